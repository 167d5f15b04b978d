"""Paths in a state tree, and the tensor names made of them.

A path is the keys from the root down, joined with "/". It is for people and tensor files, never for the file system.
"""

from __future__ import annotations

from highcamp.core import strict
from highcamp.core.digest import digest
from highcamp.core.plain import encode_key
from highcamp.core.tensorfile import MAX_NAME_BYTES, RESERVED_NAME

_SUFFIX_BYTES = 12  # room for "~" and a count behind a name that is as long as names may be
_LONGEST = MAX_NAME_BYTES - _SUFFIX_BYTES
_DIGEST_DIGITS = 32  # all 128 bits: names that share their first 460 bytes stay apart


class UniqueNames:
    """Turns paths into names that a tensor file accepts: printable, short enough, each one once."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        """Begin with no names taken but the one that the file format reserves."""
        self._counts = {RESERVED_NAME: 1}

    def take(self, path: str) -> str:
        """Return the name of the next tensor with this path; the same sequence of paths always gives the same names."""
        name = path
        if not name.isprintable():
            name = "".join(character if character.isprintable() else _percent(character) for character in name)
        if len(name) * 4 > _LONGEST:  # a character takes up to 4 bytes
            name = _shorten(name)
        counts = self._counts
        if name not in counts:
            counts[name] = 1
            return name
        count = counts[name]
        numbered = name
        while numbered in counts:
            count += 1
            numbered = f"{name}~{count}"
        counts[name] = count  # the next one need not try them all again
        counts[numbered] = 1
        return numbered


def join(path: str, key: object) -> str:
    """Return the path of the child under `key`, a dict key, a field or a position."""
    text = key if type(key) is str else key_text(key)
    return f"{path}/{text}" if path else text


def key_text(key: object) -> str:
    """Return how a dict key stands in a path: `0`, `weight`, and compact JSON for tuples and frozensets."""
    if isinstance(key, (tuple, frozenset)):
        return strict.write(encode_key(key, "a key")).decode()
    return str(key)


def _shorten(name: str) -> str:
    data = name.encode("utf-8")
    if len(data) <= _LONGEST:
        return name
    kept = data[: _LONGEST - _DIGEST_DIGITS - 1].decode("utf-8", "ignore")
    return f"{kept}~{digest(data)[-_DIGEST_DIGITS:]}"


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))
