"""Unchanged tensors: which of them go into a file of their own, and which committed file holds the same bytes.

Truth is the digest: a tensor is unchanged if its bytes have the digest that the checkpoint before recorded. What has been
unchanged for a while is kept in a file of its own, so that this file is linked rather than written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from highcamp.core.digest import digest
from highcamp.errors import HighcampError
from highcamp.run import commit
from highcamp.run.commit import Committed, checkpoint_path
from highcamp.run.tensors import read_layout

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Mapping, Sequence

    from highcamp.core.array import HostArray, Spec
    from highcamp.core.manifest import File
    from highcamp.core.tensorfile import Entry
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.storage.store import Store

LEAST_BYTES = 1 << 20
"""Of a file worth linking: below it, writing takes no longer than asking for digests."""
CALM_SAVES = 2
"""Saves in a row without a change, after which a tensor is expected to stay as it is."""
MAX_REFUSALS = 2
"""Links refused in a row, after which the store is taken for one without links; a file with too many refuses one."""


class Group(NamedTuple):
    """The tensors of one file. same: a committed file that holds just these bytes."""

    file: str
    names: tuple[str, ...]
    same: Committed | None = None


class _Before(NamedTuple):
    """A tensor file of the checkpoint before.

    identity: of the file, None if it could not be told; see `Reader`. nonfinite: see `Committed`.
    """

    path: str
    file: File
    identity: Hashable
    specs: dict[str, Spec]
    digests: dict[str, str]
    nonfinite: dict[str, str] | None = None


class _Known(NamedTuple):
    """What is known of one object.

    files: of the checkpoint before. calm: for how many saves in a row each tensor has been unchanged. moved: the tensors
    that have ever been seen to change, whatever a hint says.
    """

    files: list[_Before]
    calm: dict[str, int]
    moved: frozenset[str]


_NOTHING = _Known([], {}, frozenset())


class Unchanged:
    """What one attempt knows of the checkpoint before. The loop asks, the writer tells; each sees the whole of it."""

    def __init__(self, store: Store) -> None:
        """Nothing is known yet."""
        self._store = store
        self._known: dict[str, _Known] = {}
        self._refusals = 0

    def groups(self, objects: Mapping[str, Mapping[str, HostArray]]) -> dict[str, list[Group]]:
        """How the tensors of each object are spread over files; reads the bytes of those expected to be unchanged.

        A file that is to be linked is held open; whoever is given it closes it.
        """
        return {name: self._groups(name, arrays, objects) for name, arrays in objects.items() if arrays}

    def _groups(self, name: str, arrays: Mapping[str, HostArray], objects: Collection[str]) -> list[Group]:
        main = f"{name}.safetensors"
        known = self._known.get(name, _NOTHING)
        still = _still(known, arrays)
        if not still:
            return [Group(main, tuple(arrays))]
        kept = tuple(key for key in arrays if key in still)
        same = self._same(known, {key: arrays[key] for key in kept})
        if len(kept) == len(arrays):
            return [Group(main, kept, same)]
        number = next(number for number in range(1, len(objects) + 2) if f"{name}.{number}" not in objects)
        moving = tuple(key for key in arrays if key not in still)
        return [Group(main, moving), Group(f"{name}.{number}.safetensors", kept, same)]

    def _same(self, known: _Known, arrays: Mapping[str, HostArray]) -> Committed | None:
        """The file of the checkpoint before that holds just these tensors with these bytes, if there is one."""
        specs = {key: array.spec for key, array in arrays.items()}
        before = next((file for file in known.files if file.specs == specs), None)
        if before is None or self._refusals >= MAX_REFUSALS:
            return None
        if any(digest(array.data) != before.digests[key] for key, array in arrays.items()):
            return None
        try:
            reader = self._store.open(before.path)  # held: the bytes stay even if somebody removes the checkpoint
        except HighcampError:
            return None  # it is gone already, or cannot be read: then it is written again
        if before.identity is None or reader.identity != before.identity:
            reader.close()  # somebody has replaced or changed it
            return None
        return Committed(before.path, before.file, tuple(before.digests.values()), reader, nonfinite=before.nonfinite)

    def learn(
        self,
        checkpoint: Checkpoint,
        tables: Mapping[str, tuple[Sequence[Entry], Sequence[str]]],
        *,
        could_link: bool | None = None,
    ) -> None:
        """Take note of a checkpoint that was committed.

        tables: the tensors of each file, and their digests in that order. could_link: whether what was to be linked was.
        """
        if could_link is not None:
            self._refusals = 0 if could_link else self._refusals + 1
        listed = {file.name: file for file in checkpoint.files}
        self._known = {
            name: _learnt(
                self._known.get(name, _NOTHING),
                [
                    _Before(
                        path := f"{checkpoint_path(checkpoint.name)}/{file}",
                        listed[file],
                        self._identity(path, listed[file].size),
                        {each.name: each.spec for each in tables[file][0]},
                        {each.name: text for each, text in zip(*tables[file], strict=True)},
                        checkpoint.manifest.nonfinite_tensors(name),
                    )
                    for file in entry.files
                ],
            )
            for name, entry in checkpoint.manifest.objects.items()
        }

    def learn_from_disk(self, checkpoint: Checkpoint) -> None:
        """Take note of a checkpoint that the run goes on from, and forget all others. Raises Damaged, StorageError."""
        self._known = {}
        state = commit.read_state(checkpoint.store, checkpoint.name, checkpoint.manifest)
        tables = {}
        for name in (name for entry in checkpoint.manifest.objects.values() for name in entry.files):
            entries = read_layout(checkpoint, name).entries
            digests = state.digests.get(name, [])
            tables[name] = (entries, digests if len(digests) == len(entries) else [""] * len(entries))
        self.learn(checkpoint, tables)

    def _identity(self, path: str, size: int) -> Hashable:
        """Which file it is that was committed, so that another in its place is not taken for it."""
        try:
            with self._store.open(path) as reader:
                return reader.identity if reader.size == size else None
        except HighcampError:
            return None  # then it is not linked


def _still(known: _Known, arrays: Mapping[str, HostArray]) -> frozenset[str]:
    """The tensors expected to be unchanged, none if they are too small to matter."""
    still = frozenset(
        key
        for key, array in arrays.items()
        if known.calm.get(key, 0) >= CALM_SAVES or (array.is_still and key not in known.moved)
    )
    return still if sum(arrays[key].nbytes for key in still) >= LEAST_BYTES else frozenset()


def _learnt(known: _Known, files: list[_Before]) -> _Known:
    """What is known after one more checkpoint. files: those of the object in it."""
    texts = {key: text for file in known.files for key, text in file.digests.items()}
    calm: dict[str, int] = {}
    moved = set(known.moved)
    for place, file in enumerate(files):
        for key, text in file.digests.items():
            if key not in texts:
                calm[key] = CALM_SAVES if place else 0  # a second file is one of calm tensors
            elif texts[key] == text:
                calm[key] = known.calm.get(key, 0) + 1
            else:
                calm[key] = 0
                moved.add(key)
    return _Known(files, calm, frozenset(moved))
