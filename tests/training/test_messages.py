"""What training says: the texts, and where they go."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from highcamp import Checkpointer, Every, Keep, StorageError
from highcamp.storage.memory import MemoryStore
from highcamp.testing import FaultyStore
from highcamp.training import messages

NAN = math.nan


def test_the_lines_of_a_run(train, where, capsys):
    """People and scripts look for these words; they are Keras's where Keras has some."""
    train([0.3134, 0.3121, 0.3398, NAN, 0.3120999], verbose=1)

    captured = capsys.readouterr()
    *lines, end = captured.err.splitlines()
    assert captured.out == ""
    assert lines == [
        "Epoch 1: val_loss improved to 0.31340, saving step-00000001",
        "Epoch 2: val_loss improved from 0.31340 to 0.31210, saving step-00000002",
        "Epoch 3: val_loss did not improve from 0.31210 (epoch 2)",
        "Epoch 4: val_loss is nan; recorded, not ranked (best stays epoch 2)",
        "Epoch 5: val_loss improved from 0.3121000 to 0.3120999, saving step-00000005",
    ]
    assert re.fullmatch(
        rf"Best: epoch 5, val_loss 0\.31210 -> {where}/checkpoints/step-00000005"
        rf" · 5 saves, pause \S+ m?s each, \S+ \S+/s, \d+\.\d % of training time · highcamp ls {where}",
        end,
    )


def test_the_lines_of_a_restart(train, where, capsys):
    """Without them, nobody knows whether a run was resumed or began anew."""
    train([0.5, 0.4])
    train([0.5, 0.4, 0.3, 0.35], verbose=1)
    train([0.5] * 4, verbose=1)

    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "Resumed from step-00000002 (epoch 2, attempt 2); 2 epochs to go",
        "Epoch 3: val_loss improved from 0.40000 to 0.30000, saving step-00000003",
        "Epoch 4: val_loss did not improve from 0.30000 (epoch 3)",
    ]
    assert lines[4:] == ["Run is complete (4 of 4 epochs); nothing to train. epochs(14) would go on"]


def test_the_line_of_a_restart_in_the_middle_of_an_epoch(capsys):
    """Where a run goes on is told to the batch."""
    store = MemoryStore()
    for attempt in (1, 2):
        with Checkpointer(store, every=Every(steps=2), verbose=attempt - 1) as checkpointer:
            checkpointer.track(model={"w": np.zeros(3)})
            for epoch in checkpointer.epochs(2):
                for batch in checkpointer.batches(range(4)):
                    if attempt == 1 and (epoch, batch) == (1, 3):
                        break
                if attempt == 1 and epoch == 1:
                    break

    assert capsys.readouterr().err.splitlines()[0] == (
        "Resumed from step-00000006 (epoch 1, batch 2 of the next, attempt 2); 1 epoch to go"
    )


def test_the_line_of_a_restored_state(capsys):
    """A state that is passed has no epochs to go."""
    store = MemoryStore()
    for _ in range(2):
        with Checkpointer(store) as checkpointer:
            checkpointer.restore(like={"model": {"w": np.zeros(3)}})
            checkpointer.save({"model": {"w": np.zeros(3)}}, step=450)

    assert "Resumed from step-00000450 (attempt 2)" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("logged", "line"),
    [
        ({"loss": 1.0, "val_accuracy": 0.5}, 'no "val_loss" among loss, val_accuracy'),
        ({}, 'no "val_loss" among no metrics at all'),
        (None, 'no "val_loss" among no metrics at all'),
    ],
)
def test_a_missing_metric_is_said_once(train, capsys, logged, line):
    """Said at every epoch it is not read, said never the run is unranked to its end."""
    train([logged] * 3, verbose=1)

    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"Epoch 1: {line}; checkpoints are saved unranked"
    assert len(lines) == 2
    assert lines[1].startswith("3 saves, ")


def test_first_nan_has_no_best_to_name(train, capsys):
    """There is no epoch that the best could stay at."""
    train([NAN, math.inf], verbose=0)

    assert capsys.readouterr().err.splitlines() == [
        "Epoch 1: val_loss is nan; recorded, not ranked (there is no best yet)",
        "Epoch 2: val_loss is inf; recorded, not ranked (there is no best yet)",
    ]


def test_an_epoch_that_is_not_saved_is_not_said_to_be(train, capsys):
    """The line would name a checkpoint that does not exist."""
    train([0.5, 0.4, 0.3, 0.2], verbose=1, every=Every(epochs=2))

    assert [line.partition("saving ")[2] for line in capsys.readouterr().err.splitlines()[:4]] == [
        "", "step-00000002", "", "step-00000004",
    ]  # fmt: skip


def test_verbose_0_says_warnings_only(train, capsys):
    """Silence was asked for; but not about damage."""
    train([0.5, 0.4], verbose=0)

    assert capsys.readouterr().err == ""


def test_verbose_2_says_every_save_and_removal(train, capsys):
    """What went, and what each save cost, for whoever wants to know."""
    train([0.5, 0.4, 0.3], verbose=2, keep=Keep(best=1, last=1))

    text = capsys.readouterr().err
    assert re.search(r"^saving step-00000001: pause \d+\.\d ms$", text, re.MULTILINE)
    assert "removed step-00000001\n" in text
    assert "removed step-00000002\n" in text
    assert "removed step-00000003" not in text


def test_a_failed_save_is_told_with_on_error_warn(capsys):
    """Training goes on without a save that nobody heard of."""
    failing = FaultyStore(MemoryStore(), fail_at=0)
    weights = {"w": np.zeros(3)}
    with Checkpointer(failing, on_error="warn", verbose=0) as checkpointer:
        checkpointer.track(model=weights)
        for epoch in checkpointer.epochs(3):
            weights["w"] += 1
            if epoch == 1:
                checkpointer.start()
                checkpointer._saver._writer.drain()
                failing._fail_at = len(failing.operations) + 2

    assert [entry.epoch for entry in checkpointer.run.checkpoints] == [1, 3]
    line = capsys.readouterr().err
    assert line.startswith("a save failed and training goes on without it: injected: ")
    assert line.splitlines()[1:] == [
        "1 save failed while training went on, the last because: injected: draft checkpoints/step-00000002"
    ]


@pytest.mark.parametrize(
    ("one", "other", "texts"),
    [
        (0.3134, 0.3121, ("0.31340", "0.31210")),
        (0.00004, 0.000039, ("0.000040", "0.000039")),
        (1e-9, 1e-10, ("0.0000000010", "0.0000000001")),
        (1.0, 1.0 - 2**-53, None),
        (1e300, 1e-300, None),
        (1e-300, 2e-300, None),
        (5e-324, 0.0, None),
        (123456789.0, 123456788.99999999, None),
    ],
)
def test_two_values_are_told_apart(one, other, texts):
    """Otherwise a line says that 0.00004 has improved to 0.00004."""
    found = messages.two_numbers(one, other)

    assert found[0] != found[1]
    assert (float(found[0]) > float(found[1])) == (one > other)
    assert texts is None or found == texts


@pytest.mark.parametrize(
    ("value", "text"), [(0.31210, "0.31210"), (0.0, "0.00000"), (2.5e-7, "2.5000e-07"), (-3e-5, "-3.0000e-05")]
)
def test_a_small_value_is_not_zero(value, text):
    """A loss of 0.00000 looks like a mistake, or like perfection."""
    assert messages.one_number(value) == text


def test_a_line_is_short_enough_to_read(train, capsys):
    """One line each; a traceback or a table in a log of thousands of epochs hides what matters."""
    run = train([0.5, NAN], verbose=1)

    lines = capsys.readouterr().err.replace(run.run.path, "runs/digits").splitlines()
    assert all(len(line) < 200 for line in lines)


def test_what_cannot_be_written_is_raised_not_said(where):
    """With on_error="raise", the default, a message alone is forgotten."""
    failing = FaultyStore(MemoryStore(), fail_at=0, forever=True)
    checkpointer = Checkpointer(failing, verbose=0)
    checkpointer.track(model={"w": np.zeros(3)})
    checkpointer.start()
    failing._fail_at = len(failing.operations) + 2

    with pytest.raises(StorageError, match="injected"):
        for _ in checkpointer.epochs(2):
            pass
    with pytest.raises(StorageError):
        checkpointer.close()
