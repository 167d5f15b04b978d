"""The save in the background: one at a time, from a copy, and what goes wrong with it is heard of."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Every, Keep, StorageError
from highcamp.run.checkpoint import Checkpoint
from highcamp.storage.memory import MemoryStore
from highcamp.testing import FaultyStore
from highcamp.training.writer import Pending, Writer


def _state(value=0.0):
    return {"model": {"w": np.full(1000, value)}}


class Gate(MemoryStore):
    """Stops each save before its manifest until it is let through."""

    def __init__(self):
        super().__init__()
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.now = self.most = 0

    def create(self, path, chunks):
        """Wait, at the manifest."""
        if path.endswith("manifest.json"):
            self.now += 1
            self.most = max(self.most, self.now)
            self.entered.release()
            assert self.go_on.acquire(timeout=60)
            self.now -= 1
        super().create(path, chunks)


@pytest.fixture
def failing():
    """A store, and a way to let the next save fail."""
    store = FaultyStore(MemoryStore(), fail_at=0)

    def fail_next():
        store._fail_at = len(store.operations) + 2

    return store, fail_next


def test_save_returns_before_it_is_written():
    """Training would wait for the disk."""
    store = Gate()
    with Checkpointer(store, verbose=0) as checkpointer:
        pending = checkpointer.save(_state(), step=1)
        assert store.entered.acquire(timeout=60)
        assert not pending.is_done
        with pytest.raises(TimeoutError, match="the save of step-00000001 is not durable after 0.001 s; it goes on"):
            pending.wait(timeout=0.001)
        assert checkpointer.run.checkpoints == []
        store.go_on.release()
        assert pending.wait().step == 1


def test_queue_is_bounded():
    """A disk slower than the loop: copies pile up until the memory is full."""
    store = Gate()
    with Checkpointer(store, verbose=0, keep=Keep(last=9)) as checkpointer:
        first = checkpointer.save(_state(1), step=1)
        assert store.entered.acquire(timeout=60)
        done = []
        second = threading.Thread(target=lambda: done.append(checkpointer.save(_state(2), step=2)))
        second.start()
        second.join(0.2)
        assert second.is_alive()  # waits for the first: one save in flight
        assert not done
        store.go_on.release(2)
        second.join(60)
        assert first.is_done

    assert store.most == 1
    assert [entry.load()["w"][0] for entry in checkpointer.run.checkpoints] == [1, 2]
    assert checkpointer._saver._source.size_bytes < 3 * 8000


def test_snapshot_is_not_torn():
    """Updates made while the file is written would leak into it."""
    store = Gate()
    weights = {"w": np.zeros(100_000), "count": [0]}
    with Checkpointer(store, verbose=0) as checkpointer:
        checkpointer.track(model=weights)
        checkpointer.start()
        weights["w"] += 1
        weights["count"][0] = 1
        pending = checkpointer.save(step=1)
        weights["w"] += 1
        weights["count"][0] = 2
        assert store.entered.acquire(timeout=60)
        weights["w"] += 1
        store.go_on.release()
        saved = pending.wait().state("model")

    assert np.unique(saved["w"]).tolist() == [1]
    assert saved["count"] == [1]


def test_last_is_committed():
    """The newest would be one that is still being written; and after a failure none would be found."""
    store = Gate()
    with Checkpointer(store, verbose=0) as checkpointer:
        store.go_on.release()
        checkpointer.save(_state(1), step=1).wait()
        checkpointer.save(_state(2), step=2)
        assert store.entered.acquire(timeout=60)
        assert store.entered.acquire(timeout=60)
        assert checkpointer.run.last.step == 1
        assert highcamp.open(store).checkpoint("last").step == 1
        store.go_on.release()

    assert checkpointer.run.last.step == 2


CALLS = {
    "save": lambda each: each.save(_state(), step=9),
    "save_if_due": lambda each: each.save_if_due(_state(), step=9),
    "log": lambda each: each.log(loss=1),
    "restore": lambda each: each.restore(like=_state()),
    "restore best": lambda each: each.restore("last", like=_state()),
    "close": lambda each: each.close(),
}


@pytest.mark.parametrize("call", CALLS)
def test_writer_error_surfaces(failing, call):
    """A run whose last save failed would end like one that saved."""
    store, fail_next = failing
    checkpointer = Checkpointer(store, every=Every(steps=1), verbose=0)
    checkpointer.save(_state(1), step=1).wait()
    fail_next()
    pending = checkpointer.save(_state(2), step=2)
    pending._done.wait()

    with pytest.raises(StorageError, match="injected"):
        CALLS[call](checkpointer)

    assert checkpointer.run.last.step == 1
    if call != "close":  # told once; the next save is a new one
        assert checkpointer.save(_state(3), step=3).wait().step == 3
        checkpointer.close()


def test_writer_error_surfaces_in_the_loop(failing):
    """In a loop of epochs the next epoch is the next call."""
    store, fail_next = failing
    checkpointer = Checkpointer(store, verbose=0)
    checkpointer.track(**_state())
    done = []
    with pytest.raises(StorageError), checkpointer:
        for epoch in checkpointer.epochs(5):
            done.append(epoch)
            if epoch == 1:
                checkpointer._saver._writer.drain()
                fail_next()
            if checkpointer._saver._writer._pending:
                checkpointer._saver._writer._pending._done.wait()

    assert done == [0, 1]


def test_the_last_save_of_a_loop_is_waited_for(failing):
    """Its failure comes when the loop has ended."""
    store, fail_next = failing
    with pytest.raises(StorageError), Checkpointer(store, verbose=0) as checkpointer:
        checkpointer.track(**_state())
        for _ in checkpointer.epochs(1):
            fail_next()
        pytest.fail("the last epoch is not saved")

    assert checkpointer.run.checkpoints == []
    assert checkpointer.run.history.attempts[-1].ended == "error"
    assert not checkpointer.run.is_complete


def test_an_error_asked_for_is_not_raised_again(failing):
    """Who waits for a save and takes its error has heard of it."""
    store, fail_next = failing
    with Checkpointer(store, verbose=0) as checkpointer:
        checkpointer.save(_state(1), step=1).wait()
        fail_next()
        with pytest.raises(StorageError):
            checkpointer.save(_state(2), step=2).wait()
        checkpointer.save(_state(3), step=3)

    assert checkpointer.run.last.step == 3


def test_errors_are_raised(failing):
    """Swallowed: no file, and training goes on."""
    store, fail_next = failing
    checkpointer = Checkpointer(store, verbose=0)
    checkpointer.save(_state(1), step=1).wait()
    fail_next()
    pending = checkpointer.save(_state(2), step=2)

    with pytest.raises(StorageError, match="injected") as error:
        pending.wait()
    assert error.value.exit_code == 3
    with pytest.raises(StorageError):
        pending.wait()
    checkpointer.close()


def test_warn_goes_on_and_saves_again(failing, capsys):
    """A disk that was full for a while must not end a run that asked to go on."""
    store, fail_next = failing
    with Checkpointer(store, every=Every(steps=1), on_error="warn", verbose=0, keep=Keep(last=9)) as checkpointer:
        for step in range(1, 6):
            if step == 3:
                checkpointer._saver.raise_failed(wait=True)
                fail_next()
            checkpointer.save_if_due(_state(step), step=step, metrics={"loss": step})

    assert [entry.step for entry in checkpointer.run.checkpoints] == [1, 2, 4, 5]
    assert [row.step for row in checkpointer.run.history.rows] == [1, 2, 3, 4, 5]
    told = capsys.readouterr().err
    assert told.count("a save failed and training goes on without it: injected") == 1
    assert "1 save failed while training went on, the last because: injected" in told.splitlines()[-1]


def test_a_run_is_marked_by_the_saves_that_failed(failing):
    """Weeks later, nobody knows why the epoch that is looked for is not there."""
    store, fail_next = failing
    with Checkpointer(store, every=Every(steps=1), on_error="warn", verbose=0, keep=Keep(last=9)) as checkpointer:
        for step in range(1, 5):
            if step == 3:
                checkpointer._saver.raise_failed(wait=True)
                fail_next()
            checkpointer.save_if_due(_state(step), step=step, epoch=step)

    (failure,) = checkpointer.run.history.failures
    assert (failure.attempt, failure.step, failure.epoch) == (1, 3, 3)
    assert "injected" in failure.reason
    assert [save.step for save in checkpointer.run.history.saves] == [1, 2, 4]


def test_warn_does_not_hide_what_is_no_failure_of_the_disk():
    """A bug, or Ctrl-C in the thread that writes, is no warning."""
    checkpointer = Checkpointer(
        FaultyStore(MemoryStore(), fail_at=8, error=ZeroDivisionError()), on_error="warn", verbose=0
    )

    with pytest.raises(ZeroDivisionError):
        for step in range(9):
            checkpointer.save(_state(), step=step)
    checkpointer.close()


def test_memory_is_taken_once():
    """Fresh memory for each save costs more time than the copy, and twice the memory."""
    with Checkpointer(MemoryStore(), verbose=0) as checkpointer:
        sizes = []
        for step in range(1, 6):
            checkpointer.save({"model": {"w": np.full(100_000, step)}}, step=step)
            sizes.append(checkpointer._saver._source.size_bytes)

    assert len(set(sizes)) == 1
    assert sizes[0] <= 1.05 * 800_000 + 32_000  # the random states of whatever is imported


def test_shapes_may_change_between_saves():
    """A model that grows, or an optimizer that gets its slots with the first step."""
    with Checkpointer(MemoryStore(), verbose=0, keep=Keep(last=9)) as checkpointer:
        for step, shape in enumerate([(3,), (5, 5), (0,), (2,), (100,)], start=1):
            checkpointer.save({"model": {"w": np.full(shape, step)}, "more": {"x": np.arange(step)}}, step=step)

    for entry, shape in zip(checkpointer.run.checkpoints, [(3,), (5, 5), (0,), (2,), (100,)], strict=True):
        assert entry.verify().ok
        assert entry.load()["w"].shape == shape
        assert entry.load("more")["x"].tolist() == list(range(entry.step))


def test_a_writer_keeps_what_it_could_not_tell():
    """An error that has nowhere to go is lost, and the program ends well."""
    writer = Writer()
    assert writer.drain() is None

    writer.hold(StorageError("full"))

    assert str(writer.drain()) == "full"
    assert writer.drain() is None


def test_ctrl_c_while_waiting_keeps_the_save():
    """The save that was being waited for would be forgotten, and its failure with it."""
    writer = Writer()
    go_on = threading.Event()

    def job(_):
        go_on.wait(60)
        raise StorageError("full")

    pending = writer.start("step-1", job)

    def interrupted():
        raise KeyboardInterrupt

    pending.unseen_error, ask = interrupted, pending.unseen_error
    with pytest.raises(KeyboardInterrupt):
        writer.drain()
    pending.unseen_error = ask
    assert writer.is_busy
    go_on.set()
    assert str(writer.drain()) == "full"


def test_a_pending_save_lets_go_of_its_memory():
    """Each Pending that somebody keeps would keep a copy of the model."""

    class Large:
        pass

    import gc
    import weakref

    large = Large()
    reference = weakref.ref(large)
    checkpoint = object.__new__(Checkpoint)
    pending = Pending("step-1", lambda acknowledge, large=large: acknowledge(checkpoint))
    pending.begin()
    assert pending.wait() is checkpoint
    del large
    gc.collect()

    assert reference() is None
