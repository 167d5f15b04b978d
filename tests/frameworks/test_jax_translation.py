"""JAX state to plain trees and back, through the JSON skeleton and bytes that files hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import highcamp.jax as translation
from highcamp.core import strict, tree
from highcamp.errors import InvalidState, Mismatch

DTYPES = [
    *(jnp.float32, jnp.float16, jnp.bfloat16, jnp.complex64, jnp.bool_),
    *(jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e4m3fnuz, jnp.float8_e5m2fnuz, jnp.float8_e8m0fnu),
    *(jnp.int8, jnp.int16, jnp.int32, jnp.uint8, jnp.uint16, jnp.uint32),
]


@partial(jax.tree_util.register_dataclass, data_fields=["params", "step"], meta_fields=["name"])
@dataclass
class State:
    """Two data fields and a static one."""

    params: dict
    step: object
    name: str = "state"


class Layer:
    """A module in the manner of equinox: arrays and functions are leaves, the rest is static."""

    def __init__(self, weight, activation, width):
        self.weight, self.activation, self.width = weight, activation, width


jax.tree_util.register_pytree_with_keys(
    Layer,
    lambda layer: (
        (
            (jax.tree_util.GetAttrKey("weight"), layer.weight),
            (jax.tree_util.GetAttrKey("activation"), layer.activation),
        ),
        layer.width,
    ),
    lambda width, leaves: Layer(*leaves, width),
)


class Pair(NamedTuple):
    """Comes back as itself."""

    left: object
    right: object


@jax.tree_util.register_pytree_node_class
@dataclass
class Nameless:
    """A node that tells no names."""

    parts: list = field(default_factory=list)

    def tree_flatten(self):
        """By position."""
        return tuple(self.parts), None

    @classmethod
    def tree_unflatten(cls, _, parts):
        """By position."""
        return cls(list(parts))


def stored(state):
    """Return a state's tree as it comes back from a file without a template: plain containers, default device."""
    flat = tree.flatten(translation.to_tree(state), translation.to_host, where="state")
    skeleton = strict.read(strict.write(flat.skeleton), where="state", limit=1 << 24)
    arrays = {name: (bytes(array.data), array) for name, array in flat.arrays.items()}
    return tree.unflatten(skeleton, lambda name: translation.from_host(arrays[name][1], None))


def same(left, right):
    """Compare two pytrees: structure, dtypes, bytes; random keys by their data."""
    left_leaves, left_structure = jax.tree_util.tree_flatten(left)
    right_leaves, right_structure = jax.tree_util.tree_flatten(right)
    return left_structure == right_structure and all(map(same_leaf, left_leaves, right_leaves))


def same_leaf(left, right):
    """Compare two leaves."""
    if type(left) is not type(right):
        return False
    if not isinstance(left, jax.Array):
        return left == right
    if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
        left, right = jax.random.key_data(left), jax.random.key_data(right)
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and np.asarray(left).tobytes() == np.asarray(right).tobytes()
    )


# --- arrays


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("shape", [(3, 4), (), (0, 2)], ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype, shape):
    """A cast would make a resumed run another run."""
    numbers = np.random.default_rng(0).integers(0, 2, size=(*shape, 16), dtype=np.uint8)
    array = jnp.asarray(numbers[..., : np.dtype(dtype).itemsize].copy().view(dtype)[..., 0])

    host = translation.to_host(array)
    back = translation.from_host(host, array)

    assert bytes(host.data) == np.asarray(array).tobytes()
    assert host.data.readonly
    assert same(back, array)


def test_the_same_array_twice_is_tied():
    """Tied weights are written once; different arrays, and empty ones, are not tied."""
    array, other, empty = jnp.ones(3), jnp.ones(3), jnp.ones(0)

    ties = [translation.to_host(leaf).tie for leaf in (array, array, other, empty)]

    assert ties[0] == ties[1]
    assert ties[2] not in (ties[0], None)
    assert ties[3] is None


def test_what_has_no_bytes_is_refused_with_advice():
    """The errors of JAX itself speak of tracers and buffers, not of what to do."""
    gone = jnp.ones(3)
    gone.delete()
    refused = []

    @jax.jit
    def step(x):
        with pytest.raises(InvalidState, match="outside of jit") as caught:
            translation.to_host(x)
        refused.append(caught.value)
        return x

    step(jnp.ones(2))

    assert len(refused) == 1
    with pytest.raises(InvalidState, match=r"donated.*what the step returned"):
        translation.to_host(gone)
    with pytest.raises(InvalidState, match="to_tree"):
        translation.to_host(jax.random.key(0))
    with pytest.raises(InvalidState, match="int4"):
        translation.to_host(jnp.ones(4, jnp.int4))
    assert translation.to_host(np.ones(2)) is None


def test_64_bit_arrays_are_not_narrowed():
    """JAX does it with a warning at most; half of every number would be lost."""
    from highcamp.core.array import HostArray

    host = HostArray.from_numpy(np.arange(3))

    with pytest.raises(InvalidState, match="jax_enable_x64"):
        translation.from_host(host, None)


def aligned(count):
    """Return float32 memory that JAX on CPU would share instead of copying."""
    memory = np.zeros(count * 4 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + count * 4].view(np.float32)


def test_restored_arrays_can_be_donated():
    """Arrays that share mapped or reused memory are never given back: resume needs twice the memory, or more."""
    from highcamp.core.array import HostArray

    source = aligned(4096)
    source[:] = np.arange(4096)

    restored = translation.from_host(HostArray.from_numpy(source), None)
    source[:] = -1
    where = restored.unsafe_buffer_pointer()
    result = jax.jit(lambda x: x + 1, donate_argnums=0)(restored)

    assert where != source.ctypes.data
    assert restored.is_deleted()
    assert result.unsafe_buffer_pointer() == where
    assert np.array_equal(result, np.arange(4096) + 1)


def test_donated_buffers():
    """A view kept on CPU turns donation off in silence; one that was not copied changes with the next step."""
    state = {"w": jnp.arange(4096.0)}
    step = jax.jit(lambda s: {"w": s["w"] * 2}, donate_argnums=0)

    flat = tree.flatten(translation.to_tree(state), translation.to_host, where="state")
    snapshot = {name: bytes(array.data) for name, array in flat.arrays.items()}
    del flat
    where = state["w"].unsafe_buffer_pointer()
    after = step(state)

    assert state["w"].is_deleted()
    assert after["w"].unsafe_buffer_pointer() == where
    assert np.array_equal(np.frombuffer(snapshot["w"], np.float32), np.arange(4096))


def test_weak_types_come_back():
    """What began as a Python number gives way in arithmetic: made strong, bfloat16 sums would become float32."""
    for weak in (jnp.asarray(2.0), jnp.asarray(2), jnp.full((3,), 1.5), jnp.asarray(1j)):
        back = translation.from_host(translation.to_host(weak), weak)

        assert back.weak_type
        assert same(back, weak)
    assert not translation.from_host(translation.to_host(weak), jnp.ones(3)).weak_type


def test_the_sharding_of_like_is_kept():
    """A model spread over devices must not come back on one of them; shapes alone can say where."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    array = jax.device_put(jnp.arange(4.0), sharding)
    abstract = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)

    for like in (array, abstract):
        back = translation.from_host(translation.to_host(array), like)

        assert back.sharding == sharding
        assert same(back, array)


# --- trees


def make_optimizer():
    """Nest what optax nests: chains, masks with gaps, injected hyperparameters, several steps."""
    inner = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2)
    masked = optax.masked(optax.ema(0.9), {"w": True, "b": False})
    return optax.MultiSteps(optax.chain(optax.clip(1.0), inner, masked), 2).gradient_transformation()


def train(params, state, steps):
    """Train on data made from the step number."""
    optimizer = make_optimizer()

    @jax.jit
    def step(params, state, number):
        x = jax.random.normal(jax.random.key(number), (3, 4))
        grads = jax.grad(lambda p: jnp.mean((x @ p["w"] + p["b"]) ** 2))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for number in steps:
        params, state = step(params, state, number)
    return params, state


def fresh():
    """Return parameters and optimizer state as a script makes them before it restores."""
    params = {"w": jax.random.normal(jax.random.key(0), (4, 2)), "b": jnp.zeros(2)}
    return params, make_optimizer().init(params)


def test_structure_comes_back():
    """Optax updates its own NamedTuples; lists and dicts in their place are a crash at best."""
    params, state = train(*fresh(), range(5))
    like = jax.tree.map(jnp.zeros_like, fresh())
    plain = stored((params, state))

    restored = translation.from_tree(plain, like)

    assert same(restored, (params, state))
    assert type(restored[1]) is type(state)
    assert same(train(*restored, range(5, 9)), train(params, state, range(5, 9)))


def test_core_fills_the_tree_of_like():
    """The way of `restore(like=…)`: to_tree on both sides, arrays made where the leaf of `like` is."""
    state = {"params": train(*fresh(), range(3)), "key": jax.random.key(7), "best": None, "name": "a"}
    flat = tree.flatten(translation.to_tree(state), translation.to_host, where="state")
    like = {"params": fresh(), "key": jax.random.key(0), "best": None, "name": ""}
    specs = {name: array.spec for name, array in flat.arrays.items()}

    filled = tree.fill(
        translation.to_tree(like),
        flat.skeleton,
        lambda name, leaf: translation.from_host(flat.arrays[name], leaf),
        translation.to_host,
        specs=specs,
    )

    assert same(translation.from_tree(filled, like), state)


def test_every_kind_of_node_comes_back():
    """What is static, and what is code, is not in the checkpoint: `like` has it."""
    weight = jnp.arange(3.0)
    state = State(
        {"z": [weight, (1, None)], "a": Pair(Layer(weight, jax.nn.relu, 3), Nameless([2.5, {}]))}, jnp.int32(4), "x"
    )
    like = State({"z": [weight, (0, None)], "a": Pair(Layer(weight, jax.nn.gelu, 3), Nameless([0.0, {}]))}, 0, "y")

    plain = stored(state)
    restored = translation.from_tree(plain, like)

    assert list(plain["params"]) == ["z", "a"]
    assert plain["params"]["a"]["right"] == {"0": 2.5, "1": {}}
    assert plain["params"]["a"]["left"]["activation"] is None
    assert (restored.name, restored.params["z"][1]) == ("y", (1, None))
    assert isinstance(restored.params["a"], Pair)
    assert restored.params["a"].left.activation is jax.nn.gelu
    assert restored.params["a"].right.parts == [2.5, {}]
    assert same_leaf(restored.params["a"].left.weight, weight)
    assert same_leaf(restored.step, jnp.int32(4))


def test_dict_keys_need_not_be_text():
    """Layers are often numbered."""
    state = {30: jnp.ones(1), 4: {1: jnp.zeros(1)}}

    assert same(translation.from_tree(stored(state), state), state)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("count", [None, 3])
def test_random_keys_go_on(impl, count):
    """Key data under another generator gives other numbers, and NumPy cannot read a key at all."""
    key = jax.random.key(5, impl=impl)
    key = key if count is None else jax.random.split(key, count)
    old = jax.random.PRNGKey(1)

    plain = stored({"key": key, "old": old})
    restored = translation.from_tree(plain, {"key": jax.tree.map(jax.random.clone, key), "old": old})

    assert plain["key"]["key_impl"] == impl
    assert restored["key"].dtype == key.dtype
    assert same(restored, {"key": key, "old": old})


def test_dtype_is_compared():
    """All differences at once, by path; a silent cast would resume from rounded weights."""
    saved = stored(
        {"w": jnp.ones((2, 3)), "b": jnp.ones(2), "key": jax.random.key(0), "n": (1, 2), "old": 1, "kind": "x"}
    )
    like = {
        "w": jnp.ones((2, 4), jnp.bfloat16),
        "b": 1.0,
        "key": jax.random.key(0, impl="rbg"),
        "n": Pair(jnp.ones(1), 2),
        "new": {"a": jnp.ones(1)},
        "kind": None,
    }

    with pytest.raises(Mismatch) as caught:
        translation.from_tree(saved, like)

    for line in (
        "w: dtype float32 in the checkpoint, bfloat16 here",
        "w: shape (2, 3) in the checkpoint, (2, 4) here",
        "b: array of float32 (2,) in the checkpoint, float here",
        "key: a threefry2x32 key in the checkpoint, rbg here",
        "n: tuple in the checkpoint, Pair here",
        "old: only in the checkpoint",
        "new/a: only here",
        "kind: str in the checkpoint, NoneType here",
    ):
        assert line in str(caught.value)
    for wrong in ({"a": 1}, [1], [1, 2, 3]):
        with pytest.raises(Mismatch, match="the state"):
            translation.from_tree(wrong, (1, 2))
    with pytest.raises(Mismatch, match="a random key here"):
        translation.from_tree(jnp.ones(2), jax.random.key(0))


def test_jax_objects_are_not_restored_in_place():
    """State that is passed comes back as a value; pretending otherwise would restore nothing."""
    assert translation.capture(object()) is None
    assert translation.template(object()) is None
    assert translation.check(object(), {}) == []
    assert translation.random_state() == {}
    translation.set_random_state({})
    with pytest.raises(InvalidState, match="like=state"):
        translation.restore(object(), {})


def test_a_function_in_a_state_without_jax_is_refused_though_jax_is_loaded():
    """Whether a value can be saved must not hang on what else the program has imported."""
    from highcamp.errors import InvalidState
    from highcamp.run import live

    with pytest.raises(InvalidState, match="model/f"):
        live.capture_state({"model": {"w": np.ones(2), "f": len}})

    assert list(live.capture_state({"model": {"w": jnp.ones(2), "f": len}})) == ["model"]
