"""The safetensors layout: a table of tensors to header bytes and back, strict both ways.

A file is 8 bytes (length of the header, little-endian), the header (a JSON object, padded with spaces), and the tensors
one after another. Source: the format section of https://github.com/huggingface/safetensors. Beyond it, highcamp aligns
the data section and sets limits: the library takes 10 s and 2 GB for a hostile header of 70 MB.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from json.encoder import encode_basestring
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from highcamp.core.array import DTYPES, Spec, byte_count
from highcamp.errors import Damaged, InvalidState

if TYPE_CHECKING:
    from collections.abc import Mapping

ALIGNMENT = 4096  # direct I/O and memory maps start at pages; of today's devices no sector is larger
MAX_HEADER_BYTES = (
    16 << 20
)  # 150,000 tensors with names of 40 bytes fit; a hostile header is refused in < 1 s and 200 MB
MAX_TENSORS = 1_000_000  # refused before any text is made: no header of 16 MiB holds more than a third of it
MAX_NAME_BYTES = 512  # deep models reach 200; longer ones fill screens and error messages
MAX_DIMENSIONS = 64  # NumPy and PyTorch take no more
MAX_METADATA_PAIRS = 10_000  # text beside the tensors; training tools write up to a few hundred
_MAX_BYTES = 2**63 - 1  # sizes and offsets are signed 64-bit in every array library
_MAX_ENTRY_CHARACTERS = 4096  # 64 axes of 19 digits need 1,400; what lies behind is never parsed as one entry
RESERVED_NAME = "__metadata__"  # the one key that is no tensor
_RANK = {name: rank for rank, name in enumerate(reversed(DTYPES))}

# Possessive quantifiers: each pattern looks at a character once, whatever the input.
_SPACE = r"[ \t\n\r]*+"
_STRING = r'"([^"\\]*+(?:\\.[^"\\]*+)*+)"'
_KEY = re.compile(rf"{_SPACE}{_STRING}{_SPACE}:{_SPACE}", re.DOTALL)
_TABLE = re.compile(rf"(\{{[^{{}}]{{0,{_MAX_ENTRY_CHARACTERS}}}+\}}){_SPACE}([,}}])")
_OPEN = re.compile(rf"\{{{_SPACE}(\}})?")
_TEXT = re.compile(rf"{_STRING}{_SPACE}([,}}])", re.DOTALL)
_NEXT = re.compile(rf"{_SPACE}([,}}])")
_END = re.compile(rf"{_SPACE}\Z")
_pairs = json.JSONDecoder(object_pairs_hook=tuple).raw_decode  # pairs instead of a dict: a duplicate key stays visible


class Entry(NamedTuple):
    """One tensor of a file."""

    name: str
    """Its key in the header: printable, at most 512 bytes of UTF-8; it is no path and must not become one."""
    dtype: str
    """A key of `highcamp.core.array.DTYPES`."""
    shape: tuple[int, ...]
    """Lengths of the axes; () is a scalar."""
    start: int
    """First byte, counted from the start of the data section."""
    end: int
    """One past the last byte."""

    @property
    def spec(self) -> Spec:
        """Dtype and shape."""
        return self.dtype, self.shape


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in a tensor file."""

    header: bytes
    """The file's first bytes: 8 bytes of length, the JSON text, padding."""
    entries: tuple[Entry, ...]
    """The tensors in the order of their bytes: no gap, no overlap."""
    size: int
    """Bytes of the data section."""
    metadata: dict[str, str]
    """Text beside the tensors."""

    @property
    def data_start(self) -> int:
        """Where the data section begins in the file; a multiple of 4096 in files highcamp has written."""
        return len(self.header)

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.size


def plan(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> Layout:
    """Lay out a tensor file; the data section has the bytes and the order that the safetensors library would give it.

    specs: (dtype, shape) by tensor name. metadata: text for the header, sorted: equal input, equal bytes.
    Raises InvalidState for names, counts and sizes beyond the limits here, InvalidArgument for unknown dtypes.
    """
    if len(specs) > MAX_TENSORS:
        raise _refusal(f"{len(specs)} tensors in one file, at most {MAX_TENSORS} are written")
    if len(metadata) > MAX_METADATA_PAIRS:
        raise _refusal(f"{len(metadata)} metadata entries in one file, at most {MAX_METADATA_PAIRS} are written")
    rank = _RANK
    for name, (dtype, shape) in specs.items():
        if problem := _name_problem(name) or (dtype in rank and _shape_problem(dtype, shape)):
            raise _refusal(f"tensor {name[:100]!r}: {problem}")
        if dtype not in rank:
            byte_count(dtype, shape)  # raises, with the list of what there is
    # The library's order: larger elements first, so that each tensor is aligned to its element; then by name.
    order = sorted(specs, key=lambda name: (rank[specs[name][0]], name))
    entries: list[Entry] = []
    pieces: list[str] = []
    if metadata:
        text = ",".join(f"{encode_basestring(key)}:{encode_basestring(metadata[key])}" for key in sorted(metadata))
        pieces.append(f'"{RESERVED_NAME}":{{{text}}}')
    start = 0
    for name in order:
        dtype, shape = specs[name]
        end = start + byte_count(dtype, shape)
        entries.append(Entry(name, dtype, shape, start, end))
        axes = ",".join(map(str, shape))
        pieces.append(
            f'{encode_basestring(name)}:{{"dtype":"{dtype}","shape":[{axes}],"data_offsets":[{start},{end}]}}'
        )
        start = end
    if start > _MAX_BYTES:
        raise _refusal(f"{start} bytes of tensors in one file")
    try:
        table = f"{{{','.join(pieces)}}}".encode()
    except UnicodeEncodeError as error:
        raise _refusal("metadata has half of a surrogate pair") from error
    length = -(-(8 + len(table)) // ALIGNMENT) * ALIGNMENT
    if length > MAX_HEADER_BYTES:
        raise _refusal(f"a header of {length} bytes for {len(specs)} tensors, at most {MAX_HEADER_BYTES} are written")
    header = (length - 8).to_bytes(8, "little") + table.ljust(length - 8)
    return Layout(header, tuple(entries), start, dict(metadata))


def header_bytes(first8: bytes, file_size: int, where: str) -> int:
    """Return how many bytes the header takes, its 8 bytes of length included, before any of it is read.

    first8: the first bytes of the file, fewer than 8 when it is shorter.
    Raises Damaged, naming `where`, when the file cannot be a tensor file.
    """
    if len(first8) < 8 or file_size < 8:
        raise _damaged(where, f"it is {min(file_size, len(first8))} bytes, a tensor file has at least 10")
    length = 8 + int.from_bytes(first8[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _damaged(where, f"its header claims {length} bytes, at most {MAX_HEADER_BYTES} are read")
    if length < 10:
        raise _damaged(where, f"its header claims {length} bytes, at least 10 are needed")
    if length > file_size:
        raise _damaged(where, f"it is {file_size} bytes and its header alone claims {length}")
    return length


def parse(header: bytes, file_size: int, where: str) -> Layout:
    """Return the layout that a header describes, having checked that it accounts for each byte of the file once.

    header: the first `header_bytes(…)` bytes of the file. file_size: bytes of the whole file.
    Raises Damaged, naming `where`, for everything else: bad JSON, unknown dtypes, duplicate or unprintable names,
    negative or fractional numbers, offsets that do not match dtype and shape, gaps, overlaps, a wrong file size.
    """
    if header_bytes(header[:8], file_size, where) != len(header):
        raise _damaged(where, f"{len(header)} bytes were read as its header, which claims another length")
    try:
        text = header[8:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(where, f"its header is not UTF-8 text (byte {8 + error.start})") from error
    entries, metadata = _table(text, where)
    entries.sort(key=itemgetter(3, 4))
    position = 0
    for entry in entries:
        if entry.start != position:
            kind = "overlap" if entry.start < position else "leave a gap"
            raise _damaged(where, f"its tensors {kind}: {entry.name!r} starts at {entry.start}, expected {position}")
        position = entry.end
    if len(header) + position != file_size:
        raise _damaged(where, f"it is {file_size} bytes, its header accounts for {len(header) + position}")
    return Layout(header, tuple(entries), position, metadata)


def _table(text: str, where: str) -> tuple[list[Entry], dict[str, str]]:
    """Read the header's object entry by entry: the first bad one ends it, before the rest has cost anything."""
    entries: list[Entry] = []
    metadata: dict[str, str] | None = None
    seen: set[str] = set()
    if (match := _OPEN.match(text)) is None:
        raise _damaged(where, "its header is not a JSON object")
    position, is_open = match.end(), match[1] is None
    key_at, table_at = _KEY.match, _TABLE.match
    while is_open:
        if (match := key_at(text, position)) is None:
            raise _damaged(where, f"its header is no JSON object of tensors (character {position})")
        position = match.end()
        name = _unescape(match[1], where)
        if name in seen:
            raise _damaged(where, f"its header names {name[:100]!r} twice")
        seen.add(name)
        if name == RESERVED_NAME:
            metadata, position = _metadata(text, position, where)
            match = _NEXT.match(text, position)
        elif (match := table_at(text, position)) is not None:
            entries.append(_entry(name, match[1], where))
        if match is None:
            raise _damaged(where, f"its header has no proper entry for {name[:100]!r} (character {position})")
        position, is_open = match.end(), match[match.lastindex or 0] == ","
    if _END.match(text, position) is None:
        raise _damaged(where, f"its header goes on after the closing brace (character {position})")
    return entries, metadata or {}


def _entry(name: str, table: str, where: str) -> Entry:
    try:
        pairs, _ = _pairs(table)
        values = dict(pairs)
        dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(where, f"tensor {name[:100]!r} needs dtype, shape and data_offsets ({error})") from error
    problem: str | None = _name_problem(name)
    if problem is None:
        if len(pairs) != 3:
            problem = "it has keys besides dtype, shape and data_offsets, or one of them twice"
        elif type(dtype) is not str or dtype not in DTYPES:
            problem = f"unknown dtype {str(dtype)[:40]!r}"
        elif type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
            problem = "its shape or data_offsets is no list of integers"
        else:
            start, end = offsets
            if type(start) is not int or type(end) is not int:  # their values are checked where all of them are known
                problem = "its data_offsets are no integers"
            elif (problem := _shape_problem(dtype, shape)) is None:
                axes = tuple(shape)
                size = math.prod(axes) * DTYPES[dtype].bits // 8
                if end - start == size:
                    return Entry(name, dtype, axes, start, end)
                problem = f"{dtype} of shape {axes} takes {size} bytes, its data_offsets span {end - start}"
    raise _damaged(where, f"tensor {name[:100]!r}: {problem}")


def _metadata(text: str, position: int, where: str) -> tuple[dict[str, str], int]:
    """Read the object of texts that begins at `position`; return it and where it ends."""
    pairs: dict[str, str] = {}
    match = _OPEN.match(text, position)
    while match is not None:
        position = match.end()
        if match[match.lastindex or 0] == "}":
            return pairs, position
        if (match := _KEY.match(text, position)) is None:
            break
        key = _unescape(match[1], where)
        if (match := _TEXT.match(text, match.end())) is None:
            break
        if key in pairs or len(pairs) >= MAX_METADATA_PAIRS:
            raise _damaged(where, f"its metadata names {key[:100]!r} twice, or more than {MAX_METADATA_PAIRS} keys")
        pairs[key] = _unescape(match[1], where)
    raise _damaged(where, f"its metadata is no JSON object of texts (character {position})")


def _unescape(text: str, where: str) -> str:
    """Return what stands between two quotation marks, with its escapes resolved."""
    if "\\" not in text and text.isprintable():
        return text
    try:
        value: object = json.loads(f'"{text}"')
        str(value).encode("utf-8")  # half a surrogate pair has no place in a text
    except ValueError as error:
        raise _damaged(where, "its header has a broken string") from error
    return str(value)


def _name_problem(name: str) -> str | None:
    if not name.isprintable():
        return "its name has control characters"
    if len(name) * 4 > MAX_NAME_BYTES and len(name.encode("utf-8")) > MAX_NAME_BYTES:
        return f"its name is longer than {MAX_NAME_BYTES} bytes"
    if name == RESERVED_NAME:
        return "this name is reserved by the file format"
    return None


def _shape_problem(dtype: str, shape: tuple[int, ...] | list[int]) -> str | None:
    """Say why no array can have this shape; without elements too, for NumPy multiplies the other axes all the same."""
    if len(shape) > MAX_DIMENSIONS:
        return f"it has {len(shape)} axes, at most {MAX_DIMENSIONS} are possible"
    bits = DTYPES[dtype].bits
    for length in shape:
        if type(length) is not int or length < 0:
            return f"its shape has {str(length)[:40]}, no length of an axis"
        bits *= length or 1
        if bits > _MAX_BYTES * 8:
            return "its shape is beyond 64-bit sizes"
    if bits % 8 and 0 not in shape:
        return f"{dtype} of shape {tuple(shape)} does not end at a byte"
    return None


def _refusal(reason: str) -> InvalidState:
    return InvalidState(f"no tensor file holds this: {reason}", hint="track it as several objects, or rename")


def _damaged(where: str, reason: str) -> Damaged:
    return Damaged(f"{where} is no whole tensor file: {reason}", path=where)
