"""verify: what it finds, names and never repairs."""

from __future__ import annotations

import json
from pathlib import Path

BEST, SECOND, RESUMED, BEFORE_LAST, LAST = (f"step-{step:08d}" for step in (5, 6, 7, 11, 12))


def _flip(path, offset=-1):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_whole_run_verifies(call, run):
    """Every byte was read."""
    done = call("verify", run.path)

    assert done.code == 0
    assert [row[:2] for row in done.rows] == [[name, "whole"] for name in (BEST, SECOND, RESUMED, BEFORE_LAST, LAST)]
    assert int(done.rows[0][2]) == run.best.size_bytes
    assert done.err.startswith("5 of 5 checkpoints whole")


def test_one_flipped_byte_is_found_and_its_tensor_named(call, run):
    """Silent damage is what digests are for."""
    _flip(Path(run.last.path) / "model.safetensors")

    done = call("verify", run.path)

    assert done.code == 1
    row = next(row for row in done.rows if row[0] == LAST)
    assert (row[1], row[3], row[4]) == ("altered", "model.safetensors", "dense/kernel")
    assert f"{LAST}: model.safetensors differs from its digest" in done.err


def test_missing_truncated_and_foreign_files_are_told_apart(call, run):
    """Each has another cause and another cure."""
    (Path(run.checkpoint("best").path) / "notes.txt").write_text("mine")
    (Path(run.checkpoint("last").path) / "model.safetensors").unlink()
    (Path(run.checkpoint(RESUMED).path) / "model.safetensors").write_bytes(b"short")

    states = {row[0]: row[1] for row in call("verify", run.path).rows}

    assert (states[BEST], states[LAST], states[RESUMED]) == ("foreign", "missing", "truncated")


def test_one_checkpoint_alone(call, run):
    """The others may be huge."""
    _flip(Path(run.last.path) / "model.safetensors")

    assert call("verify", f"{run.path}@best").code == 0
    assert call("verify", f"{run.path}@epoch:12").code == 1


def test_quick_reads_no_tensors(call, run):
    """Sizes and tables only: a flipped byte of a tensor is not seen, one of a table and a missing file are."""
    _flip(Path(run.last.path) / "model.safetensors")

    done = call("verify", run.path, "--quick")

    assert done.code == 0
    assert all(0 < int(row[2]) < run.last.size_bytes - 2000 for row in done.rows)
    assert "by names, sizes and tables" in done.err

    _flip(Path(run.last.path) / "model.safetensors", 9)
    (Path(run.best.path) / "state.json").unlink()
    states = {row[0]: row[1] for row in call("verify", run.path, "--quick").rows}
    assert (states[BEST], states[LAST]) == ("missing", "altered")


def test_a_person_who_waits_sees_a_bar(terminal, run):
    """Hours of reading without a word look like a program that hangs."""
    done = terminal("verify", run.path)

    assert done.code == 0
    assert "verifying" in done.out
    assert "5 of 5 checkpoints whole" in done.out
    assert "verifying" not in terminal("verify", run.path, "--quick").out


def test_no_bar_in_a_pipe(call, run):
    """A log would be full of it."""
    assert "verifying" not in call("verify", run.path).err


def test_json_lines_end_with_a_result(call, run):
    """Long work is told line by line."""
    _flip(Path(run.last.path) / "model.safetensors")

    lines = [json.loads(line) for line in call("verify", run.path, "--json").out.splitlines()]

    assert [line["type"] for line in lines] == ["item"] * 5 + ["result"]
    assert {line["schema"] for line in lines} == {"highcamp.verify/1"}
    assert lines[4]["findings"][0]["tensor"] == "dense/kernel"
    assert (lines[-1]["verified_count"], lines[-1]["finding_count"]) == (5, 1)


def test_fail_fast_stops_at_the_first_finding(call, run):
    """A script that only asks whether all is well."""
    _flip(Path(run.best.path) / "model.safetensors")

    done = call("verify", run.path, "--fail-fast")

    assert done.code == 1
    assert len(done.rows) == 1


def test_too_short_a_time_is_told(call, run):
    """What was not verified must not pass for whole."""
    done = call("verify", run.path, "--max-duration", "0s")

    assert done.code == 3
    assert "4 checkpoints not verified" in done.err


def test_a_time_that_is_none_is_refused(call, run):
    """Rather than taken for zero."""
    assert call("verify", run.path, "--max-duration", "soon").code == 2


def test_nothing_is_repaired(call, run):
    """What is left of a damaged checkpoint may be all there is."""
    _flip(Path(run.last.path) / "model.safetensors")
    before = {file: file.read_bytes() for file in Path(run.path).rglob("*") if file.is_file()}

    call("verify", run.path)

    assert {file: file.read_bytes() for file in Path(run.path).rglob("*") if file.is_file()} == before
