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
CASES = [  # of two processes, each about half of the work
    [
        "epochs:1",
        "accumulating:2",
        "rare_validation:3",
        "plateau_by_steps:4",
        "adversaries:5",
        "steps:6",
        "two_loaders:7",
    ],
    [
        "stopped:16",
        "shortest:8",
        "streamed:9",
        "stateful:10",
        "workers:11",
        "averaged:12",
        "swa:13",
        "thawed:14",
        "scaled:15",
    ],
]


def _start(*command, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
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
    """Every case, in processes forked from two that have imported everything."""
    scripts = [_start(HERE / "resume_script.py", tmp_path_factory.mktemp("runs"), *cases) for cases in CASES]
    found = {}
    for script in scripts:
        out, err = script.communicate(timeout=280)
        assert script.returncode == 0, err[-6000:]
        found |= {each["case"]: each for each in map(json.loads, out.splitlines())}
    return found


@pytest.mark.parametrize("case", [case.partition(":")[0] for cases in CASES for case in cases])
def test_killed_and_run_again_equals_uninterrupted(compared, case):
    """Weights, optimizers, schedules, callbacks, metrics, history and best, bit for bit: else it is another training."""
    found = compared[case]

    assert found["different"] == {}, f"{case}, ended at {found['deaths']}"
    assert found["kills"] == len(found["deaths"]) >= 1


def test_deaths_were_in_the_middle_of_everything(compared):
    """A test that only dies between saves proves little."""
    places = {death.split()[0] for found in compared.values() for death in found["deaths"]}
    midway = {name for name, found in compared.items() if max(found["batches"])}

    assert places >= {"batch", "before", "within", "after"}
    assert len(midway) >= 10, midway  # an attempt began in the middle of an epoch
    assert sum(found["kills"] for found in compared.values()) >= 25


def test_example_prints_the_same_after_a_kill(tmp_path):
    """What the documents show must be what happens."""
    script = ROOT / "examples" / "lightning_digits.py"
    whole = _start(script, "--directory", tmp_path / "whole", "--steps", 7, "--epochs", 4)
    killed = _start(script, "--directory", tmp_path / "killed", "--steps", 7, "--epochs", 4)
    for _ in range(random.Random(5).randrange(1, 4)):
        killed.stderr.readline()  # an epoch has ended, and its save begins
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    expected, _ = whole.communicate(timeout=120)

    again = _start(script, "--directory", tmp_path / "killed", "--steps", 7, "--epochs", 4)
    said, errors = again.communicate(timeout=120)

    assert (killed.returncode, whole.returncode, again.returncode) == (-signal.SIGKILL, 0, 0), errors
    assert "Resumed from step-" in errors
    assert said.splitlines()[1:] == expected.splitlines()[1:]
    assert [line.split()[0] for line in said.splitlines()] == ["best:", "weights", "optimizer", "metrics", "history"]
