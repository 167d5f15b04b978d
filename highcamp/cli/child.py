"""The child: a program that runs in our place. It has our terminal, our streams, and every signal that is meant for us.

It leads a process group of its own, so that a signal reaches the processes it has started too, and nobody beside us. A group
that is not in the foreground of its terminal would neither hear Ctrl-C nor be let read: so the terminal is handed over for
as long as it runs, as a shell does. Ctrl-C then reaches it and not us, and what reaches us is passed on: nothing comes twice.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Self

from highcamp.errors import InvalidArgument
from highcamp.training.supervisor import Ending

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType, TracebackType

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the others may mean anything to the program
GRACE_SECONDS = 30.0  # for what a crashed program leaves behind; as long as Slurm and Kubernetes give
LOOK_SECONDS = 0.1


class Child:
    """A program, started as often as is asked for. Used in a `with` block, in the main thread."""

    def __init__(self, command: Sequence[str]) -> None:
        """command: the program and its arguments."""
        self._command = list(command)
        self._group = 0
        self._asked: int | None = None
        self._terminal = _terminal()
        self._before: dict[int, Any] = {}
        self._waiting: deque[int] = deque()

    def __enter__(self) -> Self:
        """Begin to hear signals: each is a byte in a pipe, so that none is lost between two looks."""
        self._wake, self._woken = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._woken, False)
        self._fd_before = signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        for signum in (*PASSED_ON, signal.SIGCHLD, signal.SIGCONT):
            # What is ignored, as SIGHUP under nohup, stays so; the child inherits it.
            if signal.getsignal(signum) != signal.SIG_IGN or signum == signal.SIGCHLD:
                self._before[signum] = signal.signal(signum, _hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The signals as they were."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._wake)
        os.close(self._woken)

    @property
    def was_asked_to_stop(self) -> bool:
        """Whether we were asked to end, and have passed that on."""
        return self._asked is not None

    def run(self) -> Ending:
        """Start it, and wait for its end. Raises InvalidArgument if it cannot be started."""
        self._group = self._start()
        self._give_terminal()
        try:
            while True:
                for signum in self._signals(None):
                    if signum == signal.SIGCHLD:
                        ending = self._look()
                        if ending is not None:
                            return ending
                    elif signum == signal.SIGCONT:
                        self._go_on()
                    else:
                        self._asked = signum if signum in STOPS else self._asked
                        self._send(signum)
        finally:
            self._take_terminal()

    def pause(self, seconds: float) -> int | None:
        """Wait `seconds`, and for what a crash has left of its group; returns a signal that asked to stop instead."""
        self._send(signal.SIGTERM)
        now = time.monotonic()
        until, at_most = now + seconds, now + max(seconds, GRACE_SECONDS)
        while (now := time.monotonic()) < until or (now < at_most and self._send(0)):
            for signum in self._signals(min(LOOK_SECONDS, max(0.0, until - now) or LOOK_SECONDS)):
                if signum in PASSED_ON:
                    return signum
        return None

    def _start(self) -> int:
        # Python ignores these two, and a program that is started would inherit that.
        python_ignores = [each for each in (signal.SIGPIPE, getattr(signal, "SIGXFSZ", None)) if each is not None]
        try:
            return os.posix_spawnp(self._command[0], self._command, os.environ, setpgroup=0, setsigdef=python_ignores)
        except OSError as error:
            raise InvalidArgument(
                f"{self._command[0]} cannot be started: {error.strerror}",
                path=self._command[0],
                hint="give the command as on a command line, for example: highcamp run -- python train.py",
            ) from error

    def _look(self) -> Ending | None:
        """What has become of it; None if it goes on."""
        found, status = os.waitpid(self._group, os.WNOHANG | os.WUNTRACED)
        if not found:
            return None  # a grandchild that was handed to us, or news that is old
        if os.WIFSTOPPED(status):
            self._stop_with_it(os.WSTOPSIG(status))
            return None
        code = os.waitstatus_to_exitcode(status)
        return Ending(code) if code >= 0 else Ending(128 - code, killed_by=-code)

    def _stop_with_it(self, signum: int) -> None:
        """Ctrl-Z: the shell waits for us, so we stop as well; and we both go on when it says so."""
        if signum not in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
            return  # SIGSTOP was meant for it alone
        self._take_terminal()
        if signum == signal.SIGTSTP or not self._is_in_foreground():
            os.killpg(os.getpgrp(), signal.SIGTSTP)  # returns when we go on; at once where no shell could wake us
        self._go_on()

    def _go_on(self) -> None:
        self._give_terminal()
        self._send(signal.SIGCONT)

    def _send(self, signum: int) -> bool:
        """A signal to all of its group, 0 for none; whether there is anybody left in it."""
        try:
            os.killpg(self._group, signum)
        except (ProcessLookupError, PermissionError):  # macOS says the latter of the dead
            return False
        return True

    def _signals(self, timeout: float | None) -> Iterator[int]:
        """Those that have come, in order; waits until there is one, or `timeout` seconds."""
        if not self._waiting and select.select([self._wake], [], [], timeout)[0]:
            with contextlib.suppress(BlockingIOError):
                self._waiting.extend(os.read(self._wake, 4096))
        while self._waiting:
            yield self._waiting.popleft()

    def _is_in_foreground(self) -> bool:
        return self._terminal is not None and os.tcgetpgrp(self._terminal) == os.getpgrp()

    def _give_terminal(self) -> None:
        if self._is_in_foreground():
            self._set_foreground(self._group)

    def _take_terminal(self) -> None:
        if self._terminal is not None and os.tcgetpgrp(self._terminal) == self._group:
            self._set_foreground(os.getpgrp())

    def _set_foreground(self, group: int) -> None:
        if self._terminal is None:
            return
        # Whoever is not in the foreground is stopped for asking, unless it will not hear of it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        try:
            os.tcsetpgrp(self._terminal, group)
        except OSError:
            self._terminal = None  # hung up, or the group has ended already
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _hear(signum: int, frame: FrameType | None) -> None:
    """Nothing: the byte in the pipe is all that is wanted."""


def _terminal() -> int | None:
    """A descriptor of the terminal that controls us, if one of our streams is it."""
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            os.tcgetpgrp(descriptor)
            return descriptor
    return None
