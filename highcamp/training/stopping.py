"""Stopping: what an attempt does at a step boundary when its process has been asked to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from highcamp.training.preemption import Preemption

if TYPE_CHECKING:
    from collections.abc import Callable

    from highcamp.training.messages import Voice
    from highcamp.training.progress import Progress
    from highcamp.training.saver import Saver


class Stopping:
    """One attempt's end before its time: saves once, waits until that is durable, and ends the process.

    It listens while there is something to lose: before training, and after it, a signal means what it always means.
    preemption: whether, and by what, the process has been asked.
    """

    def __init__(self, saver: Saver, progress: Progress, voice: Voice) -> None:
        """Nothing is listened to yet."""
        self.preemption = Preemption(notice=voice.verbose >= 1)
        self._saver, self._progress, self._voice = saver, progress, voice
        self._is_listening = self._has_told = self._has_stopped = False

    @property
    def is_asked(self) -> bool:
        """Whether to save and stop."""
        return self.preemption.is_asked

    def listen(self) -> None:
        """Begin to listen to signals and to the clock. Twice is once. Raises InvalidArgument for a deadline that is no time."""
        self.preemption.locate()
        if self._is_listening:
            return
        self.preemption.install()
        self._is_listening = True
        unheard = self.preemption.unheard
        if unheard and not self._has_told:
            self._has_told = True
            self._voice.say(
                f"not listened to: {', '.join(f'{name} ({why})' for name, why in unheard.items())}", level=2
            )

    def learn(self) -> None:
        """Saves have been made: a deadline is met by as much earlier as they take."""
        costs = self._saver.costs
        if costs.count:
            self.preemption.expect((costs.pause_seconds + costs.write_seconds) / costs.count)

    def leave(self) -> None:
        """Listen no more."""
        self.preemption.remove()
        self._is_listening = False

    def end(self, *, is_finished: bool) -> None:
        """Nothing is left to save: listen no more, and stop if that was asked for meanwhile; a deadline no longer counts."""
        self.leave()
        if self.is_asked and not self._has_stopped:
            self.stop(None, is_finished=is_finished)

    def stop(self, save: Callable[[], object] | None, *, is_finished: bool = False) -> NoReturn:
        """Save this place unless it is saved, end the attempt, and end the process as it was asked to.

        save: saves the state; None where it is not at hand, or is saved already. Raises SystemExit, or what an earlier
        handler of the signal has raised, such as KeyboardInterrupt; in their place the error of a save that failed.
        """
        saver, progress = self._saver, self._progress
        self._has_stopped = True  # whoever goes on all the same, as a notebook does, is not stopped again by closing
        words = ""
        if saver.is_open and not saver.is_closed:
            saver.raise_failed(wait=True)
            if save is not None and not saver.is_saved(progress):
                save()
                saver.raise_failed(wait=True)
            last = saver.run.last
            is_saved = saver.is_saved(progress) and last is not None
            words = f"saved {last.name}, " if is_saved and last else "nothing new was saved, "
            saver.close("complete" if is_finished else "preempted", progress)
        self.leave()
        self._voice.say(f"{self.preemption.reason}: {words}stopping with exit code {self.preemption.exit_code}")
        self.preemption.stop()
