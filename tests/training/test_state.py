"""State that is passed, not tracked: save, save_if_due, restore(like=)."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Every, InvalidArgument, InvalidState, Keep, Mismatch, Refused
from highcamp.storage.memory import MemoryStore


class Moments(NamedTuple):
    """An optimizer state as functional libraries have it."""

    count: object
    mu: object


def _state(value):
    return {
        "params": {"dense": {"kernel": np.full((2, 3), value, np.float32), "bias": np.full(3, value)}},
        "optimizer": (Moments(np.array(value), [np.full(2, value, np.float16)]), ()),
    }


@pytest.fixture
def store():
    """Where the run is."""
    return MemoryStore()


@pytest.fixture
def make(store):
    """A Checkpointer on the run."""

    def new(**options):
        return Checkpointer(store, **{"verbose": 0, "keep": Keep(best=1, last=100), **options})

    return new


def _equal(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            _equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            _equal(left, right)
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    else:
        assert repr(one) == repr(other)


def test_restore_on_a_fresh_start_is_none(make):
    """The script could not tell a new run from a resumed one."""
    with make() as checkpointer:
        assert checkpointer.restore(like=_state(0)) is None
        checkpointer.save(_state(1), step=1)

    assert checkpointer.run.last.step == 1


@pytest.mark.parametrize(
    "state",
    [
        _state(3),
        Moments(np.arange(3), {"a": np.float32(2.5)}),
        [np.arange(3), (np.zeros((0, 2)), None)],
        (np.arange(3), 4, "text", b"bytes", float("nan"), 2**100),
        np.arange(6).reshape(2, 3),
        {"w": np.arange(3), "b": np.zeros(2)},
        OrderedDict(model={"w": np.arange(3)}, step=3),
        {0: np.arange(3), (1, "a"): np.zeros(2)},
        {"progress": {"w": np.arange(3)}},
        {"a/b": {"w": np.arange(3)}, "..": {"w": np.arange(2)}},
        {"Model": {"w": np.arange(3)}, "model": {"w": np.arange(4)}},
        {"empty": {}, "model": {"w": np.arange(3)}},
        {"model": np.arange(3), "count": 7},
    ],
    ids=[
        "dict", "namedtuple", "list", "tuple", "array", "arrays", "ordered", "int keys", "our name", "path", "case", "empty",
        "mixed",
    ],
)  # fmt: skip
def test_structure_comes_back(make, state):
    """A named tuple that comes back as a list is a TypeError in the first step after a restart."""
    with make() as checkpointer:
        checkpointer.save(state, step=5, epoch=1)

    with make() as again:
        restored = again.restore(like=state)

    _equal(restored, state)
    assert (again.step, again.epoch) == (5, 1)


def test_a_restored_state_is_ours_to_change(make):
    """Memory shared with the file, or with what is given as `like`, would change under the loop."""
    like = _state(0)
    with make() as checkpointer:
        checkpointer.save(_state(3), step=1)
    with make() as again:
        restored = again.restore(like=like)

    restored["params"]["dense"]["kernel"] += 1

    assert like["params"]["dense"]["kernel"][0, 0] == 0
    assert again.run.last.load("params")["dense/kernel"][0, 0] == 3


def test_a_dict_of_parts_is_one_file_each(make):
    """Weights alone could not be read without the optimizer's bytes."""
    with make() as checkpointer:
        checkpoint = checkpointer.save(_state(2), step=1).wait()

    assert checkpoint.objects == ("params", "optimizer", "progress")
    assert {file.name for file in checkpoint.files} >= {"params.safetensors", "optimizer.safetensors"}
    assert checkpoint.load("params")["dense/bias"].tolist() == [2, 2, 2]
    assert "params" in checkpointer.run.settings.tracked


def test_the_state_may_change_when_save_returns(make):
    """An update made while the file is written would leak into it: a torn checkpoint that loads without a word."""
    state = {"model": {f"w{at}": np.zeros(20_000) for at in range(20)}}
    with make() as checkpointer:
        for step in range(1, 6):
            for array in state["model"].values():
                array[:] = step
            checkpointer.save(state, step=step)
            for array in state["model"].values():
                array[:] = -1

    for entry in checkpointer.run.checkpoints:
        assert {value for array in entry.load().values() for value in np.unique(array)} == {entry.step}


def test_save_says_what_it_did(make):
    """`save` that returns False, and nothing was saved."""
    with make() as checkpointer:
        pending = checkpointer.save(_state(1), step=7, metrics={"loss": 0.5})
        checkpoint = pending.wait()

        assert pending.is_done
        assert (checkpoint.name, checkpoint.step, checkpoint.metrics) == ("step-00000007", 7, {"loss": 0.5})
        assert pending.wait().name == checkpoint.name
        assert (
            checkpointer.save(_state(2), step=1).wait().name == "step-00000001"
        )  # going back is a save like any other
        assert checkpointer.save(_state(3), step=7).wait().name == "step-00000007.2"
    assert checkpointer.run.last.name == "step-00000007.2"


def test_save_if_due_keeps_the_cadence(make):
    """Too often costs time, too seldom costs work; and a metric logged in between must not be lost."""
    with make(monitor="loss", every=Every(steps=3)) as checkpointer:
        saved = [
            checkpointer.save_if_due(_state(step), step=step, metrics={"loss": 10 - step}) is not None
            for step in range(1, 8)
        ]

    assert saved == [False, False, True, False, False, True, False]
    assert [(entry.step, entry.metrics) for entry in checkpointer.run.checkpoints] == [
        (3, {"loss": 7}),
        (6, {"loss": 4}),
    ]
    assert [row.step for row in checkpointer.run.history.rows] == [1, 2, 3, 4, 5, 6, 7]


def test_save_if_due_goes_on_after_a_restart(make):
    """The cadence counts from the checkpoint that was restored, not from zero."""
    with make(every=Every(steps=10)) as checkpointer:
        checkpointer.save_if_due(_state(1), step=10)
    with make(every=Every(steps=10)) as again:
        again.restore(like=_state(0))
        assert [step for step in range(11, 31) if again.save_if_due(_state(step), step=step)] == [20, 30]


def test_save_if_due_by_epochs_asks_for_the_epoch(make):
    """With `every=Every(epochs=1)`, the default, and only a step, nothing would ever be due."""
    with make() as checkpointer:
        with pytest.raises(InvalidArgument, match="every epoch cannot be told from steps"):
            checkpointer.save_if_due(_state(1), step=10)
        assert checkpointer.save_if_due(_state(1), step=10, epoch=0) is None
        assert checkpointer.save_if_due(_state(1), step=20, epoch=1).wait().epoch == 1


def test_saving_without_restoring_is_refused(make):
    """A script that forgets to restore would train from the start, over a run that is weeks old."""
    with make() as checkpointer:
        checkpointer.save(_state(1), step=5)

    for call in (
        lambda again: again.save(_state(9), step=1),
        lambda again: again.save_if_due(_state(9), step=1, epoch=1),
        lambda again: again.log(loss=1),
    ):
        again = make()
        with pytest.raises(
            Refused, match=r"has checkpoints up to step-00000005, which were not restored; call restore\(\)"
        ):
            call(again)
        again.close()
    assert len(again.run.checkpoints) == 1
    assert len(again.run.history.attempts) == 1


def test_saving_over_a_damaged_run_without_restoring_is_refused(where):
    """What is left of a damaged run may be mended; a fresh one among it may not be told apart."""
    with Checkpointer(where, verbose=0) as checkpointer:
        checkpointer.save({"model": {"w": np.zeros(1000)}}, step=5)
    file = where / "checkpoints/step-00000005/model.safetensors"
    file.write_bytes(file.read_bytes()[:100])

    with pytest.raises(Refused, match="not restored"):
        Checkpointer(where, verbose=0).save({"model": {"w": np.zeros(1000)}}, step=1)


def test_restore_of_a_reference_leaves_the_counters(make):
    """Looking at an old state must not send the loop back to it."""
    with make(monitor="loss") as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(_state(step), step=step, metrics={"loss": step})
        best = checkpointer.restore("best", like=_state(0))
        second = checkpointer.restore("best~1", like=_state(0))

    assert (best["params"]["dense"]["bias"][0], second["params"]["dense"]["bias"][0]) == (1, 2)
    assert checkpointer.step == 3


def test_restore_again_goes_back_to_the_last(make):
    """After a diverged step, the loop asks for the state before it, and for its counters."""
    with make() as checkpointer:
        checkpointer.restore(like=_state(0))
        checkpointer.save(_state(4), step=4)
        checkpointer.save_if_due(_state(9), step=9, epoch=0)
        assert checkpointer.step == 9

        restored = checkpointer.restore(like=_state(0))

    assert restored["params"]["dense"]["bias"][0] == 4
    assert checkpointer.step == 4


def test_random_states_come_back_with_the_state(make):
    """A resumed run would go on with other random numbers than one that was never stopped."""
    random.seed(5)
    np.random.seed(5)
    with make() as checkpointer:
        checkpointer.save(_state(1), step=1)
    expected = (random.random(), np.random.random())
    random.seed(6)
    np.random.seed(6)

    with make() as again:
        again.restore(like=_state(0))

    assert (random.random(), np.random.random()) == expected


def test_a_mismatch_lists_every_difference(make):
    """One difference at a time is one restart at a time."""
    with make() as checkpointer:
        checkpointer.save({**_state(1), "scheduler": {"at": 3}}, step=1)
    like = {
        "params": {
            "dense": {"kernel": np.zeros((2, 4), np.float32), "bias": np.zeros(3, np.float32)},
            "norm": np.zeros(2),
        },
        "optimizer": (Moments(np.array(0), [np.zeros(2, np.float16)]), ()),
        "ema": {"w": np.zeros(2)},
    }

    with pytest.raises(Mismatch) as error, make() as again:
        again.restore(like=like)

    text = str(error.value)
    for words in (
        "does not fit (5 differences, nothing was changed):",
        "params/dense/kernel: shape (2, 3) in the checkpoint, (2, 4) here",
        "params/dense/bias: dtype I64 in the checkpoint, F32 here",
        "params/norm: only here",
        "ema: only here",
        "scheduler: only in the checkpoint",
    ):
        assert words in text
    assert (again.step, again.epoch) == (0, 0)
    assert len(again.run.history.attempts) == 1


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"model": {"f": len}}, "model/f"),
        ({"model": {"list": [1, {2: object()}]}}, "model/list/1/2"),
        (np.array([object()]), "state"),
        ({"model": {"when": np.array("2020", "datetime64[s]")}}, "model/when"),
    ],
)
def test_what_files_cannot_hold_is_named(make, state, path):
    """The error would come from the writer, long after, and say nothing of where."""
    with make() as checkpointer:
        with pytest.raises(InvalidState) as error:
            checkpointer.save(state, step=1)
        assert error.value.path == path or path in str(error.value)
        assert checkpointer.save(_state(1), step=1).wait().step == 1


@pytest.mark.parametrize("count", [-1, 1.5, "3", True])
def test_a_step_that_is_no_count_is_refused(make, count):
    """A step of 1.5 would be the name of a directory."""
    with make() as checkpointer:
        with pytest.raises(InvalidArgument, match="step is .*, not a count"):
            checkpointer.save(_state(1), step=count)
        with pytest.raises(InvalidArgument, match="epoch is .*, not a count"):
            checkpointer.save(_state(1), step=1, epoch=count)


def test_a_step_may_be_any_integer_there_is(make):
    """The step of a functional optimizer is an array of no dimension."""
    with make() as checkpointer:
        assert checkpointer.save(_state(1), step=np.array(3), epoch=np.int64(2)).wait().epoch == 2
    assert type(highcamp.open(checkpointer.run.store).last.step) is int


def test_nothing_to_save_and_nothing_to_restore_is_said(make):
    """`save()` of nothing would be a checkpoint that restores nothing."""
    with make() as checkpointer:
        with pytest.raises(InvalidArgument, match=r"save\(\) has nothing to save or restore.*or pass a state"):
            checkpointer.save(step=1)
        with pytest.raises(InvalidArgument, match=r"restore\(\) has nothing to save or restore.*or pass like=state"):
            checkpointer.restore()
        checkpointer.save(_state(1), step=1)
        with pytest.raises(InvalidArgument, match="no object is tracked"):
            checkpointer.restore("last")
