"""Recall: what is remembered of the capture before is never what is no longer so."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from highcamp.run import live
from highcamp.training.recall import Recall


@pytest.fixture
def training():
    """A model and its optimizer after a step."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    """One step."""
    optimizer.zero_grad()
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()


def captured(recall, **objects):
    """What is saved of each object, through the recall."""
    return {name: live.capture(name, obj, recall) for name, obj in objects.items()}


def is_as_new(recall, **objects):
    """Whether the recall gives what is there, compared with a capture that remembers nothing."""
    found, expected = captured(recall, **objects), {name: live.capture(name, obj) for name, obj in objects.items()}
    for name, flat in expected.items():
        assert found[name].skeleton == flat.skeleton
        assert list(found[name].arrays) == list(flat.arrays)
        for key, array in flat.arrays.items():
            mine = found[name].arrays[key]
            assert (mine.spec, mine.tie, mine.is_still, bytes(mine.data)) == (
                array.spec, array.tie, array.is_still, bytes(array.data)
            ), key  # fmt: skip
    return True


def test_the_same_tensors_give_the_same_arrays(training):
    """Else each save would look at every tensor, which takes longer than to copy a small one."""
    model, optimizer = training
    recall = Recall()
    first = captured(recall, model=model, optimizer=optimizer)
    version = recall.version
    step(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.25
    second = captured(recall, model=model, optimizer=optimizer)
    assert recall.version == version
    for name, flat in second.items():
        assert flat.arrays is first[name].arrays
    assert second["optimizer"].skeleton != first["optimizer"].skeleton
    assert is_as_new(recall, model=model, optimizer=optimizer)


CHANGES = {
    "data": lambda model, optimizer: setattr(model[0].weight, "data", torch.ones(4, 4)),
    "in place": lambda model, optimizer: model[0].weight.data.mul_(2),
    "transposed": lambda model, optimizer: model[0].weight.data.t_(),
    "transposed itself": lambda model, optimizer: model[1].running_mean.resize_(2, 2).t_(),
    "other type": lambda model, optimizer: model.double(),
    "replaced": lambda model, optimizer: setattr(model[0], "weight", torch.nn.Parameter(torch.ones(4, 4))),
    "frozen": lambda model, optimizer: model[0].weight.requires_grad_(requires_grad=False),
    "buffer added": lambda model, optimizer: model.register_buffer("more", torch.ones(2)),
    "module removed": lambda model, optimizer: delattr(model, "1"),
    "state cleared": lambda model, optimizer: optimizer.state.clear(),
    "state replaced": lambda model, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "group added": lambda model, optimizer: optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]}),
    "lr a tensor": lambda model, optimizer: optimizer.param_groups[0].update(lr=torch.tensor(0.5)),
    "resized": lambda model, optimizer: model[1].running_mean.resize_(2),
    "tied": lambda model, optimizer: setattr(model[1], "bias", model[1].weight),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_between_two_saves_is_saved(training, change):
    """The second checkpoint would hold the tensors of the first, or under wrong names."""
    model, optimizer = training
    recall = Recall()
    captured(recall, model=model, optimizer=optimizer)
    change(model, optimizer)
    assert is_as_new(recall, model=model, optimizer=optimizer)
    assert is_as_new(recall, model=model, optimizer=optimizer)


def test_tensors_are_let_go_when_the_object_has_others():
    """A model that is built anew would stay in memory twice."""
    model = torch.nn.Linear(4, 4)
    recall = Recall()
    captured(recall, model=model)
    old = weakref.ref(model.weight)
    model.weight = torch.nn.Parameter(torch.ones(4, 4))
    captured(recall, model=model)
    gc.collect()
    assert old() is None


def test_an_array_is_found_by_its_tensor(training):
    """The barrier of an overlapped snapshot is put before what the optimizer writes to."""
    model, optimizer = training
    recall = Recall()
    flats = captured(recall, model=model, optimizer=optimizer)
    assert recall.of(model[0].weight) is flats["model"].arrays["0.weight"]
    assert recall.of(optimizer.state[model[0].weight]["exp_avg"]) in flats["optimizer"].arrays.values()
    assert recall.of(torch.ones(1)) is None
    assert recall.holds(flats["model"].arrays["0.weight"])
