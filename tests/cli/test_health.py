"""Checkpoints with weights that are NaN are told from healthy ones wherever checkpoints are shown."""

from __future__ import annotations

import json

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Keep


@pytest.fixture
def sick(tmp_path, monkeypatch):
    """A run of three steps; the last one is NaN in 25 tensors."""
    monkeypatch.chdir(tmp_path)
    with Checkpointer(tmp_path / "run", monitor="val_loss", keep=Keep(best=1, last=2), verbose=-1) as checkpointer:
        for step, value in enumerate([1.0, 2.0, np.nan], start=1):
            state = {
                "params": {f"l{place:02}": np.full(2, value) for place in range(25)},
                "opt_state": {"m": np.zeros(6)},
            }
            checkpointer.save(state, step=step, metrics={"val_loss": 1 / step})
    return highcamp.open(tmp_path / "run")


def test_ls_says_which_are_not_healthy_and_why_the_others_stay(call, sick):
    """Somebody would hand on the newest one, which has the lowest loss."""
    rows = {row[0]: row for row in call("ls", sick.path).rows}

    assert {name: row[-2:] for name, row in rows.items() if name != "CHECKPOINT"} == {
        "step-00000001": ["last healthy 2 of 2", "committed"],
        "step-00000002": ["best 1 of 1, last healthy 1 of 2", "committed"],
        "step-00000003": ["last: always kept", "not healthy"],
    }
    told = json.loads(call("ls", sick.path, "--json").out)["items"]
    assert {each["name"]: (each["healthy"], each["state"], each["is_best"]) for each in told} == {
        "step-00000001": (True, "committed", False),
        "step-00000002": (True, "committed", True),
        "step-00000003": (False, "committed", False),
    }


@pytest.mark.parametrize("width", [60, 160])
def test_ls_says_it_on_narrow_terminals_too(terminal, sick, width):
    """The column that says it is the first to go."""
    said = " ".join(terminal("ls", sick.path, width=width).out.split())

    assert "not healthy (NaN or infinite weights): step-00000003" in said


def test_ls_of_a_healthy_run_is_as_it_was(call, sick):
    """A word beside every row of every run would be read by nobody."""
    sick.store.remove("checkpoints/step-00000003")

    assert "healthy" not in call("ls", sick.path).out.replace("last healthy", "")


def test_show_says_what_is_wrong(call, sick):
    """The names are where the search for the reason begins."""
    facts = {row[0]: row[1] for row in call("show", f"{sick.path}@last").rows}

    assert facts["health"] == "not healthy: NaN in params/l00, NaN in params/l01, NaN in params/l02 and 22 more tensors"
    told = json.loads(call("show", f"{sick.path}@last", "--json").out)
    assert told["healthy"] is False
    assert told["nonfinite_weights"]["nonfinite"] == 25
    assert told["nonfinite_weights"]["tensors"]["params/l07"] == "nan"
    assert len(told["nonfinite_weights"]["tensors"]) == 20


def test_show_says_what_is_right_and_what_is_unknown(call, sick, run):
    """Nothing at all would leave open which of the two it is."""
    for path, words, value in (
        (f"{sick.path}@best", "no weight is NaN or infinite", True),
        (f"{run.path}@best", "not known", None),
    ):
        facts = {row[0]: row[1] for row in call("show", path).rows}
        told = json.loads(call("show", path, "--json").out)

        assert facts["health"] == words
        assert (told["healthy"], told["nonfinite_weights"]) == (value, None)
