"""The snapshot: the in-memory copy of the state from which a checkpoint is written.

Its memory is laid out like the data section of the tensor file and reused by every save: fresh memory costs a page fault
for each page, which is several times slower than the copy itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from highcamp.core import tensorfile
from highcamp.run.commit import Part

if TYPE_CHECKING:
    from collections.abc import Mapping

    from highcamp.core.array import Spec
    from highcamp.core.tensorfile import Layout
    from highcamp.core.tree import Flat

METADATA = {"format": "pt"}  # what transformers looks for before it loads a safetensors file


class Snapshot:
    """Reusable memory for the state of one checkpoint; its owner sees to it that no write is under way when it is retaken."""

    def __init__(self) -> None:
        """Memory is allocated at the first `take`."""
        self._buffers: dict[str, memoryview] = {}
        self._layouts: dict[str, tuple[dict[str, Spec], Layout]] = {}

    @property
    def size_bytes(self) -> int:
        """The memory held."""
        return sum(len(buffer) for buffer in self._buffers.values())

    def take(self, flats: Mapping[str, Flat]) -> list[Part]:
        """Copy every array into this memory; when it returns, the live objects may change.

        flats: object name -> its flattened state. The parts are valid until the next `take`.
        """
        return [self._copy(name, flat) for name, flat in flats.items()]

    def _copy(self, name: str, flat: Flat) -> Part:
        if not flat.arrays:
            return Part(name, flat.skeleton)
        layout = self._layout(name, {key: array.spec for key, array in flat.arrays.items()})
        length = layout.size
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < length:
            buffer = self._buffers[name] = memoryview(bytearray(length))
        for entry in layout.entries:
            buffer[entry.start : entry.end] = flat.arrays[entry.name].data
        return Part(name, flat.skeleton, layout, buffer[:length].toreadonly())

    def _layout(self, name: str, specs: dict[str, Spec]) -> Layout:
        """The table of the file; it is the same from save to save as long as shapes and data types are."""
        known = self._layouts.get(name)
        if known is None or known[0] != specs:
            known = self._layouts[name] = (specs, tensorfile.plan(specs, METADATA))
        return known[1]
