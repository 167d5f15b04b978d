"""Translation: what leaves a live object comes back into another, bit for bit; what does not fit changes nothing."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from highcamp.errors import InvalidArgument, InvalidState, Mismatch
from highcamp.keras import state
from highcamp.keras.export import export, rebuild
from highcamp.keras.labels import ARCHITECTURE


def _numpy(tree):
    """A captured tree as a checkpoint gives it back."""
    return {
        name: np.array(keras.ops.convert_to_numpy(value)) if isinstance(value, keras.Variable) else value
        for name, value in tree.items()
    }


def _names(model):
    return [name for name in state.capture(model) if name != ARCHITECTURE]


def test_names_are_readable(make_model):
    """`run.best.load("model")["hidden/kernel"]` is what people write."""
    assert _names(make_model()) == [
        "hidden/kernel",
        "hidden/bias",
        "seed_generator/seed_generator_state",
        "batch_normalization/gamma",
        "batch_normalization/beta",
        "batch_normalization/moving_mean",
        "batch_normalization/moving_variance",
        "out/kernel",
        "out/bias",
    ]


def test_only_models_and_layers_are_weights(make_model):
    """What stays of a best of which only the weights are kept: told by what an object is, never by its name."""
    model = make_model()
    others = [model.optimizer, keras.callbacks.EarlyStopping(), keras.metrics.Mean(), keras.random.SeedGenerator(1)]

    assert [state.is_weights(obj) for obj in (model, model.layers[0])] == [True, True]
    assert [state.is_weights(obj) for obj in others] == [False] * 4


def test_a_model_built_again_has_the_same_names():
    """In a notebook the second model's "dense" is "dense_1": its weights would not be found."""

    def make():
        inputs = keras.Input((4,))
        first = keras.layers.Dense(3)(inputs)
        return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Dropout(0.1)(keras.layers.Dense(3)(first))))

    assert _names(make()) == _names(make())
    assert "dense_2/kernel" in _names(make())


def test_equal_names_are_told_apart():
    """`Variable.path` is not unique: one layer would overwrite the other."""
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="d")], name="m")
    outer = keras.Sequential([keras.Input((4,)), inner, keras.layers.Dense(4, name="d")], name="m")

    names = _names(outer)

    assert len(set(names)) == len(names) == 4
    tree = _numpy(state.capture(outer))
    other = keras.models.clone_model(outer)
    state.restore(other, tree)
    for one, two in zip(outer.variables, other.variables, strict=True):
        assert np.array_equal(keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(two))


def test_seed_generators_restored(make_model, points):
    """`.keras` and `.weights.h5` bring Dropout's counter back as 0: other units are dropped."""
    model = make_model()
    model.fit(*points, batch_size=8, verbose=0)
    tree = _numpy(state.capture(model))

    fresh = make_model()
    state.restore(fresh, tree)

    seeds = "seed_generator/seed_generator_state"
    if keras.backend.backend() != "torch":  # where Dropout draws from PyTorch's own generator
        assert tree[seeds].tolist()[1] > 0
    assert np.array_equal(_numpy(state.capture(fresh))[seeds], tree[seeds])


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda: keras.optimizers.Adam(amsgrad=True, use_ema=True),
        lambda: keras.optimizers.SGD(momentum=0.9, gradient_accumulation_steps=2),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.RMSprop(centered=True)),
        lambda: keras.optimizers.AdamW(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)),
    ],
    ids=["amsgrad_ema", "accumulation", "loss_scale", "schedule"],
)
def test_optimizer_really_restored(make_model, points, values_of, make_optimizer):
    """With Keras's own recipe iterations and slots come back as 0, with no more than a warning."""
    model = make_model(make_optimizer())
    model.fit(*points, batch_size=8, verbose=0)
    trees = [_numpy(state.capture(obj)) for obj in (model, model.optimizer)]

    fresh = make_model(make_optimizer())
    fresh.optimizer.build(fresh.trainable_variables)
    for obj, tree in zip((fresh, fresh.optimizer), trees, strict=True):
        state.restore(obj, tree)

    assert values_of(fresh) == values_of(model)


def test_variables_keep_their_identity(make_model):
    """An optimizer knows its variables by identity."""
    model = make_model()
    before = [id(variable) for variable in model.variables]

    state.restore(model, _numpy(state.capture(model)))

    assert [id(variable) for variable in model.variables] == before


def test_restored_values_share_no_memory(make_model):
    """JAX takes an aligned NumPy array as it is: a donated step would write into the checkpoint's memory."""
    model = keras.Sequential([keras.Input((512,)), keras.layers.Dense(512, name="d")])
    tree = _numpy(state.capture(model))

    state.restore(model, tree)
    tree["d/kernel"][...] = 7.0

    assert not np.any(keras.ops.convert_to_numpy(model.layers[0].kernel) == 7.0)


def test_every_difference_is_listed_and_nothing_changed(make_model, values_of):
    """Half a restore is neither the old model nor the saved one."""
    tree = _numpy(state.capture(make_model()))
    tree["hidden/kernel"] = np.zeros((4, 7), "float32")
    tree["out/bias"] = tree["out/bias"].astype("float64")
    tree["other/kernel"] = tree.pop("out/kernel")
    live = make_model()
    before = values_of(live)

    with pytest.raises(Mismatch) as error:
        state.restore(live, tree)

    words = str(error.value)
    assert "hidden/kernel: shape (4, 7) in the checkpoint, (4, 6) here" in words
    assert "out/bias: dtype F64 in the checkpoint, F32 here" in words
    assert "other/kernel: only in the checkpoint" in words
    assert "out/kernel: only here" in words
    assert values_of(live) == before


def test_integers_of_another_backend_fit(make_model):
    """Seeds are int64 on TensorFlow, int32 on PyTorch, uint32 on JAX; weights move between backends."""
    model = make_model()
    tree = _numpy(state.capture(model))
    seeds = "seed_generator/seed_generator_state"

    for kind in ("int64", "int32", "uint32"):
        tree[seeds] = np.array([5, 9], kind)
        state.restore(model, tree)
        assert _numpy(state.capture(model))[seeds].tolist() == [5, 9]


def test_bfloat16_round_trip():
    """NumPy knows bfloat16 only through ml_dtypes."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="bfloat16", name="d")])
    host = state.to_host(model.layers[0].kernel)
    tree = {
        name: state.to_host(value).numpy().copy()
        for name, value in state.capture(model).items()
        if name != ARCHITECTURE
    }
    model.layers[0].kernel.assign(np.zeros((4, 3)))

    state.restore(model, tree)

    assert host.dtype == "BF16"
    assert np.array_equal(state.to_host(model.layers[0].kernel).numpy(), tree["d/kernel"])
    assert np.any(tree["d/kernel"] != 0)


def test_an_unbuilt_model_is_refused():
    """An empty checkpoint would be found out only after the crash."""
    model = keras.Sequential([keras.layers.Dense(3)])

    with pytest.raises(InvalidState, match=r"not built yet.*keras.Input"):
        state.capture(model)


def test_the_global_generator_is_restored():
    """Unseeded calls of keras.random draw from it."""
    keras.random.uniform((2,))
    saved = {
        name: np.array(keras.ops.convert_to_numpy(value)) if isinstance(value, keras.Variable) else value
        for name, value in state.random_state().items()
    }
    expected = keras.ops.convert_to_numpy(keras.random.uniform((4,)))
    keras.utils.set_random_seed(99)

    state.set_random_state(saved)

    assert np.array_equal(keras.ops.convert_to_numpy(keras.random.uniform((4,))), expected)


def test_a_generator_that_was_not_there_is_taken_away():
    """It would be made from Python's generator at another moment than before."""
    saved = state.random_state()
    keras.random.uniform((2,))

    state.set_random_state({**saved, "generator": None})

    assert state.random_state()["generator"] is None


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_export_writes_what_keras_reads(tmp_path, make_model, points, suffix):
    """The weights are in the user's own format, without the script."""
    model = make_model()
    model.fit(*points, verbose=0)
    expected = model.predict(points[0], verbose=0)
    path = tmp_path / f"out{suffix}"

    export(_numpy(state.capture(model)), path)

    if suffix == ".keras":
        loaded = keras.models.load_model(path)
        assert loaded.compiled
    else:
        loaded = make_model()
        loaded.optimizer.build(loaded.trainable_variables)
        loaded.load_weights(path)
    assert np.array_equal(loaded.predict(points[0], verbose=0), expected)


def test_export_never_runs_code(tmp_path):
    """A Lambda layer is byte code; a checkpoint from somebody else would own the machine."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: x * 2), keras.layers.Dense(1)])
    keras.config.enable_unsafe_deserialization()

    with pytest.raises(InvalidState, match="Lambda"):
        export(_numpy(state.capture(model)), tmp_path / "a.keras")

    keras.src.backend.common.global_state.set_global_attribute("safe_mode_saving", None)


def test_export_imports_nothing_by_name(make_model):
    """A class named in a checkpoint is used only if the process knows it already."""
    tree = _numpy(state.capture(make_model()))
    tree[ARCHITECTURE]["config"]["layers"][1] |= {"module": "os", "class_name": "system", "registered_name": "x>y"}

    with pytest.raises(InvalidState, match=r"os.system, which is not registered"):
        rebuild(tree)

    state._architectures.clear()


def test_export_without_a_description_says_what_to_do():
    """A class without get_config cannot be rebuilt; its weights can be restored."""
    with pytest.raises(InvalidState, match=r"checkpoint.restore\(model=model\)"):
        rebuild({"a": np.zeros(3), ARCHITECTURE: None})


def test_export_refuses_other_suffixes(tmp_path):
    """A file Keras cannot read is no export."""
    with pytest.raises(InvalidArgument, match=r"\.weights\.h5 or \.keras"):
        export({}, tmp_path / "a.h5")
