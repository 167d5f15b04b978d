"""Export: files that other tools open without highcamp."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from highcamp import Checkpointer, CheckpointNotFound, Damaged, InvalidArgument, Refused
from highcamp.storage.memory import MemoryStore


@pytest.fixture
def checkpoint():
    """A checkpoint of a PyTorch-like state: tied tensors, an empty one, a scalar, half precision."""
    shared = np.arange(6, dtype=np.float32).reshape(2, 3)
    model = {
        "embed": {"weight": shared}, "head": {"weight": shared}, "empty": np.zeros((0, 4)), "scale": np.array(2.5),
        "half": np.ones(3, np.float16), "count": np.array([1, 2], np.int64), "mask": np.array([True, False]), "note": "text",
    }  # fmt: skip
    with Checkpointer(MemoryStore(), verbose=0) as checkpointer:
        return checkpointer.save({"model": model, "brain": {"w": np.ones(3, ml_dtypes.bfloat16)}}, step=1).wait()


def _check(found, checkpoint):
    expected = checkpoint.load("model")
    assert set(found) == set(expected) == {
        "embed/weight", "head/weight", "empty", "scale", "half", "count", "mask",
    }  # fmt: skip
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def test_safetensors_opens_it(checkpoint, tmp_path):
    """The library that everybody has must read it, without a word about us."""
    path = checkpoint.export(tmp_path / "new" / "model.safetensors")

    assert path == tmp_path / "new" / "model.safetensors"
    _check(safetensors.numpy.load_file(path), checkpoint)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_file_of_the_checkpoint_itself_is_safetensors(run):
    """Nothing needs to be exported to be read."""
    found = safetensors.numpy.load_file(f"{run.best.path}/model.safetensors")

    assert {name: array.tolist() for name, array in found.items()} == {
        "dense/kernel": [[2, 2, 2], [2, 2, 2]],
        "dense/bias": [2, 2, 2],
    }


def test_numpy_opens_it(checkpoint, tmp_path):
    """Without pickle, as everything."""
    path = checkpoint.export(tmp_path / "model.npz")

    with np.load(path, allow_pickle=False) as found:
        _check(dict(found), checkpoint)


def test_numpy_has_no_bfloat16(checkpoint, tmp_path):
    """Raw bytes of a type that the reader does not know would be numbers of another kind."""
    with pytest.raises(InvalidArgument, match="w is bfloat16, which .npz files cannot hold; export to .safetensors"):
        checkpoint.export(tmp_path / "brain.npz", object="brain")

    assert list(tmp_path.iterdir()) == []


def test_torch_opens_it(checkpoint, tmp_path):
    """By `torch.load` with its safe setting: a state_dict of plain tensors."""
    import torch

    path = checkpoint.export(str(tmp_path / "model.pt"))
    found = torch.load(path, weights_only=True)

    _check({name: tensor.numpy() for name, tensor in found.items()}, checkpoint)
    brain = torch.load(checkpoint.export(tmp_path / "brain.pt", object="brain"), weights_only=True)
    assert brain["w"].dtype is torch.bfloat16
    assert found["scale"].shape == ()


@pytest.mark.parametrize("name", ["model.safetensors", "model.npz", "model.pt"])
def test_an_existing_file_stays(checkpoint, tmp_path, name):
    """Somebody's weights of the same name."""
    path = tmp_path / name
    path.write_bytes(b"mine")

    with pytest.raises(Refused, match=r"exists; name another file, or use force=True \(--force\)"):
        checkpoint.export(path)
    assert path.read_bytes() == b"mine"

    checkpoint.export(path, force=True)
    assert len(path.read_bytes()) > 100
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["model", "model.bin", "model.h5", "model.ckpt", "safetensors"])
def test_an_unknown_suffix_is_refused(checkpoint, tmp_path, name):
    """A format that is guessed is the wrong one."""
    with pytest.raises(
        InvalidArgument, match=r"has no suffix that export knows; use one of \.safetensors, \.npz, \.pt"
    ):
        checkpoint.export(tmp_path / name)


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    """A copy would carry the damage on, with no digest left to find it."""
    file = run.store.local_path("checkpoints/step-00000020/model.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    with pytest.raises(Damaged, match="differs from its digest"):
        run.checkpoint("step:20").export(tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_object_that_is_not_there_is_said(checkpoint, tmp_path):
    """The answer names what there is."""
    with pytest.raises(CheckpointNotFound, match="holds no object 'optimizer'; it holds model, brain, progress"):
        checkpoint.export(tmp_path / "optimizer.safetensors", object="optimizer")
