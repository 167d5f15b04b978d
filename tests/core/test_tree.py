"""State trees: everything comes back as it was, or is refused with its path."""

from __future__ import annotations

import collections
import datetime as dt
import enum
import functools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter, OrderedDict, defaultdict, namedtuple

import ml_dtypes
import numpy as np
import pytest

from highcamp.core import strict
from highcamp.core.array import DTYPES, HostArray, numpy_dtype
from highcamp.core.tree import differences, fill, flatten, names, unflatten
from highcamp.errors import Damaged, InvalidState, Mismatch

Point = namedtuple("Point", "x y")  # noqa: PYI024 - the untyped kind is what users have


class Color(enum.Enum):
    """An enum."""

    RED = 1


class Level(enum.IntEnum):
    """An enum that is an integer."""

    LOW = 1


class Mode(str, enum.Enum):  # noqa: UP042 - the older spelling, which code still has
    """An enum that is a text."""

    MIN = "min"


class Flags(enum.Flag):
    """An enum of bits."""

    A = 1


def as_array(leaf):
    """NumPy arrays are tensors, nothing else is."""
    return HostArray.from_numpy(leaf) if isinstance(leaf, np.ndarray) else None


def by_identity(leaf):
    """Arrays over the same memory are tied, as a framework's module says it."""
    return HostArray.from_numpy(leaf, tie=leaf.ctypes.data) if isinstance(leaf, np.ndarray) else None


def flat(tree):
    """The tree taken apart."""
    return flatten(tree, as_array, where="state")


def back(tree):
    """The tree, through the bytes of the JSON."""
    taken = flat(tree)
    skeleton = strict.read(strict.write(taken.skeleton), where="state.json", limit=1 << 24)
    return unflatten(skeleton, lambda name: taken.arrays[name].numpy())


def same(one, two) -> bool:
    """Equal in type and bits all the way down."""
    if type(one) is not type(two):
        return False
    match one:
        case np.ndarray():
            return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
        case np.generic():
            return one.tobytes() == two.tobytes() or (one != one and two != two)  # noqa: PLR0124 - NaN
        case dict():
            return all(same(*pair) for pair in zip(one.items(), two.items(), strict=True)) and len(one) == len(two)
        case list() | tuple():
            return len(one) == len(two) and all(map(same, one, two))
        case set() | frozenset():
            return sorted(map(repr, one)) == sorted(map(repr, two))
        case float() | complex():
            return repr(one) == repr(two)
    return one == two


PLAIN = [
    None, True, False, 0, -1, 2**53, -(2**53), 2**53 + 1, 2**64, -(2**127), 2**128 - 1, 10**4200,
    0.0, -0.0, 0.1, 5e-324, 1.7976931348623157e308, 1e16, 3.0, math.nan, math.inf, -math.inf,
    complex(1, -0.0), complex(math.nan, math.inf), "", "text", "é😀", "$tensor", "a\x00\n\u202e", "\x7f",
    b"", bytes(range(256)), [], (), {}, set(), frozenset(), [[]], ((),), [None],
    {1, 2, 3}, frozenset({"a", (1, frozenset({2}))}), {math.nan}, {b"x", None, 2**70, 1j, 0.5},
    Counter({30: 1, 80: 2}), Counter("hello"), Counter({(1, 2): 3, "a": 0.5}), Counter(),
    {0: "a", 1: "b"}, {"0": 1, 0: 2}, {(1, 2): "t", None: 0, True: 1, 2.5: 3, b"k": 4, frozenset({1}): 5, 1j: 6},
    {"$tensor": "x"}, {"$": 1, "a": 2}, {"$items": []}, {"": 1}, {"a/b": 1, "a": {"b": 2}}, {2**100: 1},
    {"z": 1, "a": 2}, {math.nan: 1}, {-0.0: 1}, {np.int64(3): 1},
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(PLAIN)))
def test_plain_values_come_back_in_type_and_bits(index):
    """A resumed run would differ in something nobody looks at: a random state, a patience counter, a milestone."""
    value = PLAIN[index]

    assert same(back(value), value)
    assert same(back({"a": [value, (value,)]}), {"a": [value, (value,)]})


def test_the_json_of_every_kind_stays_as_it_is():
    """Checkpoints written by earlier versions could not be read."""
    tree = {
        "plain": [None, True, 1, 2**53, -(2**53), 0.5, -0.0, "é", {"a": 1}], "tensor": np.zeros(1, "f4"), "tuple": (1, ()),
        "named": Point(1, 2), "items": {0: "a", "$b": 2}, "counter": Counter({30: 1}), "set": {2, 1, "a"},
        "frozenset": frozenset({(1, 2)}), "bytes": b"\x00\xff\xfe", "int": [2**53 + 1, -(2**64)],
        "float": [math.nan, math.inf, -math.inf],
        "complex": complex(1.5, math.inf),
        "scalar": [np.float32(1.5), np.int8(-1), np.bool_(1), np.uint64(2**63), np.float64("nan")],
    }  # fmt: skip

    assert strict.write(flat(tree).skeleton).decode() == (
        '{"plain":[null,true,1,9007199254740992,-9007199254740992,0.5,-0.0,"é",{"a":1}],"tensor":{"$tensor":"tensor"},'
        '"tuple":{"$tuple":[1,{"$tuple":[]}]},"named":{"$namedtuple":["Point",{"x":1,"y":2}]},'
        '"items":{"$items":[[0,"a"],["$b",2]]},"counter":{"$counter":[[30,1]]},"set":{"$set":["a",1,2]},'
        '"frozenset":{"$frozenset":[{"$tuple":[1,2]}]},"bytes":{"$bytes":"AP/+"},'
        '"int":[{"$int":"9007199254740993"},{"$int":"-18446744073709551616"}],'
        '"float":[{"$float":"nan"},{"$float":"inf"},{"$float":"-inf"}],"complex":{"$complex":[1.5,{"$float":"inf"}]},'
        '"scalar":[{"$scalar":["F32",1.5]},{"$scalar":["I8",-1]},{"$scalar":["BOOL",true]},'
        '{"$scalar":["U64",{"$int":"9223372036854775808"}]},{"$scalar":["F64",{"$float":"nan"}]}]}'
    )


def test_a_named_tuple_as_a_key_is_found_again():
    """What was stored under it would be lost: the tuple that comes back is equal to it."""
    rebuilt = back({Point(1, 2): 3, frozenset({Point(3, 4)}): 5})

    assert rebuilt[Point(1, 2)] == 3
    assert rebuilt[frozenset({(3, 4)})] == 5


def test_two_nan_keys_stay_two():
    """A state that was saved could not be loaded."""
    tree = {float("nan"): 1, float("nan"): 2}

    assert list(back(tree).values()) == [1, 2]
    assert len(back({float("nan"), float("nan")})) == 2


@pytest.mark.parametrize("name", [name for name, dtype in DTYPES.items() if dtype.numpy is not None])
def test_numpy_scalars_come_back_as_the_same_type(name):
    """Arithmetic after a resume would be done in another precision."""
    kind = numpy_dtype(name).type
    values = [0, 1] if name == "BOOL" else [1, 2] if name == "F8_E8M0" else [0, 1, 2, 0.5 if "F" in name else 5]
    scalars = [kind(value) for value in values]
    if name[0] in "IU":
        scalars += [kind(np.iinfo(kind).max), kind(np.iinfo(kind).min)]
    if name in {"F16", "BF16", "F32", "F64", "F8_E5M2"}:
        scalars += [kind(value) for value in (math.nan, math.inf, -math.inf, -0.0, 0.1)]
    if name == "C64":
        scalars += [kind(complex(math.nan, -0.0)), kind(complex(math.inf, 0.1))]

    for scalar in scalars:
        assert same(back(scalar), scalar)
        assert same(back({"a": (scalar,)}), {"a": (scalar,)})


def test_tensors_are_named_by_their_paths():
    """Nobody could find a tensor in the file without highcamp."""
    a = np.ones(1)
    tree = {"layers": [{"weight": a}, {"weight": a + 1}], "state": {0: {"exp_avg": a}, (1, 2): a}, "p": Point(a, (a,))}

    taken = flat(tree)

    assert list(taken.arrays) == [
        "layers/0/weight", "layers/1/weight", "state/0/exp_avg", 'state/{"$tuple":[1,2]}', "p/x", "p/y/0",
    ]  # fmt: skip
    assert names(taken.skeleton) == {name: name for name in taken.arrays}


def test_a_tree_that_is_one_tensor_bears_the_objects_name():
    """It would have no name at all."""
    taken = flatten(np.ones(2), as_array, where="objects/embedding")

    assert taken.skeleton == {"$tensor": "embedding"}
    assert list(taken.arrays) == ["embedding"]
    assert names(taken.skeleton) == {"embedding": "embedding"}


def test_keys_that_look_alike_stay_apart():
    """One tensor would silently take the place of another."""
    values = [np.array(float(i)) for i in range(8)]
    tree = {
        "a/b": values[0], "a": {"b": values[1]}, "0": values[2], 0: values[3], "None": values[4], None: values[5],
        "__metadata__": values[6], "a/b~2": values[7],
    }  # fmt: skip

    taken = flat(tree)

    assert len(taken.arrays) == 8
    assert same(back(tree), tree)
    assert names(taken.skeleton) == {name: name for name in taken.arrays}


HOSTILE_KEYS = [
    "../../x",
    "/etc/passwd",
    "a\x00b",
    "\n",
    "\u202e",
    "x" * 1000,
    "é" * 400,
    "CON",
    "%2e%2e",
    "\\",
    '"',
    "",
    " ",
]


def test_hostile_keys_give_harmless_names():
    """A key of the state would become a path, cut a name short, or make the file unreadable."""
    tree = {key: {key: np.array(i)} for i, key in enumerate(HOSTILE_KEYS)}

    taken = flat(tree)

    assert len(taken.arrays) == len(HOSTILE_KEYS)
    assert all(name.isprintable() and len(name.encode()) <= 512 for name in taken.arrays)
    assert same(back(tree), tree)
    assert list(names(taken.skeleton).values()) == list(taken.arrays)


def test_tied_arrays_are_written_once_and_both_come_back():
    """Tied embeddings would take twice the space and come back untied."""
    shared = np.arange(6.0).reshape(2, 3)
    tree = {"embed": shared, "head": {"weight": shared}, "other": shared.copy()}

    taken = flatten(tree, by_identity, where="model")

    assert list(taken.arrays) == ["embed", "other"]
    assert names(taken.skeleton) == {"embed": "embed", "head/weight": "embed", "other": "other"}
    rebuilt = unflatten(taken.skeleton, dict(taken.arrays).__getitem__)
    assert rebuilt["embed"] is rebuilt["head"]["weight"]


def test_views_of_one_memory_are_tied_only_when_they_look_the_same():
    """A bias that begins where a weight begins would come back as the weight."""
    shared = np.arange(6.0)
    tree = {"a": shared, "b": shared.reshape(2, 3), "c": shared[:3], "d": shared.view("i8"), "e": shared}

    taken = flatten(tree, by_identity, where="model")

    assert list(taken.arrays) == ["a", "b", "c", "d"]
    assert taken.skeleton["e"] == {"$tensor": "a"}


def test_arrays_without_a_tie_are_written_each():
    """Two equal arrays would become one, and change together after a restore."""
    shared = np.ones(3)

    assert list(flat({"a": shared, "b": shared}).arrays) == ["a", "b"]


def test_a_tied_alias_does_not_shift_the_numbers_of_others():
    """The paths of a saved and a live state would be compared under different names."""
    shared = np.ones(3)
    tree = {"z": shared, "a/b": shared, "a": {"b": np.zeros(1)}}

    taken = flatten(tree, by_identity, where="model")

    assert names(taken.skeleton) == {"z": "z", "a/b": "z", "a/b~2": "a/b~2"}


def test_named_tuples_come_back_as_dicts_of_their_fields():
    """Without a template there is no class, and importing one by name would run code."""
    assert same(back(Point(1, [Point(2, 3)])), {"x": 1, "y": [{"x": 2, "y": 3}]})
    assert flat(Point(1, 2)).skeleton == {"$namedtuple": ["Point", {"x": 1, "y": 2}]}


def test_kinds_of_dicts_lists_and_tuples_come_back_plain():
    """A torch.Size, a defaultdict or a tracked list in a state would stop every save."""

    class Size(tuple):
        __slots__ = ()

    class Tracked(list):
        pass

    class Attributes(dict):
        pass

    tree = [OrderedDict(b=1, a=2), defaultdict(list, {0: [1]}), Size((2, 3)), Tracked([1]), Attributes(a=1)]

    assert same(back(tree), [{"b": 1, "a": 2}, {0: [1]}, (2, 3), [1], {"a": 1}])


def test_equal_sets_have_equal_bytes():
    """Two saves of one state would have two digests, from process to process."""
    code = (
        "from highcamp.core import strict, tree;"
        "print(strict.write(tree.flatten({'a': {f'k{i}' for i in range(50)}}, lambda leaf: None, where='s').skeleton))"
    )

    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in range(3)
    }

    assert len(texts) == 1


def test_the_states_of_random_generators_come_back():
    """Shuffles and dropout after a resume would differ."""
    python = random.Random(0)
    numpy = np.random.Generator(np.random.PCG64(7))
    legacy = np.random.RandomState(3)

    rebuilt = back([python.getstate(), numpy.bit_generator.state, legacy.get_state()])

    other = random.Random(1)
    other.setstate(rebuilt[0])
    assert other.random() == python.random()
    generator = np.random.Generator(np.random.PCG64(8))
    generator.bit_generator.state = rebuilt[1]
    assert generator.random() == numpy.random()
    old = np.random.RandomState(4)
    old.set_state(rebuilt[2])
    assert old.rand() == legacy.rand()


def test_the_state_of_torch_multi_step_schedules_comes_back():
    """Its milestones are a Counter, which many checkpoints turn into a dict or cannot hold at all."""
    state = {"milestones": Counter({30: 1, 80: 1}), "gamma": 0.1, "last_epoch": 3, "_last_lr": [0.1]}

    rebuilt = back(state)

    assert same(rebuilt, state)
    assert rebuilt["milestones"][31] == 0


# ------------------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "an enum": (Color.RED, r"is a Color \(enum\); store its .value"),
    "an integer enum": (Level.LOW, r"is a Level \(enum\)"),
    "a text enum": (Mode.MIN, r"is a Mode \(enum\)"),
    "a flag": (Flags.A, r"is a Flags \(enum\)"),
    "a function": (test_named_tuples_come_back_as_dicts_of_their_fields, "is code .*leave it out"),
    "a lambda": (lambda: 0, "is code"),
    "a builtin": (print, "is code"),
    "a method": ([].append, "is code"),
    "a partial": (functools.partial(print), "is a functools.partial, neither a tensor nor plain data; give it state_dict"),
    "a class": (Color, "is code"),
    "a module": (json, "is code"),
    "an object": (object(), "is a object, neither a tensor nor plain data"),
    "a date": (dt.datetime(2026, 1, 1, tzinfo=dt.UTC), "is a datetime.datetime, neither"),
    "a range": (range(3), "is a range, neither"),
    "a generator": ((i for i in range(3)), "is a generator, neither"),
    "a deque": (collections.deque([1]), "is a collections.deque, neither"),
    "a bytearray": (bytearray(b"x"), r"is a bytearray; store bytes\(…\) of it"),
    "a memoryview": (memoryview(b"x"), "is a memoryview, neither"),
    "a kind of text": (type("Name", (str,), {})("x"), r"is a .*Name; store str\(…\)"),
    "a kind of float": (type("Seconds", (float,), {})(1.0), r"is a .*Seconds; store float\(…\)"),
    "a kind of counter": (type("Count", (Counter,), {})("a"), "is a .*Count, neither"),
    "numpy text": (np.str_("x"), r"is a NumPy scalar of dtype <U1.*\.item\(\)"),
    "numpy bytes": (np.bytes_(b"x"), r"is a NumPy scalar of dtype \|S1.*\.item\(\)"),
    "a numpy date": (np.datetime64("2026-01-01"), "is a NumPy scalar of dtype datetime64"),
    "complex128": (np.complex128(1), r"is a NumPy scalar of dtype complex128.*\.item\(\)"),
    "float128": (np.longdouble(1), "is a NumPy scalar of dtype float128"),
    "int4": (ml_dtypes.int4(1), "is a NumPy scalar of dtype int4"),
    "half a pair": ("\ud800", "is text with half of a surrogate pair"),
    "half a pair as a key": ({"\ud800": 1}, "half of a surrogate pair"),
    "an enum key": ({Color.RED: 1}, r"its key Color: ?is a Color \(enum\)|its key .* is a Color \(enum\)"),
    "a text enum key": ({Mode.MIN: 1}, r"is a Mode \(enum\)"),
    "a huge integer": (10**5000, "is an integer of more than 4,200 digits"),
    "a counter of texts": (Counter({"a": "b"}), "counts are not all numbers"),
    "an enum in a set": ({Color.RED}, r"is a Color \(enum\)"),
    "an object in a set": ({object()}, "is a object, neither"),
    "an object as a key": ({object(): 1}, "is a object, neither"),
    "text as an array": (np.array(["a"]), "an array of dtype <U1 cannot be stored in a tensor file; store .tolist"),
    "an array of objects": (np.array([None]), "an array of dtype object cannot be stored"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_files_cannot_hold_is_refused_with_its_path(name):
    """It would be pickled, lost, or come back as something else; and nobody would know which value it was."""
    value, message = REFUSED[name]

    with pytest.raises(InvalidState, match=message) as caught:
        flatten({"param_groups": [{"mode": value}]}, as_array, where="optimizer")

    assert str(caught.value).startswith("optimizer/param_groups/0/mode")
    assert caught.value.path.startswith("optimizer/param_groups/0/mode")


def test_the_root_is_named_too():
    """The error would begin with nothing."""
    with pytest.raises(InvalidState, match=r"^scheduler is a Color \(enum\)"):
        flatten(Color.RED, as_array, where="scheduler")


def test_a_state_that_contains_itself_is_refused():
    """The save would end in RecursionError, or never."""
    inner: dict[str, object] = {}
    inner["parent"] = [inner]
    loop: list[object] = []
    loop.append((loop,))

    with pytest.raises(InvalidState, match=r"^state/a/parent/0 contains itself; a state must be a tree"):
        flat({"a": inner})
    with pytest.raises(InvalidState, match=r"^state/0/0 contains itself"):
        flat(loop)


def test_one_list_in_two_places_is_no_cycle():
    """Shared hyperparameters would stop every save."""
    betas = [0.9, 0.999]

    assert back({"a": betas, "b": betas, "c": [betas, betas]}) == {"a": betas, "b": betas, "c": [betas, betas]}


def nested(depth: int, wrap, leaf=1):
    """A leaf inside `depth` containers."""
    for _ in range(depth):
        leaf = wrap(leaf)
    return leaf


WRAPS = {
    "lists": lambda inner: [inner],
    "tuples": lambda inner: (inner,),
    "dicts": lambda inner: {"a": inner},
    "other dicts": lambda inner: {0: inner},
    "named tuples": lambda inner: Point(inner, 0),
}


@pytest.mark.parametrize("name", WRAPS)
@pytest.mark.parametrize(
    "leaf", [1, math.nan, np.float32("nan"), np.complex64(complex(math.nan, 1)), 2**70, np.ones(1)], ids=repr
)
def test_the_deepest_state_comes_back_and_one_level_more_is_refused(name, leaf):
    """A state that was saved could not be loaded."""
    wrap = WRAPS[name]
    taken = flat(nested(100, wrap, leaf))

    skeleton = strict.read(strict.write(taken.skeleton), where="f", limit=1 << 20)
    unflatten(skeleton, taken.arrays.__getitem__)
    names(skeleton)
    with pytest.raises(InvalidState, match="nested deeper than 100 levels"):
        flat(nested(101, wrap, leaf))


def test_the_deepest_keys_and_sets_come_back():
    """A state that was saved could not be loaded, or end in RecursionError."""
    for leaf in ((1,), frozenset({2.5, np.complex64(complex(math.nan, 1))})):
        for wrap in (lambda inner: (inner,), lambda inner: frozenset({inner})):
            for depth in range(90, 100):
                key = nested(depth, wrap, leaf)
                if depth > 97:  # the dict, the set, and the leaf's own level
                    with pytest.raises(InvalidState, match="nested deeper than 100 levels"):
                        flat({"s": {key}})
                    continue
                taken = flat({key: 1, "s": {key}})
                strict.read(strict.write(taken.skeleton), where="f", limit=1 << 20)
                unflatten(taken.skeleton, lambda name: name)

    with pytest.raises(InvalidState, match="nested deeper"):
        flat({nested(500, lambda inner: (inner,)): 1})


# ------------------------------------------------------------------------------------------------- malformed skeletons

MALFORMED = {
    "an unknown tag": {"$class": "os.system"},
    "a python tag": {"$pickle": "gASV"},
    "a tag beside a key": {"$tensor": "a", "b": 1},
    "two tags": {"$tensor": "a", "$tuple": []},
    "a key with a dollar": {"a": 1, "$b": 2},
    "an empty tag": {"$": []},
    "a tensor without name": {"$tensor": 1},
    "a tensor of a list": {"$tensor": ["a"]},
    "a tuple of a dict": {"$tuple": {}},
    "a tuple of text": {"$tuple": "ab"},
    "a named tuple of a list": {"$namedtuple": ["P", []]},
    "a named tuple without type": {"$namedtuple": [{}]},
    "a named tuple of a number": {"$namedtuple": [1, {}]},
    "items of a dict": {"$items": {}},
    "items of singles": {"$items": [[1]]},
    "items of three": {"$items": [[1, 2, 3]]},
    "items of text": {"$items": ["ab"]},
    "equal keys": {"$items": [[1, "a"], [1, "b"]]},
    "keys equal as numbers": {"$items": [[1, "a"], [True, "b"]]},
    "a list as a key": {"$items": [[[1], 2]]},
    "a dict as a key": {"$items": [[{}, 2]]},
    "a dict with one key as a key": {"$items": [[{"a": 1}, 2]]},
    "a tensor as a key": {"$items": [[{"$tensor": "a"}, 2]]},
    "a set as a key": {"$items": [[{"$set": [1]}, 2]]},
    "a counter as a key": {"$items": [[{"$counter": []}, 2]]},
    "a list in a key": {"$items": [[{"$tuple": [[1]]}, 2]]},
    "a counter of one": {"$counter": [[1]]},
    "a counter of text": {"$counter": [["a", "b"]]},
    "a counter of tensors": {"$counter": [["a", {"$tensor": "b"}]]},
    "a counter with equal keys": {"$counter": [["a", 1], ["a", 2]]},
    "a counter of a dict": {"$counter": {"a": 1}},
    "a set of a dict": {"$set": {}},
    "a set of lists": {"$set": [[1]]},
    "a set of tensors": {"$set": [{"$tensor": "a"}]},
    "a set with equal elements": {"$set": [1, 1]},
    "a frozenset of sets": {"$frozenset": [{"$set": []}]},
    "bytes of a number": {"$bytes": 1},
    "bytes that are no base64": {"$bytes": "a"},
    "bytes with spaces": {"$bytes": "YQ ==\n"},
    "bytes of accents": {"$bytes": "é"},
    "an integer that is one": {"$int": 1},
    "an integer of words": {"$int": "one"},
    "an integer with underscores": {"$int": "1_000"},
    "an integer with spaces": {"$int": " 1"},
    "an integer in another script": {"$int": "\u0661"},
    "an empty integer": {"$int": ""},
    "a huge integer": {"$int": "1" * 4301},
    "a finite float": {"$float": "1.0"},
    "an infinite word": {"$float": "Infinity"},
    "a float of a float": {"$float": 1.0},
    "a complex of one": {"$complex": [1.0]},
    "a complex of integers": {"$complex": [1, 2]},
    "a complex of text": {"$complex": ["1", "2"]},
    "a scalar of no dtype": {"$scalar": ["float32", 1.0]},
    "a packed scalar": {"$scalar": ["F4", 1.0]},
    "a scalar without value": {"$scalar": ["F32"]},
    "an integer as a float": {"$scalar": ["F32", 1]},
    "a float as an integer": {"$scalar": ["I32", 1.0]},
    "a boolean as an integer": {"$scalar": ["I32", True]},
    "an integer as a boolean": {"$scalar": ["BOOL", 1]},
    "text as a float": {"$scalar": ["F64", "1"]},
    "too large for its dtype": {"$scalar": ["I8", 300]},
    "too small for its dtype": {"$scalar": ["U8", -1]},
    "far too large": {"$scalar": ["I64", {"$int": "1" * 100}]},
    "beyond a float32": {"$scalar": ["F32", 1e300]},
    "between two float16": {"$scalar": ["F16", 0.1]},
    "negative as e8m0": {"$scalar": ["F8_E8M0", -1.0]},
    "a list as a scalar": {"$scalar": ["F32", [1.0]]},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_skeleton_is_damaged(name):
    """A hostile file would decide what is built, or end the process with an error nobody catches."""
    skeleton = strict.read(json.dumps({"a": [MALFORMED[name]]}).encode(), where="f", limit=1 << 20)

    with pytest.raises(Damaged, match=r"^the stored state is malformed at a/0: ") as caught:
        unflatten(skeleton, lambda name: name)

    assert caught.value.path == "a/0"
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("wrap", ["$tuple", "$set", "$frozenset", "$complex", "$scalar", "$counter", "$items"])
def test_a_deep_skeleton_is_damaged(wrap):
    """RecursionError would pass every `except HighcampError`."""
    skeleton: object = 1
    for _ in range(5000):
        content = {"$complex": [skeleton, 1.0], "$scalar": ["F32", skeleton]}.get(wrap, [skeleton])
        if wrap in {"$counter", "$items"}:
            content = [[skeleton, 1]]
        skeleton = {wrap: content}

    with pytest.raises(Damaged, match="malformed"):
        unflatten(skeleton, lambda name: name)
    with pytest.raises(Damaged, match="malformed"):
        unflatten({"$items": [[skeleton, 1]]}, lambda name: name)


def test_deep_containers_are_damaged():
    """RecursionError would pass every `except HighcampError`."""
    lists: object = 1
    for _ in range(100_000):
        lists = [lists]

    with pytest.raises(Damaged, match="nested deeper than 100"):
        unflatten(lists, lambda name: name)
    with pytest.raises(Damaged, match="nested deeper than 100"):
        names(lists)
    while isinstance(lists, list):  # freeing it at once would recurse in C
        lists = lists.pop()


# ----------------------------------------------------------------------------------------------------------- comparison


def test_every_difference_is_said_and_sorted():
    """The user would mend one, run again, and meet the next."""
    saved = {"b": ("F32", (3, 4)), "a": ("BF16", (2,)), "same": ("I64", ()), "gone": ("F32", ()), "c": ("F32", (1,))}
    live = {"b": ("F32", (3, 5)), "a": ("F32", (2,)), "same": ("I64", ()), "new": ("F32", ()), "c": ("F64", (2,))}

    assert differences(saved, live) == [
        "a: dtype BF16 in the checkpoint, F32 here",
        "b: shape (3, 4) in the checkpoint, (3, 5) here",
        "c: dtype F32 in the checkpoint, F64 here",
        "c: shape (1,) in the checkpoint, (2,) here",
        "gone: only in the checkpoint",
        "new: only here",
    ]
    assert differences(saved, dict(reversed(saved.items()))) == []
    assert differences({}, {}) == []


def filled(like, tree, leaf=None):
    """The template filled with the state of `tree`; nothing is filled when it does not fit."""
    taken = flat(tree)
    calls = []

    def take(name, live):
        calls.append(name)
        return leaf(name, live) if leaf else taken.arrays[name].numpy()

    specs = {name: array.spec for name, array in taken.arrays.items()}
    try:
        return fill(like, taken.skeleton, take, as_array, specs=specs)
    except Mismatch:
        assert calls == []  # nothing half-done
        raise


def test_a_template_gives_its_structure_and_types():
    """Optimizer states of named tuples would come back as dicts, which the optimizer does not take."""

    class Attributes(dict):
        pass

    class Tracked(list):
        pass

    zeros, ones = np.zeros(2), np.ones(2)

    def tree(array, number):
        attributes = Attributes(a=array)
        attributes.owner = "kept"
        default = defaultdict(list, {0: array})
        return {
            "named": Point(array, (array, number)), "ordered": OrderedDict(b=array, a=number), "default": default,
            "attributes": attributes, "tracked": Tracked([array]), "list": [array, [number]], "counter": Counter({number: 1}),
            "set": {number}, "text": f"{number}", 5: None,
        }  # fmt: skip

    like = tree(zeros, 1)

    result = filled(like, tree(ones, 2))

    assert same(result, tree(ones, 2))
    assert result["default"].default_factory is list
    assert result["attributes"].owner == "kept"
    assert same(like, tree(zeros, 1))
    assert result["tracked"] is not like["tracked"]
    assert result["attributes"] is not like["attributes"]


def test_a_template_takes_named_tuples_from_dicts_and_lists_from_tuples():
    """A state saved by another version of a library, with a tuple for a list, would not fit."""
    one = np.ones(1)

    assert same(filled(Point(one * 0, 0), {"y": 3, "x": one}), Point(one, 3))
    assert same(filled({"x": one * 0, "y": 0}, Point(one, 3)), {"x": one, "y": 3})
    assert same(filled([one * 0, 0], (one, 3)), [one, 3])
    assert same(filled((one * 0, 0), Point(one, 3)), (one, 3))
    assert same(filled(Point(one * 0, 0), [one, 3]), Point(one, 3))


def test_the_leaf_is_given_the_live_one():
    """A restore could not write straight into live memory, on its device."""
    like = {"a": np.zeros(2), "b": [np.zeros(2)]}
    seen = []

    filled(like, {"a": np.ones(2), "b": [np.ones(2)]}, lambda name, live: seen.append((name, live)))

    assert [name for name, _ in seen] == ["a", "b/0"]
    assert seen[0][1] is like["a"]
    assert seen[1][1] is like["b"][0]


def test_a_template_that_does_not_fit_lists_everything_and_changes_nothing():
    """Half of the weights would be restored, and the user mend one line at a time."""
    f = np.zeros
    like = {
        "shape": f(2), "dtype": f(2, "f4"), "new": {"deep": [f(1), 3]}, "short": [f(1), f(1)], "long": [f(1)],
        "tensor": f(1), "plain": 3, "dict": {"a": f(1)}, "sequence": [f(1)], "p": Point(f(1), 0), "empty": {"new": 1},
    }  # fmt: skip
    tree = {
        "shape": f(3), "dtype": f(2, "f8"), "old": (f(1), {"x": f(1)}), "short": [f(1)], "long": [f(1), f(1), 5],
        "tensor": 3, "plain": f(1), "dict": [f(1)], "sequence": {"0": f(1)}, "p": {"x": f(1), "z": f(1)}, "empty": {},
    }  # fmt: skip

    with pytest.raises(Mismatch) as caught:
        filled(like, tree)

    message = str(caught.value)
    lines = [line.strip() for line in message.split("\n  ")[1:]]
    lines[-1] = lines[-1].split("\n")[0]
    assert lines == [
        "dict: a list in the checkpoint, a dict here",
        "dtype: dtype F64 in the checkpoint, F32 here",
        "empty/new: only here",
        "long/1: only in the checkpoint",
        "long/2: only in the checkpoint",
        "new/deep/0: only here",
        "old/0: only in the checkpoint",
        "old/1/x: only in the checkpoint",
        "p/y: only here",
        "p/z: only in the checkpoint",
        "plain: a tensor in the checkpoint, a plain value here",
        "sequence: a dict in the checkpoint, a list here",
        "shape: shape (3,) in the checkpoint, (2,) here",
        "short/1: only here",
        "tensor: a plain value in the checkpoint, a tensor here",
    ]
    assert message.startswith("the checkpoint does not fit (15 differences, nothing was changed):\n  dict: ")


def test_a_template_of_one_tensor_fits_one_tensor():
    """The smallest state would be the one that cannot be restored."""
    assert same(filled(np.zeros(2), np.ones(2)), np.ones(2))
    with pytest.raises(Mismatch, match=r"the state itself: shape \(2,\) in the checkpoint, \(3,\) here"):
        filled(np.zeros(3), np.ones(2))


def test_a_template_may_tell_only_its_specs():
    """Abstract arrays, which have a shape and no memory, could not be a template."""

    class Abstract:
        spec = ("F64", (2,))

    result = fill(
        {"a": Abstract()},
        {"a": {"$tensor": "a"}},
        lambda name, _: name,
        lambda leaf: leaf if isinstance(leaf, Abstract) else None,
        specs={"a": ("F64", (2,))},
    )

    assert result == {"a": "a"}


def test_a_malformed_skeleton_is_damaged_before_any_leaf_is_filled():
    """Half of the weights would be restored."""
    calls = []
    for broken in ({"$tensor": "missing"}, {"$int": "x"}, {"$class": "x"}):
        with pytest.raises(Damaged, match="malformed at b"):
            fill(
                {"a": np.zeros(1), "b": np.zeros(1) if "$tensor" in broken else 1},
                {"a": {"$tensor": "a"}, "b": broken},
                lambda name, _: calls.append(name),
                as_array,
                specs={"a": ("F64", (1,))},
            )

    assert calls == []


def test_the_order_of_a_template_is_kept():
    """Optimizers that go by position would match the wrong parameters."""
    assert list(filled({"b": 0, "a": 0}, {"a": 1, "b": 2})) == ["b", "a"]


# ---------------------------------------------------------------------------------------------------------------- speed


def test_100_000_tensors_take_microseconds_each():
    """Large models would pause at every save for their tree alone."""
    array = HostArray("F32", (3,), memoryview(bytes(12)))
    tree = {f"layer{i}": {f"weight{j}": array for j in range(10)} for i in range(10_000)}

    began = time.process_time()
    taken = flatten(tree, lambda leaf: leaf if isinstance(leaf, HostArray) else None, where="model")
    flattened = time.process_time() - began
    text = strict.write(taken.skeleton)
    skeleton = strict.read(text, where="f", limit=1 << 28)
    paths = names(skeleton)
    unflatten(skeleton, taken.arrays.__getitem__)
    rest = time.process_time() - began - flattened

    assert len(paths) == len(taken.arrays) == 100_000
    assert flattened < 1  # 0.1 s on an idle machine
    assert rest < 3  # 0.7 s
