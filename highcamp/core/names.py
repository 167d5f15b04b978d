"""Which names may become file names."""

from __future__ import annotations

import re

from highcamp.errors import InvalidArgument

MAX_NAME_CHARACTERS = 100
"""Leaves room for prefixes and suffixes within the 255 bytes that every common file system allows."""

_PATTERN = re.compile(rf"(?!\.)[A-Za-z0-9._-]{{1,{MAX_NAME_CHARACTERS}}}\Z")
_WINDOWS_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10))})


def is_file_name(name: object) -> bool:
    """Whether `name` may be used as a file name on every system: `[A-Za-z0-9._-]`, no leading dot, no device name."""
    return (
        isinstance(name, str)
        and _PATTERN.match(name) is not None
        and not name.endswith(".")
        and name.partition(".")[0].lower() not in _WINDOWS_DEVICES
    )


def check_name(name: object, what: str) -> str:
    """Return `name` if it may become a file name; `what` says in the error what was named.

    Raises InvalidArgument.
    """
    if not is_file_name(name):
        shown = repr(name) if len(repr(name)) <= MAX_NAME_CHARACTERS else repr(name)[:MAX_NAME_CHARACTERS] + "…"
        raise InvalidArgument(
            f"{what} {shown} cannot become a file name",
            hint=f"use 1 to {MAX_NAME_CHARACTERS} letters, digits, '.', '_' or '-', not beginning with a dot",
        )
    return str(name)
