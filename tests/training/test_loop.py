"""A loop of one's own: what is counted, what is saved, and how it may end."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Every, InvalidArgument, Keep, Mismatch, StorageError
from highcamp.storage.memory import MemoryStore
from highcamp.testing import FaultyStore


class Stop(Exception):
    """A bug in somebody's training script."""


@pytest.fixture
def store():
    """Where the run is; in memory, because what is counted here is not what the disk does."""
    return MemoryStore()


@pytest.fixture
def open_loop(store):
    """A Checkpointer on the run with one tracked object, and that object; keeps every checkpoint."""

    def make(*, directory=store, **options):
        weights = {"w": np.zeros(3)}
        checkpointer = Checkpointer(directory, **{"keep": Keep(best=1, last=100), "verbose": 0, **options})
        checkpointer.track(model=weights)
        return checkpointer, weights["w"]

    return make


def _places(run):
    """Where each checkpoint was taken, and the weights in it."""
    return [(entry.step, entry.epoch, entry.batch, entry.load("model")["w"][0]) for entry in run.checkpoints]


def _train(checkpointer, weights, epochs, loader, *, stop_before=None):
    """A loop that counts its batches, one step each; returns the batches trained on."""
    trained = []
    with checkpointer:
        for epoch in checkpointer.epochs(epochs):
            for batch in checkpointer.batches(loader() if callable(loader) else loader):
                if len(trained) == stop_before:
                    raise Stop
                weights += 1
                trained.append((epoch, batch))
    return trained


# What is counted


def test_epochs_are_counted_from_zero(open_loop):
    """A script that moves from `range(n)` must not train one epoch more or less."""
    checkpointer, _ = open_loop()

    with checkpointer:
        assert list(checkpointer.epochs(3)) == [0, 1, 2]

    assert (checkpointer.epoch, checkpointer.step) == (3, 3)


def test_loop_counter_is_ours(open_loop):
    """Killed at epoch 2 of 5, a script with its own counter would train five more."""
    checkpointer, weights = open_loop()
    with pytest.raises(Stop):
        _train(checkpointer, weights, 5, range(4), stop_before=9)

    again, weights = open_loop()
    assert [epoch for epoch, _ in _train(again, weights, 5, range(4))] == [2] * 4 + [3] * 4 + [4] * 4
    assert weights[0] == 20


def test_batches_are_counted_as_steps(open_loop):
    """The step names the checkpoint and ranks it; a wrong one puts metrics on the wrong weights."""
    checkpointer, weights = open_loop(every=Every(steps=2))

    _train(checkpointer, weights, 2, range(5))

    assert _places(checkpointer.run) == [
        (2, 0, 2, 2), (4, 0, 4, 4), (6, 1, 1, 6), (8, 1, 3, 8), (10, 2, 0, 10),
    ]  # fmt: skip


def test_the_end_of_an_epoch_is_saved_once(open_loop):
    """Due by step and by epoch at the same moment, the same weights would be written twice."""
    checkpointer, weights = open_loop(every=Every(epochs=1, steps=5))

    _train(checkpointer, weights, 2, range(5))

    assert _places(checkpointer.run) == [(5, 1, 0, 5), (10, 2, 0, 10)]


def test_the_last_epoch_is_always_saved(open_loop):
    """The end of training would be lost because the cadence did not fall on it."""
    checkpointer, weights = open_loop(every=Every(epochs=3))

    _train(checkpointer, weights, 5, range(2))

    assert _places(checkpointer.run) == [(6, 3, 0, 6), (10, 5, 0, 10)]


def test_time_is_a_cadence_within_epochs(open_loop, monkeypatch):
    """One epoch may last days."""
    now = itertools.count(step=40.0)
    monkeypatch.setattr("highcamp.training.saver.time.monotonic", lambda: next(now))
    checkpointer, weights = open_loop(every=Every(seconds=100.0))

    _train(checkpointer, weights, 1, range(20))

    places = [entry.batch for entry in checkpointer.run.checkpoints]
    assert len(places) > 3
    assert places[-1] == 0


def test_without_batches_an_epoch_is_a_step(open_loop):
    """Two epochs with the same step would be one place, and the second would not be saved."""
    checkpointer, weights = open_loop()

    with checkpointer:
        for _ in checkpointer.epochs(2):
            weights += 1
            checkpointer.log(loss=1)

    assert _places(checkpointer.run) == [(1, 1, 0, 1), (2, 2, 0, 2)]
    assert [(row.step, row.epoch) for row in checkpointer.run.history.rows] == [(1, 1), (2, 2)]


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "3", None])
def test_a_number_of_epochs_that_is_none_is_refused(open_loop, count):
    """`epochs(True)` would train one epoch and call the run complete."""
    checkpointer, _ = open_loop()

    with pytest.raises(InvalidArgument, match="not a positive number of epochs"):
        checkpointer.epochs(count)


def test_epochs_without_tracked_objects_is_refused(store):
    """Fifty epochs, and nothing was saved."""
    with pytest.raises(InvalidArgument, match=r"call track\(model"):
        Checkpointer(store).epochs(50)


def test_batches_outside_epochs_is_refused(open_loop):
    """Steps would be counted for no epoch, and a restart would begin anywhere."""
    checkpointer, _ = open_loop()

    with pytest.raises(InvalidArgument, match=r"batches\(\) was called outside epochs\(\)"):
        checkpointer.batches([1])


def test_batches_twice_in_an_epoch_is_refused(open_loop):
    """A restart would pass over as many batches of the first loader as both had given, and train on the second again."""
    checkpointer, _ = open_loop()

    with checkpointer, pytest.raises(InvalidArgument, match=r"batches\(\) was called twice in epoch 1"):
        for _ in checkpointer.epochs(1):
            list(checkpointer.batches(range(3)))
            list(checkpointer.batches(range(3)))


# Metrics and where they belong


def test_a_metric_logged_while_a_batch_is_at_hand_belongs_to_its_step(open_loop):
    """Validated every 2 steps and saved every 2 steps, no checkpoint would ever get a metric."""
    checkpointer, weights = open_loop(monitor="val_loss", every=Every(steps=2))

    with checkpointer:
        for _ in checkpointer.epochs(1):
            for batch in checkpointer.batches(range(7)):
                weights += 1
                if batch % 2:
                    checkpointer.log(val_loss=10 - weights[0])

    assert [(entry.step, entry.metrics.get("val_loss")) for entry in checkpointer.run.checkpoints] == [
        (2, 8.0), (4, 6.0), (6, 4.0), (7, None),
    ]  # fmt: skip
    assert checkpointer.run.best.step == 6


def test_what_is_logged_within_an_epoch_is_not_the_epoch_before(open_loop):
    """The curve would show for each epoch what the next one logged in passing."""
    checkpointer, _ = open_loop(monitor="loss")

    with checkpointer:
        for epoch in checkpointer.epochs(2):
            for batch in checkpointer.batches(range(3)):
                checkpointer.log(loss=100 * epoch + batch)
            checkpointer.log(loss=10 - epoch)

    history = checkpointer.run.history
    assert [(row.epoch, row.step, row.metrics) for row in history.epochs()] == [
        (1, 3, {"loss": 10}),
        (2, 6, {"loss": 9}),
    ]
    assert [(row.epoch, row.batch, row.step) for row in history.rows] == [
        (0, 1, 1), (0, 2, 2), (0, 3, 3), (1, 0, 3), (1, 1, 4), (1, 2, 5), (1, 3, 6), (2, 0, 6),
    ]  # fmt: skip
    assert [entry.metrics for entry in checkpointer.run.checkpoints] == [{"loss": 10}, {"loss": 9}]


def test_several_rows_of_one_epoch_are_one(open_loop):
    """Training and validation log in two places; the second must not take the first's place."""
    checkpointer, _ = open_loop(monitor="val_loss")

    with checkpointer:
        for _ in checkpointer.epochs(1):
            list(checkpointer.batches(range(3)))
            checkpointer.log(train_loss=0.5)
            checkpointer.log({"val_loss": 0.25}, lr=0.125)

    metrics = {"train_loss": 0.5, "val_loss": 0.25, "lr": 0.125}
    assert checkpointer.run.last.metrics == metrics
    assert [row.metrics for row in checkpointer.run.history.epochs()] == [metrics]


def test_a_metric_given_a_step_goes_to_its_epoch(open_loop):
    """The curve would show a late value at the epoch in which it happened to arrive."""
    checkpointer, _ = open_loop(monitor="val_loss")

    with checkpointer:
        for epoch in checkpointer.epochs(3):
            list(checkpointer.batches(range(2)))
            if epoch == 2:
                checkpointer.log(step=2, val_loss=0.1)
                checkpointer.log(step=4, val_loss=0.2)

    assert [(row.epoch, row.step, row.metrics["val_loss"]) for row in checkpointer.run.history.epochs()] == [
        (1, 2, 0.1),
        (2, 4, 0.2),
    ]
    assert checkpointer.run.best.step == 2


# Early stopping


def test_epochs_since_best_counts_what_is_done(open_loop):
    """Patience of 2 would mean 1 or 3, depending on where the question is asked."""
    values = [0.5, 0.4, math.nan, 0.6, 0.3, 0.3]
    checkpointer, _ = open_loop(monitor="val_loss")
    first, after = [], []

    with checkpointer:
        for epoch in checkpointer.epochs(6):
            first.append(checkpointer.epochs_since_best)
            checkpointer.log(val_loss=values[epoch])
            after.append(checkpointer.epochs_since_best)

    assert first == [0, 0, 0, 1, 2, 0]
    assert after == [0, 0, 1, 2, 0, 1]
    assert checkpointer.run.best.epoch == 5


@pytest.mark.parametrize("stop", range(1, 8))
def test_early_stopping_is_the_same_after_a_restart(open_loop, stop):
    """Killed and started again, training would stop at another epoch than if it had not been killed."""
    values = [0.5, 0.4, 0.4, math.nan, 0.45, 0.41, 0.1, 0.1]

    def script(stop_before):
        done = []
        checkpointer, _ = open_loop(monitor="val_loss")
        with checkpointer:
            for epoch in checkpointer.epochs(8):
                if checkpointer.epochs_since_best >= 3:
                    break
                if epoch == stop_before:
                    raise Stop
                for batch in checkpointer.batches(range(4)):
                    if batch == 2:
                        checkpointer.log(val_loss=0.01)  # of a part of the data, in passing
                checkpointer.log(val_loss=values[epoch])
                done.append(epoch)
        return done

    if stop < 5:
        with pytest.raises(Stop):
            script(stop)
        assert script(None) == list(range(stop, 5))
    else:
        assert script(stop) == list(range(5))
    assert script(None) == []


def test_epochs_since_best_needs_a_monitor(open_loop):
    """It would be 0 for ever, and training would never stop."""
    checkpointer, _ = open_loop()

    with pytest.raises(InvalidArgument, match="epochs_since_best needs a monitored metric"):
        _ = checkpointer.epochs_since_best


# Endings


def test_break_after_log_saves_the_epoch(open_loop):
    """Early stopping would throw away the last epoch."""
    checkpointer, weights = open_loop(monitor="val_loss", every=Every(epochs=10))

    with checkpointer:
        for epoch in checkpointer.epochs(50):
            weights += 1
            checkpointer.log(val_loss=0.5)
            if epoch == 2:
                break

    assert _places(checkpointer.run) == [(3, 3, 0, 3)]
    assert checkpointer.run.history.attempts[-1].ended == "closed"
    assert not checkpointer.run.is_complete


def test_break_in_the_middle_saves_no_half_epoch(open_loop):
    """Half an epoch would be called a whole one, and the rest of it never be trained on."""
    checkpointer, weights = open_loop()

    with checkpointer:
        for epoch in checkpointer.epochs(5):
            checkpointer.log(lr=0.1)
            for batch in checkpointer.batches(range(4)):
                if epoch == 1 and batch == 2:
                    break
                weights += 1
            if epoch == 1:
                break

    assert _places(checkpointer.run) == [(4, 1, 0, 4)]


def test_leaving_the_batches_early_ends_the_epoch_all_the_same(open_loop):
    """With `if batch == 3: break`, validation would be logged for the wrong epoch."""
    checkpointer, weights = open_loop(monitor="val_loss")

    with checkpointer:
        for _ in checkpointer.epochs(2):
            for batch in checkpointer.batches(range(100)):
                if batch == 3:
                    break
                weights += 1
            checkpointer.log(val_loss=10 - weights[0])

    assert _places(checkpointer.run) == [(3, 1, 0, 3), (6, 2, 0, 6)]
    assert [(row.epoch, row.step, row.metrics) for row in checkpointer.run.history.epochs()] == [
        (1, 3, {"val_loss": 7}),
        (2, 6, {"val_loss": 4}),
    ]


def test_a_failed_save_at_break_is_raised(store, open_loop):
    """Python prints what goes wrong while a loop is left, and goes on: the run would end like one that has saved."""
    failing = FaultyStore(store, fail_at=0)
    checkpointer, _ = open_loop(directory=failing, monitor="val_loss", every=Every(epochs=10))

    with pytest.raises(StorageError, match="injected"), checkpointer:
        for epoch in checkpointer.epochs(50):
            checkpointer.log(val_loss=0.5)
            if epoch == 2:
                failing._fail_at = len(failing.operations) + 3
                break

    assert highcamp.open(store).checkpoints == []
    assert highcamp.open(store).history.attempts[-1].ended == "error"


def test_a_failed_save_at_break_is_raised_before_the_best_is_restored(store, open_loop):
    """The best weights would be put over the last ones, which are nowhere else."""
    failing = FaultyStore(store, fail_at=0)
    checkpointer, weights = open_loop(directory=failing, monitor="val_loss")
    for epoch in checkpointer.epochs(50):
        weights += 1
        checkpointer.log(val_loss=0.5)
        if epoch == 2:
            failing._fail_at = len(failing.operations) + 3
            break

    with pytest.raises(StorageError, match="injected"):
        checkpointer.restore("best")

    assert weights[0] == 3
    checkpointer.close()


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit])
def test_exception_drains(open_loop, error):
    """A save under way when an exception comes would be lost with the process."""
    checkpointer, weights = open_loop()

    with pytest.raises(error), checkpointer:
        for epoch in checkpointer.epochs(5):
            if epoch == 2:
                raise error
            weights += 1

    assert _places(checkpointer.run) == [(1, 1, 0, 1), (2, 2, 0, 2)]
    ended = "interrupted" if error is KeyboardInterrupt else "error"
    assert checkpointer.run.history.attempts[-1].ended == ended


def test_an_exception_is_not_replaced_by_that_of_a_save(store, open_loop, capsys):
    """The bug in the script would be hidden behind the full disk."""
    failing = FaultyStore(store, fail_at=0, forever=True)
    checkpointer, _ = open_loop(directory=failing)

    with pytest.raises(Stop), checkpointer:
        checkpointer.start()
        failing._fail_at = len(failing.operations) + 3
        checkpointer.save()
        raise Stop

    assert "not saved: injected" in capsys.readouterr().err


def test_close_twice_is_once(open_loop):
    """`close` in a `finally` inside a `with` block must not be an error of its own."""
    checkpointer, weights = open_loop()
    _train(checkpointer, weights, 1, range(2))

    checkpointer.close()
    checkpointer.close()

    assert [attempt.ended for attempt in checkpointer.run.history.attempts] == ["complete"]


@pytest.mark.parametrize("call", ["save", "log", "epochs", "restore", "save_if_due"])
def test_a_closed_one_says_so(open_loop, call):
    """It would save into a run that another process has taken over."""
    checkpointer, weights = open_loop(every=Every(steps=1))
    _train(checkpointer, weights, 1, range(2))

    with pytest.raises(InvalidArgument, match="this Checkpointer is closed"):
        {
            "save": checkpointer.save,
            "log": lambda: checkpointer.log(loss=1),
            "epochs": lambda: list(checkpointer.epochs(5)),
            "restore": lambda: checkpointer.restore(like={"model": {"w": np.zeros(3)}}),
            "save_if_due": lambda: checkpointer.save_if_due(step=9),
        }[call]()


def test_a_complete_run_says_so_and_trains_nothing(open_loop, capsys):
    """Started once more by mistake, a finished run would train over its result."""
    checkpointer, weights = open_loop()
    _train(checkpointer, weights, 3, range(2))

    again, weights = open_loop(verbose=1)
    assert _train(again, weights, 3, range(2)) == []

    assert weights[0] == 6
    assert capsys.readouterr().err == ("Run is complete (3 of 3 epochs); nothing to train. epochs(13) would go on\n")
    assert again.run.is_complete
    assert len(again.run.checkpoints) == 3


def test_ended_run_can_go_on(open_loop, capsys):
    """The end of training removes what is needed to go on, or forgets that it can."""
    checkpointer, weights = open_loop(keep=Keep(best=1, last=1))
    _train(checkpointer, weights, 2, range(3))

    again, weights = open_loop(verbose=1)
    assert _train(again, weights, 4, range(3)) == [(epoch, batch) for epoch in (2, 3) for batch in range(3)]

    assert weights[0] == 12
    assert again.run.epochs_planned == 4
    assert capsys.readouterr().err.startswith("Resumed from step-00000006 (epoch 2, attempt 2); 2 epochs to go\n")


def test_epochs_may_be_asked_for_again(open_loop):
    """Two phases of training in one script are one run."""
    checkpointer, weights = open_loop()

    with checkpointer:
        first = [epoch for epoch in checkpointer.epochs(2) for _ in checkpointer.batches(range(2))]
        weights += 10
        second = [epoch for epoch in checkpointer.epochs(3) for _ in checkpointer.batches(range(2))]

    assert (first, second) == ([0, 0, 1, 1], [2, 2])
    assert _places(checkpointer.run)[-1] == (6, 3, 0, 10)


def test_after_break_the_epoch_begins_anew(open_loop):
    """In a notebook, the cell that was stopped is run again: batches would be counted on from where it was left."""
    checkpointer, _ = open_loop(every=Every(steps=1))

    with checkpointer:
        for _ in checkpointer.epochs(1):
            for batch in checkpointer.batches(range(4)):
                if batch == 2:
                    break
            break
        for _ in checkpointer.epochs(1):
            list(checkpointer.batches(range(4)))

    assert [entry.batch for entry in checkpointer.run.checkpoints] == [1, 2, 1, 2, 3, 0]


# Saving by hand


@pytest.mark.parametrize("stop", [1, 3, 9, 10, 12, 19])
def test_batches_not_trained_twice(open_loop, stop):
    """Resumed in mid-epoch, the batches before would be trained on again."""
    order = np.random.default_rng(7).permutation(10).tolist()
    trained = []

    checkpointer, weights = open_loop(every=Every(steps=1))
    with pytest.raises(Stop), checkpointer:
        for epoch in checkpointer.epochs(2):
            for batch in checkpointer.batches(order):
                if len(trained) == stop:
                    raise Stop
                weights += 1
                trained.append((epoch, batch))
    checkpointer, weights = open_loop(every=Every(steps=1))
    trained += _train(checkpointer, weights, 2, order)

    assert trained == [(epoch, batch) for epoch in range(2) for batch in order]
    assert weights[0] == 20


def test_saving_by_hand_takes_the_batch_at_hand_as_done(open_loop):
    """After a restart, the batch after whose update was saved would be trained on a second time."""

    def script(stop_before=None):
        seen = []
        checkpointer, weights = open_loop(monitor="loss", every=Every(epochs=100))
        with checkpointer:
            for _ in checkpointer.epochs(1):
                for batch in checkpointer.batches(list(range(10))):
                    if batch == stop_before:
                        raise Stop
                    weights += 1
                    seen.append(batch)
                    if batch == 3:
                        checkpointer.save(metrics={"loss": 0.5})
                        checkpointer.log(loss=0.25)
        return seen, _places(checkpointer.run)

    with pytest.raises(Stop):
        script(6)
    seen, places = script()

    assert seen == [4, 5, 6, 7, 8, 9]
    assert places == [(4, 0, 4, 4), (10, 1, 0, 10)]


def test_a_batch_is_counted_once(open_loop):
    """Saved by hand twice while a batch is at hand, that batch would be three steps."""
    checkpointer, weights = open_loop()

    with checkpointer:
        for _ in checkpointer.epochs(1):
            for batch in checkpointer.batches(range(5)):
                weights += 1
                if batch == 2:
                    checkpointer.save()
                    checkpointer.save()

    assert _places(checkpointer.run) == [(3, 0, 3, 3), (3, 0, 3, 3), (5, 1, 0, 5)]


def test_saving_by_hand_in_an_epoch_that_is_not_counted_is_refused(open_loop):
    """Resumed from it, the whole epoch would be trained on again; and it would be ranked by the epoch before."""
    checkpointer, weights = open_loop()

    with checkpointer, pytest.raises(InvalidArgument, match="cannot tell how much of the epoch is done"):
        for _ in checkpointer.epochs(3):
            weights += 1
            checkpointer.save(metrics={"loss": 0.5})


# Data


class Shuffled:
    """Has items by index, and an order of its own when it is iterated over."""

    def __len__(self):
        return 6

    def __getitem__(self, at):
        return at

    def __iter__(self):
        return iter(np.random.permutation(6).tolist())


class ByIndex:
    """Has items by index and nothing else: iterating over it is asking for 0, 1, 2 and so on."""

    def __len__(self):
        return 6

    def __getitem__(self, at):
        if at >= 6:
            raise IndexError
        return at


LOADERS = {
    "list": lambda: [f"b{at}" for at in range(6)],
    "range": lambda: range(6),
    "generator": lambda: (f"b{at}" for at in range(6)),
    "iterator": lambda: iter(range(6)),
    "array": lambda: np.arange(6),
    "shuffled": Shuffled,
    "by index": ByIndex,
    "dict": lambda: dict.fromkeys("abcdef", 1),
}  # fmt: skip


@pytest.mark.parametrize("stop", [1, 4, 6, 8])
@pytest.mark.parametrize("kind", LOADERS)
def test_the_batches_that_follow_are_those_that_would_have_followed(open_loop, kind, stop):
    """Resumed in mid-epoch, some batches would be trained on twice and others never."""
    np.random.seed(3)
    checkpointer, weights = open_loop(directory=MemoryStore(), every=Every(steps=1))
    expected = _train(checkpointer, weights, 2, LOADERS[kind])

    np.random.seed(3)
    checkpointer, weights = open_loop(every=Every(steps=1))
    with pytest.raises(Stop):
        _train(checkpointer, weights, 2, LOADERS[kind], stop_before=stop)
    np.random.seed(99)
    checkpointer, weights = open_loop(every=Every(steps=1))
    rest = _train(checkpointer, weights, 2, LOADERS[kind])

    assert rest == expected[stop:]


@pytest.mark.parametrize(
    "loader", [lambda: list(range(5)), lambda: iter(range(5)), Shuffled], ids=["list", "iter", "own"]
)
def test_data_that_end_before_the_resume_point_are_refused(open_loop, loader):
    """With fewer data than before, the epoch would end at once as if it were done."""
    checkpointer, weights = open_loop(every=Every(steps=1))
    with pytest.raises(Stop):
        _train(checkpointer, weights, 1, range(10), stop_before=8)

    again, weights = open_loop(every=Every(steps=1))
    with pytest.raises(Mismatch, match="after 8 (of 10 )?batches of its epoch, the loader given to .* (only|has) [56]"):
        _train(again, weights, 1, loader)


def test_resumed_in_mid_epoch_batches_must_be_counted_again(open_loop):
    """A script changed to a plain loop would train the whole epoch on weights that have had half of it."""
    checkpointer, weights = open_loop(every=Every(steps=1))
    with pytest.raises(Stop):
        _train(checkpointer, weights, 2, range(4), stop_before=2)

    again, _ = open_loop()
    with pytest.raises(Mismatch, match=r"after 2 batches of epoch 1, but batches\(\) was not called"), again:
        for _ in again.epochs(2):
            pass
    assert len(again.run.checkpoints) == 2
