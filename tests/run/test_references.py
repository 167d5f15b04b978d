"""References: the same words in code, on the command line and on the page."""

from __future__ import annotations

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, CheckpointNotFound, Keep
from highcamp.storage.memory import MemoryStore


@pytest.mark.parametrize(
    ("reference", "step"),
    [
        ("best", 20), ("best~0", 20), ("best~1", 40), ("best~2", 10),
        ("last", 40), ("last~0", 40), ("last~1", 30), ("last~3", 10),
        ("step:10", 10), ("step:00000030", 30), ("epoch:1", 10), ("epoch:4", 40),
        ("step-00000030", 30), ("pin:paper", 10),
    ],
)  # fmt: skip
def test_a_reference_means_one_checkpoint(run, reference, step):
    """Another checkpoint than the one meant is exported, or removed."""
    run.pin("step:10", "paper")

    assert run.checkpoint(reference).step == step


@pytest.mark.parametrize(
    "reference",
    [
        "best~3", "last~4", "step:11", "epoch:9", "pin:none", "pin:", "step-00000099", "", "BEST", "best~", "best~-1",
        "best~x", "last ", "last\n", "step:", "step:-10", "step:1e1", "epoch:٣", "../step-00000010", "step-00000010/",
        "checkpoints/step-00000010", "0", "~1", "best~99999999999999999999", "a\0b", "step:99999999999999999999999",
    ],
)  # fmt: skip
def test_a_reference_that_means_none_lists_what_there_is(run, reference):
    """A mistyped reference must not mean something else; and the next try should be the right one."""
    with pytest.raises(CheckpointNotFound) as error:
        run.checkpoint(reference)

    assert f"has no checkpoint {reference!r}" in str(error.value)
    assert "there are best, last, step-00000010, step-00000020, step-00000030, step-00000040" in str(error.value)


def test_only_the_newest_candidates_are_listed():
    """A message of 10,000 names is not read."""
    with Checkpointer(MemoryStore(), keep=Keep(last=100), verbose=0) as checkpointer:
        for step in range(1, 9):
            checkpointer.save({"model": {"w": np.zeros(2)}}, step=step)

    with pytest.raises(CheckpointNotFound) as error:
        checkpointer.run.checkpoint("best")

    assert "there are last, step-00000004, " in str(error.value)
    assert "step-00000008 and 3 older ones; there is no best" in str(error.value)


def test_an_empty_run_says_so(where):
    """There is a run, and nothing in it yet."""
    with Checkpointer(where, verbose=0) as checkpointer:
        checkpointer.log(loss=1)

    run = highcamp.open(where)
    with pytest.raises(CheckpointNotFound, match="it has no checkpoints yet"):
        run.checkpoint("last")
    assert (run.best, run.last, run.checkpoints, run.size_bytes) == (None, None, [], 0)


def test_two_commits_of_a_step_are_told_apart():
    """`step:` means the newer, the name means each."""
    with Checkpointer(MemoryStore(), keep=Keep(last=100), verbose=0) as checkpointer:
        for value in (1, 2, 3):
            checkpointer.save({"model": {"w": np.full(2, value)}}, step=5)
    run = checkpointer.run

    values = {
        name: run.checkpoint(name).load()["w"][0] for name in ("step-00000005", "step-00000005.2", "step:5", "last~1")
    }

    assert values == {"step-00000005": 1, "step-00000005.2": 2, "step:5": 3, "last~1": 2}


def test_damaged_ones_are_not_counted(run):
    """`last~1` after a damaged last one would be damaged as well, or skip a whole one."""
    file = run.store.local_path("checkpoints/step-00000040/state.json")
    file.unlink()

    assert [run.checkpoint(reference).step for reference in ("last", "last~1", "best~1")] == [30, 20, 10]
    assert run.checkpoint("step:40").verify().state == "missing"
