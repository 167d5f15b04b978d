"""Each tripwire of an overlapped snapshot by itself; and data that are not those of before."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from highcamp.errors import Mismatch
from highcamp.run import live
from highcamp.training import batches
from highcamp.training.overlap import Overlap, _Armed
from highcamp.training.recall import Recall


@pytest.fixture
def trained():
    """A model and its optimizer after a step."""
    torch.manual_seed(7)
    model = torch.nn.Linear(256, 256)
    optimizer = torch.optim.AdamW(model.parameters())
    overlap = Overlap()
    overlap.watch({"model": model, "optimizer": optimizer})
    model(torch.randn(4, 256)).square().mean().backward()
    optimizer.step()
    yield model, optimizer, overlap
    overlap.close()


@pytest.fixture
def armed(trained):
    """What looks after a copy that has begun and not ended."""
    model, optimizer, overlap = trained
    recall = Recall()
    arrays = {
        name: live.capture(name, obj, recall).arrays for name, obj in (("model", model), ("optimizer", optimizer))
    }
    late = overlap.late(recall, arrays)
    return _Armed(SimpleNamespace(stream=None), [wire for wire in late.values() if wire is not None], overlap._counters)


def test_untouched_it_is_not_torn(armed):
    """Every save would be refused."""
    assert armed._torn() is None


def test_one_number_is_enough(trained, armed):
    """Samples look at eight places of an array, and a write may be anywhere."""
    with torch.no_grad():
        trained[0].weight[17, 3].add_(1)

    assert "model/weight was written to" in str(armed._torn())


def test_a_step_that_changes_no_sample_is_counted(trained, armed):
    """A compiled step writes past the version counters, and gradients of zero leave the weights as they are."""
    trained[1].state[trained[0].weight]["step"] += 1

    assert "has stepped without its hooks" in str(armed._torn())


@pytest.mark.parametrize("length", [4, 6])
def test_another_number_of_batches_is_another_epoch(length):
    """The batches that were skipped would not be those that were trained on."""
    iterator, place = batches.begin(range(5))
    for _ in range(3):
        next(iterator)

    with pytest.raises(
        Mismatch, match=f"saved after 3 of 5 batches of its epoch, the loader given to batches.. has {length}"
    ):
        batches.resume(range(length), place.tree(), 3, where="run")
