"""References: `best`, `best~1`, `last`, `last~2`, `step:450`, `epoch:45`, `pin:paper`, a checkpoint's name."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from highcamp.errors import CheckpointNotFound
from highcamp.run.verify import is_full_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from highcamp.run.checkpoint import Checkpoint

_RANKED = re.compile(r"(best|last)(?:~([0-9]{1,9}))?\Z")
_COUNTED = re.compile(r"(step|epoch):([0-9]{1,16})\Z")


def resolve(
    reference: str,
    checkpoints: Sequence[Checkpoint],
    ranked: Sequence[Checkpoint],
    pins: Mapping[str, str],
    where: str,
    monitor: str | None = None,
) -> Checkpoint:
    """The one checkpoint that `reference` means.

    checkpoints: in (step, sequence) order. ranked: best first. pins: pin name -> checkpoint name. where: the run, for
    errors. monitor: the monitored metric, for errors. Two commits of the same step are told apart by taking the newer one.
    Raises CheckpointNotFound.
    """
    found: Checkpoint | None = None
    if match := _RANKED.match(reference):
        resumable = [entry for entry in checkpoints if not entry.manifest.is_weights_only]
        found = first_whole(ranked if match[1] == "best" else reversed(resumable), skip=int(match[2] or 0))
    elif match := _COUNTED.match(reference):
        fitting = [entry for entry in checkpoints if getattr(entry, match[1]) == int(match[2])]
        # Of a state that is there whole as well as its weights alone, the whole one.
        found = max(fitting, key=lambda entry: (entry.manifest.order[:2], -entry.sequence), default=None)
    else:
        name = pins.get(reference.removeprefix("pin:")) if reference.startswith("pin:") else reference
        found = next((entry for entry in checkpoints if entry.name == name), None)
    if found is None:
        raise CheckpointNotFound(
            f"{where} has no checkpoint {reference!r}", path=where, hint=_candidates(checkpoints, ranked, pins, monitor)
        )
    return found


def first_whole(checkpoints: Iterable[Checkpoint], skip: int = 0) -> Checkpoint | None:
    """The first checkpoint whose files are there in their full size, `skip` such ones passed over."""
    whole = (entry for entry in checkpoints if is_full_size(entry))
    return next(itertools.islice(whole, skip, None), None)


def _candidates(
    checkpoints: Sequence[Checkpoint], ranked: Sequence[Checkpoint], pins: Mapping[str, str], monitor: str | None
) -> str:
    if not checkpoints:
        return "it has no checkpoints yet"
    names = [entry.name for entry in checkpoints[-5:]]
    more = f" and {len(checkpoints) - 5} older ones" if len(checkpoints) > len(names) else ""
    last = [] if all(entry.manifest.is_weights_only for entry in checkpoints) else ["last"]
    words = (["best"] if ranked else []) + [*last, *(f"pin:{pin}" for pin in pins)]
    no_best = "" if ranked else f"; there is no best, because {_why_no_best(checkpoints, monitor)}"
    return f"there are {', '.join(words)}, {', '.join(names)}{more}{no_best}"


def _why_no_best(checkpoints: Sequence[Checkpoint], monitor: str | None) -> str:
    if monitor is None:
        return 'no metric is monitored: pass monitor="val_loss"'
    logged = ", ".join(dict.fromkeys(name for entry in checkpoints for name in entry.metrics)) or "none at all"
    return f"no checkpoint has a finite {monitor}; metrics logged: {logged}"
