"""Disks of other kinds: large sectors, small and large blocks, memory. The same bytes, and durable."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Keep
from highcamp.storage import direct

pytestmark = pytest.mark.skipif(
    (os.geteuid() != 0 or not shutil.which("losetup") or not shutil.which("mkfs.ext4")) and not os.environ.get("CI"),
    reason="needs root, losetup and mkfs.ext4",
)


def _run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextlib.contextmanager
def _mounted(place: Path, sector: int, options: list[str], mounting: str):
    """An ext4 of its own on a disk with such sectors, and how to mount it again."""
    image, mount = place / "image", place / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(96 << 20)
    device = _run("losetup", "--find", "--show", "--sector-size", sector, image)
    try:
        _run("mkfs.ext4", "-q", "-F", *options, device)
        _run("mount", "-o", mounting, device, mount)
        try:
            yield mount, lambda: _run("mount", "-o", mounting, device, mount)
        finally:
            _run("umount", mount)
    finally:
        _run("losetup", "--detach", device)


def _save(where: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Two checkpoints of a state whose pieces are large enough for direct I/O, the second with links."""
    monkeypatch.setattr(direct, "LEAST_BYTES", 1 << 20)
    rng = np.random.default_rng(1)
    state = {
        "w": rng.standard_normal(500_000),
        "odd": rng.integers(0, 9, 1_234_567, np.uint8),
        "calm": np.zeros(300_000),
    }
    with Checkpointer(where, keep=Keep(last=9), verbose=0) as checkpointer:
        for step in range(1, 6):
            state["w"] += 1
            state["odd"][::7] += 1
            checkpointer.save({"model": state}, step=step)
    return state


def _look(where: Path, state: dict[str, np.ndarray]) -> None:
    run = highcamp.open(where)
    assert [entry.verify().ok for entry in run.checkpoints] == [True] * 5
    found = run.last.load("model")
    assert all(np.array_equal(found[name], value) for name, value in state.items())
    assert (Path(run.last.path) / "model.1.safetensors").stat().st_nlink == 2


DISKS = {
    "sectors of 512": (512, ["-b", "4096"], "defaults"),
    "sectors of 4096": (4096, ["-b", "4096"], "defaults"),
    "blocks of 1024": (512, ["-b", "1024"], "defaults"),
    "clusters of 64 KiB": (512, ["-O", "bigalloc", "-C", "65536"], "defaults"),
    "a journal of data": (512, ["-b", "4096"], "data=journal"),  # direct writes go through the page cache there
}


@pytest.mark.parametrize("disk", DISKS)
def test_other_disks_take_the_same_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str):
    """A write that the device refuses for its size would fail every save on such a machine."""
    with _mounted(tmp_path, *DISKS[disk]) as (mount, mount_again):
        state = _save(mount / "run", monkeypatch)
        _run("umount", mount)  # what is read now comes from the device
        mount_again()
        _look(mount / "run", state)


def test_a_disk_in_memory_takes_the_same_calls(monkeypatch: pytest.MonkeyPatch):
    """Where people try things out, and where /tmp is one."""
    place = Path("/dev/shm") / f"highcamp-devices-{os.getpid()}"  # noqa: S108
    place.mkdir()
    try:
        _look(place / "run", _save(place / "run", monkeypatch))
    finally:
        shutil.rmtree(place)


def test_a_device_that_wants_larger_blocks_is_written_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Blocks of 64 KiB: the kernel refuses what is aligned to less, and not one piece may be lost over it."""
    plain, refused = os.write, []

    def write(descriptor: int, data: memoryview) -> int:
        import fcntl

        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT and len(data) % 65536:
            refused.append(len(data))
            raise OSError(22, "Invalid argument")
        return plain(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    state = _save(tmp_path / "run", monkeypatch)

    _look(tmp_path / "run", state)
    assert refused
