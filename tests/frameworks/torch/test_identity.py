"""Restored parameters are the same objects: what holds them, an optimizer or a compiled graph, stays valid."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import highcamp
from highcamp import Checkpointer
from highcamp.storage.memory import MemoryStore


class Tied(nn.Module):
    """An embedding that is the output layer too."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.rows.weight

    def forward(self, words):
        """Scores."""
        return self.out(self.norm(self.rows(words)))


def step(model, optimizer, seed):
    """One step on words made from the seed."""
    words = torch.randint(0, 6, (8,), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(words), words).backward()
    optimizer.step()


def saved_after_two_steps(model, inner):
    """A run with that model and its optimizer; then two steps more are done."""
    store, optimizer = MemoryStore(), torch.optim.AdamW(inner.parameters(), lr=0.1)
    with Checkpointer(store, verbose=0) as checkpointer:
        checkpointer.track(model=model, optimizer=optimizer)
        for _ in checkpointer.epochs(1):
            step(model, optimizer, 0)
            step(model, optimizer, 1)
    step(model, optimizer, 2)
    step(model, optimizer, 3)
    return store


def arrays(model):
    """The weights by name."""
    return {name: value.tolist() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("is_compiled_before", [False, True], ids=["plain", "compiled"])
def test_compiled_and_plain_models_read_each_other_and_nothing_is_compiled_again(is_compiled_before):
    """Compiling a large model takes minutes, and a checkpoint outlives the decision to do so."""
    torch.manual_seed(0)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    inner = Tied()
    compiled = torch.compile(inner, backend=backend)
    store = saved_after_two_steps(compiled if is_compiled_before else inner, inner)
    expected = arrays(inner)

    torch.manual_seed(1)
    again = Tied()
    other = again if is_compiled_before else torch.compile(again, backend=backend)
    optimizer = torch.optim.AdamW(again.parameters(), lr=0.1)
    step(other, optimizer, 9)  # it is compiled, and has a state of its own, before the checkpoint is read
    parameters, count = list(again.parameters()), len(graphs)
    highcamp.open(store).last.restore(model=other, optimizer=optimizer)
    step(other, optimizer, 2)
    step(other, optimizer, 3)

    assert sorted(highcamp.open(store).last.load("model")) == sorted(expected)
    assert arrays(again) == expected
    assert all(left is right for left, right in zip(parameters, again.parameters(), strict=True))
    assert again.out.weight is again.rows.weight
    assert len(graphs) == count >= 1


def test_tied_weights_are_saved_once_and_stay_tied():
    """Twice the bytes of the largest layer; and untied, they would be trained apart."""
    torch.manual_seed(0)
    model = Tied()
    store = saved_after_two_steps(model, model)
    last = highcamp.open(store).last

    torch.manual_seed(1)
    again = Tied()
    last.restore(model=again)
    with torch.no_grad():
        again.rows.weight += 1

    assert len(last.load("model")) == len(model.state_dict())
    assert last.manifest.objects["model"].bytes == sum(
        tensor.nbytes
        for tensor in [*model.parameters(), *model.buffers()]  # each of them once
    )
    assert torch.equal(again.out.weight, again.rows.weight)
