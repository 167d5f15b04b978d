"""The snapshot: the in-memory copy of the state from which a checkpoint is written.

It is laid out like the data sections of the tensor files, so that it is written without another copy.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from highcamp.core import tensorfile
from highcamp.core.array import HostArray
from highcamp.run.commit import Part, TensorFile
from highcamp.training.staging import Staging
from highcamp.training.stream import ALIGNMENT, PIECE_BYTES, Stream
from highcamp.training.unchanged import Group

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from highcamp.core.array import Spec
    from highcamp.core.tensorfile import Entry, Layout
    from highcamp.core.tree import Flat
    from highcamp.training.stream import Cuts

METADATA = {"format": "pt"}  # what transformers looks for before it loads a safetensors file
SPARE_BYTES = 32 << 10
"""Set aside beyond the tracked objects, for counters and random states."""
SPARE_SHARE = 32
"""One part in so many is allocated beyond what is needed, so that a few more numbers need no new block."""
SHARED_BYTES = 64 << 20
"""From here on a second thread shares the copying: it takes a tenth of a millisecond to start."""
LEAST_STAGING_BYTES = 1 << 20
"""Of memory that is asked for after more was refused: a process that does not get it cannot train either."""
ASIDE_SHARE = 20
"""One part in so many of a ring may be set aside beside it, or LEAST_STAGING_BYTES: more would belie `staging_bytes`."""

RING_BYTES = 4 * PIECE_BYTES
"""For a state that is referred to rather than copied: pieces of it are hashed and written while others are fetched."""


@dataclass(frozen=True)
class Shot:
    """One snapshot. parts: ready to be written once it is filled. stream: its bytes."""

    parts: list[Part]
    stream: Stream = field(repr=False)

    @property
    def new_bytes(self) -> int:
        """What writing it adds to the disk."""
        return sum(each.new_bytes for part in self.parts for each in part.files)

    @property
    def linked_bytes(self) -> int:
        """What is on the disk already."""
        return sum(each.layout.file_size - each.new_bytes for part in self.parts for each in part.files)

    @property
    def could_link(self) -> bool | None:
        """Once it is written, whether the store has linked what was to be linked; None if nothing was."""
        same = [each.same for part in self.parts for each in part.files if each.same is not None]
        return not any(each.was_copied for each in same) if same else None

    def places(self) -> dict[str, int]:
        """Where the data section of each file that is not linked lies in the memory, if that is no ring."""
        files = [each for part in self.parts for each in part.files if each.same is None]
        return {each.name: start for each, (start, _) in zip(files, self.stream.starts, strict=True)}

    def close(self) -> None:
        """Let go of the files that it links, and of whoever waits for it: it has been written, or will not be."""
        self.stream.abort(RuntimeError("this snapshot was given up"))
        for each in (each for part in self.parts for each in part.files):
            if each.same is not None:
                each.same.reader.close()

    def tables(self, digests: Mapping[str, Sequence[str]]) -> dict[str, tuple[Sequence[Entry], Sequence[str]]]:
        """The tensors of each file with their digests."""
        files = [each for part in self.parts for each in part.files]
        return {each.name: (each.layout.entries, digests[each.name]) for each in files}

    def fill(self) -> None:
        """Copy what may not be copied late; when this returns, all else of the live state may change.

        Where the staging memory is a ring, somebody must be reading meanwhile.
        """
        stream = self.stream
        try:
            if not stream.is_ring and stream.early_bytes >= SHARED_BYTES and (os.cpu_count() or 1) > 1:
                with contextlib.suppress(RuntimeError):  # no more threads
                    threading.Thread(target=self._share, name="highcamp-copy", daemon=True).start()
            stream.fill(late=False)
            if not stream.is_ring:
                stream.wait_filled(late=False)
        except BaseException as error:
            stream.abort(error)  # nobody else is going to fill it, and somebody may be waiting for it
            stream.wait_idle()  # the memory must be nobody's when the next snapshot is taken
            raise

    def _share(self) -> None:
        with contextlib.suppress(BaseException):  # the stream has it, and gives it to whoever waits
            self.stream.fill(late=False)


class Snapshot:
    """Reusable memory for the state of one checkpoint; its owner sees to it that no write is under way when it is retaken."""

    def __init__(self, staging_bytes: int | None = None, *, tell: Callable[[str], object] = lambda _: None) -> None:
        """Memory is allocated at the first `take`, or by `prepare`.

        staging_bytes: the most of it, for states that are larger; see `Stream`. tell: is called with a line, once, if the
        system gives less memory than is needed, so that a smaller piece of it is used as a ring.
        """
        self._limit = None if staging_bytes is None else max(staging_bytes // ALIGNMENT, 1) * ALIGNMENT
        self._tell = tell
        self._pid = os.getpid()
        self._staging: Staging | None = None
        self._layouts: dict[str, tuple[dict[str, Spec], Layout]] = {}

    def prepare(self, flats: Mapping[str, Flat], *, overlaps: bool = False) -> None:
        """Set memory aside for states like these, in the background, so that the first `take` is as fast as the others.

        overlaps: what never changes will be late.
        """
        if self._staging is None and any(flat.arrays for flat in flats.values()):
            layouts = [self._layout(name, flat.arrays) for name, flat in flats.items()]
            needed = sum(-(-layout.size // ALIGNMENT) * ALIGNMENT for layout in layouts)
            arrays = [array for flat in flats.values() for array in flat.arrays.values()]
            if overlaps and _is_referred(arrays, frozenset(map(id, arrays))):
                needed = min(needed, RING_BYTES)
            self._staging = self._allocate(self._capacity(needed + SPARE_BYTES))
            self._staging.prepare()

    @property
    def size_bytes(self) -> int:
        """The memory held."""
        return len(self._staging) if self._staging is not None else 0

    def take(
        self,
        flats: Mapping[str, Flat],
        groups: Mapping[str, Sequence[Group]] | None = None,
        *,
        late: frozenset[int] = frozenset(),
        cuts: Cuts | None = None,
        block: Callable[[int], memoryview | None] | None = None,
    ) -> Shot:
        """Plan the copy of every array into this memory; `Shot.fill` makes it.

        flats: object name -> its flattened state. groups: how the tensors of an object are spread over files, one file
        otherwise. late: `id` of the arrays that may be copied while the loop goes on. cuts: see `Stream`.
        block: gives memory to be used instead of the snapshot's own, so many bytes. The parts are valid until the next
        `take`. Raises MemoryError.
        """
        planned = {name: self._plan(name, flat, (groups or {}).get(name)) for name, flat in flats.items()}
        new = [
            (name, group, layout) for name, plans in planned.items() for group, layout in plans if group.same is None
        ]
        sources = [(layout, [flats[name].arrays[entry.name] for entry in layout.entries]) for name, _, layout in new]
        needed = sum(-(-layout.size // ALIGNMENT) * ALIGNMENT for layout, _ in sources)
        arrays = (each for _, found in sources for each in found)
        memory = block(needed) if block is not None else None
        if memory is None:
            memory = self._memory(self._capacity(min(needed, RING_BYTES) if _is_referred(arrays, late) else needed))
        capacity = len(memory)
        if needed > capacity and late:
            sources, late = _all_late(sources, late, max(capacity // ASIDE_SHARE, LEAST_STAGING_BYTES))
        stream = Stream(sources, late, capacity, cuts)
        stream.use(memory)
        numbers = {group.file: number for number, (_, group, _) in enumerate(new)}
        parts = []
        for name, plans in planned.items():
            files = tuple(
                TensorFile(group.file, layout, functools.partial(stream.read, numbers[group.file]))
                if group.same is None
                else TensorFile(group.file, layout, same=group.same)
                for group, layout in plans
            )
            kinds = {key: array.kind for key, array in flats[name].arrays.items() if array.kind}
            parts.append(Part(name, flats[name].skeleton, files, kinds, flats[name].weights, flats[name].trained))
        return Shot(parts, stream)

    def _plan(self, name: str, flat: Flat, groups: Sequence[Group] | None) -> list[tuple[Group, Layout]]:
        if not flat.arrays:
            return []
        if groups is None or len(groups) == 1:
            group = groups[0] if groups else Group(f"{name}.safetensors", ())
            return [(group, self._layout(group.file, flat.arrays))]
        return [(group, self._layout(group.file, {key: flat.arrays[key] for key in group.names})) for group in groups]

    def _layout(self, file: str, arrays: Mapping[str, HostArray]) -> Layout:
        """The table of a file; it is the same from save to save as long as shapes and data types are."""
        specs = {key: array.spec for key, array in arrays.items()}
        known = self._layouts.get(file)
        if known is None or known[0] != specs:
            known = self._layouts[file] = (specs, tensorfile.plan(specs, METADATA))
        return known[1]

    def _capacity(self, needed: int) -> int:
        whole = (needed + needed // SPARE_SHARE) // ALIGNMENT * ALIGNMENT + ALIGNMENT
        if needed <= self.size_bytes:
            return self.size_bytes
        if self._limit is not None:
            return min(whole, self._limit)
        return whole

    def _memory(self, capacity: int) -> memoryview:
        """What the snapshot had before, or new memory if that is too small, or has stayed in the process that forked."""
        if self._staging is None or len(self._staging) < capacity or self._pid != os.getpid():
            self._staging = None  # before the new one is asked for: the two together may not fit
            self._staging = self._allocate(capacity)
        self._staging.wait()
        self._staging.pin()
        return self._staging.view

    def _allocate(self, capacity: int) -> Staging:
        """So many bytes, or half of them, a quarter, … if the system refuses. Raises MemoryError if it refuses all."""
        self._pid = os.getpid()
        wanted, least = capacity, min(capacity, LEAST_STAGING_BYTES)
        while True:
            try:
                staging = Staging(capacity)
            except MemoryError:
                if capacity == least:
                    raise
                capacity = max(capacity // 2 // ALIGNMENT * ALIGNMENT, least)
            else:
                break
        if capacity < wanted:
            self._limit = capacity  # what was refused is not asked for again
            self._tell(
                f"{wanted / 1e6:.0f} MB of memory for saving were refused, so {capacity / 1e6:.0f} MB are used in turns: "
                f"a save then stops training for as long as it is written; staging_bytes={capacity} asks for no more"
            )
        return staging


def _is_referred(arrays: Iterable[HostArray], late: frozenset[int]) -> bool:
    """Whether all but a little never changes and may be fetched late: then holding the arrays is a snapshot already."""
    rest = LEAST_STAGING_BYTES
    for each in arrays if late else ():
        if not (each.is_immutable and id(each) in late):
            rest -= each.nbytes
            if rest < 0:
                return False
    return bool(late)


def _aside(array: HostArray) -> HostArray:
    """A copy in memory of its own."""
    return HostArray(array.dtype, array.shape, memoryview(bytes(array.data)), array.tie, array.kind)


def _all_late(
    sources: list[tuple[Layout, list[HostArray]]], late: frozenset[int], limit: int
) -> tuple[list[tuple[Layout, list[HostArray]]], frozenset[int]]:
    """The same for a ring, and what of it is late: all, or nothing.

    What may not wait would have to wait for its place in the ring, so it is set aside in memory of its own. Where that is
    more than `limit` bytes, nothing is late.
    """
    early = [each for _, arrays in sources for each in arrays if id(each) not in late]
    if sum(each.nbytes for each in early) > limit:
        return sources, frozenset()
    aside = {id(each): _aside(each) for each in early}
    sources = [(layout, [aside.get(id(each), each) for each in arrays]) for layout, arrays in sources]
    return sources, frozenset(id(each) for _, arrays in sources for each in arrays)
