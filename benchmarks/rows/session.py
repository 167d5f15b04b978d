"""A session: what is measured together, and the lines of the table that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.bench import Bench
    from benchmarks.rows.verdict import Verdict


@dataclass(frozen=True)
class Detail:
    """A table of its own in the report. text: what has to be known to read it, under the heading. rows: cells."""

    heading: str
    text: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Session:
    """measure: takes the samples. judge: the verdicts, in the order of the table. detail: the figures behind them.

    names: of its samples. keys: the rows of the table that it fills, as `--only` names them.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]
    measure: Callable[[Bench], None]
    judge: Callable[[Bench], list[Verdict]]
    detail: Callable[[Bench], list[Detail]]
