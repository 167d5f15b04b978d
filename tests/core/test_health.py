"""Health: NaN and infinities are told from bits, in every data type, wherever the pieces are cut."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from highcamp.core import health
from highcamp.core.array import DTYPES, numpy_dtype
from highcamp.core.health import BLOCK_BYTES, Checkup
from highcamp.core.tensorfile import plan

FLOATS = ["F64", "F32", "F16", "BF16", "C64", "F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0"]
SHORT = [name for name in FLOATS if DTYPES[name].bits <= 16]


class Everything:
    """Holds whatever is asked for."""

    def __contains__(self, name):
        return True


def checked(tensors, trained=(), pieces=None):
    """What is found in a file of these tensors, {name: (dtype, array)}. pieces: where its data section is cut."""
    layout = plan({name: (dtype, array.shape) for name, (dtype, array) in tensors.items()}, {})
    data = memoryview(b"".join(tensors[entry.name][1].tobytes() for entry in layout.entries))
    checkup = Checkup(layout.entries, trained)
    cuts = [0, *sorted(pieces or []), len(data)]
    for start, stop in itertools.pairwise(cuts):
        checkup.update(data[start:stop])
    return checkup.found


def expected(array):
    """As NumPy and ml_dtypes say."""
    with np.errstate(invalid="ignore"):
        wide = array if array.dtype.kind == "c" else array.astype(np.float64)
    return "nan" if np.isnan(wide).any() else "inf" if np.isinf(wide).any() else None


@pytest.mark.parametrize("dtype", SHORT)
def test_every_pattern_of_the_short_forms_is_told(dtype):
    """One pattern taken for a number, and weights that are NaN in it are called healthy."""
    kind = numpy_dtype(dtype)
    patterns = np.arange(1 << DTYPES[dtype].bits, dtype=f"u{kind.itemsize}").view(kind)
    for place in range(len(patterns)):
        array = patterns[place : place + 1]
        assert checked({"w": (dtype, array)}, Everything()).get("w") == expected(array), place


@pytest.mark.parametrize("dtype", ["F64", "F32", "C64"])
def test_the_long_forms_are_told_at_their_borders(dtype):
    """The largest number is none, and what lies behind it is."""
    kind = np.dtype(np.float32) if dtype == "C64" else numpy_dtype(dtype)
    bits = f"u{kind.itemsize}"
    infinity = int(np.array(np.inf, kind).view(bits))
    sign = 1 << (8 * kind.itemsize - 1)
    chance = random.Random(1)
    magnitudes = [0, 1, infinity - 1, infinity, infinity + 1, sign - 1]
    magnitudes += [chance.randrange(sign) for _ in range(500)]
    for each in [*magnitudes, *(sign + magnitude for magnitude in magnitudes)]:
        array = np.array([each, 0], bits).view(numpy_dtype(dtype))
        for turned in (array, array[::-1].copy()):
            assert checked({"w": (dtype, turned)}, Everything()).get("w") == expected(array), hex(each)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E4M3FNUZ"])
def test_one_among_many_is_found_wherever_it_is(dtype):
    """A block, or the last few elements behind the last block, that nobody looks at."""
    size = numpy_dtype(dtype).itemsize
    count = (2 * BLOCK_BYTES + 13 * size) // size
    array = np.random.default_rng(1).uniform(-4, 4, count).astype(numpy_dtype(dtype))
    assert checked({"w": (dtype, array)}) == {}
    for place in (0, 1, BLOCK_BYTES // size - 1, BLOCK_BYTES // size, 2 * BLOCK_BYTES // size, count - 1):
        sick = array.copy()
        sick[place] = np.nan

        assert checked({"w": (dtype, sick)}) == {"w": "nan"}


def test_integers_are_no_concern():
    """All bits set is NaN in a float, and minus one in an index."""
    ones = {f"i{bits}": (f"I{bits}", np.full(9, -1, f"i{bits // 8}")) for bits in (8, 16, 32, 64)}
    packed = {"f4": ("F4", np.full(9, 255, np.uint8))}
    layout = plan({"f4": ("F4", (18,))}, {})
    checkup = Checkup(layout.entries, Everything())
    checkup.update(memoryview(packed["f4"][1]))

    assert checked({**ones, "b": ("BOOL", np.ones(9, bool))}, Everything()) == {}
    assert checkup.found == {}


def test_the_tensor_is_named_and_its_neighbors_are_not():
    """The name is where somebody begins to look for the bug."""
    small = {f"t{place:03}": ("F32", np.ones(place % 5, np.float32)) for place in range(200)}
    small["t077"] = ("F32", np.array([1, np.nan], np.float32))
    small["t078"] = ("F32", np.array([np.inf], np.float32))
    small["half"] = ("F16", np.array([np.nan, 1], np.float16))
    small["index"] = ("I32", np.full(3, -1, np.int32))

    assert checked(small, {"t078"}) == {"t077": "nan", "t078": "inf", "half": "nan"}


def test_infinities_count_only_in_what_is_trained():
    """A model whose attention keeps a mask of infinities would never have a healthy checkpoint."""
    mask = np.triu(np.full((8, 8), -np.inf, np.float32), 1)
    for weight in (np.inf, -np.inf):
        tensors = {"mask": ("F32", mask), "w": ("F32", np.array([weight], np.float32))}

        assert checked(tensors) == {}
        assert checked(tensors, {"w"}) == {"w": "inf"}
    assert checked({"mask": ("F32", np.where(mask == 0, np.nan, mask))}) == {"mask": "nan"}


def test_nan_is_told_rather_than_infinity():
    """An infinity that is read first, or in another piece, hides nothing."""
    array = np.ones(64, np.float32)
    array[3], array[40] = np.inf, np.nan
    for order in (array, array[::-1].copy()):
        for cut in ([], [160], [158]):
            assert checked({"w": ("F32", order)}, {"w"}, cut) == {"w": "nan"}


def test_pieces_may_be_cut_anywhere():
    """Where a piece ends is the business of whoever reads the bytes: half an element is not looked at twice or never."""
    chance, generator = random.Random(2), np.random.default_rng(2)
    for _ in range(300):
        tensors = {}
        for place in range(chance.randrange(1, 8)):
            dtype = chance.choice([*FLOATS, "I16", "U8"])
            size = numpy_dtype(dtype).itemsize
            raw = generator.integers(0, 256, size * chance.randrange(6), dtype=np.uint8)
            tensors[f"t{place}"] = (dtype, raw.view(numpy_dtype(dtype)))
        total = sum(array.nbytes for _, array in tensors.values())
        cuts = [chance.randrange(total + 1) for _ in range(chance.randrange(12))]

        found = checked(tensors, Everything(), cuts)

        assert found == {
            name: word for name, (dtype, a) in tensors.items() if dtype in FLOATS and (word := expected(a))
        }


def test_a_piece_is_looked_at_in_blocks(monkeypatch):
    """A copy of a piece would take its place in memory once more, and its way through it."""
    monkeypatch.setattr(health, "BLOCK_BYTES", 64)
    array = np.ones(1000, np.float32)
    array[999] = np.nan

    assert checked({"w": ("F32", array)}, pieces=[123, 124, 125, 2000]) == {"w": "nan"}
