"""HostArray: bytes that are shared where they can be, and dtypes that files can hold."""

from __future__ import annotations

import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from highcamp.core.array import DTYPES, HostArray, byte_count, numpy_dtype
from highcamp.errors import InvalidArgument, InvalidState

IN_NUMPY = [name for name, dtype in DTYPES.items() if dtype.numpy is not None]
PACKED = [name for name, dtype in DTYPES.items() if dtype.numpy is None]


@pytest.mark.parametrize("name", IN_NUMPY)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape_comes_back_without_a_copy(name, shape):
    """A float8 model, a scalar or an empty buffer would not be saved, or another one come back."""
    dtype = numpy_dtype(name)
    count = math.prod(shape)
    array = np.frombuffer(np.random.default_rng(0).bytes(count * dtype.itemsize) or bytearray(), np.uint8)
    array = (array % 2 if name == "BOOL" else array).copy().view(dtype).reshape(shape)

    host = HostArray.from_numpy(array)

    assert host.spec == (name, shape)
    assert host.nbytes == array.nbytes == byte_count(name, shape)
    assert host.numpy().dtype == dtype
    assert host.numpy().shape == shape
    assert host.numpy().tobytes() == array.tobytes()
    if count:
        assert np.shares_memory(host.numpy(), array)


@pytest.mark.parametrize("name", IN_NUMPY)
def test_the_bits_of_a_dtype_are_those_of_numpy(name):
    """Offsets in files would be wrong for one dtype."""
    assert numpy_dtype(name).itemsize * 8 == DTYPES[name].bits


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_dtype_is_bytes_without_an_array(name):
    """Values would be read at the wrong places: no array library packs elements this way."""
    host = HostArray(name, (4,), memoryview(bytes(DTYPES[name].bits // 2)))

    assert host.nbytes == DTYPES[name].bits // 2
    with pytest.raises(InvalidState, match=f"{name} packs several elements into a byte.*read the bytes from .data"):
        host.numpy()


def test_writing_into_the_array_writes_into_the_bytes():
    """A restore would fill a copy and leave the live tensor as it was."""
    data = bytearray(12)
    host = HostArray("F32", (3,), memoryview(data))

    host.numpy()[:] = 1.5

    assert bytes(data) == np.full(3, 1.5, "<f4").tobytes()


def test_read_only_bytes_give_a_read_only_array():
    """Loaded weights share the file: writing to them would end the process, or change the checkpoint."""
    assert not HostArray("F32", (1,), memoryview(bytes(4))).numpy().flags.writeable

    frozen = np.zeros(3)
    frozen.flags.writeable = False
    assert HostArray.from_numpy(frozen).data.readonly


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24).reshape(4, 6).T,
        np.arange(24)[::2],
        np.arange(24)[::-1],
        np.asfortranarray(np.arange(24.0).reshape(4, 6)),
        np.broadcast_to(np.float32(3), (2, 3)),
        np.arange(5, dtype=">f8"),
        np.arange(6, dtype=">i4").reshape(2, 3).T,
        np.array(3, dtype=">u2"),
        np.array([1 + 2j], dtype=">c8"),
    ],
    ids=[
        "transposed",
        "strided",
        "reversed",
        "fortran",
        "broadcast",
        "big",
        "big strided",
        "big scalar",
        "big complex",
    ],
)
def test_other_layouts_are_copied_to_little_endian_rows(array):
    """The file would hold the right numbers in the wrong order."""
    host = HostArray.from_numpy(array)

    assert host.shape == array.shape
    np.testing.assert_array_equal(host.numpy(), array)
    assert bytes(host.data) == array.astype(array.dtype.newbyteorder("<")).tobytes("C")


def test_a_numpy_scalar_is_an_array_without_axes():
    """A step counter kept as a NumPy scalar would gain an axis."""
    host = HostArray.from_numpy(np.float32(2.5))

    assert host.spec == ("F32", ())
    assert host.numpy()[()] == np.float32(2.5)


REFUSED = {
    "object": (np.array([{}], dtype=object), "plain values"),
    "text": (np.array(["a"]), "tolist"),
    "bytes": (np.array([b"a"]), "tolist"),
    "date": (np.array(["2026-01-01"], dtype="M8[D]"), "int64"),
    "duration": (np.array([1], dtype="m8[s]"), "int64"),
    "complex128": (np.zeros(2, np.complex128), "complex64"),
    "float128": (np.zeros(2, np.longdouble), "float64"),
    "record": (np.zeros(2, [("a", "f4"), ("b", "i4")]), "DTYPES"),
    "int4": (np.zeros(2, ml_dtypes.int4), "DTYPES"),
    "another float8": (np.zeros(2, ml_dtypes.float8_e4m3b11fnuz), "DTYPES"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_dtype_that_files_cannot_hold_is_refused_with_advice(name):
    """Pickle would be the only way to store it, or the values would change silently."""
    array, advice = REFUSED[name]

    with pytest.raises(InvalidState, match="cannot be stored in a tensor file") as caught:
        HostArray.from_numpy(array)

    assert str(array.dtype) in str(caught.value)
    assert advice in str(caught.value)


def test_a_masked_array_is_refused():
    """Its mask would be lost without a word."""
    with pytest.raises(InvalidState, match="mask would be lost"):
        HostArray.from_numpy(np.ma.masked_array([1.0, 2.0], [True, False]))


def test_bytes_that_do_not_fit_are_refused():
    """A tensor file would be written whose table lies."""
    with pytest.raises(InvalidArgument, match=r"F32 of shape \(3,\) takes 12 bytes, 11 were given"):
        HostArray("F32", (3,), memoryview(bytes(11)))
    with pytest.raises(InvalidArgument, match="takes 12 bytes, 13 were given"):
        HostArray("F32", (3,), memoryview(bytes(13)))
    with pytest.raises(InvalidArgument, match="one contiguous axis of format 'B', this is 1 of 'f'"):
        HostArray("F32", (3,), memoryview(np.zeros(3, "f4")))
    with pytest.raises(InvalidArgument, match="one contiguous axis"):
        HostArray("U8", (3,), memoryview(bytes(6))[::2])
    with pytest.raises(InvalidArgument, match="one contiguous axis"):
        HostArray("U8", (2, 3), memoryview(bytes(6)).cast("B", (2, 3)))
    with pytest.raises(InvalidArgument, match=r"F4 of shape \(3,\) does not end at a byte"):
        HostArray("F4", (3,), memoryview(bytes(2)))
    with pytest.raises(InvalidArgument, match=r"unknown dtype 'float32'.*F32"):
        HostArray("float32", (3,), memoryview(bytes(12)))
    with pytest.raises(InvalidArgument, match="unknown dtype 'C128'"):
        numpy_dtype("C128")


def test_arrays_are_compared_by_identity_and_cannot_be_changed():
    """Comparing two states would read gigabytes; a changed shape would not fit its bytes."""
    one, two = (HostArray.from_numpy(np.zeros(2)) for _ in range(2))

    assert one != two
    assert len({one, two}) == 2
    with pytest.raises(AttributeError):
        one.shape = (1,)


def test_importing_core_loads_no_numpy():
    """`import highcamp` and every command would wait for NumPy."""
    code = (
        "import sys, highcamp.core.array, highcamp.core.tree, highcamp.core.tensorfile, highcamp.core.strict;"
        "from highcamp.core.tree import flatten, unflatten;"
        "flat = flatten({'a': [1, 2.5, 'x']}, lambda leaf: None, where='state');"
        "unflatten(flat.skeleton, print);"
        "sys.exit('numpy' in sys.modules or 'ml_dtypes' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
