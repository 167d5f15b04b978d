"""Takes snapshots in shared memory until it is killed: `snapshots.py DIRECTORY`, one line of standard input per child.

Started once, so that NumPy and highcamp are imported once; every child is a fork, with a process number and a start of
its own. A line "RUN_ID UID" makes one, as another user if UID is not 0. It answers "child PID", then "sealed SEQUENCE
STEP" after each snapshot, then, when it has been killed and waited for, "ended".
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback

import numpy as np

from highcamp.core import tensorfile
from highcamp.training.slot import SlotFile
from highcamp.training.tier import Tier

PIECE = 4096  # copied in many small pieces, most of the time is in the middle of a copy
LAYOUTS = {
    "model.safetensors": tensorfile.plan({"weight": ("F32", (64, 1024))}, {"format": "pt"}),
    "optimizer.safetensors": tensorfile.plan({"m": ("F64", (32768,)), "step": ("I64", ())}, {"format": "pt"}),
}


def contents(step: int) -> dict[str, bytes]:
    """What the files hold at a step."""
    rng = np.random.default_rng(step)
    return {name: rng.bytes(layout.size) for name, layout in LAYOUTS.items()}


def take(tier: Tier, step: int) -> int:
    """Take one snapshot; returns its sequence."""
    files, offset = [], 0
    for name, layout in LAYOUTS.items():
        files.append(SlotFile(name, layout, offset))
        offset += -(-layout.size // 4096) * 4096
    data = contents(step)
    slot = tier.slot(offset)
    slot.begin()
    for file in files:
        whole = data[file.name]
        for start in range(0, len(whole), PIECE):
            piece = whole[start : start + PIECE]
            slot.view[file.offset + start : file.offset + start + len(piece)] = piece
    slot.seal({"step": step, "objects": {"model": {"w": {"$tensor": "weight"}}}}, files)
    return slot.sequence


def work(directory: str, run_id: str, uid: int) -> None:
    """The child: for ever."""
    if uid:
        os.setuid(uid)
    os.write(1, f"child {os.getpid()}\n".encode())
    tier, step = Tier(run_id, 1, directory=directory), 0
    while True:
        step += 1
        os.write(1, f"sealed {take(tier, step)} {step}\n".encode())


def main() -> None:
    """Serve until standard input ends."""
    with tempfile.TemporaryDirectory() as place:
        take(Tier("run", 1, directory=place), 1)  # imports what another user may not be allowed to read
    for line in sys.stdin:
        run_id, uid = line.split()
        child = os.fork()
        if child == 0:
            try:
                work(sys.argv[1], run_id, int(uid))
            except BaseException:  # noqa: BLE001  (seen by whoever reads the failed test)
                traceback.print_exc()
            finally:
                os._exit(70)
        os.waitpid(child, 0)
        os.write(1, b"ended\n")


if __name__ == "__main__":
    main()
