"""xxh3-128 digests of bytes.

A digest finds accidents (a flipped bit, a file cut short). It is no protection against a forger: xxh3 is not a
cryptographic hash.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PREFIX = "xxh3-128:"  # the algorithm travels with the value, so that another one can be added without a new format


def digest(data: Buffer) -> str:
    """Return the digest of `data` (any C-contiguous buffer) as `xxh3-128:` and 32 lower-case hexadecimal digits."""
    return _PREFIX + xxhash.xxh3_128_hexdigest(data)


class Hasher:
    """The digest of bytes that arrive in pieces: the text is the same as `digest` of all of them joined."""

    __slots__ = ("_state",)

    def __init__(self) -> None:
        """Begin with no bytes."""
        self._state = xxhash.xxh3_128()

    def update(self, buf: Buffer) -> None:
        """Take the next bytes (any C-contiguous buffer)."""
        self._state.update(buf)

    def text(self) -> str:
        """Return the digest of everything taken so far; more may follow."""
        return _PREFIX + self._state.hexdigest()
