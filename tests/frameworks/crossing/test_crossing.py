"""A run is no framework's own: what one has written, another reads, and so does every reader of safetensors files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Mismatch

HERE = Path(__file__).parent
ROOT = Path(highcamp.__file__).parent.parent
FRAMEWORKS = ["torch", "lightning", "transformers", "keras", "jax"]
BRIEF = {"torch", "jax"}  # those whose model has bfloat16 weights


def _start(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where each framework, in a process of its own, has written a run, and told what its weights are."""
    home = tmp_path_factory.mktemp("runs")
    waiting = [(name, _start("write_script.py", name, home)) for name in FRAMEWORKS]
    for name, process in waiting:
        _, errors = process.communicate(timeout=150)
        assert process.returncode == 0, f"{name}:\n{errors[-4000:]}"
    return home


@pytest.fixture(scope="module")
def told(home):
    """What each framework says of its weights: {name: [dtype, shape, bytes in hexadecimal]}."""
    return {name: json.loads((home / f"{name}.json").read_text()) for name in FRAMEWORKS}


def plain(arrays):
    """The same of arrays of any framework."""
    found = {}
    for name, array in arrays.items():
        if type(array).__module__.partition(".")[0] == "torch":
            import torch

            data = array.contiguous().flatten().view(torch.uint8).numpy()
            found[name] = [str(array.dtype)[6:], list(array.shape), data.tobytes().hex()]
        else:
            host = np.asarray(array)
            found[name] = [str(host.dtype), list(host.shape), host.tobytes().hex()]
    return found


@pytest.mark.timeout(200)
def test_every_run_is_read_without_its_framework(home, told):
    """Weights that only one program can read are lost with it."""
    process = _start("read_script.py", *(home / name for name in FRAMEWORKS))
    out, errors = process.communicate(timeout=60)

    assert process.returncode == 0, errors
    found = json.loads(out)
    assert {name: found[str(home / name)] for name in FRAMEWORKS} == told


@pytest.mark.parametrize("library", ["numpy", "torch", "flax"])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_safetensors_own_readers_find_the_same(home, told, name, library):
    """The files are what their name says; tied weights are in them once."""
    reader = pytest.importorskip(f"safetensors.{library}")
    run = highcamp.open(home / name)
    path = Path(run.best.path) / "model.safetensors"

    found = plain(reader.load_file(path))

    assert found.items() <= told[name].items()
    assert {json.dumps(each) for each in found.values()} == {json.dumps(each) for each in told[name].values()}


def nested(names, value):
    """A tree in which `value(name)` lies under the parts of each name."""
    tree = {}
    for name in names:
        *parents, last = name.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value(name)
    return tree


def flat(tree, prefix=""):
    """The reverse."""
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def zeros_of(library, told):
    """What makes an array of zeros in a library, by name: dtype and shape as they were told."""

    def make(name):
        dtype, shape, _ = told[name]
        if library == "torch":
            import torch

            return torch.zeros(shape, dtype=getattr(torch, dtype))
        if library == "jax":
            import jax.numpy as jnp

            return jnp.zeros(shape, dtype)
        return np.zeros(shape, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

    return make


@pytest.mark.parametrize("library", ["torch", "jax", "numpy"])
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_a_tree_of_another_framework_takes_the_weights(home, told, name, library, tmp_path):
    """A model that is moved to another framework begins with the bytes that it had."""
    shutil.copytree(home / name, tmp_path / "run")
    separated = nested if name == "jax" else lambda names, value: {each: value(each) for each in names}
    like = separated(told[name], zeros_of(library, told[name]))

    with Checkpointer(tmp_path / "run", verbose=0) as checkpointer:
        restored = checkpointer.restore("best", like={"model": like})["model"]

    leaves = flat(restored)
    assert plain(leaves) == told[name]
    assert {type(leaf) for leaf in leaves.values()} == {type(leaf) for leaf in flat(like).values()}
    assert not any(bool(leaf.any()) for leaf in flat(like).values())  # it is a pattern, and not written to


@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("name", ["torch", "lightning", "transformers", "jax"])
def test_live_arrays_of_another_framework_take_the_weights(home, told, name, library):
    """Without a training at all: evaluation elsewhere."""
    separated = nested if name == "jax" else lambda names, value: {each: value(each) for each in names}
    live = separated(told[name], zeros_of(library, told[name]))
    leaves = flat(live)

    highcamp.open(home / name).best.restore(model=live)

    assert plain(leaves) == told[name]


def test_a_module_of_pytorch_takes_what_lightning_and_transformers_have_written(home, told):
    """The Trainer is for training; what uses the model afterwards is the model."""
    torch = pytest.importorskip("torch")

    class Module(torch.nn.Module):
        """The inside of the LightningModule."""

        def __init__(self):
            super().__init__()
            self.dense = torch.nn.Linear(4, 3)

    module = Module()
    highcamp.open(home / "lightning").best.restore(model=module)

    assert plain(module.state_dict()) == told["lightning"]


def test_another_dtype_is_refused_across_frameworks_too(home, told):
    """A cast would be a loss that nobody has asked for."""
    torch = pytest.importorskip("torch")
    live = nested(told["jax"], zeros_of("torch", told["jax"]))
    live["brief"]["kernel"] = torch.zeros(3, 2)

    with pytest.raises(Mismatch, match="brief/kernel: dtype BF16 in the checkpoint, F32 here"):
        highcamp.open(home / "jax").best.restore(model=live)

    assert not live["dense"]["kernel"].any()


def test_the_runs_hold_what_is_hard(told):
    """A test of float32 alone would not see a reader that casts."""
    briefs = {name for name, arrays in told.items() if any(dtype == "bfloat16" for dtype, _, _ in arrays.values())}

    assert briefs == BRIEF
    assert told["transformers"]["lm_head.weight"] == told["transformers"]["transformer.wte.weight"]
