"""Arrays over four devices of one process; run by `test_devices.py` with XLA told to make them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import highcamp.jax as translation
from highcamp import Checkpointer
from highcamp.errors import Mismatch
from highcamp.jax.arrays import gather

MESH = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
LINE = jax.make_mesh((4,), ("z",), axis_types=(AxisType.Auto,))
SHARDINGS = {
    "rows": NamedSharding(LINE, P("z")),
    "columns": NamedSharding(LINE, P(None, "z")),
    "grid": NamedSharding(MESH, P("x", "y")),
    "crossed": NamedSharding(MESH, P("y", "x")),
    "both in one": NamedSharding(MESH, P(None, ("y", "x"))),
    "partially replicated": NamedSharding(MESH, P("y")),
    "replicated": NamedSharding(MESH, P()),
    "pinned": NamedSharding(MESH, P("x"), memory_kind="pinned_host"),
    "the last device": SingleDeviceSharding(jax.devices()[3]),
}


def values(sharding, dtype=jnp.float32):
    """Numbers that are all different, 8 x 12, kept in a given way."""
    return jax.device_put(jnp.arange(96).reshape(8, 12).astype(dtype), sharding)


def bits(array):
    """The bytes of an array, keys too."""
    array = jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array
    return np.asarray(array.copy()).tobytes()


def through(directory, state, like):
    """A state, saved and restored by another attempt."""
    with Checkpointer(directory, verbose=0) as checkpointer:
        checkpointer.save(state, step=1)
    with Checkpointer(directory, verbose=0) as checkpointer:
        return checkpointer.restore(like=like)


def test_there_are_four_devices():
    """On one of them, everything below would be said of nothing."""
    assert jax.device_count() == 4


@pytest.mark.parametrize("new", SHARDINGS)
def test_the_sharding_is_that_of_like_whatever_it_was(tmp_path, new):
    """A model that was spread over devices must not come back on one of them, nor only in the way it was spread."""
    state = {"arrays": {name: values(sharding) for name, sharding in SHARDINGS.items()}}
    like = {"arrays": {name: values(SHARDINGS[new]) * 0 for name in SHARDINGS}}
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like)

    for number, each in enumerate((like, abstract)):
        restored = through(tmp_path / str(number), state, each)

        for name, array in restored["arrays"].items():
            assert array.sharding == SHARDINGS[new], name
            assert array.committed
            assert bits(array) == bits(state["arrays"][name]), name


@pytest.mark.parametrize("way", SHARDINGS)
def test_every_way_of_spreading_is_brought_in_order(way):
    """Rows in the order of devices are another matrix."""
    for dtype in (jnp.float32, jnp.bfloat16, jnp.bool_, jnp.float8_e4m3fn):
        array = values(SHARDINGS[way], dtype)

        host = translation.to_host(array)

        assert bytes(host.data) == bits(array)
        assert host.is_immutable


def test_any_stretch_of_an_array_is_brought():
    """Pieces of the stream begin and end anywhere, in the middle of an element too."""
    dice = np.random.default_rng(0)
    array = jax.device_put(jnp.arange(480, dtype=jnp.int32).reshape(4, 6, 4, 5), NamedSharding(MESH, P("x", None, "y")))
    whole, host = bits(array), translation.to_host(array)
    for _ in range(300):
        start, stop = sorted(dice.integers(0, len(whole) + 1, 2))
        view = bytearray(int(stop - start))

        host.copy_to(memoryview(view), int(start))

        assert view == whole[start:stop]


def test_no_more_is_touched_than_asked_for():
    """A piece of a large array must not bring all of it: that would take the square of the time."""
    block = np.arange(60).reshape(3, 4, 5)
    out = np.empty(7, block.dtype)

    gather((3, 4, 5), [((0, 0, 0), block)], out, 17)

    assert out.tolist() == list(range(17, 24))
    gather((), [((), np.array(5))], out[:1], 0)
    assert out[0] == 5


def test_nothing_is_left_beside_a_spread_array_that_was_saved(tmp_path):
    """NumPy's view of it is a copy that JAX keeps as long as the array lives: the state twice, for nothing."""
    state = {"w": values(SHARDINGS["grid"]), "v": values(SHARDINGS["replicated"])}

    through(tmp_path, state, state)

    assert [leaf._npy_value for leaf in state.values()] == [None, None]


@pytest.mark.parametrize("snapshot", ["copy", "overlap"])
def test_a_donated_or_deleted_array_is_saved_as_it_was(tmp_path, snapshot):
    """The step after `save` may take the memory of every shard; the checkpoint holds what was there before."""
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 2, state), donate_argnums=0)
    state = {"arrays": {name: values(SHARDINGS[name]) for name in ("rows", "grid", "partially replicated")}}
    expected = {name: bits(leaf) for name, leaf in state["arrays"].items()}

    with Checkpointer(tmp_path, snapshot=snapshot, verbose=0) as checkpointer:
        pending = checkpointer.save(state, step=1)
        after = step(state)
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        pending.wait()
        again = checkpointer.restore(like=after)

    assert {name: bits(leaf) for name, leaf in again["arrays"].items()} == expected
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_restored_arrays_can_be_donated_on_every_device(tmp_path):
    """Else a run needs more memory after a restart than before."""
    state = {"w": values(SHARDINGS["grid"])}
    restored = through(tmp_path, state, state)
    before = {shard.device: shard.data.unsafe_buffer_pointer() for shard in restored["w"].addressable_shards}

    after = jax.jit(lambda state: {"w": state["w"] + 1}, donate_argnums=0)(restored)

    assert restored["w"].is_deleted()
    assert {shard.device: shard.data.unsafe_buffer_pointer() for shard in after["w"].addressable_shards} == before


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_spread_random_keys_go_on(tmp_path, impl):
    """Each device draws from its own key."""
    keys = jax.device_put(jax.random.split(jax.random.key(3, impl=impl), 8), NamedSharding(LINE, P("z")))
    state = {"keys": keys, "old": jax.device_put(jax.random.PRNGKey(1), SHARDINGS["replicated"])}
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)

    for number, like in enumerate((state, abstract)):
        restored = through(tmp_path / str(number), state, like)

        assert restored["keys"].dtype == keys.dtype
        assert restored["keys"].sharding.is_equivalent_to(keys.sharding, 1)
        assert {name: bits(leaf) for name, leaf in restored.items()} == {
            name: bits(leaf) for name, leaf in state.items()
        }


def test_what_jax_has_spread_unevenly_comes_back(tmp_path):
    """Six rows over four devices: where they are is for JAX to choose, and to be asked of `like`."""
    uneven = jax.jit(lambda x: jax.lax.with_sharding_constraint(x * 1, SHARDINGS["rows"]))(jnp.arange(6.0))
    state = {"u": uneven, "w": values(SHARDINGS["grid"])}

    restored = through(tmp_path, state, state)

    assert restored["u"].sharding == uneven.sharding
    assert bits(restored["u"]) == bits(uneven)


def test_what_cannot_be_spread_as_asked_is_said_with_everything_else(tmp_path):
    """All differences at once, by path, before anything is read."""
    state = {"part": {"u": jnp.arange(6.0), "w": values(SHARDINGS["grid"])}}
    like = {
        "part": {
            "u": jax.ShapeDtypeStruct((6,), jnp.float32, sharding=SHARDINGS["rows"]),
            "w": jax.ShapeDtypeStruct((8, 3), jnp.float32),
        }
    }

    with pytest.raises(Mismatch, match="2 differences") as caught:
        through(tmp_path, state, like)

    assert "part/u: cannot be spread as here" in str(caught.value)
    assert "part/w: shape (8, 12) in the checkpoint, (8, 3) here" in str(caught.value)


def test_what_is_not_bound_to_a_device_stays_so(tmp_path):
    """Bound to the first device, a number can no longer be added to what is on the others."""
    state = {
        "free": jnp.arange(3.0),
        "bound": jax.device_put(jnp.arange(3.0), jax.devices()[2]),
        "key": jax.random.key(0),
    }

    restored = through(tmp_path, state, state)

    assert {name: leaf.committed for name, leaf in restored.items()} == {"free": False, "bound": True, "key": False}
    assert restored["bound"].device == jax.devices()[2]
    assert (restored["free"] + restored["bound"]).device == jax.devices()[2]


def test_tracked_state_stays_where_it_is(tmp_path):
    """What is restored in place has its devices from what it replaces."""

    def make(scale):
        holder = {
            "w": values(SHARDINGS["grid"]) * scale,
            "opt": optax.adam(1e-3).init({"w": values(SHARDINGS["rows"])}),
        }
        module = nnx.Linear(8, 12, rngs=nnx.Rngs(int(scale)))
        module.kernel[...] = jax.device_put(module.kernel[...], SHARDINGS["crossed"])
        return holder, module

    holder, module = make(3.0)
    expected = bits(holder["w"]), bits(module.kernel[...])
    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.track(state=holder, model=module)
        checkpointer.save(step=1, epoch=1)
    holder, module = make(0.0)
    kernel = module.kernel
    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.track(state=holder, model=module)
        checkpointer.restore()

    assert (bits(holder["w"]), bits(module.kernel[...])) == expected
    assert holder["w"].sharding == SHARDINGS["grid"]
    assert holder["opt"][0].mu["w"].sharding == SHARDINGS["rows"]
    assert module.kernel is kernel
    assert kernel[...].sharding == SHARDINGS["crossed"]
