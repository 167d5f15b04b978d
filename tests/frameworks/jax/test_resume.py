"""Killed again and again, in mid-epoch and in the middle of saves, a JAX training ends as one that was never interrupted."""

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
EXAMPLE = ROOT / "examples" / "jax_digits.py"
SEEDS = [0, 1, 2, 3, 4, 5]


def _start(cache, *command):
    """Python with JAX on CPU; what one process compiles, the others find."""
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-u", *map(str, command)], env=environment, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def compared(tmp_path_factory, cache):
    """Every seed, in processes forked from one that has imported everything."""
    script = _start(cache, "-W", "error", HERE / "resume_script.py", tmp_path_factory.mktemp("runs"), *SEEDS)
    out, err = script.communicate(timeout=280)
    assert script.returncode == 0, err[-6000:]
    return {found["seed"]: found for found in map(json.loads, out.splitlines())}


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_and_run_again_equals_uninterrupted(compared, seed):
    """Weights, optimizer, random key, metrics, history and best, bit for bit: else it is another training."""
    found = compared[seed]

    assert found["different"] == {}, f"seed {seed}, ended at {found['deaths']}"
    assert found["stops"] == len(found["deaths"]) >= 3
    assert max(found["batches"]) > 0  # an attempt began in the middle of an epoch


def test_deaths_were_in_the_middle_of_everything(compared):
    """A test that only dies between saves proves little; and one that never was asked to stop, nothing about stopping."""
    places = {death.split()[0] for found in compared.values() for death in found["deaths"]}
    # Two of three ways save every 7 steps and after 20, so any other batch is one at which SIGTERM came.
    batches = {batch for seed, found in compared.items() if seed % 3 < 2 for batch in found["batches"]}

    assert places >= {"batch", "before", "within", "after"}
    assert batches - {0, 7, 14}


def test_example_prints_the_same_after_a_kill(tmp_path, cache):
    """What the documents show must be what happens."""
    killed = _start(cache, EXAMPLE, "--directory", tmp_path / "killed", "--steps", 7)
    for line in killed.stderr:
        if line.startswith("Epoch 3:"):
            killed.send_signal(signal.SIGKILL)
            break
    killed.communicate()
    whole = _start(cache, EXAMPLE, "--directory", tmp_path / "whole")
    expected, _ = whole.communicate(timeout=120)

    again = _start(cache, EXAMPLE, "--directory", tmp_path / "killed", "--steps", 7)
    said, errors = again.communicate(timeout=120)

    assert (killed.returncode, whole.returncode, again.returncode) == (-signal.SIGKILL, 0, 0), errors
    assert "Resumed from step-" in errors
    assert said == expected
    assert [line.split()[0] for line in said.splitlines()] == [
        "best:",
        "weights",
        "optimizer",
        "key",
        "metrics",
        "history",
    ]
