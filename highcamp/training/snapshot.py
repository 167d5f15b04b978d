"""The snapshot: the in-memory copy of the state from which a checkpoint is written.

It is laid out like the data section of the tensor file, so that it is written without another copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from highcamp.core import tensorfile
from highcamp.run.commit import Part
from highcamp.training.staging import Staging

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
        self._buffers: dict[str, Staging] = {}
        self._layouts: dict[str, tuple[dict[str, Spec], Layout]] = {}

    def prepare(self, flats: Mapping[str, Flat]) -> None:
        """Set memory aside for states like these, in the background, so that the first `take` is as fast as the others."""
        for name, flat in flats.items():
            if flat.arrays and name not in self._buffers:
                layout = self._layout(name, {key: array.spec for key, array in flat.arrays.items()})
                staging = self._buffers[name] = Staging(max(layout.size, 1))
                staging.prepare()

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
        kinds = {key: array.kind for key, array in flat.arrays.items() if array.kind}
        layout = self._layout(name, {key: array.spec for key, array in flat.arrays.items()})
        view = self._staging(name, layout.size).view
        for entry in layout.entries:
            view[entry.start : entry.end] = flat.arrays[entry.name].data
        return Part(name, flat.skeleton, layout, view[: layout.size].toreadonly(), kinds)

    def _staging(self, name: str, size: int) -> Staging:
        """Memory for one object: what it had before, or new if that is too small."""
        staging = self._buffers.get(name)
        if staging is None or len(staging) < size:
            self._buffers.pop(name, None)  # before the new one is asked for: the two together may not fit
            staging = self._buffers[name] = Staging(max(size, 1))
        staging.wait()
        return staging

    def _layout(self, name: str, specs: dict[str, Spec]) -> Layout:
        """The table of the file; it is the same from save to save as long as shapes and data types are."""
        known = self._layouts.get(name)
        if known is None or known[0] != specs:
            known = self._layouts[name] = (specs, tensorfile.plan(specs, METADATA))
        return known[1]
