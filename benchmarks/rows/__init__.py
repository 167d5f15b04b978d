"""The rows of the table: one module measures and judges what belongs together."""

from __future__ import annotations

from benchmarks.rows import epochs, frozen, idle, many, overlap, runs, saves, sizes, training

SESSIONS = (
    saves.SESSION,
    overlap.SESSION,
    saves.MEMORY,
    epochs.SESSION,
    training.SESSION,
    idle.SESSION,
    frozen.SESSION,
    many.SESSION,
    runs.SESSION,
    runs.IMPORTS,
    sizes.SESSION,
)
KEYS = tuple(key for session in SESSIONS for key in session.keys)
