"""The writer: one save in the background at a time; its error surfaces at the next call and at close."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING

from highcamp.errors import HighcampError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from highcamp.run.checkpoint import Checkpoint

    Job = Callable[[Callable[[Checkpoint], None]], None]
    """Commits a checkpoint, hands it over as soon as it is durable, and then does what is left to do."""


class Pending:
    """A save under way."""

    def __init__(self, name: str, job: Job) -> None:
        """job: what commits it, run in a thread of its own by `begin`. name: what is being saved, for messages."""
        self.name = name
        self._pid = os.getpid()
        self._job = job
        self._result: Checkpoint | None = None
        self._error: BaseException | None = None
        self._was_seen = False
        self._claim = threading.Lock()
        # Not `join`: Ctrl-C within it makes Python 3.11 take a running thread for one that has ended.
        self._durable, self._done = threading.Event(), threading.Event()

    def begin(self) -> None:
        """Start the thread; if even that is interrupted, the job either runs or never will, and `wait` knows which."""
        # Not a daemon: the interpreter waits for it at exit, however the program ends, and needs no executor to do so.
        thread = threading.Thread(target=self._run, name=f"highcamp-save-{self.name}", daemon=False)
        try:
            thread.start()
        except BaseException as error:
            if self._claim.acquire(blocking=False):
                self._error, self._was_seen = error, True
                self._end()
            raise

    @property
    def is_done(self) -> bool:
        """Whether the save and all that follows it has ended, well or not."""
        return self._done.is_set()

    @property
    def is_of_this_process(self) -> bool:
        """False in a child that was forked while it was under way: the thread is the parent's."""
        return self._pid == os.getpid()

    def wait(self, timeout: float | None = None) -> Checkpoint:
        """The checkpoint, durable; or the error that kept it from being one. Raises TimeoutError after `timeout` seconds."""
        if not self._durable.wait(timeout):
            raise TimeoutError(f"the save of {self.name} is not durable after {timeout} s; it goes on")
        if self._result is not None:
            return self._result
        self._was_seen = True
        if self._error is not None:
            raise self._error
        raise StorageError(f"the save of {self.name} ended without a result")

    def unseen_error(self) -> BaseException | None:
        """Wait for the end, and return an error that nobody has been told of yet; asking counts as being told."""
        self._done.wait()
        error = None if self._was_seen else self._error
        self._was_seen = True
        return error

    def _run(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._job(self._acknowledge)
        except BaseException as error:  # noqa: BLE001  (raised again in the thread that asks)
            self._error = error
        finally:
            self._job = _nothing  # lets go of the snapshot
            self._end()

    def _acknowledge(self, checkpoint: Checkpoint) -> None:
        """The checkpoint is durable; what the job does from here on, nobody waits for but the next save."""
        self._result = checkpoint
        self._durable.set()

    def _end(self) -> None:
        self._durable.set()
        self._done.set()


def _nothing(_: Callable[[Checkpoint], None]) -> None:
    raise StorageError("this save has run already")


class Writer:
    """Runs one save at a time; starting the next waits for the one before."""

    def __init__(self) -> None:
        """Nothing is under way."""
        self._pid = os.getpid()
        self._pending: Pending | None = None
        self._held: BaseException | None = None
        _writers.add(self)

    @property
    def is_of_this_process(self) -> bool:
        """False in a child that was forked while saves were under way: their threads are the parent's."""
        return self._pid == os.getpid()

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way."""
        pending = self._pending
        return pending is not None and pending.is_of_this_process and not pending.is_done

    def start(self, name: str, job: Job) -> Pending:
        """Start a save; the one before must have been drained."""
        self._pending = pending = Pending(name, job)  # ours to wait for before it can be interrupted
        pending.begin()
        return pending

    def hold(self, error: BaseException) -> None:
        """Keep an error that could not be raised where it happened, for the next `drain`."""
        self._held = error

    def drain(self) -> BaseException | None:
        """Wait until nothing is under way; returns an error that nobody has been told of yet."""
        held, self._held = self._held, None
        if held is not None:
            return held
        pending = self._pending
        if pending is None or not pending.is_of_this_process:
            return None
        error = pending.unseen_error()  # after Ctrl-C in here the save goes on, and is still ours to wait for
        self._pending = None
        return error


_writers: weakref.WeakSet[Writer] = weakref.WeakSet()


@atexit.register
def _report_unseen() -> None:
    """A program that ends without asking must not end as if its last save had worked."""
    ours = [writer for writer in list(_writers) if writer.is_of_this_process]  # a forked child has copies
    errors = [error for writer in ours if (error := writer.drain()) is not None]
    for error in errors:
        words = str(error) if isinstance(error, HighcampError) else repr(error)
        print(f"highcamp: not saved: {words}", file=sys.stderr)  # noqa: T201
    if errors:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the exit code cannot be changed in any other way this late
