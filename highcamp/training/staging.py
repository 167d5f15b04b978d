"""Staging memory: page-aligned, faulted in ahead, reused by every save.

Fresh memory costs a page fault for each page when it is first written, which is five to nine times slower than the copy
itself. Whole pages are also what direct I/O writes from, without another copy.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import weakref

from highcamp.run import live

_FILL_BYTES = 64 << 20  # zeroed at once by the background thread; the interpreter is free in between


class Staging:
    """One block of memory. `view` is its bytes; `prepare` faults it in from a thread of its own."""

    def __init__(self, size: int) -> None:
        """size: bytes, at least 1. Raises MemoryError where the system refuses them."""
        try:
            self._map = mmap.mmap(-1, size)
        except OSError as error:
            raise MemoryError(f"{size / 1e6:.0f} MB of staging memory: {error}") from error
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            # Huge pages make the first save faster. A forked data-loader worker must not inherit the block: every page
            # would be copied again at the next save, at a tenth of the speed.
            with contextlib.suppress(AttributeError, OSError):
                self._map.madvise(getattr(mmap, advice))
        self.view = memoryview(self._map)
        self._is_pinned = False
        self._ready = threading.Event()
        self._ready.set()
        _blocks.add(self)

    def __len__(self) -> int:
        """Its size in bytes."""
        return len(self.view)

    def prepare(self) -> None:
        """Begin to fault every page in; `wait` for the end before the block is written."""
        self._ready.clear()
        try:
            threading.Thread(target=self._prepare, name="highcamp-staging", daemon=True).start()
        except RuntimeError:  # no more threads: the first save pays for the page faults
            self._ready.set()

    def pin(self) -> None:
        """Let a device copy to it at full rate, where one is in use; asked again and again, for that may begin later."""
        if not self._is_pinned and (unpin := live.pin(self.view)) is not None:
            self._is_pinned = True
            weakref.finalize(self, unpin)

    def wait(self) -> None:
        """Wait until `prepare` has done its work, if it was called."""
        self._ready.wait()  # not Thread.join: after Ctrl-C in it, a running thread counts as one that has ended

    def _prepare(self) -> None:
        try:
            self._touch()
        finally:
            self._ready.set()

    def _touch(self) -> None:
        import numpy as np

        block = np.frombuffer(self.view, np.uint8)
        for start in range(0, len(block), _FILL_BYTES):
            block[start : start + _FILL_BYTES].fill(0)  # lets go of the interpreter, which madvise does not


_blocks: weakref.WeakSet[Staging] = weakref.WeakSet()
_kept_for_ever: list[Staging] = []


def _keep_in_child() -> None:
    """A forked child does not have these pages: if it let go of a block, it would unmap what took their place."""
    _kept_for_ever.extend(_blocks)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_in_child)
