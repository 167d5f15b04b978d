"""HostArray: the bytes of one array in main memory, with its dtype as safetensors spells it.

NumPy is imported when an array is first seen or asked for, never with this module.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from highcamp.errors import InvalidArgument, InvalidState

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    import numpy as np

Spec: TypeAlias = tuple[str, tuple[int, ...]]
"""What a tensor looks like: dtype as safetensors spells it, and shape."""


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type of the safetensors format."""

    name: str
    """The spelling in a tensor file, for example BF16."""
    bits: int
    """Bits of one element; fewer than 8 are packed, so a tensor of them must end at a byte."""
    numpy: str | None
    """The name in NumPy or ml_dtypes; None for packed elements, which no array library lays out the same way."""


DTYPES: dict[str, Dtype] = {
    dtype.name: dtype
    for dtype in (  # safetensors 0.8, in the library's order: tensors in a file are sorted by it, last first
        Dtype("BOOL", 8, "bool"),
        Dtype("F4", 4, None),
        Dtype("F6_E2M3", 6, None),
        Dtype("F6_E3M2", 6, None),
        Dtype("U8", 8, "uint8"),
        Dtype("I8", 8, "int8"),
        Dtype("F8_E5M2", 8, "float8_e5m2"),
        Dtype("F8_E4M3", 8, "float8_e4m3fn"),
        Dtype("F8_E8M0", 8, "float8_e8m0fnu"),
        Dtype("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
        Dtype("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
        Dtype("I16", 16, "int16"),
        Dtype("U16", 16, "uint16"),
        Dtype("F16", 16, "float16"),
        Dtype("BF16", 16, "bfloat16"),
        Dtype("I32", 32, "int32"),
        Dtype("U32", 32, "uint32"),
        Dtype("F32", 32, "float32"),
        Dtype("C64", 64, "complex64"),
        Dtype("F64", 64, "float64"),
        Dtype("I64", 64, "int64"),
        Dtype("U64", 64, "uint64"),
    )
}
"""Every dtype a tensor file can hold, by its spelling there."""

_BY_NUMPY_NAME = {dtype.numpy: dtype.name for dtype in DTYPES.values() if dtype.numpy is not None}
_IN_NUMPY_ITSELF = ("bool", "int", "uint", "float16", "float32", "float64", "complex")


_LARGE = 64 << 10  # bytes; below it, setting NumPy to work takes longer than the copy


@dataclass(frozen=True, slots=True, eq=False)
class HostArray:
    """One array in main memory: C order, little-endian, compared by identity."""

    dtype: str
    """A key of `DTYPES`."""
    shape: tuple[int, ...]
    """Lengths of the axes; () is a scalar."""
    data: memoryview
    """The bytes: one axis of format "B", as many as dtype and shape ask for; shared with whoever made it."""
    tie: Hashable | None = None
    """Equal for two arrays over the same memory: with equal dtype and shape they are written once."""
    kind: str = ""
    """Whose array it was, such as "torch", so that it comes back as one; "" for NumPy's and where the object decides."""
    is_still: bool = False
    """A hint: it will probably be the same at the next save, as a parameter that is not trained."""
    is_immutable: bool = False
    """Its bytes never change as long as somebody holds them, as those of a JAX array."""
    is_trained: bool = False
    """It is known to be what training changes on purpose, as a parameter with a gradient: an infinity in it is no constant."""

    def __post_init__(self) -> None:
        """Raise InvalidArgument when the bytes cannot be what dtype and shape say."""
        size = byte_count(self.dtype, self.shape)
        data = self.data
        if data.format != "B" or data.ndim != 1 or not data.c_contiguous:
            raise InvalidArgument(
                f"array bytes must be one contiguous axis of format 'B', this is {data.ndim} of {data.format!r}",
                hint='pass memoryview(…).cast("B")',
            )
        if data.nbytes != size:
            raise InvalidArgument(f"{self.dtype} of shape {self.shape} takes {size} bytes, {data.nbytes} were given")

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self.data.nbytes

    def copy_to(self, view: memoryview, start: int) -> None:
        """Fill `view` with the bytes from `start` on."""
        stop = start + len(view)
        if len(view) < _LARGE:
            view[:] = self.data[start:stop]
            return
        import numpy as np

        # Lets go of the interpreter, which the assignment above does not: the loop goes on while this copies.
        np.copyto(np.frombuffer(view, np.uint8), np.frombuffer(self.data[start:stop], np.uint8))

    @property
    def spec(self) -> Spec:
        """Dtype and shape."""
        return self.dtype, self.shape

    def numpy(self) -> np.ndarray[Any, Any]:
        """Return the array over the same bytes, read-only if they are.

        Raises InvalidState for packed dtypes (F4, F6_E2M3, F6_E3M2): NumPy has none.
        """
        import numpy as np

        return np.ndarray(self.shape, numpy_dtype(self.dtype), buffer=self.data)

    @classmethod
    def from_numpy(cls, array: np.ndarray[Any, Any] | np.generic, tie: Hashable | None = None) -> HostArray:
        """Return a NumPy array or scalar as a HostArray: shared where C-contiguous and little-endian, copied otherwise.

        Raises InvalidState for dtypes that tensor files cannot hold (object, text, dates, complex128, float128,
        records) and for masked arrays.
        """
        import numpy as np

        dtype = array.dtype
        name = _BY_NUMPY_NAME.get(dtype.name)
        if name is None:
            raise InvalidState(f"an array of dtype {dtype} cannot be stored in a tensor file", hint=_advice(dtype))
        if isinstance(array, np.ma.MaskedArray):
            raise InvalidState(
                "a masked array cannot be stored: its mask would be lost", hint="store .data and .mask as two arrays"
            )
        if _is_big_endian(dtype):
            array = array.astype(dtype.newbyteorder("<"))
        plain = np.asarray(array, order="C")  # not ascontiguousarray: it gives a scalar an axis
        buffer: Any = plain.reshape(-1).view(np.uint8)
        return cls(name, plain.shape, memoryview(buffer), tie)


class DistantArray(HostArray):
    """An array whose bytes are not one stretch of main memory: strided, or on a device. They are brought when asked for."""

    __slots__ = ("_bring",)

    def __init__(
        self,
        dtype: str,
        shape: tuple[int, ...],
        bring: Callable[[memoryview, int], None],
        tie: Hashable | None = None,
        kind: str = "",
        *,
        is_still: bool = False,
        is_trained: bool = False,
        is_immutable: bool = False,
    ) -> None:
        """bring: fills a writable view of bytes with those of the array in C order, from a given byte on."""
        values = {"dtype": dtype, "shape": shape, "tie": tie, "kind": kind, "is_immutable": is_immutable}
        for name, value in {**values, "is_still": is_still, "is_trained": is_trained}.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_bring", bring)

    @property
    def data(self) -> memoryview:
        """A copy of the bytes, read-only."""
        found = memoryview(bytearray(self.nbytes))
        if found:
            self._bring(found, 0)  # type: ignore[attr-defined]
        return found.toreadonly()

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return byte_count(self.dtype, self.shape)

    def copy_to(self, view: memoryview, start: int) -> None:
        """Fill `view` with the bytes from `start` on."""
        if view:
            self._bring(view, start)  # type: ignore[attr-defined]


def byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor; InvalidArgument for an unknown dtype, or packed elements that end inside a byte."""
    known = DTYPES.get(dtype)
    if known is None:
        raise InvalidArgument(f"unknown dtype {dtype!r}", hint=f"one of {', '.join(DTYPES)}")
    size, rest = divmod(math.prod(shape) * known.bits, 8)
    if rest:
        raise InvalidArgument(f"{dtype} of shape {shape} does not end at a byte", hint="pad the last axis")
    return size


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a safetensors spelling.

    Raises InvalidState for packed dtypes, InvalidArgument for unknown ones.
    """
    import numpy as np

    known = DTYPES.get(dtype)
    if known is None:
        raise InvalidArgument(f"unknown dtype {dtype!r}", hint=f"one of {', '.join(DTYPES)}")
    if known.numpy is None:
        raise InvalidState(
            f"{dtype} packs several elements into a byte, NumPy has no such dtype", hint="read the bytes from .data"
        )
    if known.numpy.startswith(_IN_NUMPY_ITSELF):
        return np.dtype(known.numpy)
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, known.numpy))
    return found


def _is_big_endian(dtype: np.dtype[Any]) -> bool:
    return dtype.byteorder == ">" or (dtype.byteorder == "=" and sys.byteorder == "big")


def _advice(dtype: np.dtype[Any]) -> str:
    match dtype.kind:
        case "c":
            return "store real and imaginary part as two arrays, or convert to complex64"
        case "f":
            return "convert it to float64"
        case "M" | "m":
            return "store .view('int64') and the unit as text"
        case "O":
            return "store a list of plain values, or convert it to a numeric dtype"
        case "U" | "S" | "T":
            return "store .tolist()"
        case _:
            return "convert it to one of the dtypes in highcamp.core.array.DTYPES, or store its fields one by one"
