"""Where the demo speaks: calm lines, and a bar while the network trains."""

from __future__ import annotations

import sys
import textwrap
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from highcamp.cli.output import write_message
from highcamp.cli.text import number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from highcamp.cli.output import Output
    from highcamp.cli.table import Table

INDENT = 16  # the width of a step's number and title
WORDS_WIDTH = 36  # of "best val_loss 0.1234 (epoch 12)"
PLAIN_LINES = 10  # progress lines per training where there is no terminal


class Screen:
    """Lines for a person: on stdout, or on stderr where stdout is for JSON; none at all if quiet."""

    def __init__(self, output: Output) -> None:
        """Speak as `output` was asked to."""
        self._output = output
        self._is_silent = output.quiet

    @property
    def _stream(self) -> TextIO:
        return sys.stderr if self._output.as_json else sys.stdout

    @property
    def is_live(self) -> bool:
        """Whether a bar can move: on a terminal that knows how."""
        from rich.console import Console

        return not self._is_silent and self._stream.isatty() and not Console(file=self._stream).is_dumb_terminal

    def say(self, text: str = "", style: str = "") -> None:
        """One paragraph, indented like the words of the steps if it begins with spaces."""
        if self._is_silent:
            return
        body = text.lstrip(" ")
        indent = text[: len(text) - len(body)]
        lines = textwrap.wrap(body, min(100, self._output.width), initial_indent=indent, subsequent_indent=indent) or [
            ""
        ]
        for line in lines:
            self._write(line, style)

    def step(self, number: int, title: str, sentence: str) -> None:
        """One of the seven steps: its number, its name, and what it does."""
        if self._is_silent:
            return
        start = f" {number}  {title:<{INDENT - 4}}"
        width = min(100, self._output.width)
        lines = textwrap.wrap(sentence, width, initial_indent=start, subsequent_indent=" " * INDENT)
        for line in lines:
            self._write(line)

    def table(self, table: Table) -> None:
        """A table as on a terminal, wherever it goes."""
        if self._is_silent:
            return
        for line in table.lines(self._output.width):
            self._write(line.plain, str(line.style))

    @contextmanager
    def progress(self, epochs: int, done: int = 0) -> Iterator[Callable[[int, float | None, int | None], None]]:
        """A bar over `epochs`; gives the function that moves it: (epochs done, best val_loss, its epoch)."""
        if not self.is_live:
            yield self._plain_progress(epochs, done)
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(file=self._stream, highlight=False)
        counts = f"{{task.completed:>{len(str(epochs))}}} of {epochs} epochs"
        room = self._output.width - INDENT - len(counts) - WORDS_WIDTH
        columns = (
            TextColumn(" " * (INDENT - 1)),
            BarColumn(bar_width=max(8, min(24, room)), style="dim", complete_style="cyan", finished_style="green"),
            TextColumn(counts),
            TextColumn("{task.fields[words]}", style="dim"),
        )
        with Progress(*columns, console=console, expand=False) as bar:
            task = bar.add_task("", total=epochs, completed=done, words="")

            def move(epoch: int, best: float | None, best_epoch: int | None) -> None:
                words = f"best val_loss {number(best)} (epoch {best_epoch})" if best is not None and room > 0 else ""
                bar.update(task, completed=epoch, words=words)

            yield move

    @contextmanager
    def waiting(self, words: str) -> Iterator[None]:
        """A sign of life while nothing can be told yet: on a terminal only."""
        if not self.is_live:
            yield
            return
        from rich.console import Console

        with Console(file=self._stream, highlight=False).status(words, spinner="line"):
            yield

    def _plain_progress(self, epochs: int, done: int) -> Callable[[int, float | None, int | None], None]:
        said, stride = done, max(1, epochs // PLAIN_LINES)

        def move(epoch: int, best: float | None, best_epoch: int | None) -> None:
            nonlocal said
            if epoch // stride > said // stride or epoch == epochs > said:
                said = epoch
                words = f"   best val_loss {number(best)} (epoch {best_epoch})" if best is not None else ""
                self.say(f"{' ' * INDENT}epoch {epoch} of {epochs}{words}")

        return move

    def _write(self, line: str, style: str = "") -> None:
        if self._output.as_json:
            write_message(line)
        else:
            self._output.line(line, style)
            sys.stdout.flush()
