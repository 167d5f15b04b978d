"""Tensor files against the safetensors library, both ways: equal data sections, and each reads what the other wrote."""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from highcamp.core.array import DTYPES, HostArray, numpy_dtype
from highcamp.core.tensorfile import ALIGNMENT, MAX_NAME_BYTES, header_bytes, parse, plan
from highcamp.core.tree import flatten, names
from highcamp.errors import Damaged, HighcampError

# How the library spells a dtype where it writes. It reads F6_E2M3 and F6_E3M2 and cannot write them.
WRITABLE = {name: dtype.numpy for name, dtype in DTYPES.items() if dtype.numpy is not None}
LENGTHS = st.integers(0, 5)
SHAPES = st.one_of(st.just(()), st.lists(LENGTHS, min_size=1, max_size=4).map(tuple))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAMES = st.text(st.characters(exclude_categories=["Cs"]).filter(str.isprintable), max_size=20).filter(
    lambda name: name != "__metadata__" and len(name.encode()) <= MAX_NAME_BYTES
)
SPECS = st.tuples(st.sampled_from(sorted(WRITABLE)), SHAPES)
ODD_SPECS = st.tuples(st.sampled_from([*DTYPES, "F33"]), st.lists(st.integers(-1, 2**40), max_size=3).map(tuple))
METADATA = st.dictionaries(TEXT, TEXT, max_size=4)


def content(specs, seed):
    """Random bytes for every tensor."""
    generator = np.random.default_rng(seed)
    data = {}
    for name, (dtype, shape) in specs.items():
        values = np.frombuffer(generator.bytes(math.prod(shape) * DTYPES[dtype].bits // 8), np.uint8)
        data[name] = (values % 2).astype(np.uint8) if dtype == "BOOL" else values.copy()
    return data


def library_file(specs, data, metadata) -> bytes:
    """The file that the library writes."""
    tensors = {
        name: safetensors.TensorSpec(
            dtype=WRITABLE[dtype], shape=shape, data_ptr=data[name].ctypes.data, data_len=data[name].nbytes
        )
        for name, (dtype, shape) in specs.items()
    }
    return bytes(safetensors.serialize(tensors, metadata=metadata or None))


def our_file(specs, data, metadata) -> bytes:
    """The file that we write."""
    layout = plan(specs, metadata)
    return layout.header + b"".join(data[entry.name].tobytes() for entry in layout.entries)


def split(file: bytes):
    """Layout and data section of a file."""
    length = header_bytes(file[:8], len(file), "f")
    return parse(file[:length], len(file), "f"), file[length:]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, SPECS, max_size=12), METADATA, st.integers(0, 2**32))
@example({name: (name, (2, 3)) for name in WRITABLE}, {"format": "pt"}, 0)
@example({name: (name, ()) for name in WRITABLE}, {}, 1)
@example({name: (name, (0, 3)) for name in WRITABLE}, {}, 2)
@example({"a": ("F32", (0,)), "b": ("F32", (1,)), "c": ("F32", (0,)), "d": ("BOOL", (3,))}, {}, 3)
@example({"\U0001f600": ("U8", (1,)), "\uff21": ("U8", (1,)), "z": ("U8", (1,)), "é": ("U8", (2,))}, {}, 4)
def test_our_file_and_the_librarys_hold_the_same(specs, metadata, seed):
    """Files would be readable by highcamp only, or weights from elsewhere not readable at all."""
    data = content(specs, seed)

    ours, theirs = our_file(specs, data, metadata), library_file(specs, data, metadata)

    our_layout, our_data = split(ours)
    their_layout, their_data = split(theirs)
    assert our_data == their_data
    assert [tuple(entry) for entry in our_layout.entries] == [tuple(entry) for entry in their_layout.entries]
    assert our_layout.metadata == their_layout.metadata == metadata
    assert our_layout.data_start % ALIGNMENT == 0
    # The library reads ours: names, dtypes, shapes and bytes.
    read = {
        name: (view["dtype"], tuple(view["shape"]), bytes(view["data"])) for name, view in safetensors.deserialize(ours)
    }
    assert read == {name: (*specs[name], data[name].tobytes()) for name in specs}


PACKED = st.sampled_from([("F4", 2), ("F6_E2M3", 4), ("F6_E3M2", 4)])


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, st.tuples(PACKED, SHAPES), max_size=6), st.integers(0, 2**32))
def test_packed_elements_are_read_by_the_library(shapes, seed):
    """Four-bit weights would be written at the wrong places."""
    specs = {name: (dtype, (*shape, multiple)) for name, ((dtype, multiple), shape) in shapes.items()}
    data = content(specs, seed)

    read = safetensors.deserialize(our_file(specs, data, {}))

    assert {name: (view["dtype"], tuple(view["shape"]), bytes(view["data"])) for name, view in read} == {
        name: (*specs[name], data[name].tobytes()) for name in specs
    }


def test_packed_elements_of_the_library_are_read_by_us():
    """Four-bit weights from elsewhere would be called damaged."""
    values = np.arange(12, dtype=np.uint8)
    spec = safetensors.TensorSpec(dtype="float4_e2m1fn_x2", shape=(3, 4), data_ptr=values.ctypes.data, data_len=12)

    layout, data = split(bytes(safetensors.serialize({"a": spec})))

    assert layout.entries[0].spec == ("F4", (3, 8))
    assert data == values.tobytes()


# F8_E8M0 is missing: safetensors 0.8 writes it from torch and has no entry in its table to read it back.
@pytest.mark.parametrize("name", sorted(set(WRITABLE) - {"F8_E8M0"}))
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_torch_reads_what_we_write(name, shape, tmp_path):
    """`safetensors.torch.load_file` is what most people will open a checkpoint with."""
    array = content({"w": (name, shape)}, 5)["w"].view(numpy_dtype(name)).reshape(shape)
    host = HostArray.from_numpy(array)
    layout = plan({"w": host.spec}, {"format": "pt"})
    path = tmp_path / "model.safetensors"
    path.write_bytes(layout.header + bytes(host.data))

    tensor = safetensors.torch.load_file(path)["w"]

    assert tuple(tensor.shape) == shape
    flat = tensor.reshape(-1)
    assert (flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"") == array.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, SHAPES, min_size=1, max_size=6), st.data())
def test_tied_tensors_are_in_the_file_once(shapes, choose):
    """Tied embeddings would be written twice, and the library refuses to write them at all."""
    arrays = {name: np.random.default_rng(0).random(shape, dtype=np.float32) for name, shape in shapes.items()}
    tree = [choose.draw(st.sampled_from(sorted(arrays))) for _ in range(8)]

    flat = flatten(
        [arrays[name] for name in tree], lambda leaf: HostArray.from_numpy(leaf, tie=id(leaf)), where="model"
    )
    layout = plan({name: array.spec for name, array in flat.arrays.items()}, {})
    file = layout.header + b"".join(bytes(flat.arrays[entry.name].data) for entry in layout.entries)
    loaded = safetensors.numpy.load(file)

    assert len(loaded) == len(set(tree))
    for index, name in enumerate(tree):
        np.testing.assert_array_equal(loaded[names(flat.skeleton)[str(index)]], arrays[name])


# ------------------------------------------------------------------------------------------------- what is not accepted

NUMBERS = st.one_of(
    st.integers(-2, 40), st.sampled_from([2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 0.0, 1.5, True, None, "1"])
)
TABLES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from([*DTYPES, "f32", "C128"]), st.none(), st.integers()),
        "shape": st.one_of(st.lists(NUMBERS, max_size=3), NUMBERS),
        "data_offsets": st.one_of(st.lists(NUMBERS, min_size=1, max_size=3), NUMBERS),
        "more": NUMBERS,
    },
)
HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__", "\n", "é"]), st.one_of(TABLES, METADATA, NUMBERS), max_size=4
)


def accepted(file: bytes):
    """What we read, None for damaged; every other exception fails the test."""
    try:
        return split(file)[0]
    except Damaged:
        return None


@settings(max_examples=1000, deadline=None)
@given(HEADERS, st.integers(0, 20))
def test_whatever_we_accept_the_library_reads_alike(table, size):
    """A lenient reader gives tensors that are not in the file."""
    text = json.dumps(table).encode()
    file = struct.pack("<Q", len(text)) + text + bytes(size)

    layout = accepted(file)

    if layout is not None:
        read = {name: (view["dtype"], tuple(view["shape"])) for name, view in safetensors.deserialize(file)}
        assert read == {entry.name: entry.spec for entry in layout.entries}


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(NAMES, SPECS, min_size=1, max_size=4), st.data())
def test_a_changed_byte_in_the_header_never_escapes_as_another_error(specs, choose):
    """Damage would end the process with an error nobody catches."""
    file = bytearray(library_file(specs, content(specs, 0), {"format": "pt"}))
    length = header_bytes(bytes(file[:8]), len(file), "f")
    for _ in range(choose.draw(st.integers(1, 4))):
        file[choose.draw(st.integers(0, length - 1))] = choose.draw(st.integers(0, 255))
    size = len(file) + choose.draw(st.sampled_from([0, 0, -1, 1, 8]))

    layout = accepted(bytes(file[:size]))

    if layout is not None:
        assert layout.file_size == min(size, len(file))
        assert [entry.start for entry in layout.entries] == [0, *(entry.end for entry in layout.entries)][:-1]


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_a_file_or_damaged(data, is_framed):
    """A foreign file under our name would end the process with an error nobody catches."""
    accepted(struct.pack("<Q", len(data)) + data if is_framed else data)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=8), ODD_SPECS, max_size=4))
def test_whatever_we_plan_we_parse(specs):
    """A checkpoint would be committed that nobody can load."""
    try:
        layout = plan(specs, {})
    except HighcampError:
        return

    assert parse(layout.header, layout.file_size, "f") == layout
