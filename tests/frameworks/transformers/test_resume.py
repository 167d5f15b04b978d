"""Killed again and again, in mid-epoch and in the middle of saves, a training ends as one that was never interrupted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import highcamp

HERE = Path(__file__).parent
ROOT = Path(highcamp.__file__).parent.parent
CASES = ["accumulating:4", "masked:2", "streamed:8", "lora:4", "stopped:2", "kept:1", "scaled:8"]


def _start(*command, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-u", *map(str, command)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Every case, in processes forked from one that has imported everything."""
    script = _start(HERE / "resume_script.py", tmp_path_factory.mktemp("runs"), *CASES)
    out, err = script.communicate(timeout=280)
    assert script.returncode == 0, err[-6000:]
    return {found["case"]: found for found in map(json.loads, out.splitlines())}


@pytest.mark.parametrize("case", CASES)
def test_killed_and_run_again_equals_uninterrupted(compared, case):
    """Weights, optimizer, schedule, scaler, callbacks, logs, history and best, bit for bit: else it is another training."""
    found = compared[case]

    assert found["different"] == {}, f"{case}, ended at {found['deaths']}"
    assert found["kills"] == len(found["deaths"]) >= 3
    assert max(found["batches"]) > 0  # an attempt began in the middle of an epoch


def test_deaths_were_in_the_middle_of_everything(compared):
    """A test that only dies between saves proves little."""
    places = {death.split()[0] for found in compared.values() for death in found["deaths"]}

    assert places >= {"step", "before", "within", "after"}


def test_example_prints_the_same_after_a_kill(tmp_path):
    """What the documents show must be what happens."""
    script = ROOT / "examples" / "transformers_tiny.py"
    whole = _start(script, tmp_path / "whole")
    killed = _start(script, tmp_path / "killed")
    lines = random.Random(5).randrange(8, 16)  # logged of 24
    for _ in range(lines):
        killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    expected, _ = whole.communicate(timeout=120)

    again = _start(script, tmp_path / "killed")
    said, errors = again.communicate(timeout=120)

    assert (killed.returncode, whole.returncode, again.returncode) == (-signal.SIGKILL, 0, 0), errors
    assert "Resumed from step-" in errors
    assert said.splitlines()[-6:] == expected.splitlines()[-6:]
    assert [line.split()[0] for line in said.splitlines()[-6:]] == [
        "weights", "optimizer", "schedule", "metrics", "log", "best",
    ]  # fmt: skip
