"""A best that has given back its resume state is told from a whole one wherever checkpoints are shown."""

from __future__ import annotations

import json

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Keep


@pytest.fixture
def stripped(tmp_path, monkeypatch):
    """A run of three steps, the weights of its best alone."""
    monkeypatch.chdir(tmp_path)
    state = {"params": {"w": np.zeros(3)}, "opt_state": {"m": np.zeros(6)}}
    keep = Keep(best=1, last=1, best_weights_only=True)
    with Checkpointer(tmp_path / "run", monitor="val_loss", keep=keep, verbose=0) as checkpointer:
        for step, loss in enumerate([0.5, 0.2, 0.3], start=1):
            checkpointer.save(state, step=step, metrics={"val_loss": loss})
    return highcamp.open(tmp_path / "run")


def test_ls_says_which_are_weights_only(call, stripped):
    """Somebody would plan to train on from the best, and find no optimizer in it."""
    rows = {row[0]: row for row in call("ls", stripped.path).rows}

    assert (rows["step-00000002.2"][-2:], rows["step-00000003"][-1]) == (["best 1 of 1", "weights only"], "committed")
    told = json.loads(call("ls", stripped.path, "--json").out)["items"]
    assert {each["name"]: (each["weights_only"], each["is_best"], each["is_last"]) for each in told} == {
        "step-00000002.2": (True, True, False),
        "step-00000003": (False, False, True),
    }


@pytest.mark.parametrize("width", [60, 160])
def test_ls_says_it_on_narrow_terminals_too(terminal, stripped, width):
    """The column that says it is the first to go."""
    assert "weights only: step-00000002.2" in terminal("ls", stripped.path, width=width).out


def test_ls_says_damage_first(call, stripped):
    """What is missing matters more than what was given back."""
    stripped.store.local_path("checkpoints/step-00000002.2/params.safetensors").unlink()

    rows = {row[0]: row for row in call("ls", stripped.path).rows}

    assert rows["step-00000002.2"][-1] == "missing"


def test_show_says_what_it_holds(call, stripped):
    """One who looks at a single checkpoint has nothing to compare it with."""
    facts = {row[0]: row[1] for row in call("show", f"{stripped.path}@best").rows}

    assert facts["holds"] == "weights only: training cannot resume from it"
    assert facts["state"] == "committed"
    assert "holds" not in dict(row[:2] for row in call("show", f"{stripped.path}@last").rows)
    told = json.loads(call("show", f"{stripped.path}@last", "--json").out)
    assert told["weights_only"] is False
    assert {each["name"]: each["weights"] for each in told["objects"]} == {
        "params": True, "opt_state": False, "progress": False,
    }  # fmt: skip


def test_show_tells_the_policy(call, stripped):
    """Why the optimizer of the best is gone."""
    facts = {row[0]: row[1] for row in call("show", stripped.path).rows}

    assert facts["keeps"] == "best 1, last 1, weights only of a best that nothing else keeps"
    assert facts["best"].startswith("step-00000002.2, ")
    assert facts["last"].startswith("step-00000003, ")
    assert json.loads(call("show", stripped.path, "--json").out)["keep"]["best_weights_only"] is True


def test_prune_follows_the_policy_that_the_run_was_trained_with(call, tmp_path):
    """Typed by hand it would keep, or remove, something else than training does."""
    state = {"params": {"w": np.zeros(3000)}, "opt_state": {"m": np.zeros(6000)}}
    with Checkpointer(tmp_path / "run", monitor="val_loss", keep=Keep(best=1, last=9), verbose=0) as checkpointer:
        for step, loss in enumerate([0.5, 0.2, 0.3], start=1):
            checkpointer.save(state, step=step, metrics={"val_loss": loss})
    asked = ("prune", tmp_path / "run", "--last", "1", "--best-weights-only")

    before = {row[0]: row for row in call(*asked).rows}

    assert [before[f"step-0000000{step}"][2] for step in (1, 2, 3)] == ["remove", "weights", "keep"]
    assert 48_000 <= int(before["step-00000002"][-1]) < 72_000  # not the weights, which are linked
    told = json.loads(call(*asked, "--apply", "--json").out)
    assert (told["keep"]["best_weights_only"], told["removed"]) == (True, ["step-00000001", "step-00000002"])
    run = highcamp.open(tmp_path / "run")
    assert [entry.name for entry in run.checkpoints] == ["step-00000002.2", "step-00000003"]
    assert run.best.verify().is_whole
    again = json.loads(call("prune", run.path, "--last", "1", "--best-weights-only", "--apply", "--json").out)
    assert (again["removed"], again["frees_bytes"]) == ([], 0)


def test_prune_of_a_run_that_keeps_weights_only_goes_on_so(call, stripped):
    """Its own policy is the default."""
    told = json.loads(call("prune", stripped.path, "--json").out)

    assert told["keep"]["best_weights_only"] is True
    assert [each["verdict"] for each in told["items"]] == ["keep", "keep"]
