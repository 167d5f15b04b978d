"""Processes that are killed, or whose system calls fail: a nursery of them, and the calls they make."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fault_scene as scene

from highcamp.storage.local import LocalStore

STRIDE = int(os.environ.get("HIGHCAMP_FAULT_STRIDE", "2"))
HERE = Path(__file__).parent
CALLS = (
    "mkdir", "mkdirat", "openat", "write", "pwrite64", "writev", "fsync", "fdatasync", "rename", "renameat", "renameat2",
    "link", "linkat", "unlink", "unlinkat", "rmdir", "ftruncate", "close",
)  # fmt: skip
LINE = re.compile(r"(?P<pid>\d+)\s+(?P<call>\w+)\((?P<rest>.*)")


class Nursery:
    """A process that forks children to be killed; see kill_nursery.py."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "kill_nursery.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), *sys.path])},
        )  # fmt: skip

    def close(self):
        """End it."""
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def _say(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def run(self, directory, diary, *, inject=None, log=None, after_seconds=None, strips=False):
        """One child's work; returns how it ended. inject: for strace. log: strace's. after_seconds: SIGKILL then.

        strips: whether a best gives back its resume state.
        """
        self._say(f"{directory} {diary}{' strip' if strips else ''}")
        child = int(self.process.stdout.readline())
        tracer = None
        if inject or log:
            arguments = ["strace", "-f", "-y", "-p", str(child), "-e", f"trace={','.join(CALLS)}", "-o", str(log)]
            arguments += ["-e", f"inject={inject}"] if inject else []
            tracer = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
            said = tracer.stderr.readline()
            assert "attached" in said, f"strace cannot trace here: {said}"
        self._say("go")
        if after_seconds is not None:
            time.sleep(after_seconds)
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(child, signal.SIGKILL)
        ended = self.process.stdout.readline().strip()
        if tracer is not None:
            tracer.communicate(timeout=60)
        return ended


def prepared(place, name):
    """A run with two checkpoints, and the path of the diary that lies beside it."""
    template, path = place / "template", place / f"{name}.diary"
    if not template.exists():
        diary = scene.Diary()
        scene.prepare(LocalStore(template), diary)
        (place / "template.diary").write_text("".join(f"{line}\n" for line in diary.lines))
    shutil.copytree(template, place / name)
    shutil.copy(place / "template.diary", path)
    return LocalStore(place / name), path


def whole_lines(path):
    """The diary of a process that may have died in the middle of a line: that line does not count."""
    diary = scene.Diary()
    diary.lines = path.read_text().split("\n")[:-1]
    return diary


def lines_of(log):
    """The lines of a log of strace; a call that another thread's call cut in two is put together again."""
    begun, found = {}, []
    for line in log.read_text().splitlines():
        pid, _, text = line.partition(" ")
        if text.endswith("<unfinished ...>"):
            begun[pid] = line.removesuffix("<unfinished ...>")
        elif " resumed>" in text and pid in begun:
            found.append(begun.pop(pid) + text.partition(" resumed>")[2])
        else:
            found.append(line)
    return found


def calls_of(log, directory):
    """Every call in a log of strace that changes something below `directory`: (call, its number among its kind, text)."""
    counts, found, written = {}, [], set()
    below = re.compile(rf'{re.escape(str(directory))}[/>"]')  # not the diary beside it
    for line in lines_of(log):
        match = LINE.match(line)
        if match is None:
            continue
        call, rest = match["call"], match["rest"]
        counts[call] = counts.get(call, 0) + 1
        if not below.search(rest) or (call == "openat" and "O_CREAT" not in rest):
            continue
        path = rest.partition("<")[2].partition(">")[0]
        if call in ("write", "pwrite64", "writev", "fsync", "fdatasync"):
            written.add(path)
        elif call == "close":
            if path not in written:  # it was only read
                continue
            written.discard(path)
        found.append((call, counts[call], rest))
    return found
