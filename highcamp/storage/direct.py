"""Direct I/O: large aligned pieces go to the disk past the page cache, everything else plainly.

Decided piece by piece on one descriptor: the flag is turned on for what is aligned and off for the rest, so a file has
no special tail, and a file system that refuses gets plain writes from then on. Direct I/O is not durability: the fsync
afterwards still carries size and metadata.
"""

from __future__ import annotations

import errno
import os
import sys

from highcamp.storage.system import write

ALIGNMENT = 4096
"""Of address, length and position: no common device has larger blocks; those of 64 KiB answer EINVAL and are written plainly."""
LEAST_BYTES = 4 << 20
"""Below this a plain write is as fast, and leaves the bytes in the page cache for whoever verifies them."""


class DirectWriter:
    """Writes to one descriptor that was opened for plain writing, from its beginning."""

    def __init__(self, descriptor: int) -> None:
        """descriptor: stays the caller's to sync and close."""
        self._descriptor = descriptor
        self._position = 0
        self._is_on = False
        self._is_refused = sys.platform != "linux"

    def write(self, data: memoryview) -> int:
        """One write; returns how many bytes were taken, at least 1. Raises OSError."""
        count = self._write_directly(data)
        if count == 0:
            self._turn(on=False)
            count = write(self._descriptor, data)
        self._position += count
        return count

    def _write_directly(self, data: memoryview) -> int:
        """How many bytes were taken; 0 if this piece has to be written plainly."""
        length = len(data) // ALIGNMENT * ALIGNMENT
        if self._is_refused or length < LEAST_BYTES or self._position % ALIGNMENT or _address(data) % ALIGNMENT:
            return 0
        try:
            self._turn(on=True)
            return write(self._descriptor, data[:length])
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
            self._is_refused = True  # tmpfs, some overlay, FUSE and network mounts; at the flag or at the first write
            return 0

    def _turn(self, *, on: bool) -> None:
        if on == self._is_on:
            return
        import fcntl

        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        direct = os.O_DIRECT
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | direct if on else flags & ~direct)
        self._is_on = on


def _address(data: memoryview) -> int:
    """Where the bytes lie in memory."""
    import numpy as np

    return int(np.frombuffer(data, np.uint8).__array_interface__["data"][0])
