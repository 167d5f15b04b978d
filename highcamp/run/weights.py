"""Weights: what stays of a checkpoint that gives back its resume state.

A checkpoint never changes, so its weights become a checkpoint of their own before it goes. Their files are the same files,
linked: no byte of them is written again. A crash in between leaves both, and the next prune removes one.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from highcamp.core.manifest import split_metrics
from highcamp.errors import StorageError
from highcamp.run import commit, owner, verify
from highcamp.run.checkpoint import Checkpoint
from highcamp.run.commit import Committed, Part, TensorFile, checkpoint_path
from highcamp.run.tensors import read_layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from highcamp.storage.store import Store


def take(entry: Checkpoint, sequence: int) -> Checkpoint:
    """Commit the weights of a checkpoint as one of the same step; durable when this returns. The old one is still there.

    sequence: its own. It is about the same state: its facts are those of the old one, its metrics completed by what the
    history knows, its health is what was known of them. Raises Damaged, StorageError.
    """
    store, old = entry.store, entry.manifest
    metrics, nonfinite = split_metrics(entry.metrics)
    facts = msgspec.structs.replace(
        old, sequence=sequence, weights_of=old.sequence, metrics=metrics, nonfinite=nonfinite, files=(), objects={}
    )
    state = commit.read_state(store, entry.name, old)
    with ExitStack() as readers:
        parts = [
            Part(
                name,
                state.objects[name],
                tuple(_linked(entry, file, state, readers) for file in found.files),
                state.kinds.get(name, {}),
                weights=True,
            )
            for name, found in old.objects.items()
            if found.weights is True
        ]
        name, manifest, _ = commit.commit(store, facts, parts)
    taken = Checkpoint(name, manifest, manifest.values, store=store)
    if not verify.is_full_size(taken):  # before somebody lets the old one go
        raise StorageError(
            f"{taken.path} is not whole, though it was written just now",
            path=taken.path,
            hint=f"{entry.name} stays as it is; the disk or another process has changed the files",
        )
    return taken


def _linked(entry: Checkpoint, name: str, state: commit.State, readers: ExitStack) -> TensorFile:
    """One tensor file of a checkpoint, to be linked."""
    path = f"{checkpoint_path(entry.name)}/{name}"
    file = next(file for file in entry.files if file.name == name)
    reader = readers.enter_context(entry.store.open(path))
    same = Committed(path, file, tuple(state.digests.get(name, ())), reader)
    return TensorFile(name, read_layout(entry, name), same=same)


@contextmanager
def holding(store: Store) -> Iterator[None]:
    """Own the run for a moment: whoever writes a checkpoint must be the only one. Raises RunLocked, StorageError."""
    from highcamp.run.attempt import local_directory

    ownership = owner.take(store, local_directory(store), datetime.now(UTC))
    try:
        yield
    finally:
        ownership.release()
