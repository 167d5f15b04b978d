"""`highcamp run` around torchrun: restarts, signals and exit codes go through both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import highcamp

ROOT = Path(highcamp.__file__).parents[1]

# Six epochs of three batches: killed in the third epoch unless it was resumed; then it waits in the next for a signal.
TRAIN = """
import os, signal, time
import torch
from highcamp import Checkpointer

model = torch.nn.Linear(2, 2)
with Checkpointer("runs/digits", verbose=0) as checkpointer:
    checkpointer.track(model=model)
    resumed = None
    for epoch in checkpointer.epochs(6):
        resumed = epoch > 0 if resumed is None else resumed
        for _ in checkpointer.batches(range(3)):
            if resumed:
                print("ready", flush=True)
                while not checkpointer.preemption.is_asked:
                    time.sleep(0.01)
            elif epoch == 2:
                while checkpointer.run.last is None or checkpointer.run.last.epoch < 2:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.timeout(120)
def test_torchrun_is_restarted_and_told_to_stop(tmp_path):
    """It hides how its workers ended, and starts them where our signals do not reach them by themselves."""
    (tmp_path / "train.py").write_text(TRAIN)
    torchrun = ["torch.distributed.run", "--nproc-per-node=1", "--standalone", "train.py"]
    command = [sys.executable, "-m", "highcamp.cli", "run", "--delay", "0s", "--", sys.executable, "-m", *torchrun]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    assert started.stdout.readline() == "ready\n", started.communicate()[1]
    started.send_signal(signal.SIGTERM)
    _, errors = started.communicate(timeout=100)

    run = highcamp.open(tmp_path / "runs" / "digits")
    said = [line for line in errors.splitlines() if line.startswith("highcamp run: ")]
    assert started.returncode == 1  # torchrun's own, whatever its workers end with
    assert "starting again in 0 s from step-00000006 (restart 1 of at most 10)" in said[1]
    assert said[-1] == "highcamp run: not started again, because it was asked to stop"
    assert [(attempt.step, attempt.ended) for attempt in run.history.attempts] == [(0, None), (6, "preempted")]
    assert (run.last.step, run.last.batch) == (7, 1)
