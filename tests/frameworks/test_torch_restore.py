"""PyTorch objects out of real files: into their own memory where that is safe, bit for bit in any case."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import highcamp
from highcamp import Checkpointer, Mismatch
from highcamp.storage.memory import MemoryReader, MemoryStore

LARGE = 40_000  # elements of float32: read by a call of their own


class Watched(MemoryStore):
    """A store that remembers where the bytes go that are read."""

    def __init__(self):
        super().__init__()
        self.landed = []

    def open(self, path):
        return WatchedReader(super().open(path), self.landed)


class WatchedReader(MemoryReader):
    """A reader of such a store."""

    def __init__(self, reader, landed):
        super().__init__(reader._data, reader._where)
        self.landed = landed

    def read_into(self, offset, buffer):
        self.landed.append(np.frombuffer(buffer, np.uint8).__array_interface__["data"][0])
        super().read_into(offset, buffer)


def save(**objects):
    """Return a checkpoint of these objects, and the store it is in."""
    store = Watched()
    with Checkpointer(store, verbose=0) as checkpointer:
        checkpointer.track(**objects)
        list(checkpointer.epochs(1))
    return highcamp.open(store).last, store


def bits(tree):
    """Return a state with each tensor as dtype, shape and bytes."""
    if isinstance(tree, torch.Tensor):
        plain = tree.detach().contiguous()
        return str(tree.dtype), tuple(tree.shape), plain.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [bits(value) for value in tree]
    return tree


def net(seed, width=200):
    """Return a model with a large and a small parameter in each layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def train(model, optimizer, steps, width=200):
    """Train on data made from the step number."""
    for step in steps:
        batch = torch.randn(3, width, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = model(batch).float().square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


# -------------------------------------------------------------------------------------------------------- modules


def test_parameters_take_the_bytes_in_their_own_memory():
    """A copy on the way needs the memory of the whole model once more, just when it has been built."""
    model = net(0)
    checkpoint, store = save(model=model)
    again = net(1)
    addresses = {tensor.data_ptr() for tensor in again.state_dict().values() if tensor.numel() >= LARGE}
    parameters = list(again.parameters())

    store.landed.clear()
    checkpoint.restore(model=again)

    assert addresses
    assert addresses <= set(store.landed)
    assert bits(dict(again.state_dict())) == bits(dict(model.state_dict()))
    assert all(left is right for left, right in zip(parameters, again.parameters(), strict=True))


def test_autograd_notices_that_a_parameter_was_overwritten():
    """A backward pass through the old graph with new weights would give wrong gradients without a word."""
    model = net(0)
    checkpoint, _ = save(model=model)
    loss = model(torch.ones(3, 200)).square().mean()

    checkpoint.restore(model=model)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Odd(nn.Module):
    """Every way in which a module may hold memory."""

    def __init__(self):
        super().__init__()
        self.tied = nn.Parameter(torch.randn(300, 200))
        self.also = self.tied
        self.transposed = nn.Parameter(torch.randn(200, 300).t())
        self.rows = nn.Parameter(torch.randn(400, 200)[::2])
        self.frozen = nn.Parameter(torch.randn(LARGE), requires_grad=False)
        self.brief = nn.Parameter(torch.randn(2 * LARGE).bfloat16())
        self.register_buffer("eighth", torch.randn(4 * LARGE).to(torch.float8_e4m3fn))
        self.register_buffer("scale", torch.randn(()))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("seen", torch.randint(0, 2, (70_000,)).bool())
        self.register_buffer("view", self.frozen.data[:100])
        self.words = {"seen": ["a"], "array": torch.randn(3)}

    def get_extra_state(self):
        return self.words

    def set_extra_state(self, state):
        self.words = state


WRAPPERS = {
    "bare": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_kind_of_memory_comes_back(wrapper):
    """Bytes read as they lie into a transposed weight would be another weight."""
    torch.manual_seed(0)
    model = Odd()
    checkpoint, _ = save(model=model)
    torch.manual_seed(1)
    again = Odd()
    before = {name: (tensor.data_ptr(), tensor.stride()) for name, tensor in again.state_dict(keep_vars=True).items()
              if isinstance(tensor, torch.Tensor)}  # fmt: skip

    checkpoint.restore(model=WRAPPERS[wrapper](again))

    assert bits(dict(again.state_dict())) == bits(dict(model.state_dict()))
    assert again.tied is again.also
    assert not again.frozen.requires_grad
    assert again.brief.requires_grad
    assert torch.equal(again.view, again.frozen[:100])
    for name, tensor in again.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            assert (tensor.data_ptr(), tensor.stride()) == before[name]


class Adding(nn.Linear):
    """A module of a user that looks at its own weight while it loads."""

    def _load_from_state_dict(self, state, prefix, *rest):
        with torch.no_grad():
            self.weight.zero_()
            self.weight.add_(state[prefix + "weight"])
            self.bias.copy_(state[prefix + "bias"])


def scale(module, state, prefix, *rest):
    """A hook that compares the loaded weight with the one that is there."""
    state[prefix + "weight"] = state[prefix + "weight"] * (1 + module.weight.detach().abs().max())


@pytest.mark.parametrize("kind", ["method", "hook", "inner"])
def test_loading_code_of_others_finds_the_weights_that_were_there(kind):
    """Given its own memory as the state to load, such a module would zero what it is about to add."""

    def make(seed):
        torch.manual_seed(seed)
        layer = (Adding if kind != "hook" else nn.Linear)(200, 200)
        if kind == "hook":
            layer.register_load_state_dict_pre_hook(scale)
        return nn.Sequential(nn.Linear(200, 200), layer) if kind == "inner" else layer

    model = make(0)
    saved = copy.deepcopy(dict(model.state_dict()))
    checkpoint, _ = save(model=model)
    again = make(1)
    expected = make(1)
    expected.load_state_dict(saved)

    checkpoint.restore(model=again)

    assert bits(dict(again.state_dict())) == bits(dict(expected.state_dict()))


# ----------------------------------------------------------------------------------------------------- optimizers

OPTIMIZERS = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, foreach=True, amsgrad=True),
    "AdamW tensor lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.01), foreach=False),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.01),
    "SGD momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), max_iter=3, history_size=4),
}


@pytest.mark.parametrize("is_live", [False, True], ids=["fresh", "live"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_goes_on(name, is_live):
    """A moment in the wrong place trains on, a little worse."""
    expected = net(0)
    optimizer = OPTIMIZERS[name](expected)
    train(expected, optimizer, range(3))
    checkpoint, _ = save(model=expected, optimizer=optimizer)
    state = bits(optimizer.state_dict())
    train(expected, optimizer, range(3, 6))

    again = net(1)
    resumed = OPTIMIZERS[name](again)
    if is_live:
        train(again, resumed, range(7))
    rate = resumed.param_groups[0]["lr"]
    checkpoint.restore(model=again, optimizer=resumed)

    assert bits(resumed.state_dict()) == state
    assert rate is resumed.param_groups[0]["lr"] or not isinstance(rate, torch.Tensor)
    train(again, resumed, range(3, 6))
    assert bits(dict(again.state_dict())) == bits(dict(expected.state_dict()))
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())


@pytest.mark.parametrize("is_live", [False, True], ids=["fresh", "live"])
def test_moments_are_read_where_they_stay(is_live):
    """They are two thirds of a training state: a copy of them may be what no longer fits into memory."""
    model = net(0)
    optimizer = OPTIMIZERS["AdamW"](model)
    train(model, optimizer, range(2))
    checkpoint, store = save(optimizer=optimizer)
    again = net(1)
    resumed = OPTIMIZERS["AdamW"](again)
    if is_live:
        train(again, resumed, range(2))
    before = resumed.state[again[0].weight].get("exp_avg")

    store.landed.clear()
    checkpoint.restore(optimizer=resumed)

    state = resumed.state[again[0].weight]
    assert {state["exp_avg"].data_ptr(), state["exp_avg_sq"].data_ptr()} <= set(store.landed)
    assert before is None or state["exp_avg"] is before
    assert torch.equal(state["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


def test_moments_keep_the_precision_they_were_saved_in():
    """float32 moments of bfloat16 weights, cast on loading, have lost two thirds of their digits."""
    states = []
    for seed in (0, 1):
        model = net(seed).bfloat16()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.randn(parameter.shape)
        states.append((model, optimizer))
    checkpoint, _ = save(model=states[0][0], optimizer=states[0][1])

    fresh = torch.optim.SGD(states[1][0].parameters(), lr=0.1, momentum=0.9)
    for optimizer in (states[1][1], fresh):
        checkpoint.restore(model=states[1][0], optimizer=optimizer)

        assert bits(optimizer.state_dict()) == bits(states[0][1].state_dict())


def clear(optimizer, *_):
    """Set everything to zero that an optimizer remembers."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


class Restarting(torch.optim.SGD):
    """An optimizer of a user that begins to load by clearing what it has."""

    def load_state_dict(self, state_dict):
        clear(self)
        super().load_state_dict(state_dict)


class Shadowing(torch.optim.SGD):
    """An optimizer of a user whose state holds the memory of the parameters themselves."""

    def shadow(self):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["shadow"] = parameter.detach()


@pytest.mark.parametrize("kind", ["method", "hook", "attribute"])
def test_optimizers_of_others_are_given_memory_of_its_own(kind):
    """Cleared before it is loaded, a state that lies in the live tensors already would be nothing but zeros."""
    model = net(0)
    optimizer = (Restarting if kind == "method" else torch.optim.SGD)(model.parameters(), lr=0.1, momentum=0.9)
    if kind == "hook":
        optimizer.register_load_state_dict_pre_hook(clear)
    elif kind == "attribute":
        optimizer.load_state_dict = lambda state: (clear(optimizer), torch.optim.SGD.load_state_dict(optimizer, state))
    train(model, optimizer, range(2))
    checkpoint, _ = save(optimizer=optimizer)
    expected = bits(optimizer.state_dict())

    train(model, optimizer, range(2))
    checkpoint.restore(optimizer=optimizer)

    assert bits(optimizer.state_dict()) == expected


def test_restoring_an_optimizer_does_not_write_into_parameters():
    """Who asks for the optimizer alone has reasons to keep the weights."""
    model = net(0)
    optimizer = Shadowing(model.parameters(), lr=0.1)
    optimizer.shadow()
    checkpoint, _ = save(optimizer=optimizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3)

    checkpoint.restore(optimizer=optimizer)

    assert all((parameter == 3).all() for parameter in model.parameters())
    assert bits(optimizer.state[model[0].weight]["shadow"]) == bits(net(0)[0].weight)


# -------------------------------------------------------------------------------------------------------- others


def test_a_mismatch_of_the_optimizer_leaves_the_model_as_it_was():
    """New weights under old moments are a state that no training ever had."""
    model = net(0)
    optimizer = OPTIMIZERS["AdamW"](model)
    train(model, optimizer, range(1))
    checkpoint, _ = save(model=model, optimizer=optimizer)
    again = net(1)
    before = bits(dict(again.state_dict()))

    with pytest.raises(Mismatch, match="nothing was changed"):
        checkpoint.restore(model=again, optimizer=torch.optim.AdamW(again[0].parameters()))

    assert bits(dict(again.state_dict())) == before


def test_tensors_in_containers_stay_the_same_tensors():
    """An average of weights that somebody holds in a dict is used where it was handed to."""
    saved = {"ema": [torch.randn(LARGE), torch.randn(3).bfloat16()], "count": 3, "numpy": np.arange(3)}
    checkpoint, _ = save(ema=saved)
    here = {"ema": [torch.zeros(LARGE), torch.zeros(3).bfloat16()], "count": 0, "numpy": np.zeros(3, int)}
    first, second, array = *here["ema"], here["numpy"]

    checkpoint.restore(ema=here)

    assert here["ema"][0] is first
    assert here["ema"][1] is second
    assert here["numpy"] is array
    assert (bits(here["ema"]), here["count"], array.tolist()) == (bits(saved["ema"]), 3, [0, 1, 2])
    assert first._version > 0


def test_a_passed_state_comes_back_in_new_tensors():
    """The tree that says what is wanted stays as it is; ties in it are ties in what comes back."""
    table = torch.randn(LARGE)
    store = MemoryStore()
    with Checkpointer(store, verbose=0) as checkpointer:
        checkpointer.save({"params": {"first": table, "second": table, "half": table.bfloat16()}}, step=1).wait()
    like = nn.Parameter(torch.zeros(LARGE), requires_grad=False)

    with Checkpointer(store, verbose=0) as checkpointer:
        tied = checkpointer.restore(
            like={"params": {"first": like, "second": like, "half": torch.zeros(LARGE).bfloat16()}}
        )
        apart = checkpointer.restore(
            "last",
            like={"params": {"first": like, "second": torch.zeros(LARGE), "half": torch.zeros(LARGE).bfloat16()}},
        )

    assert isinstance(tied["params"]["first"], nn.Parameter)
    assert not tied["params"]["first"].requires_grad
    assert tied["params"]["first"].data_ptr() == tied["params"]["second"].data_ptr()
    assert apart["params"]["first"].data_ptr() != apart["params"]["second"].data_ptr()
    for found in (tied, apart):
        assert bits(found["params"]["first"]) == bits(found["params"]["second"]) == bits(table)
        assert bits(found["params"]["half"]) == bits(table.bfloat16())
    assert not like.any()
