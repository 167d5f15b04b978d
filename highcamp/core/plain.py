"""Plain values and their JSON: everything in a state tree that is neither a tensor nor a container of tensors.

What JSON has no word for is a tagged object with one key: {"$int": "decimal"} {"$float": "nan"} {"$complex": [re, im]}
{"$bytes": base64} {"$scalar": ["F32", value]} {"$set": […]} {"$frozenset": […]} {"$counter": [[key, count], …]}, and
{"$tuple": […]} in keys. No tag names a class to import.
"""

from __future__ import annotations

import binascii
import math
import re
import sys
from collections import Counter
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

from highcamp.core import strict
from highcamp.core.array import DTYPES, numpy_dtype
from highcamp.errors import Damaged, InvalidState

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MAX_DEPTH = 100  # containers inside each other: no real state comes near, and every reader's stack suffices
_SCALAR_DEPTH = 2  # a complex NumPy scalar with a part that is NaN has tags inside tags, on one level of the state
_MAX_EXACT = 2**53  # beyond it, JSON readers that use doubles would change an integer
_MAX_INT_BITS = 14_000  # just below the 4,300 digits that Python turns back into an integer
_DECIMAL = re.compile(r"-?[0-9]{1,4300}\Z")
_FLOATS = ("nan", "inf", "-inf")
_SCALARS = {dtype.numpy: dtype.name for dtype in DTYPES.values() if dtype.numpy is not None}


def encode(value: object, path: str, depth: int = 0) -> Json:
    """Return the JSON of a plain value; `path` names it in errors.

    Raises InvalidState for every other type (enums, functions, objects), for text that is not Unicode and for integers
    beyond 4,200 digits.
    """
    kind = type(value)
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int) and kind is int:
        if -_MAX_EXACT <= value <= _MAX_EXACT:
            return value
        if value.bit_length() > _MAX_INT_BITS:
            raise refusal(path, "is an integer of more than 4,200 digits", "store it as bytes: n.to_bytes(…)")
        return {"$int": str(value)}
    if isinstance(value, float) and kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, str) and kind is str:
        if not value.isascii():
            _check_text(value, path)
        return value
    if isinstance(value, bytes) and kind is bytes:
        return {"$bytes": binascii.b2a_base64(value, newline=False).decode()}
    if isinstance(value, complex) and kind is complex:
        return {"$complex": [encode(value.real, path), encode(value.imag, path)]}
    if isinstance(value, (set, frozenset)) and kind in (set, frozenset):
        elements = [encode_key(element, path, depth + 1) for element in value]
        return {f"${kind.__name__}": sorted(elements, key=strict.write)}  # sets have no order: equal ones, equal bytes
    if isinstance(value, Counter) and kind is Counter:
        if not all(type(count) in (bool, int, float) for count in value.values()):
            raise refusal(path, "is a Counter whose counts are not all numbers", "store dict(…) of it")
        return {"$counter": [[encode_key(key, path, depth + 1), encode(count, path)] for key, count in value.items()]}
    numpy = sys.modules.get("numpy")  # where NumPy was never imported, nobody has one of its scalars
    if numpy is not None and isinstance(value, numpy.generic):
        return _encode_scalar(value, path)
    raise _wrong_type(value, path)


def encode_key(value: object, path: str, depth: int = 0) -> Json:
    """Return the JSON of a plain hashable value: a dict key, or an element of a set; tuples and frozensets of them too.

    Raises InvalidState for everything else. A named tuple becomes a tuple: the two are equal, and equal as keys.
    """
    if depth > MAX_DEPTH:
        raise refusal(path, f"is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, tuple):
        return {"$tuple": [encode_key(element, path, depth + 1) for element in value]}
    return encode(value, path, depth)


def decode(skeleton: object, path: str, depth: int = 0) -> object:
    """Return the plain value of its JSON. Raises Damaged, naming `path`, for what `encode` would not have written."""
    if skeleton is None or isinstance(skeleton, (bool, int, float, str)):
        return skeleton
    if depth > MAX_DEPTH + _SCALAR_DEPTH:
        raise malformed(path, f"it is nested deeper than {MAX_DEPTH} levels")
    tag, content = tag_of(skeleton, path)
    match tag, content:
        case "$int", str() if _DECIMAL.match(content):
            return int(content)
        case "$float", str() if content in _FLOATS:
            return float(content)  # a new NaN each time: two of them can be keys of one dict
        case "$complex", [_, _]:
            real, imaginary = (decode(part, path, depth + 1) for part in content)
            if isinstance(real, float) and isinstance(imaginary, float):
                return complex(real, imaginary)
        case "$bytes", str():
            try:
                return binascii.a2b_base64(content.encode(), strict_mode=True)
            except ValueError:  # binascii.Error is one
                pass  # reported below, as everything else that fits no case
        case "$scalar", [str() as dtype, value]:
            return _decode_scalar(dtype, value, path, depth + 1)
        case "$set" | "$frozenset", list():
            elements = frozenset(decode_key(element, path, depth + 1) for element in content)
            if len(elements) == len(content):
                return elements if tag == "$frozenset" else set(elements)
        case "$counter", list():
            counts = _decode_counts(content, path, depth + 1)
            if counts is not None:
                return Counter(counts)
    raise malformed(path, f"{tag} cannot hold {strict_text(content)}")


def decode_key(skeleton: object, path: str, depth: int = 0) -> Any:
    """Return the plain hashable value of its JSON. Raises Damaged, naming `path`, for everything else."""
    if isinstance(skeleton, str):
        return skeleton
    if depth > MAX_DEPTH:
        raise malformed(path, f"it is nested deeper than {MAX_DEPTH} levels")
    if isinstance(skeleton, dict):
        match tag_of(skeleton, path):
            case "$tuple", list() as content:
                return tuple(decode_key(element, path, depth + 1) for element in content)
            case ("$set" | "$counter") as tag, _:
                raise malformed(path, f"{tag} inside a key or a set")
    return decode(skeleton, path, depth)


def decode_items(content: list[object], path: str, depth: int = 0) -> dict[Any, object]:
    """Return the skeletons of [key, skeleton] pairs by key. Raises Damaged for other shapes and for equal keys."""
    result: dict[Any, object] = {}
    for pair in content:
        if not isinstance(pair, list) or len(pair) != 2:
            raise malformed(path, f"{strict_text(pair)} is no pair of key and value")
        result[decode_key(pair[0], path, depth)] = pair[1]
    if len(result) != len(content):
        raise malformed(path, "two keys are equal")
    return result


def tag_of(skeleton: object, path: str) -> tuple[str, object]:
    """Return tag and content of a tagged object. Raises Damaged for everything else."""
    if isinstance(skeleton, dict) and len(skeleton) == 1:
        tag, content = next(iter(skeleton.items()))
        if isinstance(tag, str) and tag.startswith("$"):
            return tag, content
    raise malformed(path, f"{strict_text(skeleton)} is no value of a state")


def strict_text(value: object) -> str:
    """Return the first characters of a value for an error message, without walking all of it."""
    text = repr(value) if isinstance(value, (str, int, float)) else type(value).__name__
    return text if len(text) <= 60 else text[:60] + "…"


def refusal(path: str, what: str, hint: str | None = None) -> InvalidState:
    """Return the error that says why the value at `path` cannot be saved."""
    return InvalidState(f"{path} {what}", path=path, hint=hint)


def malformed(path: str, reason: str) -> Damaged:
    """Return the error that says where a stored tree is malformed."""
    return Damaged(f"the stored state is malformed at {path or 'its root'}: {reason}", path=path)


def _encode_scalar(value: Any, path: str) -> Json:
    dtype = _SCALARS.get(value.dtype.name)
    if dtype is None:
        hint = "convert it with .item()" if value.dtype.kind in "USc" else "convert it to a plain number or text"
        raise refusal(path, f"is a NumPy scalar of dtype {value.dtype}, which has no place in a tensor file", hint)
    match value.dtype.kind:
        case "b":
            return {"$scalar": [dtype, bool(value)]}
        case "i" | "u":
            return {"$scalar": [dtype, encode(int(value), path)]}
        case "c":
            return {"$scalar": [dtype, encode(complex(value), path)]}
        case _:  # float kinds, and those of ml_dtypes, which call themselves "V"
            return {"$scalar": [dtype, encode(float(value), path)]}


def _decode_counts(content: list[object], path: str, depth: int) -> dict[Any, int | float] | None:
    """Return the counts by key, None where one is no number."""
    counts: dict[Any, int | float] = {}
    for key, skeleton in decode_items(content, path, depth).items():
        count = decode(skeleton, path, depth)
        if not isinstance(count, (int, float)):
            return None
        counts[key] = count
    return counts


def _decode_scalar(dtype: str, skeleton: object, path: str, depth: int) -> object:
    """Return the NumPy scalar; the value must be one that the dtype holds exactly."""
    value = decode(skeleton, path, depth)
    known = DTYPES.get(dtype)
    if known is None or known.numpy is None:
        raise malformed(path, f"no scalar has dtype {dtype[:40]!r}")
    kind: Any = type(value)
    if kind is not _scalar_kind(dtype):
        raise malformed(path, f"a {dtype} scalar cannot be {strict_text(value)}")
    import numpy as np

    scalar: Any
    try:
        with np.errstate(all="ignore"):
            made: Any = numpy_dtype(dtype).type
            scalar = made(value)
            same = kind(scalar) == value or value != value  # noqa: PLR0124 - NaN
    except (OverflowError, ValueError):
        same = False
    if not same:
        raise malformed(path, f"{strict_text(value)} is no value of a {dtype} scalar")
    return scalar


def _scalar_kind(dtype: str) -> Any:
    """Return the Python type that holds every value of a dtype."""
    return {"B": bool, "C": complex, "I": int, "U": int}.get("F" if dtype == "BF16" else dtype[0], float)


def _check_text(text: str, path: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        hint = 'store it as bytes: text.encode("utf-8", "surrogateescape")'
        raise refusal(path, "is text with half of a surrogate pair", hint) from None


def _wrong_type(value: object, path: str) -> InvalidState:
    """Return the error for a value of a type that files cannot hold."""
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    what, hint = f"is a {name}, neither a tensor nor plain data", "give it state_dict() and load_state_dict()"
    if isinstance(value, Enum):
        what, hint = f"is a {kind.__name__} (enum)", "store its .value; no class is ever imported by name on loading"
    elif isinstance(value, (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)):
        what, hint = f"is code ({value!r:.80})", "leave it out; code is not part of the state"
    else:
        for plain in (int, float, complex, str, bytes, bytearray, set, frozenset):
            if isinstance(value, plain):
                what, hint = f"is a {name}", f"store {'bytes' if plain is bytearray else plain.__name__}(…) of it"
    return refusal(path, what, hint)
