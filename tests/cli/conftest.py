"""Runs to look at, made by highcamp itself, and ways to call the program: in a pipe, and on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

import pytest

import highcamp
from highcamp.cli.program import main

ROOT = Path(highcamp.__file__).parents[1]

# Twelve epochs: the lowest val_loss in epoch 5, NaN in epoch 3, killed in the middle of epoch 8 when `kill` is given.
SCRIPT = """
import math, os, signal, sys
import numpy as np
from highcamp import Checkpointer, Keep

weights = {"dense/kernel": np.zeros((64, 10), np.float32), "dense/bias": np.zeros(10, np.float32)}
losses = [0.9, 0.7, math.nan, 0.5, 0.3, 0.31, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6]
with Checkpointer(sys.argv[1], monitor="val_loss", keep=Keep(best=2, last=2), verbose=0) as checkpointer:
    checkpointer.track(model=weights)
    for epoch in checkpointer.epochs(12):
        if epoch == 7 and sys.argv[2] == "kill":
            while checkpointer.run.last.epoch < 7:  # written by a thread: which one is resumed must not be chance
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        weights["dense/kernel"] += 0.5
        checkpointer.log(loss=1 / (epoch + 1), val_loss=losses[epoch], val_accuracy=0.9)
"""


@dataclass
class Done:
    """What a call came to."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[list[str]]:
        """The lines of a table in a pipe."""
        return [line.split("\t") for line in self.out.splitlines()]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A run that was killed in epoch 8 and went on to the end."""
    path = tmp_path_factory.mktemp("made") / "digits"
    for word in ("kill", "end"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, path, word], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == (-9 if word == "kill" else 0), done.stderr
    return path


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """A copy of that run, at runs/digits below the current directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("HIGHCAMP_RUN", "COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(made, tmp_path / "runs/digits")
    return highcamp.open(tmp_path / "runs/digits")


@pytest.fixture
def call(capsys):
    """Call the program in this process, as in a pipe."""

    def call(*arguments) -> Done:
        capsys.readouterr()
        code = main([str(each) for each in arguments])
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def start():
    """Call the program in a process of its own."""

    def start(*arguments, **options) -> Done:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
        command = [sys.executable, "-m", "highcamp.cli", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=200, check=False, **options)
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    return start


@pytest.fixture
def terminal():
    """Call the program on a terminal of a given width; gives the screen's text, escape codes included."""

    def terminal(*arguments, width=120, env=None) -> Done:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "NO_COLOR": "1", **(env or {})}
        process = subprocess.Popen(
            [sys.executable, "-m", "highcamp.cli", *map(str, arguments)],
            env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        said = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not piece:
                break
            said += piece
        os.close(ours)
        return Done(process.wait(60), said.decode().replace("\r\n", "\n"), "")

    return terminal
