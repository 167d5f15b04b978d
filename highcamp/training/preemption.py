"""Preemption: signals to a flag, the flag to a save at the next step boundary.

A cluster that takes a machine away says so first: SIGTERM, SIGUSR1 or SIGUSR2 (`sbatch --signal=USR1@120`), or a time by
which the job must be gone. A person presses Ctrl-C. All of these only set a flag, because a signal arrives within any
instruction, also while the writer holds a lock. The loop looks at the flag where a step has ended, saves, and stops.

Exit codes are those of a shell: 128 + signal, so 143 for SIGTERM, 138 for SIGUSR1 and 140 for SIGUSR2 on Linux; nothing but 0
may mean that training is done, because jobs that depend on it would begin. Ctrl-C ends as KeyboardInterrupt, which a shell
counts as 130 and takes as the wish to end its own loop too. A deadline ends with 75, EX_TEMPFAIL of sysexits.h: not an
error, try again later; it is the code that sites list in Slurm's `RequeueExit`.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from highcamp.training.deadline import deadline_of, deadline_words

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
LEAD_SECONDS = 60.0  # for the step under way, and for what comes after the save
SAME_PRESS_SECONDS = 0.2  # a terminal and a supervisor may both deliver one Ctrl-C
TEMPORARY_FAILURE = 75  # os.EX_TEMPFAIL, which not every platform has
_BETWEEN = {"highcamp", "keras", "lightning", "pytorch_lightning", "transformers", "accelerate"}
_NOTICE = b"\nCtrl-C: saving at the next step, then stopping; once more stops at once\n"


class Preemption:
    """Whether this process has been asked to stop, by what, and how it ends.

    unheard: signals that are not listened to, each with the reason, after `install`.
    """

    def __init__(self, *, notice: bool = False) -> None:
        """Nothing is listened to yet. notice: answer Ctrl-C on a terminal at once, because the save may be a while."""
        self.unheard: dict[str, str] = {}
        self._notice = notice
        self._is_set = False
        self._reason: str | None = None
        self._exit_code = 0
        self._kept: BaseException | None = None  # what an earlier handler raised; it has the last word
        self._heard: dict[int, float] = {}  # signal -> when it was first heard
        self._deadline: float | None = None
        self._save_seconds = 0.0
        self._ask_at: float | None = None
        self._loop: CodeType | None = None

    @property
    def is_asked(self) -> bool:
        """Whether to save and stop. Looked at after each step, so it costs no more than a look at the clock."""
        if self._ask_at is not None and not self._is_set and time.time() >= self._ask_at:
            self.ask(deadline_words((self._deadline or 0.0) - time.time()), TEMPORARY_FAILURE)
        return self._is_set

    @property
    def reason(self) -> str | None:
        """What asked: "SIGTERM", "Ctrl-C", "deadline in 30 s"; None while nothing has."""
        return self._reason

    @property
    def exit_code(self) -> int:
        """How the process ends, as a shell counts: 128 + signal, or 75 for a deadline; 0 while nothing has asked."""
        return self._exit_code

    def ask(self, reason: str = "asked by the program", exit_code: int = TEMPORARY_FAILURE) -> None:
        """Set the flag by hand: from another thread, or where no signal can be listened to. The first reason stays."""
        if not self._is_set:
            self._reason, self._exit_code = reason, exit_code
            self._is_set = True  # last: whoever sees it finds the rest

    def expect(self, save_seconds: float) -> None:
        """A save took so long, from its call until it was durable: a deadline is met by twice as much earlier."""
        self._save_seconds = max(self._save_seconds, save_seconds)
        self._ask_at = None if self._deadline is None else self._deadline - LEAD_SECONDS - 2 * self._save_seconds

    def install(self) -> None:
        """Listen to signals and to the clock. Twice is once. Raises InvalidArgument for a deadline that is no time.

        Signals can be listened to in the main thread of the main interpreter only. One that is ignored stays ignored, one
        that belongs to a handler outside Python is left to it.
        """
        self._deadline = deadline_of(os.environ)
        self.expect(0.0)
        self.unheard = _listen(self)

    def locate(self) -> None:
        """The function that calls us trains: Ctrl-C counts while it runs. Elsewhere it means what it always means.

        After an exception nobody may have told us that training is over, and in a notebook nothing else would.
        """
        frame: FrameType | None = sys._getframe()  # noqa: SLF001  (the only door to one's caller)
        while frame is not None and _is_between(frame):
            frame = frame.f_back
        is_main = threading.current_thread() is threading.main_thread()
        self._loop = frame.f_code if frame is not None and is_main else None

    def remove(self) -> None:
        """Listen no more, and look at the clock no more; the last one to leave puts the earlier handlers back."""
        self._ask_at = None
        _listen_no_more(self)

    def stop(self) -> NoReturn:
        """End as asked: by what an earlier handler raised, or by SystemExit with the exit code."""
        kept, self._kept = self._kept, None
        if kept is not None:
            raise kept.with_traceback(None)
        raise SystemExit(self._exit_code)

    def _hear(self, signum: int) -> bool:
        """Runs within a signal handler: no lock, no logging. Whether it is the second time somebody presses Ctrl-C."""
        now = time.monotonic()
        first = self._heard.setdefault(signum, now)
        is_interrupt = signum == signal.SIGINT
        self.ask("Ctrl-C" if is_interrupt else signal.Signals(signum).name, 128 + signum)
        if is_interrupt and first == now and self._notice:
            with contextlib.suppress(OSError):
                os.write(2, _NOTICE)  # one system call, unlike a stream, which has a lock
        return is_interrupt and now - first > SAME_PRESS_SECONDS

    def _is_training(self, frame: FrameType | None) -> bool:
        """Whether what is running, and was interrupted in `frame`, was called by the function that trains."""
        if self._loop is None:
            return True
        while frame is not None and frame.f_code is not self._loop:
            frame = frame.f_back
        return frame is not None

    def _keep(self, error: BaseException) -> None:
        self._kept = self._kept or error


class _Handler:
    """What stands in a signal's place while somebody listens; passes on to what stood there before.

    After its time it may live on in the chain of a handler that was installed later; then it only passes on.
    """

    def __init__(self, signum: int, previous: Callable[[int, FrameType | None], object] | int) -> None:
        self.signum = signum
        self.previous = previous
        self.is_live = True

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        listeners = _living() if self.is_live else []
        if signum == signal.SIGINT:
            listeners = [each for each in listeners if each._is_training(frame)]  # noqa: SLF001
        if not listeners:
            self._pass_on(frame)
            return
        is_impatient = [listener._hear(signum) for listener in listeners]  # noqa: SLF001
        try:
            if callable(self.previous):
                self.previous(signum, frame)
            elif signum == signal.SIGINT:
                raise KeyboardInterrupt  # noqa: TRY301
        except BaseException as error:
            if any(is_impatient):
                raise
            for listener in listeners:  # it would tear the step apart: its time comes after the save
                listener._keep(error)  # noqa: SLF001

    @property
    def is_in_place(self) -> bool:
        """Whether nobody has put another in front of it."""
        found: object = signal.getsignal(self.signum)
        return found is self

    def _pass_on(self, frame: FrameType | None) -> None:
        if callable(self.previous):
            self.previous(self.signum, frame)
        elif self.previous == signal.SIG_DFL and self.is_in_place:
            signal.signal(self.signum, signal.SIG_DFL)
            os.kill(os.getpid(), self.signum)


def _is_between(frame: FrameType) -> bool:
    """Whether a frame stands between us and the function that trains: ours, a framework's, or a generator around ours."""
    root = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return root in _BETWEEN or bool(frame.f_code.co_flags & inspect.CO_GENERATOR)


# One set of handlers for the process, however many listen: with one each, the first to leave would cut off the others.
_listeners: tuple[weakref.ref[Preemption], ...] = ()  # replaced, never changed: a handler may be reading it
_handlers: dict[int, _Handler] = {}
_lock = threading.Lock()  # taken by `install` and `remove`, never by a handler


def _living() -> list[Preemption]:
    return [found for each in _listeners if (found := each()) is not None]


def _listen(preemption: Preemption) -> dict[str, str]:
    global _listeners  # noqa: PLW0603
    with _lock:
        others = [each for each in _living() if each is not preemption]
        _listeners = tuple(weakref.ref(each) for each in [*others, preemption])
        return {signum.name: why for signum in SIGNALS if (why := _take(signum))}


def _take(signum: signal.Signals) -> str:
    """Put our handler in place, if it is not there; returns why it is not."""
    found = signal.getsignal(signum)
    if isinstance(found, _Handler) and found.is_live:
        return ""
    if found == signal.SIG_IGN:
        return "it is ignored"
    if found is None or (found == signal.SIG_DFL and _is_caught(signum)):
        return "a handler outside Python has it"
    handler = _Handler(signum, found)
    try:
        signal.signal(signum, handler)
    except ValueError:
        return "only the main thread of the main interpreter can listen to it"
    if signum in _handlers:
        _handlers[signum].is_live = False  # it may be called by the one that was put in front of it
    _handlers[signum] = handler
    return ""


def _is_caught(signum: int) -> bool:
    """Whether the process catches a signal of which Python knows no handler, as faulthandler.register does."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return False  # not Linux: it cannot be told
    mask = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)
    return bool(mask >> (signum - 1) & 1)


def _listen_no_more(preemption: Preemption) -> None:
    global _listeners  # noqa: PLW0603
    with _lock:
        _listeners = tuple(weakref.ref(each) for each in _living() if each is not preemption)
        if not _listeners:
            _give_back()


def _give_back() -> None:
    for signum, handler in list(_handlers.items()):
        if handler.is_in_place:
            try:
                signal.signal(signum, handler.previous)
            except ValueError:  # another thread: it stays, and passes on
                continue
        handler.is_live = False  # where somebody has put another in front of it, too
        del _handlers[signum]


def _forget_in_child() -> None:
    """A forked child, such as a data-loader worker, is not the trainer: signals mean to it what they meant before."""
    global _listeners, _lock
    _listeners, _lock = (), threading.Lock()
    _give_back()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
