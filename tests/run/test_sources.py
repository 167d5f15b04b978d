"""Where the bytes of a save come from, and who may commit them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

import highcamp
from highcamp import Checkpointer, Every, Keep

STARTER = """
import sys
import numpy as np
from highcamp import Checkpointer, Every
from highcamp.errors import RunLocked

checkpointer = Checkpointer(sys.argv[1], every=Every(steps=1), verbose=0)
try:
    checkpointer.restore(like={"w": np.zeros(2)})
    checkpointer.save({"w": np.ones(2)}, step=1).wait()
except RunLocked:
    print("refused")
else:
    print("committed", flush=True)
    sys.stdin.readline()
    checkpointer.close()
"""


def test_mapped_source_is_safe(tmp_path: Path):
    """Tensors mapped from a checkpoint and saved again could be written over the file they are read from."""
    values = np.arange(5000.0)
    with Checkpointer(tmp_path, every=Every(steps=1), keep=Keep(best=0, last=1), verbose=0) as checkpointer:
        checkpointer.save({"model": {"w": values}}, step=1).wait()
        mapped = checkpointer.run.last.load("model")
        for step in (1, 2):  # the same step again, and one that removes what is mapped
            checkpointer.save({"model": mapped}, step=step).wait()

        assert np.array_equal(mapped["w"], values)
    assert np.array_equal(highcamp.open(tmp_path).last.load("model")["w"], values)


def test_one_process_commits(tmp_path: Path):
    """Several ranks started on one directory would each rename its own checkpoint into place."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER, str(tmp_path / "run")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = sorted(process.stdout.readline().strip() for process in processes)
    for process in processes:
        process.communicate("\n", timeout=30)

    assert said == ["committed", "refused", "refused"]
    assert len(highcamp.open(tmp_path / "run").checkpoints) == 1


def test_what_was_loaded_is_let_go_of_at_once(tmp_path: Path):
    """A mapping that lives until the garbage collector runs keeps a disk busy, and a restored state in memory twice."""
    import gc

    with Checkpointer(tmp_path, every=Every(steps=1), verbose=0) as checkpointer:
        checkpointer.save({"model": {"w": np.arange(5000.0)}}, step=1).wait()
        gc.collect()
        gc.disable()
        try:
            for read in (checkpointer.run.last.load, checkpointer.run.last.state):
                before = Path("/proc/self/maps").read_text().count("model.safetensors")
                read("model")
                assert Path("/proc/self/maps").read_text().count("model.safetensors") == before
        finally:
            gc.enable()
