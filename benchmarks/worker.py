"""Contestants in processes of their own: started here, and told over a pipe what to do next.

An order is a line of JSON, so is its answer. Standard output of the process goes to standard error: frameworks talk.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "KERAS_BACKEND": "jax",
    "PYTHONUNBUFFERED": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class Failed(RuntimeError):
    """A contestant has failed; the message is its traceback."""


class Worker:
    """A process that holds contestants. Made by a `Crew`."""

    def __init__(self, log: Path) -> None:
        """log: what the process prints."""
        self._log = log
        answers, theirs = os.pipe()
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", str(theirs)],
                stdin=subprocess.PIPE, stdout=stream, stderr=stream, pass_fds=[theirs], cwd=ROOT,
                env={**os.environ, **ENVIRONMENT}, text=True,
            )  # fmt: skip
        os.close(theirs)
        self._answers = os.fdopen(answers, encoding="utf-8")

    def make(self, name: str, kind: str, **options: Any) -> None:
        """Make a contestant called `name`. Raises Failed."""
        self._ask({"make": name, "kind": kind, "options": options})

    def call(self, name: str, method: str, **options: Any) -> dict[str, Any]:
        """What a method of the contestant returns. Raises Failed."""
        reply: dict[str, Any] = self._ask({"call": name, "method": method, "options": options})["result"]
        return reply

    def let_go(self, name: str) -> None:
        """Forget a contestant and its memory."""
        self._ask({"drop": name})

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.wait()
        self._answers.close()

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._answers.readline()
        if not line:
            raise Failed(f"{order} ended the process; the end of its log:\n{_tail(self._log)}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise Failed(f"{order}:\n{reply['error']}")
        return reply


def _tail(log: Path) -> str:
    return "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-20:])


class Crew:
    """The processes of one session. With `spare`, those of an ended session are taken again instead of starting others."""

    def __init__(self, log: Path, spare: list[Worker] | None = None) -> None:
        """log: what all processes print."""
        self._log, self._spare = log, spare
        self._workers: list[Worker] = []

    def hire(self, wanted: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, Worker]:
        """A process for each name, with that contestant in it: its kind and options."""
        workers = {name: self.worker() for name in wanted}

        def make(name: str) -> None:
            kind, options = wanted[name]
            workers[name].make(name, kind, **options)

        with ThreadPoolExecutor(len(workers)) as pool:  # imports take seconds, and most of them wait for the disk
            list(pool.map(make, wanted))
        return workers

    def worker(self) -> Worker:
        """A process with no contestant in it."""
        worker = self._spare.pop() if self._spare else Worker(self._log)
        self._workers.append(worker)
        return worker

    def __enter__(self) -> Self:
        """Return the crew."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes, or keep them as spare ones."""
        for worker in self._workers:
            if self._spare is None or error is not None:
                worker.close()
            else:
                worker.let_go("")
                self._spare.append(worker)
        self._workers = []


def contestant(kind: str) -> Any:
    """The class of a contestant; imported now, in the process that needs it."""
    from benchmarks import epochs, idle, limits, loops, ours, peers

    kinds: dict[str, Any] = {
        "limits": limits.Limits,
        "highcamp": ours.Ours,
        "highcamp partly": ours.OursPartly,
        "torch.save": peers.TorchSave,
        "safetensors": peers.Safetensors,
        "dcp.save": peers.Dcp,
        "dcp.async_save": peers.DcpAsync,
        "orbax": peers.Orbax,
        "step": loops.Step,
        "training": loops.Training,
        "epochs": epochs.Epochs,
        "idle": idle.Idle,
    }
    return kinds[kind]


def main(descriptor: int) -> None:
    """Follow orders until there are no more."""
    held: dict[str, Any] = {}
    with os.fdopen(descriptor, "w", encoding="utf-8", buffering=1) as answers:
        for line in sys.stdin:
            order = json.loads(line)
            try:
                answer = _follow(order, held)
            except BaseException:  # noqa: BLE001  (told to the one who has ordered)
                answer = {"error": traceback.format_exc()}
            answers.write(json.dumps(answer) + "\n")


def _follow(order: dict[str, Any], held: dict[str, Any]) -> dict[str, Any]:
    if "make" in order:
        held[order["make"]] = contestant(order["kind"])(**order["options"])
        return {}
    if "call" in order:
        return {"result": getattr(held[order["call"]], order["method"])(**order["options"])}
    for name in [order["drop"]] if order["drop"] else list(held):
        found = held.pop(name)
        if hasattr(found, "settle"):
            found.settle()
    return {}


if __name__ == "__main__":
    main(int(sys.argv[1]))
