"""Verdicts: what was promised, what was measured, and whether it was met."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """One line of the table.

    key: of the row, for `--only`. is_met: None if it could not be measured. limit: the physical limit, or the peer, that it
    is compared with. because: what explains a bound that was missed, from what was measured.
    """

    key: str
    what: str
    bound: str
    figure: str
    is_met: bool | None
    limit: str = ""
    because: str = ""

    @property
    def word(self) -> str:
        """How it is told."""
        return {True: "met", False: "missed", None: "not measured"}[self.is_met]


def unmeasured(key: str, what: str, bound: str, reason: str = "") -> Verdict:
    """The line of a row that could not be measured."""
    return Verdict(key, what, bound, reason or "not measured in this run", None)
