"""JAX with several devices, and in several processes: each needs a process that has begun as one of such."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import highcamp

HERE = Path(__file__).parent
ROOT = Path(highcamp.__file__).parent.parent


def _start(*command, **environment):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_checks_on_four_devices():
    """What `inner/check_devices.py` says."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "python_files=check_*.py"]
    checks = _start("-m", "pytest", HERE / "inner", *options, XLA_FLAGS="--xla_force_host_platform_device_count=4")

    said, _ = checks.communicate(timeout=280)

    assert checks.returncode == 0, said[-8000:]
    assert " passed" in said


def test_an_array_of_several_processes_is_refused(tmp_path):
    """Each process has a part of it only: saved by one, the rest would be missing."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        _start("-W", "error", HERE / "distributed_script.py", address, number, tmp_path) for number in range(2)
    ]

    said = [process.communicate(timeout=120)[0] for process in processes]

    assert [process.returncode for process in processes] == [0, 0], said
    for words in said:
        assert "params/w: a JAX array of shape (4,) and dtype float32 has shards in other processes" in words
        assert "params/w: has shards in other processes here" in words
        assert "[0. 1. 2. 3.]" in words
