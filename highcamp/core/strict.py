"""JSON as highcamp reads and writes it: one meaning for every text, one error type for everything else.

Python's own reader accepts NaN and 1e999, lets the last of two equal keys win, returns lone surrogates, and answers
hostile input with RecursionError or ValueError. Here all of that is `Damaged`. `read` takes whatever `write` returns.
"""

from __future__ import annotations

import json
import math
import re
from itertools import accumulate
from typing import NoReturn

from highcamp.errors import Damaged, InvalidState

MAX_DEPTH = 400  # a state tree is at most 100 deep, a level takes up to 3 in JSON; Python's parser gives up near 1,000
MAX_CONTAINERS = (
    2_000_000  # lists and objects: `[]` costs 2 bytes of text and 64 of memory; 100,000 tensors need about 110,000
)
MAX_QUOTES = 10_000_000  # two a string, which takes 50 bytes of memory and more; 1,000,000 tensors need 8,000,000
MAX_DIGITS = 4300  # Python's own limit, for the cost of an integer grows with the square of its digits

# Possessive, and an unterminated string runs to the end: no input makes this quadratic.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


class _NotStrictError(ValueError):
    """A text that Python's reader would accept and this one does not."""


def read(data: bytes, *, where: str, limit: int, max_depth: int = MAX_DEPTH) -> object:
    """Return the value of the UTF-8 JSON text `data`; objects are dicts in the order of the text.

    where: what is being read, for the message. limit: most bytes accepted. max_depth: most lists and objects inside
    each other. Raises Damaged for everything that is not one JSON value with a single meaning: other encodings, NaN,
    Infinity, numbers beyond float range, integers over 4,300 digits, duplicate keys, lone surrogates, trailing bytes,
    too deep, too large, too many values.
    """
    if len(data) > limit:
        raise _damaged(where, f"it is {len(data)} bytes, at most {limit} are read")
    _check_shape(data, where, max_depth)
    try:
        value: object = _DECODER.decode(data.decode("utf-8"))
        if _SURROGATE.search(data):
            # Writing it again tells pairs from halves; such escapes are rare, so that the price hardly ever is paid.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(where, f"it is not UTF-8 text (byte {error.start})") from error
    except UnicodeEncodeError as error:
        raise _damaged(where, "it has half of a surrogate pair in a string") from error
    except json.JSONDecodeError as error:
        raise _damaged(where, f"it is not JSON ({error.msg}, character {error.pos})") from error
    except RecursionError as error:  # the caller itself was close to the interpreter's limit
        raise _damaged(where, "it is nested too deeply to be read here") from error
    except ValueError as error:
        raise _damaged(where, str(error)) from error
    return value


def write(value: object) -> bytes:
    """Return `value` (None, bool, int, float, str, list, dict with str keys) as compact UTF-8 JSON, no final newline.

    Raises InvalidState for what `read` would not take: NaN, infinities, lone surrogates, other types, too deep or many.
    """
    try:
        data = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
        _check_shape(data, "the value", MAX_DEPTH)
    except (TypeError, ValueError, RecursionError) as error:
        message = f"this value cannot be written as JSON: {error}"
        raise InvalidState(message, hint="use finite numbers, text, lists and dicts") from error
    return data


def _check_shape(data: bytes, where: str, max_depth: int) -> None:
    """Refuse before any value is made what would take too much memory or stack."""
    containers = data.count(b"[") + data.count(b"{")
    if containers > MAX_CONTAINERS:
        raise _damaged(where, f"it has {containers} lists and objects, at most {MAX_CONTAINERS} are read")
    quotes = data.count(b'"')
    if quotes > MAX_QUOTES:
        raise _damaged(where, f"it has {quotes} quotation marks, at most {MAX_QUOTES} are read")
    if containers <= max_depth:
        return
    brackets = _STRING.sub(b"", data).translate(None, _NOT_BRACKETS)
    depth = max(accumulate(map(_STEPS.__getitem__, brackets)), default=0)
    if depth > max_depth:
        raise _damaged(where, f"it is nested {depth} deep, at most {max_depth} are read")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _NotStrictError(f"it has the key {twice[:100]!r} twice in one object")
    return value


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _NotStrictError(f"the number {text[:40]} is beyond the range of a float")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _NotStrictError(f"it has an integer of {len(text)} digits, at most {MAX_DIGITS} are read")
    return int(text)


def _constant(text: str) -> NoReturn:
    raise _NotStrictError(f"{text} is no JSON number")


def _damaged(where: str, reason: str) -> Damaged:
    return Damaged(f"{where} cannot be read: {reason}", path=where)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_float, parse_int=_integer, parse_constant=_constant, strict=True
)
