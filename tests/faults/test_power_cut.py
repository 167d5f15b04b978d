"""Power cuts: a real file system that loses everything it was not made to keep."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

import highcamp

if TYPE_CHECKING:
    from pathlib import Path

SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN: the file system stops at once, as if the machine had lost power
LOG_FLUSHED, LOG_NOT_FLUSHED = 1, 2

WORKER = """
import sys
import numpy as np
from highcamp import Checkpointer, Every, Keep

with Checkpointer(sys.argv[1], monitor="val_loss", every=Every(steps=1), keep=Keep(best=1, last=2), verbose=0) as checkpointer:
    # The weights are large enough to be written past the page cache, and the base to be linked once it has been calm.
    like = {"model": {"w": np.zeros(530_000), "base": np.zeros(140_000)}}
    checkpointer.restore(like=like)
    for step in range(checkpointer.step + 1, 10_000):
        checkpointer.log(step=step, val_loss=1 / step)
        like["model"]["w"][:] = step
        checkpointer.save(like, step=step).wait()
        print(step, flush=True)
"""

can_cut = os.geteuid() == 0 and sys.platform == "linux" and shutil.which("mkfs.ext4") is not None


@pytest.fixture
def disk(tmp_path: Path):
    """An ext4 of its own, and how to mount it."""
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(48 << 20)
    _run("mkfs.ext4", "-q", "-F", image)

    def attach() -> None:
        _run("mount", "-o", "loop", image, mount)

    yield mount, attach
    with contextlib.suppress(AssertionError):  # after a failure it may not be mounted
        _run("umount", mount)


@pytest.mark.skipif(not can_cut and not os.environ.get("CI"), reason="needs root and mkfs.ext4 (e2fsprogs)")
@pytest.mark.parametrize("flag", [LOG_FLUSHED, LOG_NOT_FLUSHED], ids=["log-flushed", "log-not-flushed"])
def test_power_cut_after_ack(disk, flag):
    """Renamed without fsync, a checkpoint that was acknowledged has files of 0 bytes, or is gone."""
    mount, attach = disk
    chance = random.Random(flag)
    attach()
    acknowledged = 0
    for _ in range(6):
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(mount / "run")],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        lines = []
        try:
            lines += [worker.stdout.readline() for _ in range(chance.randrange(1, 6))]
            time.sleep(chance.random() * 0.02)  # anywhere within the next save
            _cut(mount, flag)
        finally:
            worker.kill()
            lines += worker.stdout.read().splitlines(keepends=True)
            worker.wait()
            worker.stdout.close()
        acknowledged = max([acknowledged, *(int(line) for line in lines if line.endswith("\n"))])
        _run("umount", mount)
        attach()

        run = highcamp.open(mount / "run")
        assert acknowledged
        assert run.last.step >= acknowledged
        assert run.best.step >= acknowledged  # the value falls with each step, so a lost row would show
        assert [entry.verify().state for entry in run.checkpoints] == ["whole"] * len(run.checkpoints)
        assert set(run.last.load("model")["w"].tolist()) == {float(run.last.step)}


def _run(command: str, *arguments: object) -> None:
    done = subprocess.run([shutil.which(command), *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _cut(mount: Path, flag: int) -> None:
    descriptor = os.open(mount, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", flag))
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
