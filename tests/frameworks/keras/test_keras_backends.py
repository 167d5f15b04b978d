"""Keras on its three backends, each in processes of its own: a process has one backend for life."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import highcamp

HERE = Path(__file__).parent
ROOT = Path(highcamp.__file__).parent.parent
BACKENDS = ["jax", "tensorflow", "torch"]


def _run(backend, *command, code=0):
    """Run Python with a Keras backend; the environment for one that the person at the keyboard can repeat."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    repeat = f"KERAS_BACKEND={backend} python {' '.join(map(str, command))}"
    assert done.returncode == code, f"{repeat}\nexit {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_checks_of_the_backend(backend):
    """What the files of `inner` say, on each backend."""
    chosen = [] if backend == "torch" else ["-m", "not once"]
    # Keras hands its variables to NumPy in a way that NumPy 2 calls outdated; that is not ours to change.
    quiet = ["-W", "ignore:__array__ implementation:DeprecationWarning"]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "python_files=check_*.py", *quiet, *chosen]

    said = _run(backend, "-m", "pytest", HERE / "inner", *options)

    assert " passed" in said


@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_and_run_again_equals_uninterrupted(tmp_path, backend):
    """Weights, optimizer, history and predictions, bit for bit, after SIGKILL in an epoch's middle."""
    script = HERE / "train_script.py"
    deaths = {"arrays": "2.3", "data": "1.6"} | ({"kept": "2.4"} if backend == "jax" else {})
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()

    _run(backend, script, ",".join(deaths), tmp_path / "whole")
    for mode, place in deaths.items():
        _run(backend, script, mode, tmp_path / "killed", place, code=-signal.SIGKILL)
    said = _run(backend, script, ",".join(deaths), tmp_path / "killed")

    assert highcamp.open(tmp_path / "killed" / "data").history.attempts[1].batch > 0
    if "kept" in deaths:  # not a step of the last epoch is trained again
        resumed = highcamp.open(tmp_path / "killed" / "kept").history.attempts[1]
        assert (resumed.step, resumed.epoch, resumed.batch) == (21, 2, 5)
        assert "Recovered step-00000021 from shared memory (newer than step 16 on disk)" in said
    for mode in deaths:
        assert len(highcamp.open(tmp_path / "killed" / mode).history.attempts) == 2
        with (
            np.load(tmp_path / "whole" / f"{mode}.npz") as whole,
            np.load(tmp_path / "killed" / f"{mode}.npz") as killed,
        ):
            assert sorted(whole.files) == sorted(killed.files)
            differing = [name for name in whole.files if whole[name].tobytes() != killed[name].tobytes()]
            assert differing == []


def test_weights_move_between_backends(tmp_path):
    """Trained on one, used on another: the same predictions up to rounding."""
    _run("jax", HERE / "train_script.py", "arrays", tmp_path)
    code = (
        "import sys, keras, numpy as np, highcamp\n"
        "checkpoint = highcamp.open(sys.argv[1]).last\n"
        "model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, activation='relu'), keras.layers.Dropout(0.5),"
        " keras.layers.Dropout(0.2, seed=3), keras.layers.BatchNormalization(), keras.layers.Dense(1, activation='sigmoid')])\n"
        "checkpoint.restore(model=model)\n"
        "x = np.random.default_rng(0).random((32, 6)).astype('float32')\n"
        "saved = checkpoint.load('model')\n"
        "assert np.array_equal(saved['dense/kernel'], keras.ops.convert_to_numpy(model.layers[0].kernel))\n"
        "np.save(sys.argv[2], model.predict(x, verbose=0))\n"
    )

    for backend in ("torch", "tensorflow"):
        _run(backend, "-c", code, tmp_path / "arrays", tmp_path / f"{backend}.npy")

    one, other = np.load(tmp_path / "torch.npy"), np.load(tmp_path / "tensorflow.npy")
    assert np.allclose(one, other, atol=1e-6)


def test_killed_while_saving(tmp_path):
    """In Keras the old best is gone and the new one is half a file."""
    script = HERE / "save_script.py"
    _run("torch", script, tmp_path, "kill", code=-signal.SIGKILL)
    assert len(list(tmp_path.iterdir())) == 2

    said = _run("torch", script, tmp_path)

    assert said.strip() == "0.5"
    assert [entry.name for entry in tmp_path.iterdir()] == ["best.keras"]
