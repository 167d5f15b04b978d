"""Asked to stop by a signal: one save where `fit` is, the conventional exit code, and a rerun that ends the same."""

from __future__ import annotations

import os
import random
import signal
import sys

import keras
import pytest

import highcamp
from highcamp import Every
from highcamp.keras import CheckpointCallback, EpochDataset

BACKEND = keras.backend.backend()
ON_TORCH = BACKEND == "torch"


class AskAt(keras.callbacks.Callback):
    """Signals its own process in a training batch (epoch, batch), or in a batch of the evaluation: (epoch, "test", batch)."""

    def __init__(self, *at, signals=(signal.SIGTERM,)):
        super().__init__()
        self.at, self.signals, self.epoch = at, signals, 0

    def on_epoch_begin(self, epoch, logs=None):
        """Note the epoch."""
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        """Ask, within a step."""
        self._ask(self.epoch, batch)

    def on_test_batch_begin(self, batch, logs=None):
        """Ask, within an evaluation."""
        self._ask(self.epoch, "test", batch)

    def _ask(self, *place):
        if place == self.at:
            self.at = None
            for signum in self.signals:
                os.kill(os.getpid(), signum)


class Sampled(keras.layers.Layer):
    """Draws numbers in training and in evaluation alike, as variational models do."""

    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(5)

    def call(self, inputs):
        """The inputs, shaken."""
        return inputs + 0.1 * keras.random.normal((1, 6), seed=self.seed_generator)


@pytest.fixture
def make_drawing(make_model):
    """A model whose evaluations draw numbers."""

    def make(**compiled):
        plain = make_model()
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((4,)), plain.layers[0], Sampled(), *plain.layers[1:]])
        model.compile("adam", "mse", metrics=["mae"], run_eagerly=True, **compiled)
        return model

    return make


@pytest.fixture
def run(tmp_path, make_model, points):
    """Train, asked to stop at a place if one is given; returns the model, its History, and the exit code."""

    def train(name, *at, epochs=3, model=None, data=None, others=(), signals=(signal.SIGTERM,), fit=None, **options):
        model = model or make_model()
        asking = [AskAt(*at, signals=signals)] if at else []
        arguments = {
            "validation_data": points,
            "validation_batch_size": 8,
            "verbose": 0,
            "epochs": epochs,
            **(fit or {}),
        }
        if data is None:
            arguments["batch_size"] = 6
        if isinstance(data, EpochDataset):
            options["data"] = data
        callbacks = [*asking, *others, CheckpointCallback(tmp_path / name, **{"verbose": 0, **options})]
        try:
            history = model.fit(*(points if data is None else [data]), callbacks=callbacks, **arguments)
        except SystemExit as stop:
            return model, None, stop.code
        return model, history, 0

    return train


@pytest.fixture
def check(tmp_path, run, values_of):
    """A run asked to stop at a place and run again equals one that was not; returns the checkpoint of the stop."""

    def compare(*at, make=None, data=None, others=lambda: (), **options):
        def arguments():
            return {**options, "model": make and make(), "data": data and data(), "others": others()}

        whole, history, _ = run("whole", **arguments())
        _, _, code = run("stopped", *at, **arguments())
        stopped = highcamp.open(tmp_path / "stopped").last

        resumed, later, _ = run("stopped", **arguments())

        assert code == 143
        assert values_of(resumed) == values_of(whole)
        assert (later.history, later.epoch) == (history.history, history.epoch)
        attempts = highcamp.open(tmp_path / "stopped").history.attempts
        assert [attempt.ended for attempt in attempts] == ["preempted", "complete"]
        ends = [highcamp.open(tmp_path / name).last for name in ("whole", "stopped")]
        assert ends[0].step == ends[1].step
        return stopped

    return compare


@pytest.mark.parametrize("seed", range(3))
def test_a_stop_within_an_epoch_loses_nothing(check, seed):
    """A machine that is taken away says so seconds before: by then an epoch is not over."""
    rng = random.Random(seed)
    epoch, batch = rng.randrange(3), rng.randrange(3)

    stopped = check(epoch, batch)

    assert (stopped.epoch, stopped.batch, stopped.step) == (epoch, batch + 1, 4 * epoch + batch + 1)


@pytest.mark.parametrize("batch", [0, 2])
def test_a_stop_in_an_evaluation_loses_nothing(check, make_drawing, batch):
    """An evaluation may take longer than the notice, and it changes the metrics and the states of layers that draw."""
    stopped = check(1, "test", batch, make=make_drawing)

    assert (stopped.epoch, stopped.batch, stopped.step) == (1, 4, 8)


def test_a_stop_in_the_last_batch_is_heeded_in_the_evaluation(check, make_drawing):
    """There is no batch after it that could be waited for."""
    stopped = check(1, 3, make=make_drawing)

    assert (stopped.epoch, stopped.batch, stopped.step) == (1, 4, 8)


def test_a_stop_in_the_last_batch_of_an_unmeasured_epoch_is_heeded_at_its_end(check):
    """Its metrics are there then."""
    stopped = check(0, 3, fit={"validation_freq": 2})

    assert (stopped.epoch, stopped.batch) == (1, 0)


@pytest.mark.parametrize("at", [(0, 1), (1, "test", 1)])
def test_a_stop_between_evaluations_of_every_second_epoch(check, at):
    """Unmeasured epochs stay unmeasured."""
    check(*at, fit={"validation_freq": 2})


def test_a_stop_of_a_training_that_began_later(check):
    """Epochs that were never trained are not trained by the rerun."""
    stopped = check(2, 1, fit={"initial_epoch": 1})

    assert (stopped.epoch, stopped.batch) == (2, 2)


@pytest.mark.skipif(ON_TORCH, reason="Keras allows one step per execution there")
@pytest.mark.parametrize("at", [(1, 0), (1, 3), (1, "test", 0)])
def test_a_stop_with_several_steps_per_execution(check, make_model, at):
    """Places are known at every third batch only, and the last call has fewer."""

    def make():
        model = make_model(steps_per_execution=3)
        model.run_eagerly = False
        return model

    check(*at, make=make)


@pytest.mark.parametrize("at", [(1, 2), (2, "test", 1)])
def test_a_stop_with_traced_functions(check, make_model, at):
    """What Keras compiles is what people run."""

    def make():
        model = make_model()
        model.run_eagerly = False
        return model

    check(*at, make=make)


@pytest.mark.parametrize("at", [(1, 2), (1, "test", 1)])
def test_a_stop_with_saves_within_epochs(check, make_drawing, at):
    """Both kinds of saves share one place in the data."""
    check(*at, make=make_drawing, every=Every(steps=3))


@pytest.mark.parametrize("at", [(1, 1), (1, "test", 1)])
def test_a_stop_with_an_epoch_dataset(check, points, at):
    """Batches that are done are not even read again."""
    check(*at, data=lambda: EpochDataset(*points, batch_size=5, seed=4, workers=2))


class Pairs(keras.utils.PyDataset):
    """A data source of one's own, always in one order."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.x[6 * index : 6 * index + 6], self.y[6 * index : 6 * index + 6]


@pytest.mark.parametrize("at", [(1, 2), (1, "test", 1)])
def test_a_stop_with_a_data_source_of_ones_own(check, points, at):
    """It is read again, and not trained on."""
    check(*at, data=lambda: Pairs(*points), fit={"shuffle": False})


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras has to be told so, once
@pytest.mark.skipif(BACKEND != "tensorflow", reason="the format of one backend")
@pytest.mark.parametrize("at", [(1, 2), (1, "test", 1)])
def test_a_stop_with_a_tensorflow_dataset(check, points, at):
    """One without a length says only in its first epoch where it ends."""
    import tensorflow as tf

    def data():
        return tf.data.Dataset.from_tensor_slices(points).batch(6).filter(lambda *_: True)

    check(*at, data=data, fit={"shuffle": False})


@pytest.mark.parametrize("at", [(0, 3), (1, 1), (1, "test", 1)])
def test_a_stop_with_a_generator(tmp_path, run, points, at):
    """Nobody can take a generator back to where it was; nothing is lost, trained twice, or out of step."""

    def batches():
        while True:
            for first in range(0, 24, 6):
                yield points[0][first : first + 6], points[1][first : first + 6]

    fit = {"steps_per_epoch": 4, "shuffle": False}
    _, _, code = run("a", *at, data=batches(), fit=fit)

    model, history, _ = run("a", data=batches(), fit=fit)

    assert code == 143
    assert history.epoch == [0, 1, 2]
    assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == highcamp.open(tmp_path / "a").last.step == 12


class TestSiblings:
    """The other callbacks of the list."""

    @pytest.mark.parametrize("at", [(1, 1), (1, "test", 1)])
    def test_weights_that_are_swapped_for_an_evaluation_are_never_saved(self, check, make_model, at):
        """The averages would be trained on as if they were the weights."""
        stopped = check(
            *at,
            make=lambda: make_model(keras.optimizers.SGD(0.01, use_ema=True)),
            others=lambda: [keras.callbacks.SwapEMAWeights()],
        )

        assert (stopped.epoch, stopped.batch) == ((2, 0) if "test" in at else (1, 2))

    def test_a_callback_that_may_change_the_model_is_waited_for(self, check):
        """What it does when an evaluation begins, it undoes when it ends."""

        class Masking(keras.callbacks.Callback):
            def on_test_begin(self, logs=None):
                self.kept = self.model.get_weights()
                self.model.set_weights([0 * value for value in self.kept])

            def on_test_end(self, logs=None):
                self.model.set_weights(self.kept)

        stopped = check(1, "test", 1, others=lambda: [Masking()])

        assert (stopped.epoch, stopped.batch) == (2, 0)

    @pytest.mark.parametrize("at", [(1, 1), (1, "test", 1), (1, 3)])
    def test_schedules_and_counters_are_those_of_the_place(self, check, at):
        """An epoch that is gone on with begins for them a second time."""

        def others():
            return [
                keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5),
                keras.callbacks.ReduceLROnPlateau(patience=1, min_delta=9.0, factor=0.5),
                keras.callbacks.EarlyStopping(patience=9),
            ]

        check(*at, others=others)

    def test_an_epoch_that_a_callback_cut_short_stays_short(self, check):
        """It was ended after the batch that the checkpoint was taken at, and begun again would have more of them."""

        class Short(keras.callbacks.Callback):
            count = 0

            def on_train_batch_end(self, batch, logs=None):
                self.count += 1
                if self.count == 6:
                    self.model.stop_training = True

        check(1, "test", 1, others=lambda: [Short()])

    def test_a_stop_while_others_begin_the_next_epoch(self, check):
        """A checkpoint of the epoch before would hold what they have done for the next, which is then done twice."""

        class Asking(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if epoch == 1 and self.is_asking:
                    os.kill(os.getpid(), signal.SIGTERM)

        asking = iter([False, True, False])

        def others():
            callback = Asking()
            callback.is_asking = next(asking)
            return [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5), callback]

        stopped = check(9, 9, others=others, every=Every(epochs=5))

        assert (stopped.epoch, stopped.batch) == (1, 1)


def test_metrics_that_only_the_last_batch_tells(check, make_model):
    """A training step of one's own may return values that are no means, and they are the epoch's then."""
    plain = type(make_model())

    class Own(plain):
        def train_step(self, *arguments):
            found = super().train_step(*arguments)
            if BACKEND == "jax":
                logs, state = found
                return {"last": logs["loss"] * 2}, state
            return {"last": found["loss"] * 2}

    def make():
        made = make_model()
        model = Own([keras.Input((4,)), *made.layers])
        model.compile("adam", "mse", run_eagerly=True)
        return model

    check(1, "test", 1, make=make)


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGTERM, signal.SIGTERM], 143),
        ([signal.SIGUSR1], 128 + signal.SIGUSR1),
        ([signal.SIGUSR2, signal.SIGTERM], 128 + signal.SIGUSR2),
    ],
)
@pytest.mark.parametrize("at", [(1, 1), (1, "test", 0)])
@pytest.mark.once
def test_the_first_signal_names_the_exit_code(run, signals, code, at):
    """Slurm and a shell tell from it what has happened; a second signal changes nothing."""
    assert run("a", *at, signals=signals)[2] == code


@pytest.mark.parametrize("at", [(1, 1), (1, "test", 0)])
@pytest.mark.once
def test_ctrl_c_saves_and_stays_ctrl_c(tmp_path, run, at):
    """The cell of a notebook is interrupted as it always is, but nothing is lost."""
    with pytest.raises(KeyboardInterrupt):
        run("a", *at, signals=[signal.SIGINT])

    assert highcamp.open(tmp_path / "a").last.epoch == 1
    assert highcamp.open(tmp_path / "a").last.batch == (4 if "test" in at else 2)


@pytest.mark.parametrize("at", [(), (1, 1), (1, "test", 0)])
@pytest.mark.once
def test_handlers_are_given_back(run, at):
    """After training a signal means what it always means."""
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)]

    run("a", *at)

    after = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)]
    assert after == before


@pytest.mark.once
def test_a_passed_deadline_stops_after_the_first_batch(tmp_path, run, monkeypatch):
    """It is no signal, and nobody else looks at the clock."""
    run("a", epochs=1)
    monkeypatch.setenv("HIGHCAMP_DEADLINE", "1500000000")

    _, _, code = run("a")

    assert code == 75
    assert highcamp.open(tmp_path / "a").last.epoch == 1


@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras calls no hooks beside the training there")
def test_hooks_at_batch_ends_stay_beside_the_training(run):
    """Who waits for the logs of each batch waits for the device in each batch."""
    seen = []

    class Looking(keras.callbacks.Callback):
        def set_model(self, model):
            super().set_model(model)
            self.list = sys._getframe(1).f_locals["self"]

        def on_train_batch_begin(self, batch, logs=None):
            seen.append(self.list._async_train)

    run("a", epochs=2, others=[Looking()])

    assert seen == [True] * 8


@pytest.mark.once
def test_an_evaluation_of_its_own_is_not_ours(run, points, tmp_path):
    """`model.evaluate(callbacks=[…])` after training saves nothing."""
    model, _, _ = run("a", epochs=1)
    before = len(highcamp.open(tmp_path / "a").checkpoints)

    model.evaluate(*points, verbose=0, callbacks=[CheckpointCallback(tmp_path / "a", verbose=0)])

    assert len(highcamp.open(tmp_path / "a").checkpoints) == before
