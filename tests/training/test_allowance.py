"""The memory that a container leaves: beyond it the kernel kills, without a word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from highcamp.training.allowance import left_bytes

SECOND = ("memory.max", "memory.current", "inactive_file")
FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def group(place, names, limit, used, cache=0):
    """The files of one control group, as the kernel writes them."""
    place.mkdir(parents=True, exist_ok=True)
    (place / names[0]).write_text(f"{limit}\n")
    (place / names[1]).write_text(f"{used}\n")
    (place / "memory.stat").write_text(f"anon 7\n{names[2]} {cache}\nunevictable 0\n")


def asked(tmp_path, own):
    """The answer, where the kernel says `own`."""
    (tmp_path / "own").write_text(own)
    return left_bytes(str(tmp_path / "groups"), str(tmp_path / "own"))


@pytest.mark.parametrize(
    ("names", "top", "own"), [(SECOND, ".", "0::/job/step\n"), (FIRST, "memory", "3:cpu:/\n4:memory:/job/step\n0::/\n")]
)
def test_the_tightest_limit_above_us_counts(tmp_path, names, top, own):
    """A job's limit kills all of its steps."""
    groups = tmp_path / "groups" / top
    group(groups / "job", names, 1000, 700)
    group(groups / "job" / "step", names, 5000, 600)
    assert asked(tmp_path, own) == 300


@pytest.mark.parametrize(("limit", "left"), [("max", None), (9_223_372_036_854_771_712, 9_223_372_036_854_771_112)])
def test_no_limit_is_none_or_beyond_every_machine(tmp_path, limit, left):
    """The second version says max, the first a huge number."""
    group(tmp_path / "groups", SECOND, limit, 600)
    assert asked(tmp_path, "0::/\n") == left


def test_what_the_kernel_can_drop_counts_as_left(tmp_path):
    """Reading the data set fills the group with cached files, which give way to anybody."""
    group(tmp_path / "groups", SECOND, 1000, 990, cache=800)
    assert asked(tmp_path, "0::/\n") == 810


def test_within_a_container_the_group_is_at_the_top(tmp_path):
    """Its path is that of the host, where nothing of it is mounted."""
    group(tmp_path / "groups" / "memory", FIRST, 1000, 400)
    assert asked(tmp_path, "4:memory:/docker/0123abcd\n") == 600


def test_where_nothing_is_told_nothing_is_guessed(tmp_path):
    """Such files are Linux's."""
    assert left_bytes(str(tmp_path), str(tmp_path / "absent")) is None
    assert asked(tmp_path, "0::/\n") is None
    assert asked(tmp_path, "garbage\n\n4:memory\n") is None


PROGRAM = """
import sys, warnings
import numpy as np
from highcamp import Checkpointer, Every

with Checkpointer(sys.argv[1], memory_every=Every(steps=1), every=Every(steps=1000), verbose=1) as checkpointer:
    state = {"weights": np.ones(5_000_000)}  # 40 MB: with two slots beside it, more than the limit
    for step in range(1, 4):
        checkpointer.save_if_due(state, step=step)
print("trained to the end")
"""


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/sys/fs/cgroup").is_dir(), reason="needs root and control groups")
def test_a_container_too_small_for_snapshots_in_memory_trains_on_without_them(tmp_path):
    """The second slot would be granted, and the kernel would kill the training for it."""
    first = Path("/sys/fs/cgroup/memory")
    top, names = (first, FIRST) if first.is_dir() else (Path("/sys/fs/cgroup"), SECOND)
    place = top / f"highcamp-test-{os.getpid()}"
    try:
        place.mkdir()
        (place / names[0]).write_text(str(120 << 20))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        enter = f"import os; open({str(place / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        done = subprocess.run(
            [sys.executable, "-c", enter + PROGRAM, str(tmp_path / "run")], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "trained to the end" in done.stdout
        assert "shared memory" in done.stderr or "shared memory" in done.stdout
    finally:
        place.rmdir()
