"""CheckpointCallback in `fit`: what is restored, what is said, what is refused."""

from __future__ import annotations

import re
import warnings

import keras
import numpy as np
import pytest

import highcamp
from highcamp import Every, Keep
from highcamp.errors import InvalidArgument, InvalidMetric, InvalidState, Mismatch, MissingExtra, Refused
from highcamp.keras import CheckpointCallback, EpochDataset, supported

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"


class Stop(Exception):
    """What ends a training in the middle."""


class CrashAt(keras.callbacks.Callback):
    """Raises when a batch of an epoch is done."""

    def __init__(self, epoch, batch):
        super().__init__()
        self.at, self.epoch = (epoch, batch), 0

    def on_epoch_begin(self, epoch, logs=None):
        """Note the epoch."""
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        """Crash."""
        if (self.epoch, batch) == self.at:
            raise Stop


@pytest.fixture
def run(tmp_path, make_model, points):
    """Train in a directory: `run("a", epochs=3, crash=(1, 2), every=…)` gives the model and its History."""

    def train(name, *, epochs=3, crash=None, others=(), data=None, model=None, fit=None, x=None, **options):
        model = model or make_model()
        callback = CheckpointCallback(tmp_path / name, **{"verbose": 0, "data": data, **options})
        callbacks = [*others, callback, *([CrashAt(*crash)] if crash else [])]
        arguments = {"validation_data": points, "verbose": 0, "epochs": epochs, "callbacks": callbacks, **(fit or {})}
        try:
            if data is not None:
                history = model.fit(data, **arguments)
            else:
                history = model.fit(*(x or points), **{"batch_size": 6, **arguments})
        except Stop:
            history = None
        return model, history

    return train


def _opened(tmp_path, name):
    return highcamp.open(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "crash"),
    [
        ({}, (2, 1)),
        pytest.param({"every": Every(steps=1)}, (1, 2), marks=pytest.mark.once),
        ({"every": Every(steps=3)}, (2, 0)),
    ],
    ids=["epochs", "every_batch", "steps"],
)
def test_shuffle_and_dropout_exact(run, values_of, options, crash):
    """After a restart Keras goes on with other numbers: other batches, other units dropped."""
    whole, history = run("whole", **options)
    run("crashed", crash=crash, **options)

    resumed, later = run("crashed", **options)

    assert values_of(resumed) == values_of(whole)
    assert later.history == history.history
    assert later.epoch == history.epoch == [0, 1, 2]


def test_data_of_our_own_are_exact_with_workers(run, values_of, points):
    """Within an epoch too, on every backend, whatever the seed of the script."""

    def data():
        return EpochDataset(*points, batch_size=5, seed=4, workers=2)

    whole, history = run("whole", data=data(), every=Every(steps=2))
    run("crashed", data=data(), every=Every(steps=2), crash=(1, 3))

    resumed, later = run("crashed", data=data(), every=Every(steps=2))

    assert values_of(resumed) == values_of(whole)
    assert later.history == history.history


@pytest.mark.once
def test_batches_not_trained_twice(run):
    """Keras goes on with weights of the middle and the whole epoch again: 27 steps for 24."""
    run("crashed", crash=(1, 2), every=Every(steps=2))

    model, _ = run("crashed", every=Every(steps=2))

    assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == 12


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras allows one step per execution there")
def test_several_steps_per_execution(run, make_model, values_of):
    """The batch hooks are called for every second batch only."""

    def model():
        made = make_model(steps_per_execution=2)
        made.run_eagerly = False
        return made

    whole, _ = run("whole", every=Every(steps=2), model=model(), epochs=2)
    run("crashed", crash=(1, 1), every=Every(steps=2), model=model(), epochs=2)

    resumed, _ = run("crashed", every=Every(steps=2), model=model(), epochs=2)

    assert values_of(resumed) == values_of(whole)


class TestSiblings:
    """The other callbacks of the list."""

    def test_callback_state_restored(self, run):
        """Counters are reset when training begins: EarlyStopping would stop epochs later."""

        def others():
            return [keras.callbacks.EarlyStopping(monitor="constant", mode="min", patience=3)]

        constant = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(constant=1.0))
        _, history = run("whole", epochs=9, others=[constant, *others()], monitor="loss")
        run("crashed", epochs=9, others=[constant, *others()], monitor="loss", crash=(2, 0))

        _, later = run("crashed", epochs=9, others=[constant, *others()], monitor="loss")

        assert len(history.epoch) == 4
        assert later.epoch == history.epoch

    @pytest.mark.once
    def test_a_plateau_is_remembered(self, run):
        """The cut of the learning rate would come later, or twice."""

        def others():
            constant = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(constant=1.0))
            return [constant, keras.callbacks.ReduceLROnPlateau(monitor="constant", mode="min", patience=2)]

        whole, _ = run("whole", epochs=4, others=others())
        run("crashed", epochs=4, others=others(), crash=(2, 0))

        resumed, _ = run("crashed", epochs=4, others=others())

        assert float(resumed.optimizer.learning_rate) == float(whole.optimizer.learning_rate) < 0.0002

    def test_a_schedule_is_not_applied_twice(self, run, values_of):
        """Resumed within an epoch, its beginning is called a second time."""

        def others():
            return [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)]

        whole, _ = run("whole", others=others(), every=Every(steps=1))
        run("crashed", others=others(), every=Every(steps=1), crash=(1, 2))

        resumed, _ = run("crashed", others=others(), every=Every(steps=1))

        assert values_of(resumed) == values_of(whole)

    @pytest.mark.parametrize("swap_on_epoch", [pytest.param(False, marks=pytest.mark.once), True])
    def test_averaged_weights_order(self, run, make_model, values_of, swap_on_epoch):
        """The swapped weights are saved: without the swap's own state a resumed run is 1.7e-2 off."""

        def model():
            return make_model(keras.optimizers.SGD(0.01, use_ema=True))

        def others():
            return [keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)]

        whole, _ = run("whole", others=others(), model=model())
        run("crashed", others=others(), model=model(), crash=(2, 1))

        resumed, _ = run("crashed", others=others(), model=model())

        assert values_of(resumed) == values_of(whole)

    @pytest.mark.once
    def test_a_callback_of_ones_own(self, run):
        """Two methods are enough."""

        class Counting(keras.callbacks.Callback):
            count = 0

            def on_epoch_end(self, epoch, logs=None):
                self.count += 1

            def state_dict(self):
                return {"count": self.count}

            def load_state_dict(self, state):
                self.count = state["count"]

        run("crashed", others=[Counting()], crash=(2, 0))
        again = Counting()

        run("crashed", others=[again])

        assert again.count == 3

    @pytest.mark.once
    def test_a_place_before_others_is_said(self, tmp_path, make_model, points):
        """What EarlyStopping counts after us is not in this epoch's checkpoint."""
        callbacks = [CheckpointCallback(tmp_path / "a", verbose=0), keras.callbacks.EarlyStopping()]

        with pytest.warns(UserWarning, match=r"comes before EarlyStopping .*put CheckpointCallback last"):
            make_model().fit(*points, validation_data=points, verbose=0, callbacks=callbacks)

    @pytest.mark.once
    def test_one_that_is_gone_is_said(self, run):
        """A script that was changed goes on, and says what it leaves behind."""
        run("a", epochs=1, others=[keras.callbacks.EarlyStopping(patience=9)])

        with pytest.warns(UserWarning, match="EarlyStopping, which is not among the callbacks now"):
            run("a", epochs=2)

    @pytest.mark.once
    def test_one_without_state_is_refused(self):
        """It would be kept in name only."""
        with pytest.raises(InvalidArgument, match="TerminateOnNaN has no state"):
            CheckpointCallback("a", callbacks=[keras.callbacks.TerminateOnNaN()])


class TestAgain:
    """The same script, the same cell, the same process."""

    def test_a_complete_run_trains_nothing(self, run, values_of, capsys):
        """Started once too often, a script must not change its result."""
        model, _ = run("a")

        again, history = run("a", verbose=1)

        assert values_of(again) == values_of(model)
        assert history.epoch == [0, 1, 2]
        assert (
            "Run is complete (3 of 3 epochs); nothing to train. fit(epochs=13) would go on" in capsys.readouterr().out
        )

    @pytest.mark.once
    def test_more_epochs_go_on(self, run, values_of):
        """ended_run_can_go_on: the state of the end is there."""
        whole, _ = run("whole", epochs=4)
        run("a", epochs=2)

        further, history = run("a", epochs=4)

        assert history.epoch == [0, 1, 2, 3]
        assert values_of(further) == values_of(whole)

    @pytest.mark.once
    def test_a_run_that_was_stopped_early_is_complete(self, run, capsys):
        """EarlyStopping would train one more epoch at each start."""

        def others():
            constant = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(constant=1.0))
            return [constant, keras.callbacks.EarlyStopping(monitor="constant", mode="min", patience=1)]

        _, history = run("a", epochs=9, others=others())

        _, again = run("a", epochs=9, others=others(), verbose=1)

        assert again.epoch == history.epoch == [0, 1]
        assert "EarlyStopping ended it after epoch 2 of 9" in capsys.readouterr().out

    def test_initial_epoch_does_not_leak(self, tmp_path, run, points, make_model):
        """After a resume at 2, Keras's next fit(epochs=2) trains nothing, silently."""
        run("a", epochs=2)
        model, _ = run("a", epochs=3)

        history = model.fit(*points, epochs=2, verbose=0)

        assert history.epoch == [0, 1]

    @pytest.mark.once
    def test_initial_epoch_does_not_leak_from_a_crash(self, run, points):
        """on_train_end is not called after an exception."""
        run("a", epochs=2)
        model = run("a", epochs=4, crash=(2, 0))[0]

        assert model.fit(*points, epochs=1, verbose=0).epoch == [0]

    @pytest.mark.once
    def test_one_callback_twice_in_a_process(self, tmp_path, make_model, points, values_of, run):
        """In a notebook `fit` is called again with what there is."""
        whole, _ = run("whole", epochs=3)
        model, callback = make_model(), CheckpointCallback(tmp_path / "a", verbose=0)

        for epochs in (1, 3):
            history = model.fit(
                *points, batch_size=6, validation_data=points, epochs=epochs, verbose=0, callbacks=[callback]
            )

        assert history.epoch == [0, 1, 2]
        assert values_of(model) == values_of(whole)

    @pytest.mark.once
    def test_other_epochs_planned_are_recorded(self, tmp_path, run):
        """`highcamp ls` says "finished"."""
        run("a", epochs=2)

        assert _opened(tmp_path, "a").is_complete


@pytest.mark.once
class TestBest:
    """The best, and what must not become it."""

    def _logs(self, values, name="quality"):
        def set_value(epoch, logs):
            if values[epoch] is not None:
                logs[name] = values[epoch]

        return [keras.callbacks.LambdaCallback(on_epoch_end=set_value)]

    def test_nan_first_never_wins(self, tmp_path, run):
        """Nothing beats a NaN in Keras."""
        values = [float("nan"), 0.5, 0.4, 0.6]

        run("a", epochs=4, monitor="quality", mode="min", others=self._logs(values))

        assert _opened(tmp_path, "a").best.epoch == 3

    def test_missing_metric_leaves_best(self, tmp_path, run):
        """Saved, unranked; the best stays."""
        run("a", monitor="quality", mode="min", others=self._logs([0.1, None, None]))

        opened = _opened(tmp_path, "a")
        assert (opened.best.epoch, opened.last.epoch) == (1, 3)

    def test_validation_freq_keeps_best(self, tmp_path, run):
        """Epochs without validation are kept only as the last."""
        run("a", epochs=3, fit={"validation_freq": 2})

        opened = _opened(tmp_path, "a")
        assert (opened.best.epoch, opened.last.epoch) == (2, 3)

    def test_metric_must_be_a_number(self, run):
        """The one that ranks; others are only left out."""
        with pytest.raises(InvalidMetric, match="quality"):
            run("a", monitor="quality", mode="min", others=self._logs([np.ones(3)] * 3))

    def test_other_metrics_may_be_anything(self, tmp_path, run):
        """A confusion matrix is no reason to stop."""
        with pytest.warns(UserWarning, match="table is a ndarray, not a number: it is not recorded"):
            run("a", epochs=1, others=self._logs([np.ones((2, 2))], "table"))

        assert "table" not in _opened(tmp_path, "a").history.metrics

    def test_mode_asked_in_constructor(self, tmp_path):
        """Not after the first epoch."""
        with pytest.raises(InvalidArgument, match="quality"):
            CheckpointCallback(tmp_path / "a", monitor="quality")
        with pytest.raises(InvalidArgument, match="mim"):
            CheckpointCallback(tmp_path / "a", monitor="loss", mode="mim")

    def test_train_metric_is_a_mean(self, run, capsys):
        """Logged 1.8, the saved weights evaluate to 0.3: whoever ranks by it should know."""
        run("a", epochs=1, monitor="loss", verbose=1)
        assert "loss is a mean over the epoch" in capsys.readouterr().out

        run("b", epochs=1, verbose=1)
        assert "mean over the epoch" not in capsys.readouterr().out

    def test_restore_best(self, tmp_path, run):
        """best_however_it_ends: from the committed checkpoint, not from memory."""
        model, _ = run("a", monitor="quality", mode="max", others=self._logs([0.1, 0.9, 0.2]), restore_best=True)

        best = _opened(tmp_path, "a").best
        assert best.epoch == 2
        assert np.array_equal(best.load("model")["out/bias"], keras.ops.convert_to_numpy(model.get_layer("out").bias))

    def test_a_best_may_give_back_all_but_its_weights(self, tmp_path, run):
        """Adam's slots are two thirds of a checkpoint that is kept for its weights."""
        logs, keep = self._logs([0.1, 0.9, 0.2]), Keep(best=1, last=1, best_weights_only=True)

        model, _ = run("a", monitor="quality", mode="max", others=logs, keep=keep, restore_best=True)

        best, last = _opened(tmp_path, "a").best, _opened(tmp_path, "a").last
        assert (best.epoch, best.objects) == (2, ("model",))
        assert {"model", "progress"} < set(last.objects)
        assert np.array_equal(best.load("model")["out/bias"], keras.ops.convert_to_numpy(model.get_layer("out").bias))

    def test_after_restore_best_it_goes_on_from_the_last(self, tmp_path, run, values_of):
        """The best is put into the model, not into the run."""
        values = [0.9, 0.1, 0.2, 0.3]
        whole, _ = run("whole", epochs=4, monitor="quality", mode="max", others=self._logs(values))
        run("a", epochs=2, monitor="quality", mode="max", others=self._logs(values), restore_best=True)

        further, _ = run("a", epochs=4, monitor="quality", mode="max", others=self._logs(values))

        assert values_of(further) == values_of(whole)

    def test_the_best_weights_in_a_fresh_model(self, tmp_path, run, make_model):
        """For use, in another script."""
        model, _ = run("a", keep=Keep(best=1, last=1))
        fresh = make_model()

        _opened(tmp_path, "a").last.restore(model=fresh)

        for one, two in zip(fresh.variables, model.variables, strict=True):
            assert np.array_equal(keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(two))

    @pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".safetensors"])
    def test_export(self, tmp_path, run, suffix):
        """Without the script."""
        run("a", epochs=1)

        _opened(tmp_path, "a").best.export(tmp_path / f"out{suffix}")

        assert (tmp_path / f"out{suffix}").stat().st_size > 500


class TestRefused:
    """Said before training, not after the crash."""

    def test_an_unbuilt_model(self, tmp_path, points):
        """On TensorFlow its weights do not exist when training begins, so nothing could be restored."""
        model = keras.Sequential([keras.layers.Dense(1)])
        model.compile("sgd", "mse", run_eagerly=True)
        callback = CheckpointCallback(tmp_path / "a", verbose=0)

        if ON_TENSORFLOW:
            with pytest.raises(InvalidState, match=r"is not built when training begins.*keras.Input"):
                model.fit(*points, verbose=0, callbacks=[callback])
        else:
            model.fit(*points, validation_data=points, verbose=0, callbacks=[callback])

    def test_an_unbuilt_model_with_data_is_built(self, tmp_path, points):
        """An EpochDataset tells the shape."""
        model = keras.Sequential([keras.layers.Dense(1)])
        model.compile("sgd", "mse", run_eagerly=True)
        data = EpochDataset(*points, batch_size=8)

        model.fit(
            data,
            verbose=0,
            validation_data=points,
            callbacks=[CheckpointCallback(tmp_path / "a", data=data, verbose=0)],
        )

        assert _opened(tmp_path, "a").last.epoch == 1

    @pytest.mark.once
    def test_another_model(self, run, make_model, values_of):
        """Every difference at once, and nothing changed."""
        run("a", epochs=1)
        other = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(3, name="hidden"), keras.layers.Dense(1, name="out")]
        )
        other.compile("adam", "mse", run_eagerly=True)
        before = values_of(other)[:4]

        with pytest.raises(Mismatch, match="hidden/kernel"):
            run("a", epochs=2, model=other)

        assert values_of(other)[:4] == before

    @pytest.mark.once
    def test_steps_that_are_not_the_datas(self, run, points):
        """The position within the epoch would mean another batch."""
        with pytest.raises(InvalidArgument, match="fit has 2 steps per epoch, data= has 4 batches"):
            run("a", data=EpochDataset(*points, batch_size=6), fit={"steps_per_epoch": 2})

    @pytest.mark.once
    @pytest.mark.parametrize("kind", [keras.optimizers.AdamW, keras.optimizers.SGD, keras.optimizers.Nadam])
    def test_an_optimizer_of_another_class(self, run, make_model, values_of, kind):
        """AdamW takes the state of Adam without a word, and trains otherwise."""
        run("a", epochs=1)
        other = make_model(kind())
        other.optimizer.build(other.trainable_variables)
        before = values_of(other)

        with pytest.raises(Mismatch, match=f"optimizer/class: Adam in the checkpoint, {kind.__name__} here"):
            run("a", epochs=2, model=other)

        assert values_of(other) == before

    @pytest.mark.once
    def test_a_schedule_in_the_place_of_a_rate(self, run, make_model):
        """The learning rate would be another one from the next step on."""
        run("a", epochs=1)
        schedule = keras.optimizers.schedules.ExponentialDecay(0.001, 10, 0.9)

        with pytest.raises(Mismatch, match="optimizer/learning_rate: only in the checkpoint"):
            run("a", epochs=2, model=make_model(keras.optimizers.Adam(schedule)))

    @pytest.mark.once
    def test_model_and_optimizer_differ_in_one_error(self, run):
        """One thing at a time is a tour of errors."""
        run("a", epochs=1)
        other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="hidden"), keras.layers.Dense(1)])
        other.compile("sgd", "mse", run_eagerly=True)

        with pytest.raises(Mismatch) as caught:
            run("a", epochs=2, model=other)

        assert all(
            part in str(caught.value) for part in ("hidden/kernel", "hidden/bias", "out/kernel", "optimizer/class")
        )

    @pytest.mark.once
    def test_another_length_is_said_between_epochs(self, run, capsys):
        """The run goes on, but it is another one from there."""
        run("a", epochs=1)

        _, history = run("a", epochs=2, fit={"batch_size": 8}, verbose=1)

        assert history.epoch == [0, 1]
        assert "saved with 4 batches in an epoch, here are 3: the run goes on" in capsys.readouterr().out

    @pytest.mark.once
    def test_another_length_is_refused_within_an_epoch(self, run, make_model, values_of):
        """The place would be another one. Nothing has been changed then."""
        run("a", epochs=2, every=Every(steps=1), crash=(0, 2))
        model = make_model()
        model.optimizer.build(model.trainable_variables)
        before = values_of(model)

        with pytest.raises(Mismatch, match="saved with 4 batches in an epoch, here are 3"):
            run("a", epochs=2, every=Every(steps=1), fit={"batch_size": 8}, model=model)

        assert values_of(model) == before

    @pytest.mark.once
    def test_other_data_change_nothing(self, run, points, make_model, values_of):
        """Seen before the weights are overwritten."""
        run("a", epochs=1, data=EpochDataset(*points, batch_size=6, seed=1))
        model = make_model()
        model.optimizer.build(model.trainable_variables)
        before = values_of(model)

        with pytest.raises(Mismatch, match=r"(?s)seed: 1 in the checkpoint, 2 here"):
            run("a", epochs=2, data=EpochDataset(*points, batch_size=6, seed=2), model=model)

        assert values_of(model) == before

    @pytest.mark.once
    @pytest.mark.parametrize("name", ["a", "b"])
    def test_two_callbacks_on_one_fit(self, tmp_path, make_model, points, name):
        """Each would restore over the other."""
        callbacks = [CheckpointCallback(tmp_path / each, verbose=0) for each in ("a", name)]

        with pytest.raises(Refused, match="2 CheckpointCallbacks in one fit"):
            make_model().fit(*points, verbose=0, callbacks=callbacks)

        assert not (tmp_path / "a" / "checkpoints").exists()

    @pytest.mark.once
    @pytest.mark.parametrize(
        ("typed", "ours"),
        [
            ("filepath", "directory"),
            ("backup_dir", "directory"),
            ("save_best_only", "keep="),
            ("save_weights_only", 'run.best.load("model")'),
            ("save_freq", "every="),
            ("initial_value_threshold", "nothing"),
            ("evry", "every"),
        ],
    )
    def test_names_of_other_callbacks(self, typed, ours):
        """Ours is named."""
        with pytest.raises(TypeError, match=re.escape(f"'{typed}'; use {ours}")):
            CheckpointCallback("a", **{typed: 1})

    @pytest.mark.once
    @pytest.mark.parametrize("wrong", [{"memory_every": 3}, {"staging_bytes": 7}, {"on_error": "ignore"}, {"every": 1}])
    def test_wrong_arguments(self, wrong):
        """In the constructor, not at the first save."""
        with pytest.raises(InvalidArgument, match=next(iter(wrong))):
            CheckpointCallback("a", **wrong)

    @pytest.mark.once
    def test_an_overlapped_snapshot(self):
        """It would be a copy all the same, and nobody would know."""
        with pytest.raises(InvalidArgument, match=r"overlap.* is not possible in Keras.*\"copy\""):
            CheckpointCallback("a", snapshot="overlap")

    @pytest.mark.once
    def test_another_version_of_keras(self, monkeypatch):
        """Its `fit` is read from within."""
        for version, is_ours in {
            "3.14.9": False,
            "3.15.0": True,
            "3.99.1": True,
            "4.0.0": False,
            "2.15": False,
        }.items():
            assert supported.is_supported(version) == is_ours
        monkeypatch.setattr(keras, "__version__", "3.9.2")

        with pytest.raises(MissingExtra, match=r"keras >= 3.15, < 4.0; 3.9.2 is installed.*pip install"):
            supported.check_version()

    @pytest.mark.once
    def test_data_of_another_kind(self, points):
        """`data` is for what has a position."""
        with pytest.raises(InvalidArgument, match="data is a tuple"):
            CheckpointCallback("a", data=points)


@pytest.mark.skipif(not ON_TENSORFLOW, reason="the others can repeat their order without a seed")
def test_an_order_that_cannot_be_repeated_is_said(run):
    """TensorFlow shuffles arrays where no state can be read."""
    keras.src.backend.common.global_state.set_global_attribute("global_random_seed", None)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)

    with pytest.warns(UserWarning, match="only after keras.utils.set_random_seed"):
        run("a", epochs=1, model=model)


def test_several_optimizers_are_saved(tmp_path, points):
    """A model that trains with two optimizers of its own has none in `model.optimizer`."""

    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.out = keras.layers.Dense(1)
            self.first_optimizer = keras.optimizers.SGD(0.01)
            self.second_optimizer = keras.optimizers.Adam()

        def build(self, shape):
            self.out.build(shape)

        def call(self, inputs):
            return self.out(inputs)

    model = Two()
    model.build((None, 4))
    model.compile("sgd", "mse", run_eagerly=True)
    for optimizer in (model.first_optimizer, model.second_optimizer):
        optimizer.build(model.trainable_variables)

    model.fit(*points, validation_data=points, verbose=0, callbacks=[CheckpointCallback(tmp_path / "a", verbose=0)])

    objects = set(_opened(tmp_path, "a").last.objects)
    assert {"model", "optimizer", "first_optimizer", "second_optimizer"} <= objects


@pytest.mark.once
def test_a_cadence_that_finds_itself(tmp_path, run):
    """Every.auto saves within epochs, and the rerun goes on there."""
    run("a", every=Every.auto(overhead=0.5), crash=(1, 2))

    _, history = run("a", every=Every.auto(overhead=0.5))

    assert history.epoch == [0, 1, 2]
    assert _opened(tmp_path, "a").last.step == 12


@pytest.mark.once
def test_it_is_quiet_where_nothing_is_wrong(run):
    """Warnings are for what should be changed."""
    with warnings.catch_warnings(record=True) as said:
        run("a", epochs=1, others=[keras.callbacks.EarlyStopping(patience=9)])

    assert [str(entry.message) for entry in said if "__array__" not in str(entry.message)] == []


def test_batch_hooks_stay_unused_without_need():
    """A class with `on_train_batch_end` turns Keras's asynchronous callbacks off for everybody."""
    plain, stepwise = CheckpointCallback("a"), CheckpointCallback("a", every=Every(steps=5))

    assert getattr(plain.on_train_batch_end, "_is_default", False)
    assert not getattr(stepwise.on_train_batch_end, "_is_default", False)
