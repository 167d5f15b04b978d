"""The example: killed again and again, in mid-epoch and in the middle of saves, it ends as one that was never interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import highcamp

HERE = Path(__file__).parent
ROOT = Path(highcamp.__file__).parent.parent
SEEDS = range(1, 7)


def _start(*command, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-u", "-W", "error", *map(str, command)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where the trainings are."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def compared(home):
    """Every seed, in processes forked from one that has imported everything."""
    script = _start(HERE / "resume_script.py", home, *SEEDS)
    out, err = script.communicate(timeout=200)
    assert script.returncode == 0, err[-6000:]
    return {found["seed"]: found for found in map(json.loads, out.splitlines())}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", SEEDS)
def test_killed_and_run_again_equals_uninterrupted(compared, seed):
    """Weights, average, optimizer, schedule, scaler, metrics, history and best, bit for bit: else it is another training."""
    found = compared[seed]

    assert found["different"] == {}, f"seed {seed}, ended at {found['deaths']}"
    assert found["stops"] == len(found["deaths"]) >= 3


def test_deaths_were_in_the_middle_of_everything(compared):
    """A test that only dies between saves proves little."""
    places = {death.split()[0] for found in compared.values() for death in found["deaths"]}
    midway = {seed for seed, found in compared.items() if any(found["batches"])}

    assert places >= {"batch", "before", "within", "after"}  # between and in the middle of writes, and while training
    assert midway == set(SEEDS)  # an attempt began in the middle of an epoch


def test_the_script_prints_the_same_after_signals_from_outside(compared, home, tmp_path):
    """What the documents show must be what happens: SIGKILL, then SIGTERM, then to the end."""
    expected = json.loads((home / "whole" / "result.json").read_text())
    command = (ROOT / "examples" / "torch_digits.py", "--directory", tmp_path / "run", "--steps", 7, "--epochs", 3)
    codes = []
    for signum in (signal.SIGKILL, signal.SIGTERM):
        script = _start(*command)
        said = ""
        while "Epoch" not in said and script.poll() is None:
            said = script.stderr.readline()
        script.send_signal(signum)
        script.communicate(timeout=60)
        codes.append(script.returncode)

    last = _start(*command)
    out, err = last.communicate(timeout=60)

    assert (codes, last.returncode) == ([-signal.SIGKILL, 128 + signal.SIGTERM], 0), err
    assert "Resumed from step-" in err
    assert dict(line.split(maxsplit=1) for line in out.splitlines()) == expected
