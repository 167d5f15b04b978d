"""An array never changes, so holding it is a snapshot, unless the next step takes its memory: then it must have been copied."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Every
from highcamp.errors import InvalidState
from highcamp.storage.local import LocalStore
from highcamp.training.snapshot import RING_BYTES

MEGABYTE = 1 << 20


class Waiting(LocalStore):
    """Writes nothing of a tensor file before it is let."""

    def __init__(self, path):
        super().__init__(path)
        self.has_come, self.may_go_on = threading.Event(), threading.Event()

    def create(self, path, chunks):
        def waiting():
            self.has_come.set()
            assert self.may_go_on.wait(60)
            yield from chunks

        super().create(path, waiting() if path.endswith("params.safetensors") else chunks)


@jax.jit
def made(seed):
    """Numbers, 20 arrays of 4 MiB each and a few small ones: more than the ring that is used for references."""
    keys = jax.random.split(jax.random.key(seed), 20)
    return {"large": [jax.random.normal(key, (1024, 1024)) for key in keys], "small": {"b": jnp.arange(7.0), "n": seed}}


def hashes(state):
    """Every bit of a state, with nothing kept of it."""
    return [hash(np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(state)]


def double(state):
    """What a training step does with the memory of its state."""
    return jax.tree.map(lambda leaf: leaf * 2 + 1, state)


@pytest.mark.parametrize(
    "options", [{}, {"snapshot": "overlap"}, {"staging_bytes": 8 * MEGABYTE}, {"memory_every": Every(steps=1)}], ids=str
)
def test_a_step_that_donates_right_after_save_changes_no_checkpoint(tmp_path, options):
    """Deleted or reused memory in a file is a checkpoint that never was."""
    step = jax.jit(double, donate_argnums=0)
    state = {"params": made(3)}
    expected = []

    with Checkpointer(tmp_path, verbose=0, **options) as checkpointer:
        for number in range(1, 4):
            expected = hashes(state)
            pending = checkpointer.save(state, step=number)
            state = step(state)
            pending.wait()
            again = checkpointer.restore(like=state)
            assert hashes(again) == expected


@pytest.mark.parametrize("snapshot", ["copy", "overlap"])
def test_what_is_deleted_while_it_is_written_is_whole(tmp_path, snapshot):
    """The write has not begun when the arrays are gone and their memory is wanted for others."""
    store = Waiting(tmp_path / "run")
    step = jax.jit(double, donate_argnums=0)
    state = {"params": made(1)}
    expected = hashes(state)

    with Checkpointer(store, snapshot=snapshot, verbose=0) as checkpointer:
        pending = checkpointer.save(state, step=1)
        assert store.has_come.wait(60)
        after = step(state)
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        others = jax.block_until_ready([step(made(seed)) for seed in range(5, 8)])
        store.may_go_on.set()
        pending.wait()
        again = checkpointer.restore(like={"params": after["params"]})

    assert hashes(again) == expected
    assert len(others) == 3
    assert [found.ok for found in highcamp.open(store).verify()] == [True]


def test_an_overlapped_save_of_a_state_that_is_kept_copies_nothing(tmp_path):
    """A second state in memory is what large models have no room for."""
    state = {"params": made(1)}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    with Checkpointer(tmp_path / "overlap", snapshot="overlap", verbose=0) as checkpointer:
        checkpointer.save(state, step=1).wait()
        held = checkpointer._saver._source.size_bytes
    with Checkpointer(tmp_path / "copy", verbose=0) as checkpointer:
        checkpointer.save(state, step=1).wait()
        copied = checkpointer._saver._source.size_bytes

    assert RING_BYTES < size <= copied
    assert held <= RING_BYTES * 1.05
    assert [leaf._npy_value for leaf in jax.tree.leaves(state)] == [None] * 22


def test_the_bytes_are_the_array_s_own():
    """A copy here would be one before each save, of the whole state."""
    from highcamp.jax import to_host

    array = made(1)["large"][0]

    data = np.frombuffer(to_host(array).data, np.uint8)

    assert data.ctypes.data == array.unsafe_buffer_pointer()


@pytest.mark.parametrize("snapshot", ["copy", "overlap"])
def test_nothing_is_held_when_it_is_saved(tmp_path, snapshot):
    """A view that is forgotten turns donation off without a word: every step then needs twice the memory."""
    step = jax.jit(double, donate_argnums=0)
    state = {"params": made(2)}
    with Checkpointer(tmp_path, snapshot=snapshot, verbose=0) as checkpointer:
        checkpointer.save(state, step=1).wait()
        before = {leaf.unsafe_buffer_pointer() for leaf in state["params"]["large"]}

        after = step(state)

        assert all(leaf.is_deleted() for leaf in state["params"]["large"])
        assert {leaf.unsafe_buffer_pointer() for leaf in after["params"]["large"]} == before


def test_a_copied_state_can_be_donated_while_it_is_written(tmp_path):
    """That is what the copy is for."""
    store = Waiting(tmp_path / "run")
    state = {"params": made(2)}
    before = {leaf.unsafe_buffer_pointer() for leaf in state["params"]["large"]}
    with Checkpointer(store, verbose=0) as checkpointer:
        checkpointer.save(state, step=1)
        assert store.has_come.wait(60)

        after = jax.jit(double, donate_argnums=0)(state)

        assert {leaf.unsafe_buffer_pointer() for leaf in after["params"]["large"]} == before
        store.may_go_on.set()


def test_a_deleted_array_is_refused_by_its_path(tmp_path):
    """The usual slip is to save what the step was given."""
    state = {"params": {"w": jnp.ones(3), "b": jnp.ones(2)}}
    jax.jit(double, donate_argnums=0)(state)

    with (
        Checkpointer(tmp_path, verbose=0) as checkpointer,
        pytest.raises(InvalidState, match=r"params/[bw]: a JAX array of shape .* was donated and is deleted") as caught,
    ):
        checkpointer.save(state, step=1)

    assert caught.value.path in ("params/w", "params/b")
    assert caught.value.hint == "save what the step returned, not what it was given"
    key = jax.random.key(0)
    key.delete()
    with (
        Checkpointer(tmp_path / "key", verbose=0) as checkpointer,
        pytest.raises(InvalidState, match="dropout/key_data: a JAX array of .* was donated"),
    ):
        checkpointer.save({"dropout": key}, step=1)


def test_a_donated_state_still_says_what_is_wanted_back(tmp_path):
    """`restore(like=state)` after a step that has taken the state's memory needs shapes, no bytes."""
    state = {"params": {"w": jnp.arange(3.0)}, "key": jax.random.key(1)}
    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.save(state, step=1).wait()
        jax.tree.map(lambda leaf: leaf.delete(), state)

        again = checkpointer.restore(like=state)

    assert again["params"]["w"].tolist() == [0, 1, 2]
    assert jax.random.key_data(again["key"]).tolist() == jax.random.key_data(jax.random.key(1)).tolist()
