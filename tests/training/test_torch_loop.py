"""A loop of one's own with PyTorch; kills are in test_exactness."""

from __future__ import annotations

import pytest
import torch

import highcamp
from highcamp import Checkpointer, Every, InvalidMetric, Mismatch, Refused
from highcamp.storage.memory import MemoryStore


def _objects(width=8, *, sgd=False):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Dropout(0.5), torch.nn.Linear(width, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if sgd else torch.optim.AdamW(model.parameters(), lr=0.1)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5),
    }


def _train(store, objects, epochs, **options):
    data = torch.utils.data.TensorDataset(torch.arange(40.0).reshape(10, 4) / 40)
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
    with Checkpointer(store, monitor="loss", verbose=0, **options) as checkpointer:
        checkpointer.track(**objects)
        for _ in checkpointer.epochs(epochs):
            for (batch,) in checkpointer.batches(loader):
                loss = objects["model"](batch).square().mean()
                objects["optimizer"].zero_grad()
                loss.backward()
                objects["optimizer"].step()
                objects["scheduler"].step()
            checkpointer.log(loss=loss.detach())
    return checkpointer


def _bits(objects):
    return [value.clone() for value in objects["model"].state_dict().values()]


@pytest.fixture
def store():
    """Where the run is."""
    return MemoryStore()


def test_optimizer_really_restored(store):
    """Moments that begin at zero again, with a warning at most, after every restart."""
    objects = _objects()
    _train(store, objects, 2)

    again = _objects()
    _train(store, again, 2)

    for one, other in zip(objects["optimizer"].state.values(), again["optimizer"].state.values(), strict=True):
        assert one["step"] == other["step"] == 8
        assert torch.equal(one["exp_avg"], other["exp_avg"])
        assert torch.equal(one["exp_avg_sq"], other["exp_avg_sq"])
    assert again["optimizer"].param_groups[0]["lr"] == objects["optimizer"].param_groups[0]["lr"] != 0.1
    assert again["scheduler"].last_epoch == 8


def test_a_resumed_run_equals_a_whole_one(store):
    """In one process too: a notebook cell that is run again."""
    objects = _objects()
    _train(store, objects, 2)
    torch.manual_seed(99)
    resumed = _objects()
    torch.manual_seed(98)
    _train(store, resumed, 4)

    whole = _objects()
    _train(MemoryStore(), whole, 4)

    assert all(torch.equal(one, other) for one, other in zip(_bits(resumed), _bits(whole), strict=True))


def test_a_model_that_does_not_fit_is_left_as_it_is(store):
    """Half of the layers overwritten, and then the error."""
    _train(store, _objects(), 1)
    objects = _objects(width=9)
    before = _bits(objects)

    with pytest.raises(Mismatch) as error:
        _train(store, objects, 2)

    lines = error.value.message.splitlines()
    assert "  model/0/weight: shape (8, 4) in the checkpoint, (9, 4) here" in lines or (
        "  model/0.weight: shape (8, 4) in the checkpoint, (9, 4) here" in lines
    )
    assert sum(line.startswith("  model/") for line in lines) == 3
    assert sum(line.startswith("  optimizer/") for line in lines) >= 3
    assert all(torch.equal(one, other) for one, other in zip(_bits(objects), before, strict=True))
    assert not objects["optimizer"].state


def test_another_optimizer_is_refused(store):
    """Momentum of one kind would be read as that of another."""
    _train(store, _objects(), 1)

    with pytest.raises(Mismatch, match="optimizer"):
        _train(store, _objects(sgd=True), 2)
    with pytest.raises(Refused, match="saved but not tracked: optimizer, scheduler"):
        objects = _objects()
        checkpointer = Checkpointer(store, verbose=0)
        checkpointer.track(model=objects["model"])
        list(checkpointer.epochs(2))


def test_the_best_weights_come_back(store):
    """The weights in the model at the end would be the last ones."""
    objects = _objects()
    with Checkpointer(store, monitor="val_accuracy", verbose=0) as checkpointer:
        checkpointer.track(**objects)
        best = None
        for epoch in checkpointer.epochs(3):
            with torch.no_grad():
                objects["model"][0].weight += 1
            best = _bits(objects) if epoch == 1 else best
            checkpointer.log(val_accuracy=torch.tensor([0.5, 0.9, 0.7][epoch]))
        parameter = objects["model"][0].weight
        checkpointer.restore("best")

    assert objects["model"][0].weight is parameter
    assert all(torch.equal(one, other) for one, other in zip(_bits(objects), best, strict=True))


@pytest.mark.parametrize(
    "value", [0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(0.5, requires_grad=True)]
)
def test_a_metric_may_be_a_tensor_of_no_dimension(store, value):
    """What a loss function returns is one."""
    with Checkpointer(store, verbose=0) as checkpointer:
        checkpointer.save({"model": {"w": torch.zeros(2)}}, step=1, metrics={"loss": value})

    assert checkpointer.run.last.metrics == {"loss": 0.5}


@pytest.mark.parametrize(
    "value", [torch.tensor([0.5, 1]), torch.tensor([True])[0], torch.zeros(0), torch.tensor([0.5])]
)
def test_another_tensor_is_no_metric(store, value):
    """Which of its numbers is the one nobody can tell."""
    with pytest.raises(InvalidMetric, match="a Tensor"):
        Checkpointer(store, verbose=0).log(loss=value)


def test_random_states_of_a_framework_that_is_not_saved_are_missed(store):
    """Imported only after the restart, its dropout would draw other numbers than ever."""
    from highcamp.training import rng

    state = rng.random_state()
    del state["torch"]

    with pytest.raises(Mismatch, match="holds no random state of torch"):
        rng.set_random_state(state, where="run")


def test_a_checkpoint_is_read_without_the_checkpointer(store):
    """Evaluation is another script, with the model alone."""
    objects = _objects()
    _train(store, objects, 2, every=Every(steps=3))
    other = _objects()["model"]

    highcamp.open(store).last.restore(model=other)

    assert all(torch.equal(one, other) for one, other in zip(_bits({"model": other}), _bits(objects), strict=True))
