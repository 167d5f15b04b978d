"""Which checkpoints stay, and why.

A plan is made as a whole before anything goes. It never removes the best, the last, the one resumed from, a pinned
one or the only whole one, and it leaves damaged ones alone: they fill no quota, and what is left of them may be all
there is. Unhealthy ones, whose weights are NaN or infinite, take no place among the last from healthy ones, for training
resumes from those. Where only the weights of a best are wanted, they are taken from it before it goes.
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
    every_steps, every_epochs: positive; the first one at or past each multiple stays for ever. best_weights_only: of a
    best that nothing else keeps, such as a place among the last, only the weights stay: training cannot resume from it.
    Raises InvalidArgument in the constructor.
    """

    best: int = 1
    last: int = 2
    every_steps: int | None = None
    every_epochs: int | None = None
    best_weights_only: bool = False

    def __post_init__(self) -> None:
        """Check every field; a policy that would remove everything is an error."""
        for name in ("best", "last"):
            object.__setattr__(self, name, _checked(name, getattr(self, name), least=0))
        for name in ("every_steps", "every_epochs"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _checked(name, getattr(self, name), least=1))
        if not isinstance(self.best_weights_only, bool):
            raise InvalidArgument(
                f"Keep(best_weights_only={self.best_weights_only!r}): best_weights_only is neither True nor False",
                hint="how many of the best stay is for best to say: Keep(best=3, best_weights_only=True)",
            )
        if not (self.best or self.last or self.every_steps or self.every_epochs):
            raise InvalidArgument(
                "Keep(best=0, last=0) would remove everything", hint="keep at least the last: Keep(last=1)"
            )


@dataclass(frozen=True, slots=True)
class Plan:
    """What stays, each with its reasons, and what goes; all from the oldest to the newest.

    strip: of those that stay, the ones that give back all but their weights. indivisible: those that would if their
    weights could be told from the rest.
    """

    keep: dict[str, tuple[str, ...]]
    remove: tuple[str, ...]
    strip: tuple[str, ...] = ()
    indivisible: tuple[str, ...] = ()


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
    counted, spare = _apart(whole)
    reasons: dict[str, list[str]] = {each.name: [] for each in ordered}

    # Also with a quota of 0: the best is never removed.
    best = monitor.rank(counted, limit=max(keep.best, 1)) if monitor is not None else []
    for place, each in enumerate(best, start=1):
        reasons[each.name].append(_place("best", place, keep.best))
    for each, why in _last(keep, counted):
        reasons[each.name].append(why)
    for period, noun in _periods(keep):
        for each in _milestones(counted, period, noun).values():
            reasons[each.name].append(_period(period, noun))
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

    strip: list[Candidate] = []
    taken = {each.state: each.name for each in reversed(spare)}
    for each in sorted(best, key=lambda each: each.order) if keep.best_weights_only else ():
        if not each.is_resumable or len(reasons[each.name]) > 1:
            continue
        if each.state in taken:  # its weights have been taken already: it goes, and they have its place
            reasons[taken[each.state]][:0] = reasons[each.name]
            reasons[each.name] = []
        else:
            strip.append(each)

    return Plan(
        keep={name: tuple(why) for name, why in reasons.items() if why},
        remove=tuple(name for name, why in reasons.items() if not why),
        strip=tuple(each.name for each in strip if each.is_divisible),
        indivisible=tuple(each.name for each in strip if not each.is_divisible),
    )


def doomed(
    keep: Keep,
    monitor: Monitor | None,
    candidates: Iterable[Candidate],
    *,
    pins: Mapping[str, str],
    resumed_from: str | None = None,
    damaged: Collection[str] = (),
    is_whole: Callable[[str], bool],
) -> Plan:
    """A plan that removes and strips what `plan` would, asking of as few candidates as possible whether they are whole.

    is_whole: is asked once for a name at most, and not for those in `damaged`. A run of which much is kept for ever is
    pruned after each save: asking all of them would cost more than the save.
    """
    made = list(candidates)
    broken, asked = set(damaged), set(damaged)
    while True:
        found = plan(keep, monitor, made, pins=pins, resumed_from=resumed_from, damaged=broken)
        unsure = _decisive(keep, monitor, [each for each in made if each.name not in broken], found) - asked
        if not unsure:
            return found
        asked |= unsure
        broken |= {name for name in unsure if not is_whole(name)}


def _decisive(keep: Keep, monitor: Monitor | None, whole: list[Candidate], found: Plan) -> set[str]:
    """Those that must be whole for a plan to be followed: those that go or are stripped, and all in whose favor they go.

    Damage anywhere else moves nothing into the place of another: a quota that loses one takes the next, and who had a
    place in it keeps it. Only with min_delta any one may be a step on the way to the best.
    """
    if monitor is not None and monitor.min_delta:
        return {each.name for each in whole}
    going = {*found.remove, *found.strip}
    if not going:
        return set()
    counted, spare = _apart(sorted(whole, key=lambda each: each.order))
    states = {each.state for each in spare}
    decisive = [each for each, _ in _last(keep, counted)] + [each for each in whole if each.state in states]
    if monitor is not None:
        decisive += monitor.rank(counted, limit=max(keep.best, 1))
    for period, noun in _periods(keep):
        windows = {getattr(each, noun) // period for each in whole if each.name in going}
        decisive += [each for window, each in _milestones(counted, period, noun).items() if window in windows]
    return going | {each.name for each in decisive}


def _apart(ordered: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """Those that count, and those that hold nothing but the weights of one that counts.

    A crash may leave both, and so may a person who has brought the whole one back.
    """
    first: dict[tuple[int, int], Candidate] = {}
    for each in ordered:
        first.setdefault(each.state, each)
    spare = [each for each in ordered if not each.is_resumable and first[each.state] is not each]
    names = {each.name for each in spare}
    return [each for each in ordered if each.name not in names], spare


def _last(keep: Keep, counted: Sequence[Candidate]) -> list[tuple[Candidate, str]]:
    """Those with a place among the last, and its words, the newest first.

    Weights alone have one only where there is nothing else. Unhealthy ones have those that healthy ones leave, and the very
    last is kept in any case: then the healthy ones are the last that training goes on from, and bear that name.
    """
    resumable = [each for each in counted if each.is_resumable] or list(counted)
    healthy, unhealthy = ([each for each in resumable[::-1] if each.is_unhealthy is wanted] for wanted in (False, True))
    word = "last healthy" if resumable[-1:] == unhealthy[:1] else "last"
    placed = [(each, word) for each in healthy] + [(each, "last") for each in unhealthy]
    found = [
        (each, _place(what, place, keep.last))
        for place, (each, what) in enumerate(placed[: max(keep.last, 1)], start=1)
    ]
    is_left_out = all(each is not resumable[-1] for each, _ in found)
    return [(resumable[-1], _place("last", 1, 0)), *found] if resumable and is_left_out else found


def _periods(keep: Keep) -> list[tuple[int, str]]:
    """Every so many of what: a count and the field of a candidate that it is compared with."""
    periods = {"step": keep.every_steps, "epoch": keep.every_epochs}
    return [(period, noun) for noun, period in periods.items() if period is not None]


def _milestones(ordered: Sequence[Candidate], period: int, noun: str) -> dict[int, Candidate]:
    """The first candidate at or past each multiple of the period, by multiple; of two of the same step, the newer.

    At or past, because a cadence by epochs may never meet a multiple of steps. One that was kept stays the first, so the
    plan does not change when others go.
    """
    first: dict[int, Candidate] = {}
    for each in ordered:
        window = getattr(each, noun) // period
        if window and (window not in first or first[window].step == each.step):
            first[window] = each
    return first


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
