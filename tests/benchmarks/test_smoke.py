"""The benchmarks run: every row, every contestant, with tiny states. What they measure here means nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from benchmarks.limits import MAX_DRIFT, drift
from benchmarks.report import ORDER, verdicts
from benchmarks.rows import KEYS, idle, many, overlap, training
from benchmarks.rows.epochs import CALLBACKS
from benchmarks.rows.runs import IMPORT
from benchmarks.states import Spec, difference

ROOT = Path(__file__).parents[2]
ROWS = (
    'pause of a save, `"copy"`', 'pause of a save, `"overlap"`, barrier included', "durable: hash, fsync, rename, fsync",
    "restore into live tensors, digests checked, warm", "restore into live tensors, digests checked, cold",
    "memory on top of the state", "the same with `memory_every`", "the same with `staging_bytes`", "small model (Keras",
    "training with a save every", "an idle step: `checkpointer.batches` (PyTorch)", "an idle step: `save_if_due` (JAX)",
    "an idle step: Keras callback", "an idle step: Lightning callback", "an idle step: Transformers callback",
    "95 % of the parameters frozen", "100 tensors", "checkpoints in a run: open, list and best",
    "`highcamp ls` of", "`import highcamp`",
)  # fmt: skip
PEERS = (
    "limits", "highcamp", "torch.save + fsync", "safetensors + fsync", "dcp.save", "dcp.async_save", "Orbax async",
)  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that a whole run with tiny states has written."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # half a minute on all cores: the processes of a parallel test run share one
    out = shared / "benchmarks"
    with FileLock(shared / "benchmarks.lock"):
        if not (out / "done").exists():
            command = [sys.executable, "-m", "benchmarks", "--quick", "--out", out, "--scratch", out / "scratch"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            (out / "done").touch()
    return out


def test_the_page_has_every_row_of_the_table(written):
    """A bound that nobody measures is a promise that nobody keeps."""
    page = (written / "benchmarks.md").read_text("utf-8")
    table = [line for line in page.split("## Curves")[0].splitlines() if line.startswith("| ")]

    assert [row for row in ROWS if not any(row in line for line in table)] == []
    assert all(line.split("|")[4].strip() in ("", "---", "met", "missed", "not measured") for line in table)


def test_every_contestant_took_part_in_every_row(written):
    """A peer that has dropped out silently makes the table look better than it is."""
    document = json.loads((written / "benchmarks.json").read_text("utf-8"))
    seen = {(sample["session"], sample["who"]) for sample in document["samples"]}
    wanted = {("save", who) for who in PEERS} | {("restore", who) for who in PEERS}
    wanted |= {(overlap.NAME, who) for who in (overlap.OURS, *overlap.PEERS)} | {("keras", who) for who in CALLBACKS}
    wanted |= {(training.NAME, who) for who in training.SAVERS} | {(many.NAME, who) for who in many.PEERS}
    wanted |= {(idle.NAME, idle.who(framework, each)) for framework in idle.FRAMEWORKS for each in idle.CADENCES}
    wanted |= {(IMPORT, "highcamp"), (IMPORT, "numpy"), ("sizes", "limits"), ("frozen", "highcamp")}

    assert wanted - seen == set()


def test_the_page_shows_its_pictures_and_names_no_path_of_the_machine(written):
    """The page is published: it must be whole, and tell nothing about whose machine it was."""
    page = (written / "benchmarks.md").read_text("utf-8")

    for name in ("benchmark-sizes.png", "benchmark-tensors.png", "benchmark-checkpoints.png"):
        assert f"(images/{name})" in page
        assert (written / "images" / name).read_bytes().startswith(b"\x89PNG")
    assert str(written) not in page
    assert str(ROOT) not in page


def test_a_page_can_be_written_again_from_the_raw_rows(written, tmp_path):
    """Whoever measures one row again keeps the others, and whoever mends the page's words measures nothing."""
    command = [sys.executable, "-m", "benchmarks", "--quick", "--page", "--rest", str(written / "benchmarks.json")]

    subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)

    assert (tmp_path / "benchmarks.md").read_bytes() == (written / "benchmarks.md").read_bytes()


def test_every_row_has_a_place_in_the_table(written):
    """A new row without a place would end the run at its very last step."""
    document = json.loads((written / "benchmarks.json").read_text("utf-8"))

    assert set(KEYS) - {"sizes"} == set(ORDER)
    assert {verdict["key"] for verdict in document["verdicts"]} == set(ORDER)
    assert callable(verdicts)


def test_nothing_is_left_on_the_disk(written):
    """The full run writes more than 100 GB in all; what stays behind fills somebody's disk."""
    assert list((written / "scratch").iterdir()) == []


def test_a_limit_that_moves_is_seen_and_one_that_only_spreads_is_not():
    """Ratios to a limit that has changed on the way are no ratios."""
    assert drift([1.0, 1.0, 1.0, 1.5, 1.5, 1.5]) > MAX_DRIFT
    assert drift([1.0, 1.5, 1.0, 1.0, 1.4, 1.0]) <= MAX_DRIFT
    assert drift([1.0, 2.0]) == 0.0


def test_the_shapes_are_those_of_gpt2():
    """The table says GPT-2 124M with AdamW."""
    spec = Spec("gpt2")

    assert len(spec.shapes()) == 148
    assert spec.total_tensors() == 592
    assert spec.total_bytes() == 12 * 124_439_808 + 4 * 148


def test_a_difference_is_found():
    """A comparison that cannot fail proves nothing."""
    assert difference({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == ""
    assert difference({"a": "1", "b": "3"}, {"a": "1", "b": "2"}) == "b"
    assert difference({"a": "1"}, {"a": "1", "b": "2"}) == "b"
