"""Health: whether numbers are NaN or infinite, told from their bits while they are hot in the processor's cache.

In the formats of IEEE 754, and in those that follow it, a pattern is a sign and a magnitude. As integers, magnitudes are in
the order of the numbers, infinity comes right behind the largest number, and NaN behind that. So the largest magnitude of
a block tells all of it, and NumPy finds the largest integer as fast as memory can be read: once among the patterns without
a sign, which are positive, and once among all of them without regard to it, where those with a sign are ahead.
"""

from __future__ import annotations

import bisect
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    import numpy as np

    from highcamp.core.tensorfile import Entry

NAN, INF = "nan", "inf"
BLOCK_BYTES = 256 << 10
"""Looked at at once: it fits into the cache of one core twice, and a call of NumPy costs nothing beside it."""


class _Form(NamedTuple):
    """How a data type spells what is not finite.

    size: bytes of an element. largest: magnitude of the largest number. infinity: that of infinity, -1 if there is none.
    is_signed: whether the first bit is a sign. is_nan_lowest: NaN is the lowest of all signed integers, and nothing else is.
    """

    size: int
    largest: int
    infinity: int = -1
    is_signed: bool = True
    is_nan_lowest: bool = False

    def worst(self, raw: np.ndarray[Any, Any]) -> str | None:
        """Either "nan" or "inf" if such a number is among these bytes (uint8, whole elements), NaN before infinity."""
        import numpy as np

        signed = raw.view(f"<i{self.size}")
        if self.is_nan_lowest:
            magnitude = -int(np.minimum.reduce(signed))
        else:
            magnitude = int(np.maximum.reduce(raw.view(f"<u{self.size}")))
            if self.is_signed:
                sign = 1 << 8 * self.size - 1
                magnitude = max(int(np.maximum.reduce(signed)), magnitude - sign)
        if magnitude <= self.largest:
            return None
        return INF if magnitude == self.infinity else NAN


# Sources: IEEE 754 (binary16, 32, 64); bfloat16 is the upper half of binary32; OCP 8-bit Floating Point Specification (E4M3 has
# no infinity and one NaN per sign); the FNUZ forms have no negative zero, whose pattern is their NaN; OCP Microscaling
# Formats (E8M0 has no sign, all ones are NaN; the packed forms of four and six bits have neither NaN nor infinity).
_FORMS = {
    "F64": _Form(8, 0x7FEF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": _Form(4, 0x7F7F_FFFF, 0x7F80_0000),
    "C64": _Form(4, 0x7F7F_FFFF, 0x7F80_0000),  # real and imaginary parts
    "F16": _Form(2, 0x7BFF, 0x7C00),
    "BF16": _Form(2, 0x7F7F, 0x7F80),
    "F8_E5M2": _Form(1, 0x7B, 0x7C),
    "F8_E4M3": _Form(1, 0x7E),
    "F8_E5M2FNUZ": _Form(1, 0x7F, is_nan_lowest=True),
    "F8_E4M3FNUZ": _Form(1, 0x7F, is_nan_lowest=True),
    "F8_E8M0": _Form(1, 0xFE, is_signed=False),
}


class _Stretch(NamedTuple):
    """Tensors of one data type that follow one another. start, end: in the data section."""

    start: int
    end: int
    form: _Form
    entries: Sequence[Entry]


class Checkup:
    """Which tensors of a file are not what weights must be, found piece by piece in file order.

    NaN is wrong in any of them. An infinity is wrong in a tensor that is trained, where no training puts it on purpose; in
    any other it may be a constant, such as the mask of an attention or the range of an observer that has seen nothing yet.
    Where training makes an infinity elsewhere, as in running statistics, the next step turns it into NaN.
    """

    def __init__(self, entries: Sequence[Entry], trained: Container[str] = ()) -> None:
        """entries: the table of the file. trained: the names of the tensors that are known to be trained.

        `found` is whole when the data section has gone through `update`: "nan" or "inf" (of either sign) by tensor name.
        """
        self.found: dict[str, str] = {}
        self._trained = trained
        self._at = 0
        self._begun = b""  # of an element that the piece before has cut
        groups = (
            list(group) for dtype, group in itertools.groupby(entries, lambda entry: entry.dtype) if dtype in _FORMS
        )
        self._stretches = [
            _Stretch(group[0].start, group[-1].end, _FORMS[group[0].dtype], group)
            for group in groups
            if group[0].start < group[-1].end
        ]
        self._stretches.reverse()  # the next one last

    def update(self, piece: memoryview) -> None:
        """Go on with the next bytes of the data section."""
        start, stop = self._at, self._at + len(piece)
        self._at = stop
        while self._stretches and self._stretches[-1].start < stop:
            stretch = self._stretches[-1]
            first, last = max(stretch.start, start), min(stretch.end, stop)
            self._look(stretch, first, piece[first - start : last - start])
            if stretch.end > stop:
                return
            self._stretches.pop()

    def _look(self, stretch: _Stretch, first: int, part: memoryview) -> None:
        """Look at those bytes of a stretch that begin at `first`."""
        import numpy as np

        size = stretch.form.size
        if self._begun:
            missing = size - len(self._begun)
            whole = self._begun + bytes(part[:missing])
            if len(whole) < size:
                self._begun = whole
                return
            self._look_at(stretch, first + missing - size, np.frombuffer(whole, np.uint8))
            first, part, self._begun = first + missing, part[missing:], b""
        length = len(part) // size * size
        self._begun = bytes(part[length:])
        for at in range(0, length, BLOCK_BYTES):
            block = part[at : min(at + BLOCK_BYTES, length)]
            self._look_at(stretch, first + at, np.frombuffer(block, np.uint8))

    def _look_at(self, stretch: _Stretch, first: int, raw: np.ndarray[Any, Any]) -> None:
        """Look at whole elements; only where one is not finite, at each tensor by itself."""
        if stretch.form.worst(raw) is None:
            return
        entries, last = stretch.entries, first + len(raw)
        for place in range(bisect.bisect_right(entries, first, key=lambda entry: entry.end), len(entries)):
            entry = entries[place]
            if entry.start >= last:
                return
            part = raw[max(entry.start - first, 0) : entry.end - first]
            word = stretch.form.worst(part) if len(part) else None
            if word == NAN or (word == INF and entry.name in self._trained and entry.name not in self.found):
                self.found[entry.name] = word
