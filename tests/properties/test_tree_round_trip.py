"""State trees of every shape: through JSON and back, with the same types, bits and names."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from highcamp.core import strict
from highcamp.core.array import DTYPES, HostArray, numpy_dtype
from highcamp.core.tensorfile import plan
from highcamp.core.tree import differences, fill, flatten, names, unflatten
from highcamp.errors import Damaged, InvalidState

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
FLOATS = st.floats(allow_nan=True, allow_infinity=True)
NUMBERS = st.floats(allow_nan=False)  # nobody, a template neither, can look up a key that is NaN
IN_NUMPY = sorted(name for name, dtype in DTYPES.items() if dtype.numpy is not None)


class Pair(NamedTuple):
    """What optimizer libraries keep their states in."""

    first: object
    second: object


@st.composite
def bits(draw, count):
    """Arrays of any dtype with random bits, NaN payloads included."""
    name = draw(st.sampled_from(IN_NUMPY))
    size = DTYPES[name].bits // 8 * count
    data = draw(st.binary(min_size=size, max_size=size))
    values = np.frombuffer(bytes(byte % 2 for byte in data) if name == "BOOL" else data, numpy_dtype(name))
    return values.copy()


@st.composite
def arrays(draw):
    """Arrays of any dtype and of odd shapes."""
    shape = draw(st.sampled_from([(), (0,), (1,), (2, 2), (2, 0, 3), (3,)]))
    return draw(bits(math.prod(shape))).reshape(shape)


INTEGERS = st.one_of(st.integers(), st.integers(-(2**130), 2**130), st.sampled_from([2**53, 2**53 + 1, -(2**53) - 1]))
HASHABLE = st.recursive(
    st.one_of(
        st.none(), st.booleans(), INTEGERS, NUMBERS, TEXT, st.binary(max_size=5), st.complex_numbers(allow_nan=False)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.frozensets(inner, max_size=3)),
    max_leaves=4,
)
LEAVES = st.one_of(
    HASHABLE, FLOATS, arrays(), bits(1).map(lambda values: values[0]), st.sets(HASHABLE, max_size=3),
    st.dictionaries(HASHABLE, st.integers(), max_size=3).map(Counter), st.sampled_from(["$tensor", "$items", "a/b"]),
)  # fmt: skip
KEYS = st.one_of(TEXT, st.sampled_from(["a", "a/b", "b", "$tensor", "$", "a~2", "__metadata__", "0"]), HASHABLE)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict), st.builds(Pair, inner, inner),
    ),
    max_leaves=20,
)  # fmt: skip


def as_array(leaf):
    """NumPy arrays are tensors, nothing else is."""
    return HostArray.from_numpy(leaf) if type(leaf) is np.ndarray else None


def key(value):
    """A description that is equal exactly for equal types and bits; NaN equals NaN, and dicts differ by order."""
    match value:
        case np.ndarray() | np.generic() if value.dtype.kind in "fcV" and isinstance(value, np.generic):
            return type(value), str(value)  # a scalar keeps its value, not the payload of a NaN
        case np.ndarray() | np.generic():
            return type(value), value.dtype.str, value.shape, value.tobytes()
        case Pair():
            return key(value._asdict())
        case Counter() | dict():
            kind = Counter if isinstance(value, Counter) else dict
            return kind, [(key(k), key(v)) for k, v in value.items()]
        case list() | tuple():
            return type(value), [key(child) for child in value]
        case set() | frozenset():
            return type(value), sorted(repr(key(child)) for child in value)
    return type(value), repr(value)


def through_json(skeleton):
    """The skeleton, written and read again."""
    return strict.read(strict.write(skeleton), where="state.json", limit=1 << 24)


@settings(max_examples=600, deadline=None)
@given(TREES)
def test_a_tree_comes_back_in_types_and_bits(tree):
    """A resumed run would differ in something nobody looks at."""
    flat = flatten(tree, as_array, where="state")

    rebuilt = unflatten(through_json(flat.skeleton), lambda name: flat.arrays[name].numpy())

    assert key(rebuilt) == key(tree)


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_every_tree_fits_a_tensor_file_and_its_names_stay(tree):
    """A state that was saved could not be loaded, or tensors take each other's place."""
    flat = flatten(tree, as_array, where="state")

    plan({name: array.spec for name, array in flat.arrays.items()}, {})
    paths = names(through_json(flat.skeleton))

    assert list(paths.values()) == list(flat.arrays)
    assert all(path == name for path, name in paths.items())
    again = flatten(tree, as_array, where="state")
    assert strict.write(again.skeleton) == strict.write(flat.skeleton)
    assert list(again.arrays) == list(flat.arrays)


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_a_tree_fits_itself_as_a_template(tree):
    """The most common restore, into what was saved, would be refused."""
    flat = flatten(tree, as_array, where="state")
    specs = {name: array.spec for name, array in flat.arrays.items()}

    filled = fill(tree, through_json(flat.skeleton), lambda name, _: flat.arrays[name].numpy(), as_array, specs=specs)

    assert key(filled) == key(tree)
    live = {path: specs[name] for path, name in names(flat.skeleton).items()}
    assert differences(live, dict(live)) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_ties_are_kept_and_no_others_made(keys, which):
    """Tied weights would come back untied, or two that only look alike as one."""
    shared = [np.full(2, float(index)) for index in range(3)]
    joined = "/".join(keys)  # such as a/b, which collides with the key b inside of a
    tree = {"l": [{joined: (shared[index],), "b": {"c": shared[index]}} for index in which]}

    flat = flatten(
        tree, lambda leaf: HostArray.from_numpy(leaf, tie=id(leaf)) if type(leaf) is np.ndarray else None, where="m"
    )
    rebuilt = unflatten(flat.skeleton, lambda name: flat.arrays[name])

    assert len(flat.arrays) == len(set(which))
    for index, pair in zip(which, rebuilt["l"], strict=True):
        for array in (*(pair[joined] if joined != "b" else ()), pair["b"]["c"]):
            assert array.tie == id(shared[index])


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), INTEGERS, st.floats(allow_nan=False, allow_infinity=False), TEXT,
              st.sampled_from(["F32", "I8", "BOOL", "nan", "inf", "YQ==", "12"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "b", "$x", "$tensor", "$tuple"]), inner, max_size=2),
        st.builds(lambda tag, content: {tag: content}, st.sampled_from([
            "$tensor", "$tuple", "$namedtuple", "$items", "$counter", "$set", "$frozenset", "$bytes", "$int", "$float",
            "$complex", "$scalar",
        ]), inner),
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=1000, deadline=None)
@given(JSON)
def test_any_json_is_a_state_or_damaged(skeleton):
    """A hostile file would end the process with an error nobody catches."""
    try:
        tree = unflatten(skeleton, lambda name: np.zeros(1))
    except Damaged:
        return

    try:
        names(skeleton)
        flatten(tree, as_array, where="state")
    except InvalidState as error:
        raise AssertionError from error


@settings(max_examples=500, deadline=None)
@given(st.one_of(JSON.map(strict.write), st.binary(max_size=60)), st.data())
def test_changed_json_is_read_or_damaged(text, choose):
    """Damage would end the process with an error nobody catches."""
    data = bytearray(text)
    if data:
        data[choose.draw(st.integers(0, len(data) - 1))] = choose.draw(st.integers(0, 255))

    try:
        value = strict.read(bytes(data), where="f", limit=1 << 20)
    except Damaged:
        return

    assert strict.read(strict.write(value), where="f", limit=1 << 20) == value
