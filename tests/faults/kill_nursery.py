"""Gives birth to processes that are to be killed: each does the work of fault_scene in a directory of its own.

Started once, so that NumPy and highcamp are imported once; every child is a fork. A line on standard input, "DIRECTORY
DIARY", makes one, with " strip" at its end one whose bests give back their resume state; its process id is the answer.
The child waits until "go" comes on the next line, so that strace can be attached before it begins, then the way it ended is
the answer: "ended 0", "killed 9".
"""

from __future__ import annotations

import os
import sys
import traceback

import fault_scene as scene

from highcamp.storage.local import LocalStore

READY = os.O_WRONLY | os.O_APPEND | os.O_CREAT


def work(directory: str, diary_path: str, *, strips: bool) -> None:
    """The child: what is acknowledged goes, a line at a time, to a file outside the run."""
    diary_file = os.open(diary_path, READY)
    diary = scene.Diary(lambda line: os.write(diary_file, f"{line}\n".encode()))
    scene.work(LocalStore(directory), diary, keep=scene.STRIP if strips else scene.KEEP)


def main() -> None:
    """Serve until standard input ends."""
    for line in sys.stdin:
        directory, diary_path, *words = line.split()
        wait, go = os.pipe()
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.read(wait, 1)
                work(directory, diary_path, strips=words == ["strip"])
                code = 0
            except BaseException:  # noqa: BLE001  (told by the exit code)
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(wait)
        print(child, flush=True)
        sys.stdin.readline()
        os.write(go, b"!")
        os.close(go)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else "ended", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
