"""The stream: the bytes of one snapshot on their way from live arrays through staging memory to the writer.

The stream is the data sections of the tensor files, one after another. It goes through the staging memory in pieces, each
filled by whichever thread has time for it and released when it is written. Where the memory is smaller than the stream it is
a ring: a piece waits until the one that lies in its place has been written.
"""

from __future__ import annotations

import threading
from collections import deque
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from highcamp.core.array import HostArray
    from highcamp.core.tensorfile import Layout

PIECE_BYTES = 16 << 20
"""Large enough for the disk's full rate, small enough to be hashed in the processor's cache, and for a barrier to wait for."""
HAND_BYTES = 1 << 20
"""Taken at once where pieces are small: to take one is to ask for a lock."""
ALIGNMENT = 4096  # where a file begins in the stream, so that its pieces can be written directly


class Share(NamedTuple):
    """What one array gives to a piece: `length` bytes from `offset` on, to place `at` of the stream."""

    at: int
    length: int
    array: HostArray
    offset: int


class Piece:
    """One stretch of the stream, from `start` to `stop`. is_late: it may be filled while the loop goes on."""

    __slots__ = ("is_late", "start", "stop")

    def __init__(self, start: int, *, is_late: bool) -> None:
        self.start = self.stop = start
        self.is_late = is_late


Shares: TypeAlias = "dict[Piece, list[Share]]"
"""The pieces in order, and what each is filled with."""


class _Cut(NamedTuple):
    """How one file was cut, and what decided it."""

    layout: Layout
    arrays: Sequence[HostArray]
    start: int
    shares: Shares


class Cuts:
    """How files are cut into pieces, remembered for those whose arrays somebody holds anyway."""

    def __init__(self, is_held: Callable[[HostArray], bool] = lambda _: False) -> None:
        """is_held: whether the arrays of a file are held, told by its first one."""
        self._is_held = is_held
        self._known: list[_Cut | None] = []
        self._terms: tuple[frozenset[int], int] | None = None

    def cut(
        self,
        files: Sequence[tuple[Layout, Sequence[HostArray]]],
        starts: Iterable[int],
        late: frozenset[int],
        capacity: int,
    ) -> Shares:
        """The pieces of all files. starts: where each begins in the stream. For the others see `Stream`."""
        before = self._known if self._terms == (late, capacity) else []
        self._terms, self._known = (late, capacity), []
        shares: Shares = {}
        for (layout, arrays), start, known in zip_longest(files, starts, before[: len(files)]):
            # Arrays are equal if they are the same, so that lists of them are compared without a line of Python.
            cut = known
            if cut is None or cut.layout is not layout or cut.start != start or cut.arrays != arrays:
                cut = _Cut(layout, arrays, start, _cut(layout, arrays, start, late, capacity))
            self._known.append(cut if arrays and self._is_held(arrays[0]) else None)
            shares |= cut.shares
        return shares


class Stream:
    """One snapshot's bytes. `fill` from any number of threads, `read` from one, in order."""

    def __init__(
        self,
        files: Sequence[tuple[Layout, Sequence[HostArray]]],
        late: frozenset[int],
        capacity: int,
        cuts: Cuts | None = None,
    ) -> None:
        """Lay the stream out.

        files: each tensor file's table, and its arrays in that order. late: `id` of the arrays that may be copied while the
        loop goes on. capacity: bytes of the staging memory it will go through, a multiple of ALIGNMENT. cuts: of the stream
        before.
        """
        self.starts, self.size = _places(layout for layout, _ in files)
        self._capacity = capacity
        self._shares = (cuts or Cuts()).cut(files, (start for start, _ in self.starts), late, capacity)
        self._pieces = list(self._shares)
        self._early = deque(piece for piece in self._pieces if not piece.is_late)
        self._late = deque(piece for piece in self._pieces if piece.is_late)
        self._unfilled = set(self._early), set(self._late)
        self._held: set[Piece] = set()  # in the hands of threads that fill
        self._released = 0  # everything before this place has been written
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._block = memoryview(b"")
        self._inspect: Callable[[Share, memoryview], None] | None = None

    @property
    def is_ring(self) -> bool:
        """Whether the staging memory is smaller than the stream."""
        return self._capacity < self.size

    @property
    def early_bytes(self) -> int:
        """What is still to be filled while the loop waits."""
        return sum(piece.stop - piece.start for piece in self._early)

    @property
    def has_late(self) -> bool:
        """Whether some of it may be filled while the loop goes on."""
        return bool(self._late)

    def late_arrays(self) -> Iterator[HostArray]:
        """Each array that may be filled late, before it is."""
        for piece in self._late:
            for share in self._shares[piece]:
                if share.offset == 0:
                    yield share.array

    def use(self, block: memoryview) -> None:
        """Say which memory it goes through, `capacity` bytes or more."""
        self._block = block

    def inspect(self, look: Callable[[Share, memoryview], None]) -> None:
        """Have `look` called with each share that is filled late and its copy, by the thread that has made it."""
        self._inspect = look

    def fill(self, *, late: bool) -> None:
        """Copy pieces until none is left to take, waiting for room where there is none; returns early after `abort`.

        late: those that may be filled while the loop goes on; otherwise those that may not. An error aborts the stream.
        Ctrl-C does not: the piece in hand is given back, and whoever lets go of the stream for good aborts it.
        """
        pieces, unfilled, hand = (self._early, self._late)[late], self._unfilled[late], list[Piece]()
        try:
            while self._take(pieces, hand):
                for piece in hand:
                    self._copy(piece)
                with self._changed:
                    unfilled.difference_update(hand)
                    self._let_go(hand)
        except Exception as error:
            self.abort(error)
            raise
        finally:
            with self._changed:
                pieces.extendleft(piece for piece in reversed(hand) if piece in unfilled and piece not in pieces)
                self._let_go(hand)

    def _take(self, pieces: deque[Piece], hand: list[Piece]) -> bool:
        """Put the next piece in the hand, or more where they are small; False if there is none."""
        with self._changed:
            while True:
                if self._error is not None or not pieces:
                    return False
                size = 0
                while pieces and pieces[0].stop - self._released <= self._capacity and size < HAND_BYTES:
                    size += pieces[0].stop - pieces[0].start
                    # Ctrl-C can come between any two lines: the piece is in the hand before it is out of the queue.
                    hand.append(pieces[0])
                    self._held.add(pieces[0])
                    pieces.popleft()
                if hand:
                    return True
                self._changed.wait()

    def _let_go(self, hand: list[Piece]) -> None:
        self._held.difference_update(hand)
        for piece in hand:
            if piece not in self._unfilled[piece.is_late]:
                self._shares.pop(piece, None)  # a state that was passed may be nobody else's by now
        hand.clear()
        self._changed.notify_all()

    def _copy(self, piece: Piece) -> None:
        block, capacity = self._block, self._capacity
        for at, length, array, offset in self._shares[piece]:
            place = at % capacity
            view = block[place : place + length]
            array.copy_to(view, offset)
            if piece.is_late and self._inspect is not None:
                self._inspect(Share(at, length, array, offset), view)

    def wait_filled(self, *, late: bool) -> None:
        """Wait until every piece is filled, those in other threads' hands too. Raises what has aborted it.

        late: those that may be filled while the loop goes on; otherwise those that may not.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._unfilled[late] or self._error is not None)
            if self._error is not None:
                raise self._error

    def wait_idle(self) -> None:
        """Wait until no thread is in the middle of a copy, even if Ctrl-C comes meanwhile; after `abort` none begins."""
        interruption: BaseException | None = None
        while self._held:
            try:
                with self._changed:
                    self._changed.wait_for(lambda: not self._held)
            except BaseException as error:  # noqa: BLE001  (raised below, when the memory is nobody's)
                interruption = error
        if interruption is not None:
            raise interruption

    def read(self, number: int) -> Iterator[memoryview]:
        """The pieces of file `number`, each as soon as it is filled, to be used before the next is asked for."""
        start, stop = self.starts[number]
        self._release(start)  # of the padding before it too: a piece that needs all of the memory waits for that
        waiting = deque(piece for piece in self._pieces if start <= piece.start < stop)
        while start < stop:
            end = min(_limit(start, self._capacity), stop)
            while waiting and waiting[0].start < end:
                self._wait_for(waiting.popleft())
            place = start % self._capacity
            yield self._block[place : place + end - start].toreadonly()
            start = end
            self._release(end)

    def _release(self, end: int) -> None:
        with self._changed:
            self._released = end
            self._changed.notify_all()

    def _wait_for(self, piece: Piece) -> None:
        unfilled = self._unfilled[piece.is_late]
        with self._changed:
            self._changed.wait_for(lambda: piece not in unfilled or self._error is not None)
            if self._error is not None:
                raise self._error

    def abort(self, error: BaseException) -> None:
        """Nothing more is filled; whoever waits for it gets `error`."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


def _places(layouts: Iterable[Layout]) -> tuple[list[tuple[int, int]], int]:
    """Where each file's data section begins and ends, and the length of the stream."""
    places, at = [], 0
    for layout in layouts:
        places.append((at, at + layout.size))
        at += -(-layout.size // ALIGNMENT) * ALIGNMENT
    return places, at


def _cut(layout: Layout, arrays: Sequence[HostArray], start: int, late: frozenset[int], capacity: int) -> Shares:
    """The pieces of one file that begins at `start`: none crosses from late to early, or over the end of the memory."""
    shares: Shares = {}
    piece: Piece | None = None
    filling: list[Share] = []
    limit = 0
    for entry, array in zip(layout.entries, arrays, strict=True):
        is_late = id(array) in late
        at, end = start + entry.start, start + entry.end
        offset = 0
        while at < end:
            if piece is None or piece.is_late != is_late or at == limit:
                piece, limit = Piece(at, is_late=is_late), _limit(at, capacity)
                filling = shares[piece] = []
            stop = piece.stop = min(end, limit)
            filling.append(Share(at, stop - at, array, offset))
            offset += stop - at
            at = stop
    return shares


def _limit(start: int, capacity: int) -> int:
    """Where a piece ends at the latest: whole steps of PIECE_BYTES, so that what begins aligned stays aligned."""
    return min((start // PIECE_BYTES + 1) * PIECE_BYTES, (start // capacity + 1) * capacity)
