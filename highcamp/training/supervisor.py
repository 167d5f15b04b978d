"""The supervisor: starts a training script again after a crash, for as long as that gets it further.

It watches from outside. What an attempt has gained is read from the run: a checkpoint of that attempt which is ahead of where
it began. The history belongs to the process that trains, which a crash leaves no time to write; how it ended is therefore
noted in a file of its own, `supervisor.jsonl`, when that process is gone. Nothing is decided by what this file says.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from highcamp.core import strict
from highcamp.errors import HighcampError, StorageError
from highcamp.run import owner
from highcamp.run.history import attempt_numbers, format_time
from highcamp.training.resume import preferred

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from highcamp.run.run import Run

RECORD = "supervisor.jsonl"
MAX_FRUITLESS = 2  # attempts in a row: one may be bad luck, two are a mistake that a third start would meet again
TEMPORARY_FAILURE = 75  # what training ends with at a deadline: starting again at once would only meet it again
# By these a process is asked to end; by any other signal it is killed, or has crashed.
REQUESTS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


@dataclass(frozen=True)
class Ending:
    """How a process ended. code: as a shell counts, 128 + signal if it was killed. killed_by: the signal's number."""

    code: int
    killed_by: int | None = None

    @property
    def signal_name(self) -> str | None:
        """The signal it was killed by."""
        return None if self.killed_by is None else _signal_name(self.killed_by)

    @property
    def is_asked_for(self) -> bool:
        """Whether it ended because it was asked to, so that starting it again would be against somebody's wish."""
        by = self.killed_by or self.code - 128
        return self.code == TEMPORARY_FAILURE or by in REQUESTS

    def words(self) -> str:
        """For a message."""
        if self.killed_by is None:
            asked = f", stopped by {_signal_name(self.code - 128)}" if self.is_asked_for and self.code > 128 else ""
            late = ", stopped by a deadline" if self.code == TEMPORARY_FAILURE else ""
            return f"exit code {self.code}{asked}{late}"
        hint = ", perhaps because memory ran out" if self.killed_by == signal.SIGKILL else ""
        return f"killed by {self.signal_name}{hint}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@dataclass(frozen=True)
class Patience:
    """How often, and how soon, a script is started again.

    max_restarts within window_seconds; the first after delay_seconds, each further one within the window after twice as
    long, at most max_delay_seconds.
    """

    max_restarts: int = 10
    window_seconds: float = 3600.0
    delay_seconds: float = 1.0
    max_delay_seconds: float = 60.0

    def delay(self, recent: int) -> float:
        """Seconds to wait before the next start, after `recent` restarts within the window."""
        return min(self.delay_seconds * 2.0 ** min(recent, 60), self.max_delay_seconds)


@dataclass(frozen=True)
class Stretch:
    """What one attempt did to a run.

    began, reached: steps. resumed_from: None for a fresh start. last: the checkpoint that the next one would go on from.
    was_preempted: whether it was asked to stop, and saved.
    """

    run: Run
    attempt: int
    resumed_from: str | None
    began: int
    reached: int
    last: str | None
    was_preempted: bool = False

    @property
    def has_gained(self) -> bool:
        """Whether a checkpoint is ahead of where it began."""
        return self.reached > self.began


def stretch_since(run: Run, before: int) -> Stretch | None:
    """The newest attempt that has begun since the one of number `before`; None if none has."""
    if max(attempt_numbers(run.store), default=0) <= before:
        return None  # by names alone: there may be many runs beside the one that is meant
    attempts = [each for each in run.history.attempts if each.number > before]
    if not attempts:
        return None
    newest, saved = attempts[-1], run.checkpoints
    last = next(iter(preferred(saved)), None)
    own = [each for each in saved if each.manifest.attempt == newest.number]
    if last is not None and last.is_healthy is not False:
        own = [each for each in own if each.is_healthy is not False]  # nothing goes on from the others: no gain
    reached = max((each.step for each in own), default=newest.step)
    was_preempted = newest.ended == "preempted"
    return Stretch(
        run, newest.number, newest.resumed_from, newest.step, reached, last.name if last else None, was_preempted
    )


class Script(Protocol):
    """The process that trains, as the supervisor needs it."""

    def run(self) -> Ending:
        """Start it, and wait for its end; signals that arrive meanwhile are passed on to it."""
        ...

    def pause(self, seconds: float) -> int | None:
        """Wait for what is left of it, and as long as that; returns the signal that asked to stop instead."""
        ...

    @property
    def was_asked_to_stop(self) -> bool:
        """Whether this process has been asked to stop, and has passed that on."""
        ...


class Supervisor:
    """Starts a script, and starts it again after a crash."""

    def __init__(
        self,
        script: Script,
        find_runs: Callable[[], Sequence[Run]],
        say: Callable[..., None],
        patience: Patience = Patience(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """find_runs: those the script may write to, as they are now. say(event, words, **facts): one line for a person."""
        self._script, self._find_runs, self._say = script, find_runs, say
        self._patience, self._clock = patience, clock
        self._restarts: list[float] = []
        self._fruitless = 0

    def supervise(self) -> int:
        """Run the script to its end, through crashes; returns the exit code of its last attempt."""
        count = 0
        while True:
            count += 1
            before = {run.path: max(attempt_numbers(run.store), default=0) for run in self._find_runs()}
            ending = self._script.run()
            done = self._look(before)
            verdict = self._verdict(ending, done)
            self._note(done, ending, restarts=verdict is None)
            if ending.code != 0 or count > 1:
                self._say_ended(count, ending, done)
            if verdict is not None:
                if verdict:
                    self._say("stop", verdict, exit_code=ending.code)
                return ending.code
            delay = self._plan_restart()
            self._say_restart(delay, done)
            asked = self._script.pause(delay)
            if asked is not None:
                self._say("stop", f"not started again: {_signal_name(asked)}", exit_code=128 + asked)
                return 128 + asked

    def _look(self, before: Mapping[str, int]) -> list[Stretch]:
        found = []
        for run in self._find_runs():
            try:
                stretch = stretch_since(run, before.get(run.path, 0))
            except HighcampError as error:  # training says what to do about it, or another one is meant
                self._say("warning", f"{run.path} cannot be read: {error}")
                continue
            if stretch is not None:
                found.append(stretch)
        return found

    def _verdict(self, ending: Ending, done: Sequence[Stretch]) -> str | None:
        """Why it is not started again, "" where that needs no words; None if it is."""
        if ending.code == 0:
            return ""
        # What stands between us and the training, such as torchrun, may hide how that has ended.
        is_preempted = any(each.was_preempted for each in done)
        if ending.is_asked_for or self._script.was_asked_to_stop or is_preempted:
            return "not started again, because it was asked to stop"
        self._fruitless = 0 if any(each.has_gained for each in done) else self._fruitless + 1
        if self._fruitless >= MAX_FRUITLESS:
            hint = "" if done else "; no run was written to that could tell, name it with --run"
            return f"giving up: {MAX_FRUITLESS} attempts in a row have not gained a step{hint}"
        if len(self._recent()) >= self._patience.max_restarts:
            window = self._patience.window_seconds
            return f"giving up: it was started again {len(self._recent())} times within {window:g} s"
        return None

    def _recent(self) -> list[float]:
        since = self._clock() - self._patience.window_seconds
        return [at for at in self._restarts if at > since]

    def _plan_restart(self) -> float:
        self._restarts = self._recent()
        delay = self._patience.delay(len(self._restarts))
        self._restarts.append(self._clock())
        return delay

    def _say_ended(self, count: int, ending: Ending, done: Sequence[Stretch]) -> None:
        words = f"attempt {count} ended: {ending.words()}"
        for each in done:
            origin = f"resumed from {each.resumed_from}" if each.resumed_from else "began anew"
            gain = f"saved up to step {each.reached}" if each.has_gained else "saved no further step"
            words += f"; {each.run.path}: {origin}, {gain}"
        self._say(
            "end",
            words,
            attempt=count,
            exit_code=ending.code,
            signal=ending.signal_name,
            runs=[_facts(each) for each in done],
        )

    def _say_restart(self, delay: float, done: Sequence[Stretch]) -> None:
        places = ", ".join(each.last for each in done if each.last) or "the beginning"
        limit = f"restart {len(self._restarts)} of at most {self._patience.max_restarts}"
        self._say("restart", f"starting again in {delay:g} s from {places} ({limit})", delay_seconds=delay)

    def _note(self, done: Sequence[Stretch], ending: Ending, *, restarts: bool) -> None:
        """Into each run how its attempt ended, unless another process has taken it over already."""
        for each in done:
            line = {
                "at": format_time(datetime.now(UTC)),
                "attempt": each.attempt,
                "exit_code": ending.code,
                "signal": ending.signal_name,
                "reached_step": each.reached,
                "restarts": restarts,
            }
            try:
                if owner.current(each.run.store) is None:
                    each.run.store.append(RECORD, strict.write(line) + b"\n", durable=False)
            except StorageError as error:  # a full disk must not keep training from being started again
                self._say("warning", f"not noted in {each.run.path}: {error}")


def _facts(stretch: Stretch) -> dict[str, Any]:
    return {
        "run": stretch.run.path,
        "attempt": stretch.attempt,
        "resumed_from": stretch.resumed_from,
        "began_at_step": stretch.began,
        "reached_step": stretch.reached,
    }
