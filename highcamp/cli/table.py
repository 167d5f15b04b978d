"""Tables for people: which columns fit, and rows that line up."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from highcamp.cli.text import plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.text import Text

GAP = "  "
MIN_FLEXIBLE_WIDTH = 12  # a column of words is cut down to this before any column goes
ELLIPSIS = "…"


@dataclass(frozen=True)
class Column:
    """One column of a table.

    cells: as a person reads them. values: as a program does, the same by default. right: as numbers are aligned.
    drop: 0 never; where the terminal is too narrow the highest go first, and of equal ones the rightmost.
    flexible: may be cut before any column goes.
    """

    title: str
    cells: Sequence[str]
    values: Sequence[str] | None = None
    right: bool = False
    drop: int = 1
    flexible: bool = False


@dataclass(frozen=True)
class Table:
    """Columns of the same length; the other fields are for terminals only.

    signs: one short mark per row. styles: one per row, "" for none. notes: row number -> lines printed before that row;
    the number of rows stands for the end.
    """

    columns: Sequence[Column]
    signs: Sequence[str] = ()
    styles: Sequence[str] = ()
    notes: Mapping[int, Sequence[str]] = field(default_factory=dict)

    @property
    def row_count(self) -> int:
        """How many rows there are."""
        return len(self.columns[0].cells)

    def records(self) -> list[list[str]]:
        """The titles, then the values of each row, for programs."""
        rows = [column.cells if column.values is None else column.values for column in self.columns]
        return [[column.title for column in self.columns], *(list(cells) for cells in zip(*rows, strict=True))]

    def lines(self, width: int) -> list[Text]:
        """The table, `width` columns wide if that can be; never without the columns that are not dropped."""
        from rich.cells import cell_len
        from rich.text import Text

        sign_width = max((len(sign) for sign in self.signs), default=0)
        indent = sign_width + 3 if sign_width else 0
        cells = [[plain(cell) for cell in (column.title, *column.cells)] for column in self.columns]
        fitted = _fit(self.columns, [max(map(cell_len, column)) for column in cells], width - indent)
        lines: list[Text] = []
        for row in range(self.row_count + 1):
            sign = f" {self.signs[row - 1]:<{sign_width}}  " if row and indent else " " * indent
            pieces = [_padded(cells[index][row], width, self.columns[index].right) for index, width in fitted]
            style = (self.styles[row - 1] if self.styles else "") if row else "bold"
            lines.append(Text((sign + GAP.join(pieces)).rstrip(), style=style))
            for note in self.notes.get(row, ()):
                wrapped = textwrap.wrap(note, width, initial_indent=" " * indent, subsequent_indent=" " * (indent + 4))
                lines += [Text(piece, style="yellow") for piece in wrapped]
        return lines


def _fit(columns: Sequence[Column], widths: Sequence[int], room: int) -> list[tuple[int, int]]:
    """(column number, width) of those that are shown, so that they fit into `room` if that can be."""
    shown = dict(enumerate(widths))
    while (excess := sum(shown.values()) + len(GAP) * (len(shown) - 1) - room) > 0:
        flexible = [index for index in shown if columns[index].flexible and shown[index] > MIN_FLEXIBLE_WIDTH]
        slack = {index: shown[index] - MIN_FLEXIBLE_WIDTH for index in flexible}
        if sum(slack.values()) >= excess:
            for index in reversed(flexible):
                cut = min(excess, slack[index])
                shown[index] -= cut
                excess -= cut
            break
        droppable = [(columns[index].drop, index) for index in shown if columns[index].drop]
        if not droppable:
            break
        del shown[max(droppable)[1]]
    return list(shown.items())


def _padded(cell: str, width: int, right: bool) -> str:  # noqa: FBT001
    from rich.cells import cell_len, set_cell_size

    if cell_len(cell) > width:
        cell = set_cell_size(cell, width - 1).rstrip() + ELLIPSIS
    space = " " * (width - cell_len(cell))
    return space + cell if right else cell + space
