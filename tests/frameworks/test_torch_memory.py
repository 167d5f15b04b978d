"""Tensors that are no one stretch of memory: views, other strides, lazy conjugates, and those that have no bytes at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from highcamp import Checkpointer, Keep
from highcamp.errors import InvalidState
from highcamp.storage.memory import MemoryStore
from highcamp.torch.memory import bring
from highcamp.training import stream

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.complex64, torch.float8_e5m2, torch.int16]


def _bits(tensor):
    """The bytes of a tensor in C order, by a way that is not ours."""
    plain = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_part_of_any_view_is_brought_as_it_looks(data):
    """A piece of a large tensor is a part of its bytes in C order, wherever they lie."""
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    bits = torch.from_numpy(np.random.default_rng(1).integers(0, 2, [*shape, dtype.itemsize], np.uint8))
    tensor = bits.view(dtype).reshape(shape)
    for axis in range(tensor.dim()):
        tensor = tensor.narrow(
            axis, start := data.draw(st.integers(0, tensor.shape[axis] - 1)), tensor.shape[axis] - start
        )
        step = data.draw(st.integers(1, 2))
        tensor = tensor[(slice(None),) * axis + (slice(None, None, step),)]
    tensor = tensor.permute(data.draw(st.permutations(range(tensor.dim()))))
    if data.draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    if dtype.is_complex and data.draw(st.booleans()):
        tensor = tensor.conj()
    expected = _bits(tensor)
    unit = data.draw(st.sampled_from([1, dtype.itemsize]))
    count = len(expected) // unit
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))

    view = memoryview(bytearray((stop - start) * unit))
    bring(tensor, view, start * unit)

    assert bytes(view) == expected[start * unit : stop * unit]


VIEWS = {
    "turned": torch.randn(300, 200).T,
    "every other": torch.randn(300, 200)[::2, 1::3],
    "channels last": torch.randn(4, 8, 30, 20).to(memory_format=torch.channels_last),
    "expanded": torch.randn(1, 300).expand(200, 300),
    "conjugated": torch.randn(100, 70, dtype=torch.complex64).conj(),
    "negated": torch.randn(100, 70, dtype=torch.complex64).conj().imag,
    "a part": torch.randn(40_000)[1:39_999],
    "a number": torch.tensor(1.5),
    "one odd stride": torch.randn(5, 5)[2:3, 3:4],
    "empty": torch.randn(0, 5),
    "half": torch.randn(300, 200).bfloat16().T,
}


@pytest.mark.parametrize("staging_bytes", [None, 1 << 20], ids=["whole", "ring"])
def test_views_are_saved_as_they_look(monkeypatch, staging_bytes):
    """What cannot be written as it lies would be written wrongly, or not."""
    monkeypatch.setattr(stream, "PIECE_BYTES", 8192)
    state = {"model": {**VIEWS, "filler": torch.randn(400_000)}}
    with Checkpointer(MemoryStore(), staging_bytes=staging_bytes, verbose=0) as checkpointer:
        found = checkpointer.save(state, step=1).wait().state("model")

    for name, tensor in state["model"].items():
        expected = tensor.resolve_conj().resolve_neg()
        assert found[name].tobytes() == _bits(expected), name
        assert found[name].shape == tuple(tensor.shape)


REFUSED = {
    "on the meta device": lambda: torch.empty(3, device="meta"),
    "is stored as torch.sparse_coo": lambda: torch.eye(3).to_sparse(),
    "is stored as torch.sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "is of dtype torch.complex128": lambda: torch.zeros(3, dtype=torch.complex128),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_bytes_to_save_is_refused_with_its_path(reason):
    """At the first save, with the place in the state; and the next save without it works."""
    tensor = REFUSED[reason]()
    with Checkpointer(MemoryStore(), verbose=0, keep=Keep(last=9)) as checkpointer:
        with pytest.raises(InvalidState, match=f"^model/layers/1/w: .*{reason}.*; ") as error:
            checkpointer.save({"model": {"layers": [{"w": torch.ones(3)}, {"w": tensor}]}}, step=1)
        assert error.value.path == "model/layers/1/w"
        checkpointer.save({"model": {"w": torch.ones(3)}}, step=2)

    assert [entry.step for entry in checkpointer.run.checkpoints] == [2]


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning", "ignore:.*deprecated.*:DeprecationWarning")
def test_quantized_tensors_are_refused_with_their_path():
    """Their scale would be lost."""
    try:
        tensor = torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)
    except (AttributeError, RuntimeError, NotImplementedError):
        pytest.skip("this torch has none")
    with (
        Checkpointer(MemoryStore(), verbose=0) as checkpointer,
        pytest.raises(InvalidState, match="^model/w: .*quantized"),
    ):
        checkpointer.save({"model": {"w": tensor}}, step=1)
