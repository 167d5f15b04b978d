"""Arrays of JAX, on one device or spread over several of this host, to bytes and back; random keys."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from highcamp.core.array import DistantArray, HostArray
from highcamp.errors import InvalidState

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    Block = tuple[tuple[int, ...], np.ndarray[Any, Any]]
    """A part of an array: where it begins, by axis, and its elements."""

_PYTHON_SCALARS = {"i": int, "f": float, "c": complex}


def to_host(leaf: object) -> HostArray | None:
    """Return the bytes of a JAX array, read-only, or None if `leaf` is none.

    On CPU the memory is the array's own: nothing is copied, and as long as somebody holds the result, its bytes stay what
    they are, whatever becomes of the array; a step that is given the array to donate then allocates instead, without a
    word. Of other devices the bytes are brought when they are asked for. Arrays that are the same buffers have equal `tie`s.
    Raises InvalidState for deleted (donated) arrays, tracers, random keys (see `to_tree`), arrays with shards on other
    hosts, and dtypes that tensor files do not have (int4, uint4, float4, other kinds of float8, complex128).
    """
    if not isinstance(leaf, jax.Array):
        return None
    if isinstance(leaf, jax.core.Tracer):
        raise _refused(leaf, "is being traced and has no bytes", "save outside of jit, grad and scan")
    if leaf.is_deleted():
        raise _refused(leaf, "was donated and is deleted", "save what the step returned, not what it was given")
    if is_key(leaf):
        raise _refused(leaf, "is a random key", "translate the state with highcamp.jax.to_tree first")
    where = _where(leaf.sharding)
    if not where.is_whole:
        raise _refused(
            leaf,
            "has shards in other processes",
            "only the devices of one process are supported yet: gather it first, for example with "
            "jax.experimental.multihost_utils.process_allgather(x, tiled=True), and save in one process",
        )
    spelling = _spelling(leaf.dtype)
    if where.is_single and where.is_on_cpu:
        view = np.asarray(leaf)
        if not view.flags.c_contiguous:  # laid out in another order on purpose
            view = np.ascontiguousarray(view)
        data: Any = view.reshape(-1).view(np.uint8)
        return HostArray(spelling, leaf.shape, memoryview(data).toreadonly(), tie(leaf), "jax", is_immutable=True)
    parts = [(_lows(shard.index), shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
    bring = _Bringing(leaf.shape, leaf.dtype, parts)
    if where.is_on_cpu:
        bring.blocks()  # views, which keep the memory as it is
    return DistantArray(spelling, leaf.shape, bring, tie(leaf), "jax", is_immutable=where.is_on_cpu)


def _refused(leaf: Any, why: str, hint: str) -> InvalidState:
    return InvalidState(f"a JAX array of shape {leaf.shape} and dtype {leaf.dtype} {why}", hint=hint)


class _Where(NamedTuple):
    """What is asked of a sharding. is_whole: all of it is in this process. name: of the first device."""

    is_whole: bool
    is_single: bool
    is_on_cpu: bool
    name: str


@functools.lru_cache(maxsize=1024)
def _where(sharding: Any) -> _Where:
    devices = sharding.device_set
    is_on_cpu = all(device.platform == "cpu" for device in devices)
    return _Where(sharding.is_fully_addressable, len(devices) == 1, is_on_cpu, str(next(iter(devices))))


@functools.cache
def _spelling(dtype: np.dtype[Any]) -> str:
    """How tensor files spell a data type. Raises InvalidState for one that they do not hold."""
    return HostArray.from_numpy(np.empty(0, dtype)).dtype


def tie(leaf: Any) -> Hashable | None:
    """Return what is equal for arrays that are the same buffers; None for empty, deleted and abstract ones."""
    if not isinstance(leaf, jax.Array) or not leaf.size or leaf.is_deleted():
        return None
    where = _where(leaf.sharding)
    if where.is_single:
        return ("jax", where.name, leaf.unsafe_buffer_pointer())
    return ("jax", tuple(shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards))


def _lows(index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(each.start or 0 for each in index)


class _Bringing:
    """Fills memory with the bytes of an array whose parts are on several devices, or not in main memory."""

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], parts: Sequence[tuple[tuple[int, ...], jax.Array]]
    ) -> None:
        self._shape, self._dtype, self._parts = shape, dtype, parts
        self._blocks: list[Block] | None = None

    def blocks(self) -> list[Block]:
        """The parts in main memory: views of what is there already."""
        if self._blocks is None:
            # Through new arrays of the same buffers: an array keeps what was once copied from its device to main memory.
            self._blocks = [
                (lows, np.asarray(jax.make_array_from_single_device_arrays(part.shape, part.sharding, [part])))
                for lows, part in self._parts
            ]
        return self._blocks

    def __call__(self, view: memoryview, start: int) -> None:
        """Fill `view` with the bytes from `start` on, in C order."""
        size, stop = self._dtype.itemsize, start + len(view)
        first, last = start // size, -(-stop // size)
        if (start - first * size, stop - last * size) == (0, 0):
            gather(self._shape, self.blocks(), np.frombuffer(view, self._dtype), first)
            return
        whole = np.empty(last - first, self._dtype)
        gather(self._shape, self.blocks(), whole, first)
        view[:] = whole.tobytes()[start - first * size : stop - first * size]


def gather(shape: tuple[int, ...], blocks: Sequence[Block], out: np.ndarray[Any, Any], first: int) -> None:
    """Fill `out` (one axis) with the elements of an array in C order, from `first` on.

    shape: of the array. blocks: its parts; together they cover it. No element more than asked for is touched: a piece of a
    large array must not bring all of it.
    """
    if not shape:
        for _, block in blocks[:1]:
            out[0] = block[()]
        return
    row, count, done = math.prod(shape[1:]), out.size, 0
    while done < count:
        index, offset = divmod(first + done, row)
        if offset == 0 and count - done >= row:  # whole rows, all of them at once
            rows = (count - done) // row
            box = out[done : done + rows * row].reshape(rows, *shape[1:])
            for lows, block in blocks:
                begin, end = max(lows[0], index), min(lows[0] + block.shape[0], index + rows)
                if begin < end:
                    inner = tuple(slice(low, low + size) for low, size in zip(lows[1:], block.shape[1:], strict=True))
                    box[(slice(begin - index, end - index), *inner)] = block[begin - lows[0] : end - lows[0]]
            done += rows * row
        else:
            length = min(row - offset, count - done)
            below = [
                (lows[1:], block[index - lows[0]])
                for lows, block in blocks
                if lows[0] <= index < lows[0] + block.shape[0]
            ]
            gather(shape[1:], below, out[done : done + length], offset)
            done += length


def from_host(array: HostArray, like: object | None) -> jax.Array:
    """Return a new array that owns its memory and can be donated, with the devices, sharding and weak type of `like`.

    like: an array, deleted or not, or a ShapeDtypeStruct; None or any other object means the default device. What is not
    committed to its device is not afterwards. The bytes of `array` may be reused when this returns. Raises InvalidState
    where JAX would narrow a 64-bit dtype.
    """
    source = array.numpy()
    if jax.dtypes.canonicalize_dtype(source.dtype) != source.dtype:
        hint = 'jax.config.update("jax_enable_x64", True), or read it without JAX: checkpoint.load()'
        raise InvalidState(f"JAX would narrow {array.dtype} of shape {array.shape} to 32 bits", hint=hint)
    sharding = sharding_of(like)
    new = _new_weak if getattr(like, "weak_type", False) and source.dtype.kind in _PYTHON_SCALARS else _new
    # device_put may share the memory of an aligned NumPy array (even with may_alias=False on CPU), and shared memory is
    # neither ours nor reused by donation; the output of a compiled identity is a buffer of its own
    return _compiled(new, sharding)(jax.device_put(source, sharding)).block_until_ready()


@functools.lru_cache(maxsize=1024)
def _compiled(new: Callable[[Any], jax.Array], sharding: Any) -> Callable[[Any], jax.Array]:
    compiled: Callable[[Any], jax.Array] = jax.jit(new, out_shardings=sharding)
    return compiled


def sharding_of(like: object | None) -> Any:
    """Return where an array is kept; None for one that JAX may move, which follows those that it is used with."""
    return getattr(like, "sharding", None) if getattr(like, "committed", True) else None


def abstract(
    shape: tuple[int, ...], dtype: Any, *, sharding: Any = None, weak_type: bool = False
) -> jax.ShapeDtypeStruct:
    """Return what stands for an array that is not there."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding, weak_type=weak_type)  # type: ignore[no-untyped-call]


def _new(array: jax.Array) -> jax.Array:
    return array


def _new_weak(array: jax.Array) -> jax.Array:
    """Return the values with the dtype of a Python number: it gives way to the other operand's in arithmetic."""
    return jnp.full(array.shape, _PYTHON_SCALARS[array.dtype.kind]()).at[...].set(array)


# --- random keys ---------------------------------------------------------------------------------------------------


def is_key(leaf: Any) -> bool:
    """Whether it is an array of typed random keys, or stands for one."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and _is_key_dtype(leaf.dtype)


@functools.cache
def _is_key_dtype(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def key_impl(key: Any) -> str:
    """Return the name of the generator that the keys are for."""
    return _impl(key.dtype)


@functools.cache
def _impl(dtype: Any) -> str:
    found: list[str] = []
    jax.eval_shape(lambda key: found.append(str(jax.random.key_impl(key))), abstract((), dtype))
    return found[0]


def key_data(key: Any) -> jax.ShapeDtypeStruct:
    """Return what the data of keys are like: uint32, one axis more, kept where the keys are."""
    data = jax.eval_shape(jax.random.key_data, abstract(key.shape, key.dtype))
    return abstract(data.shape, data.dtype, sharding=sharding_of(key))
