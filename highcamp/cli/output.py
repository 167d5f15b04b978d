"""Where a command's words go: data on stdout, for people, pipes or programs; messages and hints on stderr."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from highcamp.cli.text import MISSING, plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from highcamp.cli.table import Table

MIN_WIDTH = 20
PARTING = "   "
_PLAIN_SIGNS = str.maketrans({"…": "~", "·": "|", "→": ">", "█": "#", "░": "-", "✓": "+"})


@dataclass(frozen=True)
class Output:
    """What the user asked for. as_json: objects instead of tables. quiet: no messages. header: titles in pipes too."""

    as_json: bool = False
    quiet: bool = False
    header: bool = False

    @property
    def is_terminal(self) -> bool:
        """Whether a person reads stdout."""
        return not self.as_json and sys.stdout.isatty()

    @property
    def width(self) -> int:
        """How wide the terminal is, in columns: COLUMNS, or its own word."""
        return max(MIN_WIDTH, shutil.get_terminal_size((80, 24)).columns)

    def line(self, text: str = "", style: str = "") -> None:
        """One line of data; style: for terminals only."""
        if style and self.is_terminal:
            self._console().print(_encodable(text), style=style, soft_wrap=True)
        else:
            sys.stdout.write(_encodable(text) + "\n")

    def parts(self, parts: Sequence[str], style: str = "") -> None:
        """Short phrases side by side, on as many lines as it takes."""
        lines: list[str] = []
        for part in parts:
            if lines and len(lines[-1]) + len(PARTING) + len(part) <= self.width:
                lines[-1] += PARTING + part.lstrip()
            else:
                lines.append(part)
        for line in lines:
            self.line(line, style)

    def table(self, table: Table) -> None:
        """Its rows: aligned on a terminal, tab-separated with full precision elsewhere."""
        if self.is_terminal:
            console = self._console()
            for line in table.lines(self.width):
                line.plain = _encodable(line.plain)
                console.print(line, soft_wrap=True)
            return
        for record in table.records()[0 if self.header else 1 :]:
            # An empty cell would be lost to a shell's `read`, which takes two tabs for one.
            sys.stdout.write(_encodable("\t".join(plain(cell) or MISSING for cell in record)) + "\n")

    def json(self, schema: str, **fields: Any) -> None:
        """One JSON object, its schema first."""
        self._write_json({"schema": f"highcamp.{schema}", **fields}, indent=2)

    def json_line(self, kind: str, schema: str, **fields: Any) -> None:
        """One object on one line, for long work; kind: progress, item or result."""
        self._write_json({"schema": f"highcamp.{schema}", "type": kind, **fields}, indent=None)
        sys.stdout.flush()

    def message(self, text: str) -> None:
        """A line for the person, on stderr; none if quiet."""
        if not self.quiet:
            write_message(text)

    def hint(self, *commands: str) -> None:
        """Commands to try next: for a person at a terminal only."""
        if not self.is_terminal or not commands:
            return
        line = f"next: {' · '.join(commands)}"
        self.message(line if len(line) <= self.width else "next: " + "\n      ".join(commands))

    def _console(self) -> Console:
        from rich.console import Console

        # NO_COLOR means no escape codes at all: rich alone would keep bold ones.
        colors: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
        return Console(
            file=sys.stdout, color_system=colors, highlight=False, markup=False, emoji=False, width=self.width
        )

    def _write_json(self, document: Mapping[str, Any], indent: int | None) -> None:
        # ASCII only: no name can send control codes to a terminal, and every reader of JSON undoes the escapes.
        sys.stdout.write(json.dumps(document, indent=indent, allow_nan=False) + "\n")


def write_message(text: str) -> None:
    """One line on stderr, after everything that was said on stdout."""
    sys.stdout.flush()
    sys.stderr.write(_encodable(text, sys.stderr.encoding) + "\n")
    sys.stderr.flush()


def _encodable(text: str, encoding: str | None = None) -> str:
    """`text` as the stream can write it: signs become ASCII ones, letters it does not have are escaped."""
    encoding = encoding or sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN_SIGNS).encode(encoding, "backslashreplace").decode(encoding)
    return text
