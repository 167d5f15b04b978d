"""Candidates: committed checkpoints as policies see them, their metrics completed by the history."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from highcamp.core.manifest import view_metrics
from highcamp.policy.candidate import Candidate

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from highcamp.core.manifest import Manifest
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.run.history import History


def completed(
    readable: Iterable[tuple[str, Manifest]], history: History
) -> list[tuple[str, Manifest, Mapping[str, float]]]:
    """Checkpoints in (step, sequence) order: (name, manifest, metrics completed by the history).

    The metrics may be the manifest's own, so they are copied for whoever could change them.
    """
    found: list[tuple[str, Manifest, Mapping[str, float]]] = []
    newer: Manifest | None = None
    until: int | None = None  # the attempt that has committed the step anew: another state, to which later rows belong
    ordered = sorted(readable, key=lambda pair: pair[1].order)
    for name, manifest in reversed(ordered):
        if newer is None or newer.step != manifest.step:
            until = None
        elif (newer.attempt, newer.order[1]) != (manifest.attempt, manifest.order[1]):  # not its own weights alone
            until = newer.attempt
        newer = manifest
        metrics = view_metrics(manifest.metrics, manifest.nonfinite)
        # Nobody resumes from weights alone: whoever resumed from their name has resumed from what had it before.
        resumable = "" if manifest.is_weights_only else name
        later = history.at_checkpoint(resumable, manifest.attempt, manifest.step, until=until)
        if not later.keys() <= metrics.keys():
            # Completed, not replaced: another checkpoint of the same step has rows of its own in that place.
            metrics = {**metrics, **{key: value for key, value in later.items() if key not in metrics}}
        found.append((name, manifest, metrics))
    found.reverse()
    return found


def candidate(name: str, manifest: Manifest, metrics: Mapping[str, float]) -> Candidate:
    """A checkpoint that is to be ranked."""
    weights_of = None if manifest.weights_of is msgspec.UNSET else manifest.weights_of
    return Candidate(
        name, manifest.step, manifest.sequence, manifest.epoch, metrics, manifest.attempt, weights_of,
        is_healthy=manifest.is_healthy,
    )  # fmt: skip


def candidate_of(entry: Checkpoint) -> Candidate:
    """A checkpoint of which is to be decided whether it stays."""
    manifest = entry.manifest
    weights_of = None if manifest.weights_of is msgspec.UNSET else manifest.weights_of
    return Candidate(
        entry.name, manifest.step, manifest.sequence, manifest.epoch, entry.metrics, manifest.attempt, weights_of,
        manifest.is_divisible, manifest.is_healthy,
    )  # fmt: skip
