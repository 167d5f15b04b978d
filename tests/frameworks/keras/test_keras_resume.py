"""The example, killed again and again in batches, evaluations and saves, ends as one that was never interrupted."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import highcamp

HERE = Path(__file__).parent
ROOT = Path(highcamp.__file__).parent.parent
EXAMPLE = ROOT / "examples" / "keras_digits.py"
NEVER = 1_000_000_000
CASES = [  # backend, seed, steps between saves within epochs
    ("torch", 1, 7),
    ("torch", 2, None),
    ("jax", 4, None),
    ("tensorflow", 5, 7),
]


def _run(backend, place, fuse, steps):
    """The example in a process of its own; the exit code, and what it has said."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    chosen = [] if steps is None else ["--steps", steps]
    command = [
        HERE / "deadly_script.py",
        EXAMPLE,
        fuse,
        f"{place}.deaths",
        "--directory",
        place,
        "--epochs",
        3,
        *chosen,
    ]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def _killed_until_finished(backend, place, seed, steps):
    """Everything that is to be compared, and where it has died."""
    rng = random.Random(seed)
    _, whole, errors = _run(backend, place / "whole", NEVER, steps)
    assert "weights" in whole, errors
    # Once while a file is being written; then in a batch of training or of evaluation, where odd numbers only ask it to stop.
    fuses = [
        f"within:{rng.randrange(2, 6)}",
        f"evaluation:{rng.randrange(2, 5)}" if seed % 2 else f"batch:{rng.randrange(3, 15)}",
    ]
    codes = [_run(backend, place / "killed", fuse, steps)[0] for fuse in fuses]
    code, killed, errors = _run(backend, place / "killed", NEVER, steps)
    assert code == 0, errors[-3000:]
    history = [
        [(row.epoch, row.step, dict(row.metrics)) for row in highcamp.open(place / name).history.epochs()]
        for name in ("whole", "killed")
    ]
    deaths = (place / "killed.deaths").read_text().split("\n")[:-1]
    return _digests(whole), _digests(killed), history, codes, deaths


def _digests(said):
    """The last lines of the example."""
    return said[said.index("weights ") :].splitlines()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Every case, two at a time; each is waited for by its own test."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            case: pool.submit(
                _killed_until_finished, case[0], tmp_path_factory.mktemp(f"{case[0]}_{case[1]}"), *case[1:]
            )
            for case in CASES
        }


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_killed_and_run_again_equals_uninterrupted(compared, case):
    """Weights, optimizer, metrics and history, bit for bit: else it is another training."""
    whole, killed, history, codes, deaths = compared[case].result()

    assert killed == whole, f"died at {deaths}"
    assert [line.split()[0] for line in whole] == ["weights", "optimizer", "metrics", "history"]
    assert history[0] == history[1]
    assert len(history[0]) == 3
    assert codes[0] == -signal.SIGKILL
    assert codes[1] in (-signal.SIGKILL, 143)
    assert len(deaths) == 2


def test_deaths_were_in_the_middle_of_everything(compared):
    """A test that only dies between saves proves little."""
    found = [each.result() for each in compared.values()]
    deaths = [death for *_, places in found for death in places]
    codes = {code for *_, ends, _ in found for code in ends}

    assert {death.split()[0] for death in deaths} >= {"batch", "evaluation", "within"}, deaths
    assert codes == {-signal.SIGKILL, 143}


def test_signals_that_keep_coming_change_nothing(tmp_path):
    """An impatient scheduler sends SIGTERM again and again, also while the checkpoint is written."""
    environment = {**os.environ, "KERAS_BACKEND": "torch", "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-u", str(EXAMPLE), "--directory", str(tmp_path / "run"), "--epochs", "400"]
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        while b"Epoch 2" not in process.stdout.readline():
            assert process.poll() is None
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.005)

    run = highcamp.open(tmp_path / "run")
    assert process.returncode in (143, -signal.SIGTERM)  # the latter by one that came when all was saved
    assert run.history.attempts[0].ended == "preempted"
    assert run.last.step > 20
    assert all(found.is_whole for found in run.verify())
