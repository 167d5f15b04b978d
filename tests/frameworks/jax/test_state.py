"""States of JAX and its libraries, saved and restored: passed through `like=`, and tracked."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from safetensors import safe_open

import highcamp
from highcamp import Checkpointer, Every, Keep
from highcamp.errors import InvalidMetric, InvalidState, Mismatch, MissingExtra
from highcamp.jax import supported


def through(directory, state, like):
    """A state, saved and restored by another attempt."""
    with Checkpointer(directory, verbose=0) as checkpointer:
        checkpointer.save(state, step=1)
    with Checkpointer(directory, verbose=0) as checkpointer:
        return checkpointer.restore(like=like)


def same(left, right):
    """Whether two pytrees are of one structure, with leaves of one kind, and equal to the last bit."""
    left, left_structure = jax.tree.flatten(left)
    right, right_structure = jax.tree.flatten(right)
    return left_structure == right_structure and all(map(same_leaf, left, right))


def same_leaf(left, right):
    if type(left) is not type(right) or not isinstance(left, jax.Array):
        return type(left) is type(right) and left == right
    if left.dtype != right.dtype or getattr(left, "weak_type", None) != getattr(right, "weak_type", None):
        return False
    if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
        left, right = jax.random.key_data(left), jax.random.key_data(right)
    return left.shape == right.shape and np.asarray(left).tobytes() == np.asarray(right).tobytes()


def zeros(state):
    """The same state with other numbers in it, so that nothing is right by chance."""
    return jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf) if leaf.dtype != jax.random.key(0).dtype else jax.random.clone(leaf), state
    )


# --- optax


def parameters(seed=0):
    """Two layers, one of them in half precision."""
    first, second = jax.random.split(jax.random.key(seed))
    return {
        "body": {"w": jax.random.normal(first, (4, 3)), "b": jnp.zeros(3)},
        "head": {"w": jax.random.normal(second, (3, 2)).astype(jnp.bfloat16), "b": jnp.zeros(2, jnp.bfloat16)},
    }


SCHEDULE = optax.cosine_decay_schedule(1e-2, 50)
OPTIMIZERS = {
    "adamw with a schedule": optax.adamw(SCHEDULE),
    "nothing to remember": optax.sgd(0.1),
    "momentum in half precision": optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16),
    "masked": optax.masked(optax.adam(1e-2), {"body": True, "head": False}),
    "two optimizers": optax.multi_transform(
        {"slow": optax.adam(1e-3), "fast": optax.sgd(SCHEDULE, momentum=0.9), "not": optax.set_to_zero()},
        {"body": {"w": "slow", "b": "not"}, "head": "fast"},
    ),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE, b1=0.8),
    "chained": optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.ema(0.5), optax.scale(-0.1)),
    "accumulated": optax.MultiSteps(optax.lion(1e-2), every_k_schedule=3).gradient_transformation(),
    "noisy": optax.noisy_sgd(0.1, key=jax.random.key(4)),
    "guarded": optax.apply_if_finite(optax.adafactor(1e-2), 3),
    "averaging": optax.contrib.schedule_free_adamw(1e-2),
    "by plateaus": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_as_if_nothing_had_happened(tmp_path, name):
    """Optax updates its own NamedTuples; with lists and dicts in their place the next step fails, or means another thing."""
    optimizer = optax.with_extra_args_support(OPTIMIZERS[name])

    @jax.jit
    def step(state, number):
        x = jax.random.normal(jax.random.key(number), (5, 4))

        def loss(params):
            hidden = jnp.tanh(x @ params["body"]["w"] + params["body"]["b"])
            return jnp.mean((hidden @ params["head"]["w"].astype(jnp.float32) + params["head"]["b"]) ** 2)

        value, gradients = jax.value_and_grad(loss)(state["params"])
        updates, memory = optimizer.update(gradients, state["optimizer"], state["params"], value=value)
        return {"params": optax.apply_updates(state["params"], updates), "optimizer": memory}

    def begin():
        # Injected numbers are arrays, which make the moments of half precision grow in the first step.
        params = jax.tree.map(jnp.float32, parameters()) if name == "injected" else parameters()
        return {"params": params, "optimizer": optimizer.init(params)}

    state = begin()
    for number in range(4):
        state = step(state, number)

    again = through(tmp_path, state, begin())

    # What began as a Python number is an array of weak type after a compiled step, and strong in a state that is new.
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert [leaf.dtype for leaf in jax.tree.leaves(again)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
    for number in range(4, 8):
        state, again = step(state, number), step(again, number)
    assert same(again["params"], state["params"])
    assert same(jax.tree.map(jnp.asarray, again), jax.tree.map(jnp.asarray, state))


# --- Flax


class Network(nnx.Module):
    """Everything that a module may hold: variables, one of them twice, random streams, arrays, numbers, functions."""

    def __init__(self, seed, *, has_table=False):
        rngs = nnx.Rngs(seed, dropout=seed + 1)
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)])
        self.tied = self.first.kernel
        if has_table:
            self.table = jnp.arange(3.0) + seed
        self.activation, self.width, self.nothing = nnx.relu, 8, None

    def __call__(self, x):
        x = self.drop(self.norm(self.activation(self.first(x))))
        for layer in self.layers:
            x = layer(x)
        return x @ self.tied


def network(seed=0, **options):
    """A module and its optimizer."""
    module = Network(seed, **options)
    return module, nnx.Optimizer(module, optax.adamw(SCHEDULE), wrt=nnx.Param)


@nnx.jit
def nnx_step(module, optimizer, number):
    """One step with dropout and batch statistics."""
    x = jax.random.normal(jax.random.key(number), (10, 6))
    loss, gradients = nnx.value_and_grad(lambda module: jnp.mean((module(x) - x.sum()) ** 2))(module)
    optimizer.update(module, gradients)
    return loss


def variables(*nodes):
    """All that has a state."""
    return [nnx.state(node) for node in nodes]


def test_flax_modules_are_passed_and_come_back_as_new_ones(tmp_path):
    """Kernels, batch statistics, random streams and the optimizer; what is shared stays shared, and `like` as it is."""
    module, optimizer = network(has_table=True)
    for number in range(3):
        nnx_step(module, optimizer, number)
    like = dict(zip(("model", "optimizer"), network(5, has_table=True), strict=True))
    before = jax.tree.map(jnp.copy, variables(*like.values()))

    again = through(tmp_path, {"model": module, "optimizer": optimizer}, like)

    assert again["model"].tied is again["model"].first.kernel
    assert same(variables(*again.values()), variables(module, optimizer))
    assert same(variables(*like.values()), before)
    for number in range(3, 6):
        assert nnx_step(again["model"], again["optimizer"], number) == nnx_step(module, optimizer, number)
    assert same(variables(*again.values()), variables(module, optimizer))


def test_flax_modules_that_are_only_shapes_are_filled(tmp_path):
    """The idiom for models that are too large to be made twice."""
    module, _ = network()

    again = through(tmp_path, {"model": module}, {"model": nnx.eval_shape(lambda: network(3)[0])})

    assert same(variables(again["model"]), variables(module))
    assert highcamp.open(tmp_path).last.load("model")["layers/1/kernel"].shape == (8, 6)
    assert list(highcamp.open(tmp_path).last.load("model")).count("tied") == 0


def test_a_split_flax_module_comes_back(tmp_path):
    """The functional way: the state alone is passed."""
    state = nnx.state(network()[0])

    again = through(tmp_path, {"params": state}, {"params": nnx.state(network(4)[0])})

    assert type(again["params"]) is nnx.State
    assert same(again["params"], state)


def test_tracked_flax_modules_are_restored_in_place(tmp_path):
    """In the middle of an epoch too; who holds the module, a variable or the optimizer holds what was restored."""

    def train(directory, epochs, stop_at=None):
        module, optimizer = network()
        kernel, losses = module.first.kernel, []
        with Checkpointer(directory, monitor="loss", every=Every(epochs=1, steps=3), verbose=0) as checkpointer:
            checkpointer.track(model=module, optimizer=optimizer, streams=nnx.Rngs(3))
            for epoch in checkpointer.epochs(epochs):
                for batch in checkpointer.batches(range(5)):
                    if (epoch, batch) == stop_at:
                        raise KeyboardInterrupt
                    losses.append(nnx_step(module, optimizer, 5 * epoch + batch))
                checkpointer.log(loss=losses[-1])
            assert module.first.kernel is module.tied is kernel
            checkpointer.restore("best")
        return module, optimizer, checkpointer.run

    *whole, run = train(tmp_path / "whole", 3)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", 3, stop_at=(1, 4))
    *again, resumed = train(tmp_path / "stopped", 3)

    assert resumed.history.attempts[1].batch == 3
    assert same(variables(*again), variables(*whole))
    assert [row.metrics for row in resumed.history.epochs()] == [row.metrics for row in run.history.epochs()]
    assert resumed.last.manifest.objects["model"].weights
    assert not resumed.last.manifest.objects["optimizer"].weights


def test_a_changed_flax_module_is_refused_whole(tmp_path):
    """Every difference by path, and nothing half-restored."""
    module, optimizer = network()
    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.track(model=module, optimizer=optimizer)
        checkpointer.save(step=1, epoch=1)
    module, optimizer = network(seed=1)
    module.first = nnx.Linear(6, 9, rngs=nnx.Rngs(0))
    module.extra = nnx.Param(jnp.ones(2))
    before = jax.tree.map(jnp.copy, variables(module, optimizer))

    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.track(model=module, optimizer=optimizer)
        with pytest.raises(Mismatch) as caught:
            checkpointer.restore()

    for line in (
        "model/first/kernel: shape (6, 8) in the checkpoint, (6, 9) here",
        "model/first/bias: shape (8,) in the checkpoint, (9,) here",
        "model/extra: only here",
        "model/tied: only here",
    ):
        assert line in str(caught.value)
    assert same(variables(module, optimizer), before)


def test_a_train_state_of_flax_goes_on(tmp_path):
    """Its counter is a Python number when it is new, and an array after the first compiled step."""

    class Dense(linen.Module):
        @linen.compact
        def __call__(self, x, *, train):
            return linen.Dense(2)(linen.BatchNorm(use_running_average=not train)(linen.Dense(5)(x)))

    class State(TrainState):
        batch_stats: object = None
        key: object = None

    model = Dense()

    def begin(seed):
        found = model.init(jax.random.key(seed), jnp.ones((1, 3)), train=False)
        return State.create(
            apply_fn=model.apply, params=found["params"], batch_stats=found["batch_stats"], key=jax.random.key(seed),
            tx=optax.adam(SCHEDULE),
        )  # fmt: skip

    @jax.jit
    def step(state):
        key, now = jax.random.split(state.key)
        x = jax.random.normal(now, (7, 3))

        def loss(params):
            found = {"params": params, "batch_stats": state.batch_stats}
            y, new = state.apply_fn(found, x, train=True, mutable=["batch_stats"])
            return jnp.mean(y**2), new

        gradients, new = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradients, key=key, **new)

    state = begin(0)
    for _ in range(3):
        state = step(state)
    fresh = begin(1)

    again = through(tmp_path, state, fresh)
    at_once = through(tmp_path / "before the first step", fresh, state)

    assert (again.step, again.apply_fn, again.tx) == (3, fresh.apply_fn, fresh.tx)
    assert same(jax.tree.leaves(again), jax.tree.leaves(state))
    assert same(jax.tree.leaves(step(again)), jax.tree.leaves(step(state)))
    assert (at_once.step, at_once.step.dtype) == (0, jnp.int32)
    assert same(step(at_once).params, step(fresh).params)


# --- Equinox


def test_equinox_modules_come_back(tmp_path):
    """Arrays and numbers from the file; what is static, and functions, from `like`."""

    class Block(eqx.Module):
        mlp: eqx.nn.MLP
        norm: eqx.nn.BatchNorm
        drop: eqx.nn.Dropout
        scale: float
        name: str = eqx.field(static=True)

        def __init__(self, key, name, scale, activation):
            self.mlp = eqx.nn.MLP(3, 3, 8, 2, activation=activation, key=key)
            self.norm = eqx.nn.BatchNorm(3, "batch", mode="ema")
            self.drop, self.scale, self.name = eqx.nn.Dropout(0.3), scale, name

    def begin(seed, *rest):
        model, memory = eqx.nn.make_with_state(Block)(jax.random.key(seed), *rest)
        return {"model": model, "memory": memory, "optimizer": optax.adam(1e-3).init(eqx.filter(model, eqx.is_array))}

    state = begin(0, "saved", 0.5, jax.nn.relu)
    like = begin(1, "here", 2.5, jax.nn.gelu)

    again = through(tmp_path, state, like)

    assert (again["model"].name, again["model"].mlp.activation) == ("here", like["model"].mlp.activation)
    assert again["model"].scale == 0.5
    assert same(
        eqx.filter(again["model"].mlp.layers, eqx.is_array), eqx.filter(state["model"].mlp.layers, eqx.is_array)
    )
    assert same(jax.tree.leaves(again["memory"]), jax.tree.leaves(state["memory"]))
    assert same(jax.tree.leaves(again["optimizer"]), jax.tree.leaves(state["optimizer"]))


# --- leaves


def test_every_kind_of_leaf_comes_back_as_in_like(tmp_path):
    """Numbers, gaps, scalars, empty arrays, weak types, keys, NumPy's arrays: what a state has besides matrices."""
    state = {
        "numbers": {"int": 3, "float": 0.1, "complex": 1j, "bool": True, "text": "a", "none": None, "nan": float("inf")},
        "arrays": {
            "scalar": jnp.float32(3), "empty": jnp.zeros((0, 3)), "weak": jnp.asarray(2.0), "flag": jnp.ones((), bool),
            "half": jnp.bfloat16(1.5), "quarter": jnp.arange(4.0).astype(jnp.float8_e5m2), "numpy": np.arange(3),
            "numpy scalar": np.float32(0.1),
        },
        "keys": [jax.random.key(1), jax.random.split(jax.random.key(2, impl="rbg"), 3), jax.random.PRNGKey(4)],
        "nothing": optax.EmptyState(),
        "empty": [{}, (), []],
    }  # fmt: skip
    like = {
        **state,
        "numbers": dict.fromkeys(state["numbers"])
        | {"int": 0, "float": 0.0, "complex": 0j, "bool": False, "text": "", "nan": 1.0},
        "arrays": jax.tree.map(lambda leaf: leaf * 0, state["arrays"]) | {"flag": jnp.zeros((), bool)},
        "keys": [jax.random.key(0), jax.random.split(jax.random.key(0, impl="rbg"), 3), jax.random.PRNGKey(0)],
    }

    again = through(tmp_path, state, like)

    numpy, expected = again["arrays"].pop("numpy"), state["arrays"].pop("numpy")
    assert (type(numpy), numpy.dtype, numpy.tolist()) == (np.ndarray, expected.dtype, [0, 1, 2])
    assert same(again, state)


def test_a_number_becomes_an_array_and_back(tmp_path):
    """`state["step"] += 1` within a compiled step makes an array of it; the script that resumes begins with a number."""
    begun = {"params": {"w": jnp.ones(3)}, "step": 0, "scale": 1.0, "done": False}
    trained = jax.jit(lambda state: state | {"step": state["step"] + 1})(begun)

    again = through(tmp_path / "trained", trained, begun)
    back = through(tmp_path / "begun", begun, trained)

    assert same(again, trained)
    assert again["step"].weak_type
    assert same(back, jax.tree.map(jnp.asarray, begun) | {"params": begun["params"]})


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3", "float8_e3m4", "float8_e4m3b11fnuz", "int4", "uint4", "int2", "float4_e2m1fn"]
)
def test_a_dtype_that_files_do_not_have_is_refused_by_its_path(tmp_path, dtype):
    """Written as another one, it would come back as other numbers."""
    state = {"params": {"head": {"w": jnp.ones(8).astype(getattr(jnp, dtype))}}}

    with (
        Checkpointer(tmp_path, verbose=0) as checkpointer,
        pytest.raises(InvalidState, match=f"params/head/w: .*{dtype}"),
    ):
        checkpointer.save(state, step=1)


def test_all_differences_are_told_at_once(tmp_path):
    """One at a time, a person restarts as often as there are differences."""
    saved = {
        "params": {"w": jnp.ones((2, 3)), "b": jnp.ones(2), "old": {"x": jnp.ones(1), "y": jnp.ones(1)}},
        "key": jax.random.key(0, impl="rbg"),
        "optimizer": optax.adam(1e-3).init({"w": jnp.ones(2)}),
        "step": 2**40,
        "gone": jnp.ones(2),
    }
    like = {
        "params": {"w": jnp.ones((2, 3), jnp.bfloat16), "b": None, "new": [jnp.ones(1), jax.random.key(0)]},
        "key": jax.random.key(0, impl="unsafe_rbg"),
        "optimizer": optax.sgd(1e-3).init({"w": jnp.ones(2)}),
        "step": jnp.int32(0),
        "extra": network()[0],
    }

    with pytest.raises(Mismatch) as caught:
        through(tmp_path, saved, like)

    assert sorted(line.strip() for line in caught.value.message.splitlines()[1:] if not line.startswith("  extra")) == [
        "gone: only in the checkpoint",
        "key: a rbg key in the checkpoint, unsafe_rbg here",
        "optimizer/0/count: only in the checkpoint",
        "optimizer/0/mu/w: only in the checkpoint",
        "optimizer/0/nu/w: only in the checkpoint",
        "params/b: array of float32 (2,) in the checkpoint, NoneType here",
        "params/new/0: only here",
        "params/new/1: only here",
        "params/old/x: only in the checkpoint",
        "params/old/y: only in the checkpoint",
        "params/w: dtype float32 in the checkpoint, bfloat16 here",
        "step: 1099511627776 in the checkpoint, too large for int32 here",
    ]
    assert "extra/first/kernel: only here" in caught.value.message


def test_two_parts_of_one_name_are_refused(tmp_path):
    """One of them would be lost without a word."""

    class Pair:
        pass

    jax.tree_util.register_pytree_with_keys(
        Pair,
        lambda _: (((jax.tree_util.GetAttrKey("w"), jnp.ones(1)), (jax.tree_util.GetAttrKey("w"), jnp.zeros(1))), None),
        lambda *_: Pair(),
    )

    with (
        Checkpointer(tmp_path, verbose=0) as checkpointer,
        pytest.raises(InvalidState, match="Pair gives one name to two"),
    ):
        checkpointer.save({"params": Pair(), "w": {"v": jnp.ones(1)}}, step=1)


def test_ties_are_those_of_like(tmp_path):
    """Tied weights are written once; they come back as one array only where `like` has one."""
    shared = jnp.arange(4.0)
    state = {"params": {"in": shared, "out": shared}}

    tied = through(tmp_path / "tied", state, state)["params"]
    apart = through(tmp_path / "apart", state, {"params": {"in": jnp.ones(4), "out": jnp.zeros(4)}})["params"]

    assert tied["in"] is tied["out"]
    assert apart["in"].unsafe_buffer_pointer() != apart["out"].unsafe_buffer_pointer()
    assert same(tied, apart)
    written = safe_open(f"{highcamp.open(tmp_path / 'tied').last.path}/params.safetensors", "numpy")
    assert list(written.keys()) == ["in"]


# --- state that a dict holds


def test_a_dict_that_holds_a_state_is_restored_in_place(tmp_path):
    """What the loop replaces in it is what is saved; Optax's own types come back into it, on the way back to the best too."""
    optimizer = OPTIMIZERS["two optimizers"]

    def begin(seed):
        params = parameters(seed)
        return {
            "params": params,
            "optimizer": optimizer.init(params),
            "key": jax.random.key(seed),
            "count": 0,
            "data": np.arange(3),
        }

    @jax.jit
    def step(state):
        key, now = jax.random.split(state["key"])
        gradients = jax.tree.map(lambda leaf: leaf + jax.random.normal(now, leaf.shape, leaf.dtype), state["params"])
        updates, memory = optimizer.update(gradients, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "optimizer": memory, "key": key, "count": state["count"] + 1}

    def train(directory, epochs, state):
        held = []
        with Checkpointer(directory, monitor="loss", keep=Keep(best=1, last=1), verbose=0) as checkpointer:
            checkpointer.track(state=state)
            for epoch in checkpointer.epochs(epochs):
                for _ in checkpointer.batches(range(4)):
                    state.update(step(state))
                checkpointer.log(loss=jnp.float32(abs(epoch - 1)))
                held.append(
                    jax.tree.map(jnp.copy, {name: state[name] for name in ("params", "optimizer", "key", "count")})
                )
            checkpointer.restore("best")
        return held

    first, other = begin(0), begin(1)
    whole = train(tmp_path / "whole", 4, first)
    train(tmp_path / "stopped", 2, begin(0))
    rest = train(tmp_path / "stopped", 4, other)

    assert same(rest, whole[2:])
    assert same({name: other[name] for name in whole[1]}, whole[1])  # the best, put back in place of the last
    assert type(other["optimizer"]) is type(first["optimizer"])
    assert other["data"].tolist() == [0, 1, 2]


def test_a_changed_dict_is_refused_whole(tmp_path):
    """Nothing of it is replaced, and of what is tracked beside it neither."""
    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.track(
            state={"params": parameters(), "optimizer": optax.adam(1e-3).init(parameters())}, numbers=[np.ones(2)]
        )
        checkpointer.save(step=1, epoch=1)
    state, numbers = {"params": parameters(5), "optimizer": optax.sgd(0.1).init(parameters())}, [np.zeros(2)]
    before = dict(state)

    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.track(state=state, numbers=numbers)
        with pytest.raises(Mismatch, match="state/optimizer/0/mu/head/w: only in the checkpoint"):
            checkpointer.restore()

    assert all(state[name] is before[name] for name in before)
    assert numbers[0].tolist() == [0, 0]


@pytest.mark.parametrize(
    "value",
    [
        lambda: jnp.ones(3),
        lambda: eqx.nn.Linear(2, 2, key=jax.random.key(0)),
        lambda: optax.adam(1e-3).init(jnp.ones(2)),
    ],
    ids=["array", "module", "optimizer"],
)
def test_what_never_changes_cannot_be_tracked(tmp_path, value):
    """The loop replaces it, and what was tracked would be saved as it was in the beginning, for ever."""
    checkpointer = Checkpointer(tmp_path, verbose=0)

    with pytest.raises(InvalidState, match=r"model is a .*track.* a? ?dict"):
        checkpointer.track(model=value())


# --- metrics, versions


def test_metrics_of_jax_are_numbers(tmp_path):
    """Losses come out of compiled steps as arrays, in half precision too, and decide which checkpoint is the best."""
    losses = [jnp.float32(0.5), jnp.bfloat16(0.25), jnp.asarray(jnp.nan), jax.jit(lambda x: x.mean())(jnp.ones(3))]

    with Checkpointer(tmp_path, monitor="val_loss", keep=Keep(last=9), verbose=0) as checkpointer:
        for step, loss in enumerate(losses, 1):
            checkpointer.save(
                {"params": {"w": jnp.ones(2) * step}}, step=step, metrics={"val_loss": loss, "count": jnp.int32(step)}
            )
        checkpointer.log(val_accuracy=jnp.float16(0.5))

    rows = highcamp.open(tmp_path).history.rows
    assert [row.metrics.get("val_loss") for row in rows if "val_loss" in row.metrics and row.step != 3] == [
        0.5,
        0.25,
        1.0,
    ]
    assert all(type(value) is float for row in rows for value in row.metrics.values())
    assert highcamp.open(tmp_path).best.step == 2


def test_a_metric_without_a_value_is_refused_by_its_name(tmp_path):
    """Donated by the step after, traced, or one for each device: the error of JAX does not say which metric it was."""
    gone = jnp.float32(1)
    gone.delete()
    checkpointer = Checkpointer(tmp_path, verbose=0)

    @jax.jit
    def step(x):
        checkpointer.log(traced=x)
        return x

    with pytest.raises(InvalidMetric, match="metric val_loss is a ArrayImpl without a value: Array has been deleted"):
        checkpointer.log(val_loss=gone)
    with pytest.raises(InvalidMetric, match="metric traced is a .*Tracer"):
        step(jnp.float32(1))
    with pytest.raises(InvalidMetric, match="metric each is .*of shape"):
        checkpointer.log(each=jnp.ones(4))
    checkpointer.close()


def test_an_old_version_is_told_clearly(tmp_path, monkeypatch):
    """An error from deep within would be taken for one of the checkpoint."""
    monkeypatch.setattr(jax, "__version__", "0.4.38")
    supported.require.cache_clear()
    checkpointer = Checkpointer(tmp_path, verbose=0)
    try:
        with pytest.raises(MissingExtra, match=r"jax >= 0\.10\.1; 0\.4\.38 is installed") as caught:
            checkpointer.save({"w": jnp.ones(2)}, step=1)
    finally:
        supported.require.cache_clear()
    assert caught.value.hint == "pip install -U 'highcamp[jax]'"
    checkpointer.save({"w": np.ones(2)}, step=1)  # with none of its arrays, it does not matter
    checkpointer.close()


def test_an_old_version_of_flax_is_told_clearly(tmp_path, monkeypatch):
    """Only where one of its modules is saved: their trees were others before."""
    import flax

    monkeypatch.setattr(flax, "__version__", "0.10.4")
    supported.require.cache_clear()
    try:
        with (
            Checkpointer(tmp_path, verbose=0) as checkpointer,
            pytest.raises(MissingExtra, match=r"flax >= 0\.12; 0\.10\.4 is installed"),
        ):
            checkpointer.save({"model": nnx.Linear(2, 2, rngs=nnx.Rngs(0))}, step=1)
    finally:
        supported.require.cache_clear()


def test_the_oldest_version_is_the_one_that_is_installed():
    """A version that the installer allows must not be refused, nor one that is refused be allowed."""
    project = tomllib.loads((Path(highcamp.__file__).parents[1] / "pyproject.toml").read_text())
    wanted = project["project"]["optional-dependencies"]["jax"]

    assert f"jax>={'.'.join(map(str, supported.OLDEST['jax']))}" in wanted
    assert [supported.is_supported("jax", each) for each in ("0.10.0", "0.10.1", "0.10.2.dev2026", "0.11.0", "1.0")] == [
        False, True, True, True, True,
    ]  # fmt: skip
    assert re.fullmatch(r"[\d.]+", jax.__version__)
