"""The tensor files of a checkpoint: their tables first, then their bytes, straight to where they belong.

The digest is that of the whole file, so nothing in a file is trusted before all of it has been read; what has been read
until then lies in its place already.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from highcamp.core import tensorfile
from highcamp.core.array import HostArray, byte_count
from highcamp.core.digest import Hasher
from highcamp.core.tree import names
from highcamp.errors import Damaged
from highcamp.run.commit import checkpoint_path

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping

    from highcamp.core.array import Spec
    from highcamp.core.manifest import File
    from highcamp.core.tensorfile import Layout
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.storage.store import Reader

READ_BYTES = 1 << 20  # at once by one thread: hashed while it is still in the processor's own cache
PIECE_BYTES = 4 << 20  # at once by each of several threads: hashed while it is still in the cache they share
SMALL_BYTES = 64 << 10  # of a tensor; below it a call costs more than the copy, so such tensors are read together
READERS = 2  # where a file is in memory and processors are idle, 15 to 25 % faster than one; where they are not, slower
AHEAD = 4  # pieces that are read before they are hashed; all of them fit into the cache
PROBE_PIECES = 16  # of a large file, to find out which of the two is faster: 64 MiB each


@dataclass(frozen=True)
class Saved:
    """The saved state of one object; its tensors are not read yet.

    skeleton: its tree. kinds: the framework whose array a tensor was, by its name. files: its tensor files. reading: keeps
    them open.
    """

    skeleton: Any = field(repr=False)
    kinds: Mapping[str, str] = field(repr=False)
    files: tuple[OpenFile, ...] = field(repr=False)
    reading: object = field(repr=False)

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """Data type and shape of every tensor by name, as the files say that have not been compared with their digests."""
        return {entry.name: entry.spec for file in self.files for entry in file.layout.entries}

    @cached_property
    def paths(self) -> dict[str, str]:
        """Every tensor's path with its name, tied ones under each of their paths."""
        return names(self.skeleton)

    def read(self, places: Mapping[str, memoryview]) -> None:
        """Read every file whole, its tensors into `places` by name: writable, as many bytes as the tensor has.

        Tensors that have no place are read and dropped. Raises Damaged, after bytes have landed, if a file is not what
        was committed.
        """
        for file in self.files:
            file.read(places)

    def verify(self) -> None:
        """Read every file whole and compare it with its digest. Raises Damaged."""
        for file in self.files:
            file.verify()

    def load(self, *, mapped: bool) -> dict[str, HostArray]:
        """Every tensor by name, verified: read-only views of the files, or writable memory of their own."""
        if mapped:
            self.verify()
            return {name: array for file in self.files for name, array in file.map().items()}
        arrays = {name: fresh(*spec) for name, spec in self.specs.items()}
        self.read({name: array.data for name, array in arrays.items()})
        return arrays


def fresh(dtype: str, shape: tuple[int, ...]) -> HostArray:
    """An array of writable memory of its own whose bytes are still to be set."""
    import numpy as np

    buffer: Any = np.empty(byte_count(dtype, shape), np.uint8)  # in huge pages where it is large, unlike a bytearray
    return HostArray(dtype, shape, memoryview(buffer))


def load_tensors(checkpoint: Checkpoint, object_name: str, *, mapped: bool) -> dict[str, HostArray]:
    """The tensors of one object by their names in its files, verified; see `Saved.load`. Raises Damaged."""
    with ExitStack() as files:
        return Saved(None, {}, open_files(checkpoint, object_name, files), None).load(mapped=mapped)


def read_layout(checkpoint: Checkpoint, name: str) -> Layout:
    """The table of the tensor file called `name`; its bytes are not compared with their digest. Raises Damaged."""
    listed = next(file for file in checkpoint.manifest.files if file.name == name)
    with ExitStack() as files:
        return OpenFile(checkpoint, listed, files).layout


def open_files(checkpoint: Checkpoint, object_name: str, files: ExitStack) -> tuple[OpenFile, ...]:
    """The tensor files of one object, which `files` closes. Raises Damaged."""
    listed = {file.name: file for file in checkpoint.manifest.files}
    return tuple(OpenFile(checkpoint, listed[name], files) for name in checkpoint.manifest.objects[object_name].files)


class OpenFile:
    """One tensor file of a checkpoint: its table has been read, its tensors have not."""

    def __init__(self, checkpoint: Checkpoint, file: File, files: ExitStack) -> None:
        """files: closes it. Raises Damaged for a file that is missing, of another size, or has no table."""
        path = f"{checkpoint_path(checkpoint.name)}/{file.name}"
        self.file = file
        self._checkpoint = checkpoint
        try:
            self._reader = files.enter_context(checkpoint.store.open(path))
        except FileNotFoundError as error:
            raise damaged(checkpoint, f"{file.name} is missing") from error
        if self._reader.size != file.size:
            raise damaged(checkpoint, f"{file.name} is {self._reader.size} bytes, its manifest says {file.size}")
        try:
            self.layout = _layout_of(self._reader, f"{checkpoint.store.url}/{path}")
        except Damaged:
            self.verify()  # one flipped bit makes a table unreadable: then the digest is the news, not the syntax
            raise

    def read(self, places: Mapping[str, memoryview]) -> None:
        """See `Saved.read`."""
        hasher = Hasher()
        hasher.update(self.layout.header)
        # Closed at once whatever happens: a thread that still reads would write into memory of which we have let go.
        with closing(_views(self._reader, list(_pieces(self.layout, places)))) as views:
            for view in views:
                hasher.update(view)
        self._compare(hasher.text())

    def verify(self) -> None:
        """Compare every byte with the digest. Raises Damaged."""
        self._compare(read_digest(self._reader))

    def map(self) -> dict[str, HostArray]:
        """Read-only views of the mapped file, by tensor name; to be verified first."""
        data, start = self._reader.map(), self.layout.data_start
        return {
            entry.name: HostArray(entry.dtype, entry.shape, data[start + entry.start : start + entry.end])
            for entry in self.layout.entries
        }

    def _compare(self, found: str) -> None:
        if found != self.file.digest:
            raise damaged(self._checkpoint, f"{self.file.name} differs from its digest")


def _layout_of(reader: Reader, where: str) -> Layout:
    first = bytearray(min(8, reader.size))
    reader.read_into(0, memoryview(first))
    header = bytearray(tensorfile.header_bytes(bytes(first), reader.size, where))
    reader.read_into(0, memoryview(header))
    return tensorfile.parse(bytes(header), reader.size, where)


@dataclass(slots=True)
class _Stretch:
    """Bytes that follow one another in a file and are read by one call.

    into: where they belong; None for several small tensors, which are read together and then `scattered`: (place, first
    byte within the stretch).
    """

    offset: int
    length: int
    into: memoryview | None = None
    scattered: list[tuple[memoryview, int]] = field(default_factory=list)

    def read(self, reader: Reader, step: int) -> Iterator[memoryview]:
        """Read them, at most `step` bytes at once where they are not scattered, and give what was read each time."""
        if self.into is None:
            view = memoryview(bytearray(self.length))
            reader.read_into(self.offset, view)
            for place, start in self.scattered:
                place[:] = view[start : start + len(place)]
            yield view
            return
        for start in range(0, self.length, step):
            view = self.into[start : start + step]
            reader.read_into(self.offset + start, view)
            yield view


def _pieces(layout: Layout, places: Mapping[str, memoryview]) -> Iterator[list[_Stretch]]:
    """The whole data section in file order, in pieces of PIECE_BYTES."""
    piece: list[_Stretch] = []
    room = PIECE_BYTES
    for entry in layout.entries:
        place = places.get(entry.name)
        is_large = place is not None and len(place) >= SMALL_BYTES
        start = entry.start
        while start < entry.end:
            # A small tensor is not cut: the piece that holds its end is a little too long.
            length = min(entry.end - start, max(room, SMALL_BYTES))
            if is_large and place is not None:
                part = place[start - entry.start : start - entry.start + length]
                piece.append(_Stretch(layout.data_start + start, length, part))
            else:
                if not piece or piece[-1].into is not None:
                    piece.append(_Stretch(layout.data_start + start, 0))
                last = piece[-1]
                if place is not None:
                    last.scattered.append((place, last.length))
                last.length += length
            start, room = start + length, room - length
            if room <= 0:
                yield piece
                piece, room = [], PIECE_BYTES
    if piece:
        yield piece


def _views(reader: Reader, pieces: list[list[_Stretch]]) -> Generator[memoryview]:
    """Read the pieces and give what was read in file order; none of them is being read any more when this has ended.

    The beginning of a large file is read in both ways, and the rest in the faster one: which it is depends on the disk, on
    what lies in memory already and on what else the processors do.
    """
    if len(pieces) < 4 * PROBE_PIECES:
        yield from _read_alone(reader, pieces)
        return
    seconds = []
    for probed, part in (
        (_read_alone, pieces[:PROBE_PIECES]),
        (_read_together, pieces[PROBE_PIECES : 2 * PROBE_PIECES]),
    ):
        began = time.perf_counter()
        yield from probed(reader, part)
        seconds.append(time.perf_counter() - began)
    faster = _read_alone if seconds[0] <= seconds[1] else _read_together
    yield from faster(reader, pieces[2 * PROBE_PIECES :])


def _read_alone(reader: Reader, pieces: list[list[_Stretch]]) -> Generator[memoryview]:
    for piece in pieces:
        for stretch in piece:
            yield from stretch.read(reader, READ_BYTES)


def _read_together(reader: Reader, pieces: list[list[_Stretch]]) -> Generator[memoryview]:
    """Several pieces at the same time, each by a thread of its own, while the caller hashes those before."""
    from concurrent.futures import Future, ThreadPoolExecutor

    def read(piece: list[_Stretch]) -> list[memoryview]:
        return [view for stretch in piece for view in stretch.read(reader, PIECE_BYTES)]

    with ThreadPoolExecutor(READERS, "highcamp-reader") as readers:
        running: deque[Future[list[memoryview]]] = deque()
        try:
            for piece in pieces:
                running.append(readers.submit(read, piece))
                if len(running) > AHEAD:
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()
        finally:
            for future in running:  # after an error: what has not begun must not write into memory any more
                future.cancel()


def read_digest(reader: Reader) -> str:
    """Read a whole file piece by piece and return the digest of what was read."""
    hasher = Hasher()
    buffer = memoryview(bytearray(min(READ_BYTES, reader.size)))
    for start in range(0, reader.size, READ_BYTES):
        piece = buffer[: reader.size - start]
        reader.read_into(start, piece)
        hasher.update(piece)
    return hasher.text()


def damaged(checkpoint: Checkpoint, problem: str) -> Damaged:
    """The error for a checkpoint whose bytes are not what was committed."""
    return Damaged(
        f"{checkpoint.name}: {problem}",
        path=checkpoint.path,
        hint=f'"highcamp verify {checkpoint.store.url}" shows what is left',
    )
