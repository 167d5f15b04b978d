"""Which checkpoints stay, and why.

A plan is made as a whole before anything goes. It never removes the best, the last, the one resumed from, a pinned
one or the only whole one, and it leaves damaged ones alone: they fill no quota, and what is left of them may be all
there is.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import TYPE_CHECKING

from highcamp.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from highcamp.policy.candidate import Candidate
    from highcamp.policy.monitor import Monitor

DAMAGED = "damaged: not touched"


@dataclass(frozen=True, slots=True)
class Keep:
    """How many checkpoints stay: so many of the best, so many of the last, and one for every so many steps or epochs.

    best, last: 0 or more; two last ones by default, so that a damaged one has a neighbour to fall back to.
    every_steps, every_epochs: positive; the first one at or past each multiple stays for ever.
    Raises InvalidArgument in the constructor.
    """

    best: int = 1
    last: int = 2
    every_steps: int | None = None
    every_epochs: int | None = None

    def __post_init__(self) -> None:
        """Check every field; a policy that would remove everything is an error."""
        for name in ("best", "last"):
            object.__setattr__(self, name, _checked(name, getattr(self, name), least=0))
        for name in ("every_steps", "every_epochs"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _checked(name, getattr(self, name), least=1))
        if not (self.best or self.last or self.every_steps or self.every_epochs):
            raise InvalidArgument(
                "Keep(best=0, last=0) would remove everything", hint="keep at least the last: Keep(last=1)"
            )


@dataclass(frozen=True, slots=True)
class Plan:
    """What stays, each with its reasons, and what goes; both from the oldest to the newest."""

    keep: dict[str, tuple[str, ...]]
    remove: tuple[str, ...]


def plan(
    keep: Keep,
    monitor: Monitor | None,
    candidates: Iterable[Candidate],
    *,
    pins: Mapping[str, str],
    resumed_from: str | None = None,
    damaged: Collection[str] = (),
) -> Plan:
    """Decide for every candidate whether it stays, with all the reasons there are.

    pins: pin name -> checkpoint name. resumed_from, damaged: checkpoint names; names that are no candidate are ignored.
    """
    ordered = sorted(candidates, key=lambda each: each.order)
    broken = frozenset(damaged)
    whole = [each for each in ordered if each.name not in broken]
    reasons: dict[str, list[str]] = {each.name: [] for each in ordered}

    if monitor is not None:
        # Also with a quota of 0: the best is never removed.
        for place, each in enumerate(monitor.rank(whole, limit=max(keep.best, 1)), start=1):
            reasons[each.name].append(_place("best", place, keep.best))
    for place, each in enumerate(whole[: -max(keep.last, 1) - 1 : -1], start=1):
        reasons[each.name].append(_place("last", place, keep.last))
    if keep.every_steps is not None:
        for each in _milestones(whole, keep.every_steps, lambda each: each.step):
            reasons[each.name].append(_period(keep.every_steps, "step"))
    if keep.every_epochs is not None:
        for each in _milestones(whole, keep.every_epochs, lambda each: each.epoch):
            reasons[each.name].append(_period(keep.every_epochs, "epoch"))
    for pin, name in sorted(pins.items()):
        if name in reasons:
            reasons[name].append(f"pin:{pin}")
    if resumed_from in reasons:
        reasons[resumed_from].append("resumed from")
    if len(whole) == 1:
        reasons[whole[0].name].append("only whole one")
    for each in ordered:
        if each.name in broken:
            reasons[each.name].append(DAMAGED)

    return Plan(
        keep={name: tuple(why) for name, why in reasons.items() if why},
        remove=tuple(name for name, why in reasons.items() if not why),
    )


def _milestones(ordered: Sequence[Candidate], period: int, count: Callable[[Candidate], int]) -> Collection[Candidate]:
    """The first candidate at or past each multiple of the period; of two of the same step, the newer.

    At or past, because a cadence by epochs may never meet a multiple of steps. One that was kept stays the first, so the
    plan does not change when others go.
    """
    first: dict[int, Candidate] = {}
    for each in ordered:
        window = count(each) // period
        if window and (window not in first or first[window].step == each.step):
            first[window] = each
    return first.values()


def _place(what: str, place: int, quota: int) -> str:
    return f"{what} {place} of {quota}" if quota else f"{what}: always kept"


def _period(count: int, noun: str) -> str:
    return f"every {noun}" if count == 1 else f"every {count} {noun}s"


def _checked(name: str, count: object, *, least: int) -> int:
    if isinstance(count, numbers.Integral) and not isinstance(count, bool) and int(count) >= least:
        return int(count)
    raise InvalidArgument(
        f"Keep({name}={count!r}): {name} is not an integer of at least {least}",
        hint=f"leave {name} out to not keep any for it" if least else f"{name}=0 keeps none for it",
    )
