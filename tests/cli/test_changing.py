"""prune, rm, undelete, pin, unpin, export and plot: what they change, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

BEST, SECOND, RESUMED, BEFORE_LAST, LAST = (f"step-{step:08d}" for step in (5, 6, 7, 11, 12))


def _files(path):
    """Every file below, with its bytes."""
    return {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "arguments", [["prune", "{}", "--best", "1", "--last", "1"], ["rm", "{}@best~1"], ["prune", "{}", "--empty-trash"]]
)
def test_nothing_changes_without_apply(call, run, arguments):
    """A look at what would happen must be safe."""
    before = _files(run.path)

    done = call(*(each.format(run.path) for each in arguments))

    assert done.code == 0
    assert _files(run.path) == before


def test_prune_says_what_goes_and_why_the_others_stay(call, run):
    """Each row has its reason."""
    done = call("prune", run.path, "--best", "1", "--last", "1")

    assert [(row[0], row[2], row[3]) for row in done.rows] == [
        (BEST, "keep", "best 1 of 1"),
        (SECOND, "remove", "no rule keeps it"),
        (RESUMED, "keep", "resumed from"),
        (BEFORE_LAST, "remove", "no rule keeps it"),
        (LAST, "keep", "last 1 of 1"),
    ]
    assert "nothing was changed; --apply moves 2 checkpoints" in done.err


def test_prune_and_undelete_give_identical_files(call, run):
    """What was removed by mistake comes back bit for bit."""
    before = _files(run.path)

    assert call("prune", run.path, "--best", "1", "--last", "1", "--apply").code == 0
    assert [each.name for each in run.checkpoints] == [BEST, RESUMED, LAST]
    done = call("undelete", f"{run.path}@{SECOND}", f"{run.path}@{BEFORE_LAST}")

    assert done.code == 0
    assert done.out.split() == [SECOND, BEFORE_LAST]
    assert _files(run.path) == before


def test_prune_json(call, run):
    """The plan for programs."""
    told = json.loads(call("prune", run.path, "--best", "1", "--last", "1", "--json").out)

    assert told["schema"] == "highcamp.prune/1"
    assert told["applied"] is False
    assert told["removed"] == []
    assert told["frees_bytes"] == sum(each["frees_bytes"] for each in told["items"]) > 0


def test_prune_with_nothing_to_do_is_fine(call, run):
    """Done is also when nothing was to do."""
    done = call("prune", run.path, "--apply")

    assert done.code == 0
    assert done.err == "nothing to remove\n"


def test_prune_refuses_a_policy_that_keeps_nothing(call, run):
    """It is a mistake in every case."""
    done = call("prune", run.path, "--best", "0", "--last", "0")

    assert done.code == 2
    assert "would remove everything" in done.err


def test_emptying_the_trash_frees_it_for_good(call, run):
    """The only command that destroys, and it needs two words."""
    call("rm", f"{run.path}@best~1", "--apply")

    first = call("prune", run.path, "--empty-trash")
    assert first.rows[0][:2] == [SECOND, "remove"]
    assert call("undelete", run.path).out.split() == [SECOND]

    assert call("prune", run.path, "--empty-trash", "--apply").code == 0
    assert run.trash == {}
    assert call("undelete", f"{run.path}@{SECOND}").code == 12


@pytest.mark.parametrize(
    ("reference", "reason"), [("best", "the best"), ("last", "the last"), ("epoch:7", "the one resumed from")]
)
def test_rm_refuses_what_is_protected(call, run, reference, reason):
    """Best, last and the one resumed from are what highcamp is for."""
    done = call("rm", f"{run.path}@{reference}", "--apply")

    assert done.code == 13
    assert f"is protected: {reason}" in done.err
    assert len(run.checkpoints) == 5


def test_rm_looks_at_all_before_the_first_goes(call, run):
    """Half of a list removed is worse than none."""
    done = call("rm", f"{run.path}@best~1", f"{run.path}@last", "--apply")

    assert done.code == 13
    assert len(run.checkpoints) == 5


def test_rm_refuses_a_whole_run(call, run):
    """A forgotten reference must not remove anything."""
    done = call("rm", run.path, "--apply")

    assert done.code == 2
    assert "is a run, not a checkpoint" in done.err


def test_rm_and_undelete_tell_json(call, run):
    """For programs."""
    removed = json.loads(call("rm", f"{run.path}@best~1", "--apply", "--json").out)
    returned = json.loads(call("undelete", f"{run.path}@{SECOND}", "--json").out)

    assert (removed["schema"], removed["removed"]) == ("highcamp.rm/1", [SECOND])
    assert (returned["schema"], returned["items"][0]["name"]) == ("highcamp.undelete/1", SECOND)


def test_a_pin_protects_until_it_is_taken_away(call, run):
    """Pinned is never removed."""
    assert call("pin", f"{run.path}@best~1", "paper").out.strip() == SECOND
    assert call("rm", f"{run.path}@pin:paper", "--apply").code == 13
    assert [row[-2] for row in call("ls", run.path).rows if row[0] == SECOND] == ["best 2 of 2, pin:paper"]

    assert call("unpin", run.path, "paper").out.strip() == SECOND
    assert call("rm", f"{run.path}@best~1", "--apply").code == 0


def test_pin_and_unpin_tell_json(call, run, monkeypatch):
    """For programs; unpin without a run takes the nearest."""
    monkeypatch.chdir(run.path)

    assert json.loads(call("pin", "@best", "paper", "--json").out)["checkpoint"] == BEST
    assert json.loads(call("unpin", "paper", "--json").out) == {
        "schema": "highcamp.unpin/1", "run": run.path, "name": "paper", "checkpoint": BEST,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "new\nline", "x" * 300, ""])
def test_a_pin_with_a_hostile_name_is_refused(call, run, name):
    """A pin becomes a file name."""
    before = _files(run.path)

    done = call("pin", f"{run.path}@best", name)

    assert done.code == 2
    assert "Traceback" not in done.err
    assert _files(run.path) == before


def test_a_pin_is_not_moved_by_mistake(call, run):
    """The paper's weights stay the paper's weights."""
    call("pin", f"{run.path}@best", "paper")

    assert call("pin", f"{run.path}@last", "paper").code == 13
    assert run.pins == {"paper": BEST}


def test_unpin_of_an_unknown_name_lists_the_pins(call, run):
    """Names are forgotten."""
    run.pin("best", "paper")

    done = call("unpin", run.path, "papr")

    assert done.code == 12
    assert "pins: paper" in done.err


def test_export_writes_the_best_weights_and_says_how_to_load_them(call, run, tmp_path):
    """From a run to another tool in one line."""
    done = call("export", run.path, "-o", "model.npz")

    assert done.code == 0
    assert "import numpy; weights = dict(numpy.load('model.npz'))" in done.out
    found = np.load("model.npz")
    assert float(found["dense/kernel"][0, 0]) == 2.5
    told = json.loads(call("export", f"{run.path}@last", "-o", "model.safetensors", "--json").out)
    assert told["schema"] == "highcamp.export/1"
    assert told["checkpoint"] == LAST
    assert told["size_bytes"] == (tmp_path / "model.safetensors").stat().st_size


def test_export_refuses_to_overwrite(call, run, tmp_path):
    """A file that is there may be the only one."""
    (tmp_path / "model.npz").write_bytes(b"precious")

    assert call("export", run.path, "-o", "model.npz").code == 13
    assert (tmp_path / "model.npz").read_bytes() == b"precious"
    assert call("export", run.path, "-o", "model.npz", "--force").code == 0


def test_export_of_damaged_weights_writes_nothing(call, run, tmp_path):
    """Whoever gets the file has no digests any more."""
    file = Path(run.best.path) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    done = call("export", run.path, "-o", "model.npz")

    assert done.code == 1
    assert not (tmp_path / "model.npz").exists()


def test_export_knows_its_suffixes(call, run):
    """A wrong suffix is answered with the right ones."""
    done = call("export", run.path, "-o", "model.onnx")

    assert done.code == 2
    assert ".safetensors" in done.err


def test_plot_writes_into_the_run_and_prints_the_path(call, run):
    """People look in the folder."""
    pytest.importorskip("matplotlib")

    done = call("plot", run.path)

    assert done.out == "runs/digits/curve.png\n"
    assert Path("runs/digits/curve.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads(call("plot", run.path, "-o", "c.svg", "--json").out)
    assert (told["schema"], told["best_epoch"], told["best_value"]) == ("highcamp.plot/1", 5, 0.3)
