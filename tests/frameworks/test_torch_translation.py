"""PyTorch objects to plain trees and back, through the JSON skeleton and bytes that files hold."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

import highcamp.torch as translation
from highcamp.core import strict, tree
from highcamp.errors import InvalidState, Mismatch

# JAX, imported by a neighbouring test, warns of every fork; the workers here use neither it nor threads
pytestmark = [
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata 0.11 with this torch
]

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]
INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
DTYPES = [*FLOATS, *FLOAT8, *INTEGERS, torch.bool, torch.complex64]


def stored(state):
    """Return a state as it comes back from a file: through the skeleton's JSON and copies of the bytes."""
    flat = tree.flatten(state, translation.to_host, where="object")
    arrays = {name: translation.from_host(array, None) for name, array in flat.arrays.items()}
    skeleton = strict.read(strict.write(flat.skeleton), where="object", limit=1 << 24)
    return tree.unflatten(skeleton, arrays.__getitem__)


def raw(tensor):
    """Return the bytes of a tensor by another road than the code under test."""
    plain = tensor.detach().clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    return bytes(plain.untyped_storage())[: plain.numel() * plain.element_size()]


def some_bytes(dtype, shape=(3, 4)):
    """Return a tensor of random bits: NaN payloads, denormals and all."""
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8).view(dtype)


def same(left, right):
    """Compare two states bit for bit, dtypes and container types included."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and raw(left) == raw(right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and (left == right or left != left)  # noqa: PLR0124  # NaN


# --- tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype):
    """A cast or a NaN made canonical would make a resumed run another run."""
    torch.manual_seed(0)
    tensor = some_bytes(dtype)

    host = translation.to_host(tensor)
    back = translation.from_host(host, None)

    assert bytes(host.data) == raw(tensor)
    assert back.dtype == dtype
    assert same(back, tensor)


def test_packed_float4_comes_back():
    """Two elements share a byte; counting one would make the file half as long as its header says."""
    tensor = torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(2, 4)

    host = translation.to_host(tensor)
    back = translation.from_host(host, None)

    assert host.spec == ("F4", (2, 8))
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert bytes(back.view(torch.uint8).flatten().tolist()) == bytes(range(8))


class Labelled(torch.Tensor):
    """A subclass that changes what operations return."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Refuse everything that is not an attribute."""
        if getattr(func, "__name__", "") in ("__get__", "__repr__"):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise AssertionError(func)


LAYOUTS = {
    "scalar": lambda: torch.tensor(1.5, dtype=torch.bfloat16),
    "empty": lambda: torch.empty(0, 3),
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).t(),
    "strided": lambda: torch.arange(10.0)[1::3],
    "expanded": lambda: torch.ones(3, 1).expand(3, 4),
    "channels last": lambda: torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    "view into a larger one": lambda: torch.arange(10.0)[4:7],
    "one element, odd stride": lambda: torch.empty_strided((1,), (3,)).fill_(2),
    "conjugate": lambda: torch.complex(torch.ones(3), torch.arange(3.0)).conj(),
    "negated": lambda: torch.complex(torch.ones(3), torch.arange(3.0)).conj().imag,
    "parameter": lambda: nn.Parameter(torch.randn(3, dtype=torch.bfloat16)),
    "needs grad": lambda: torch.ones(2, requires_grad=True) * 2,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_comes_back(name):
    """Views and lazy bits are how modules hold memory; reading the storage as it lies would store other numbers."""
    torch.manual_seed(0)
    tensor = LAYOUTS[name]()

    back = translation.from_host(translation.to_host(tensor), None)

    assert type(back) is torch.Tensor
    assert back.is_contiguous()
    assert same(back, tensor)


def test_a_subclass_is_stored_by_its_memory():
    """Its own operations could answer anything."""
    tensor = torch.arange(3.0).as_subclass(Labelled)

    host = translation.to_host(tensor)

    assert (host.spec, bytes(host.data)) == (("F32", (3,)), raw(torch.arange(3.0)))


def test_contiguous_memory_is_shared_and_a_copy_says_so():
    """The pause of a save is one copy, not two; and reading into a copy would leave the tensor as it was."""
    tensor = torch.zeros(2, 3)

    own = translation.to_host(tensor)
    copied = translation.to_host(tensor.t())
    own.data[:4] = b"\0\0\x80\x3f"

    assert tensor[0, 0] == 1
    assert not own.data.readonly
    assert copied.data.readonly
    assert translation.to_host("no tensor") is None


def test_from_host_owns_its_memory():
    """Staging memory is reused for the next save; a restored weight must not change with it."""
    tensor = torch.arange(3.0)

    back = translation.from_host(translation.to_host(tensor), nn.Parameter(torch.zeros(1), requires_grad=False))
    tensor.zero_()

    assert isinstance(back, nn.Parameter)
    assert not back.requires_grad
    assert back.tolist() == [0, 1, 2]


def test_ties_and_bf16():
    """Tied weights written twice would come back untied in other tools, and bf16 has no NumPy dtype to fail on."""
    embedding = nn.Embedding(5, 3, dtype=torch.bfloat16)
    model = nn.ModuleDict({"embed": embedding, "head": nn.Linear(3, 5, bias=False, dtype=torch.bfloat16)})
    model["head"].weight = embedding.weight

    state = translation.capture(model)
    flat = tree.flatten(state, translation.to_host, where="model")
    ties = {name: translation.to_host(leaf).tie for name, leaf in state.items()}

    assert ties["embed.weight"] == ties["head.weight"] is not None
    assert [array.spec for array in flat.arrays.values()] == [("BF16", (5, 3))]
    assert same(stored(state), dict(state))


def test_different_views_of_one_memory_are_no_tie():
    """Only equal views may be written once: the others hold other numbers."""
    memory = torch.arange(12.0)
    views = [memory[:6], memory[6:], memory[:6].reshape(2, 3), memory[::2], torch.empty(0), torch.empty(0)]
    complexes = torch.complex(torch.ones(3), torch.ones(3))

    ties = [translation.to_host(view).tie for view in views]

    assert len(set(ties[:4])) == 4
    assert ties[4:] == [None, None]
    assert translation.to_host(complexes).tie != translation.to_host(complexes.conj()).tie


REFUSED = {
    "meta": (lambda: torch.empty(2, device="meta"), "meta device.*to_empty"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "to_dense"),
    "complex128": (lambda: torch.zeros(2, dtype=torch.complex128), "view_as_real"),
    "complex32": (lambda: torch.zeros(2, dtype=torch.complex32), "view_as_real"),
    "lazy": (lambda: nn.LazyLinear(3).weight, "run one batch"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "one by one",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_plain_bytes_is_refused_with_advice(name):
    """Stored anyway, it would be garbage found at the next resume."""
    make, message = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes warn when they are made
        tensor = make()

    with pytest.raises(InvalidState, match=message):
        translation.to_host(tensor)


def test_quantized_tensors_are_refused_with_advice():
    """Their integers mean nothing without the scale, which a tensor file does not have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)

    with pytest.raises(InvalidState, match="int_repr"):
        translation.to_host(tensor)


# --- modules


class Counting(nn.Module):
    """A module with extra state, a buffer that is saved and one that is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(9), persistent=False)
        self.words = {"seen": ["a"]}

    def get_extra_state(self):
        """Plain data."""
        return self.words

    def set_extra_state(self, state):
        """Plain data."""
        self.words = state

    def forward(self, x):
        """Multiply."""
        return x @ self.weight


def test_a_module_comes_back_in_place():
    """A parameter replaced by a new one would leave the optimizer training the old one."""
    torch.manual_seed(0)
    saved, live = Counting(), Counting()
    saved.seen += 3
    saved.words = {"seen": ["a", "b"], "count": 2}
    parameter = live.weight

    translation.restore(live, stored(translation.capture(saved)))

    assert live.weight is parameter
    assert same(live.state_dict(), saved.state_dict())
    assert live.words == {"seen": ["a", "b"], "count": 2}
    assert "scratch" not in translation.capture(live)


def test_wrappers_leave_no_mark_on_names():
    """A checkpoint of a compiled or data-parallel model must load into the bare one, and back."""
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    expected = list(bare.state_dict())
    inner = copy.deepcopy(bare)
    inner[1] = torch.compile(inner[1], backend="eager")

    for wrapped in (
        torch.compile(bare, backend="eager"),
        nn.DataParallel(bare),
        torch.compile(nn.DataParallel(inner), backend="eager"),
    ):
        state = translation.capture(wrapped)

        assert list(state) == expected
        assert translation.check(wrapped, stored(state)) == []

    target = torch.compile(nn.DataParallel(inner), backend="eager")
    with torch.no_grad():
        bare[0].weight.add_(1)
    translation.restore(target, stored(translation.capture(bare)))
    assert same(dict(translation.capture(target)), dict(bare.state_dict()))


def test_distributed_data_parallel_leaves_no_mark_on_names():
    """The same model trained on one machine less has no `module.` to find."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))

        assert list(translation.capture(wrapped)) == ["weight", "bias"]
    finally:
        torch.distributed.destroy_process_group()


def test_an_averaged_model_keeps_its_own_names_and_count():
    """Its `module.` is part of its structure, and the count decides the next average."""
    torch.manual_seed(0)
    averaged, live = AveragedModel(nn.Linear(2, 2)), AveragedModel(nn.Linear(2, 2))
    averaged.update_parameters(nn.Linear(2, 2))

    translation.restore(live, stored(translation.capture(averaged)))

    assert set(translation.capture(live)) == {"n_averaged", "module.weight", "module.bias"}
    assert same(live.state_dict(), averaged.state_dict())


def test_dtype_is_compared():
    """The cast of load_state_dict is silent: a bf16 model would go on from rounded fp32 weights."""
    live = nn.Linear(3, 2)
    before = stored(translation.capture(live))
    state = stored(translation.capture(nn.Linear(3, 2, dtype=torch.bfloat16)))
    state["extra"] = state.pop("bias")

    with pytest.raises(Mismatch) as caught:
        translation.restore(live, state)

    for line in ("bias: only here", "extra: only in the checkpoint", "weight: torch.bfloat16"):
        assert line in str(caught.value)
    assert same(dict(live.state_dict()), before)


def test_a_lazy_module_has_no_template_and_takes_the_saved_shape():
    """Before its first batch it cannot say what fits, and refusing it would make it impossible to resume."""
    live, saved = nn.LazyLinear(2), nn.Linear(3, 2)

    assert translation.template(live) is None
    translation.restore(live, stored(translation.capture(saved)))

    assert same(dict(live.state_dict()), dict(saved.state_dict()))
    assert translation.template(saved).keys() == {"weight", "bias"}


# --- optimizers


def make_training(make_optimizer, dtype=torch.float32, make_scheduler=None):
    """Return (model, optimizer, scheduler) from the same seed each time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).to(dtype)
    optimizer = make_optimizer(model)
    return model, optimizer, make_scheduler(optimizer) if make_scheduler else None


def train(model, optimizer, scheduler, steps):
    """Train on data made from the step number."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(3, 4, generator=generator).to(model[0].weight.dtype)

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = model(batch).float().square().mean()
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        if scheduler is not None:
            scheduler.step(*([loss.detach()] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


OPTIMIZERS = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "Adam amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=0.1, amsgrad=True),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, fused=True),
    "AdamW groups": lambda m: torch.optim.AdamW(
        [{"params": m[0].parameters(), "lr": 0.5}, {"params": m[1].parameters()}]
    ),
    "AdamW tensor lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.1), foreach=False),
    "named": lambda m: torch.optim.AdamW(m.named_parameters(), lr=0.1),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.1, momentum=0.9, centered=True),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.1),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters(), lr=0.1),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=0.1),
    "ASGD": lambda m: torch.optim.ASGD(m.parameters(), lr=0.1),
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters()),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters()),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_really_restored(name):
    """Momentum lost or a step counted from 0 shows only as a slightly worse model."""
    expected = make_training(OPTIMIZERS[name])
    train(*expected, range(4))
    state = stored({"model": translation.capture(expected[0]), "optimizer": translation.capture(expected[1])})
    train(*expected, range(4, 8))

    resumed = make_training(OPTIMIZERS[name])
    parameters = list(resumed[0].parameters())
    assert translation.check(resumed[1], state["optimizer"]) == []
    translation.restore(resumed[0], state["model"])
    translation.restore(resumed[1], state["optimizer"])

    assert same(translation.capture(resumed[1]), state["optimizer"])
    train(*resumed, range(4, 8))
    assert same(dict(resumed[0].state_dict()), dict(expected[0].state_dict()))
    assert same(resumed[1].state_dict(), expected[1].state_dict())
    assert all(left is right for left, right in zip(parameters, resumed[1].param_groups[0]["params"], strict=False))


def test_fp32_state_of_bf16_parameters_is_not_rounded():
    """load_state_dict casts it to bf16, and two thirds of the moments' bits are gone."""
    make = OPTIMIZERS["SGD"]
    model, optimizer, _ = make_training(make, torch.bfloat16)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "momentum_buffer": torch.randn(parameter.shape),
            "master": {"weight": parameter.detach().float() + 1e-5, "history": [torch.randn(2)]},
            "step": torch.tensor(7.0, dtype=torch.float64),
            "kind": "fp32",  # load_state_dict would take it for a sequence
            "pair": (torch.randn(2), 3),
        }
    state = stored(translation.capture(optimizer))

    _, live, _ = make_training(make, torch.bfloat16)
    translation.restore(live, state)

    assert same(translation.capture(live), state)
    assert live.state_dict()["state"][0]["momentum_buffer"].dtype == torch.float32


def test_a_tensor_learning_rate_stays_the_same_tensor():
    """A compiled step holds that tensor; a new one would be set in vain by the scheduler."""
    _, optimizer, _ = make_training(OPTIMIZERS["AdamW tensor lr"])
    state = stored(translation.capture(optimizer))
    state["param_groups"][0]["lr"] = torch.tensor(0.025)
    rate = optimizer.param_groups[0]["lr"]

    translation.restore(optimizer, state)

    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.025


def test_an_optimizer_that_does_not_fit_says_why_and_is_not_touched():
    """Torch compares group sizes alone: the moments of another layer would be used for this one."""
    other = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2))
    saved = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9)
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    saved.step()
    _, live, _ = make_training(OPTIMIZERS["AdamW groups"])
    _, adam, _ = make_training(OPTIMIZERS["Adam amsgrad"])
    before = copy.deepcopy(adam.state_dict())
    state = stored(translation.capture(saved))

    lines = translation.check(adam, state)

    assert translation.check(live, state) == [
        "class_name: SGD in the checkpoint, AdamW here",
        "param_groups: 1 in the checkpoint, 2 here",
    ]
    assert "param_groups/0/momentum: only in the checkpoint" in lines
    assert "state/0/momentum_buffer: shape (5, 5) in the checkpoint, the parameter has (4, 4)" in lines
    with pytest.raises(Mismatch, match="does not fit this Adam"):
        translation.restore(adam, state)
    assert same(adam.state_dict(), before)


def test_the_state_of_another_kind_of_object_is_told_apart():
    """Two names exchanged in `restore(…)` must not end as a KeyError, or worse, load."""
    state = translation.capture(nn.Linear(2, 2))
    _, optimizer, _ = make_training(OPTIMIZERS["SGD"])

    for live in (optimizer, seeded(), shared()):
        assert any("only here" in line for line in translation.check(live, state))
        with pytest.raises(Mismatch):
            translation.restore(live, state)


def test_a_state_from_before_the_scheduler_was_attached_fits():
    """Schedulers add keys to the groups; a missing one must not end as a KeyError in the next step."""
    make = OPTIMIZERS["SGD"]
    state = stored(translation.capture(make_training(make)[1]))
    _, live, scheduler = make_training(make, make_scheduler=lambda o: lr_scheduler.StepLR(o, 2))

    assert translation.check(live, state) == []
    translation.restore(live, state)

    assert live.param_groups[0]["initial_lr"] == 0.1
    assert scheduler.get_last_lr() == [0.1]


# --- schedulers, scaler, generators


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on(name):
    """A schedule that begins again heats up a model that had cooled down."""
    make = OPTIMIZERS["SGD"]
    expected = make_training(make, make_scheduler=SCHEDULERS[name])
    train(*expected, range(4))
    states = [stored(translation.capture(part)) for part in expected]
    train(*expected, range(4, 9))

    resumed = make_training(make, make_scheduler=SCHEDULERS[name])
    for part, state in zip(resumed, states, strict=True):
        assert translation.check(part, state) == []
        translation.restore(part, state)
    train(*resumed, range(4, 9))

    assert same(dict(resumed[0].state_dict()), dict(expected[0].state_dict()))
    assert same(resumed[2].state_dict(), expected[2].state_dict())


def test_another_scheduler_is_told_from_its_state():
    """load_state_dict takes any dict, and the schedule goes on with the other one's numbers."""
    schedulers = {name: make_training(OPTIMIZERS["SGD"], make_scheduler=make)[2] for name, make in SCHEDULERS.items()}
    state = stored(translation.capture(schedulers["StepLR"]))
    chained = stored(translation.capture(schedulers["ChainedScheduler"]))

    assert "T_0: only here" in translation.check(schedulers["CosineAnnealingWarmRestarts"], state)
    assert translation.check(schedulers["SequentialLR"], chained) != []
    with pytest.raises(Mismatch, match="step_size: only in the checkpoint"):
        translation.restore(schedulers["OneCycleLR"], state)


def test_functions_in_a_state_are_refused_by_path():
    """Only code can hold a function; dropping it in silence would resume with another schedule."""
    scheduler = make_training(OPTIMIZERS["SGD"], make_scheduler=SCHEDULERS["StepLR"])[2]
    scheduler.shape = lambda step: step

    with pytest.raises(InvalidState, match="scheduler/shape"):
        tree.flatten(translation.capture(scheduler), translation.to_host, where="scheduler")


def test_a_scaler_comes_back():
    """A scale that begins again overflows for the first hundred steps."""
    saved, live = (torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2))
    saved.scale(torch.ones(1))
    saved.update(4.0)
    state = stored(translation.capture(saved))

    translation.restore(live, state)

    assert live.state_dict() == saved.state_dict()
    assert live.get_scale() == 4.0
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    assert translation.check(disabled, state) == ["the scaler is disabled here, it was not when it was saved"]
    assert translation.check(live, {}) == ["the scaler is enabled here, it was not when it was saved"]


def test_generators_and_global_random_state_come_back():
    """Lost random state resumes with other dropout masks, and nobody notices."""
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(4)
    torch.randn(5)  # leaves a cached normal behind
    state = stored({"own": translation.capture(generator), "all": translation.random_state()})
    expected = torch.randn(7), torch.randn(7, generator=generator)
    torch.manual_seed(99)
    other = torch.Generator()

    translation.set_random_state(state["all"])
    translation.restore(other, state["own"])

    assert same((torch.randn(7), torch.randn(7, generator=other)), expected)


def test_lost_random_state_is_loud():
    """The state of a device that is not here cannot be set, and without it the numbers differ."""
    state = translation.random_state() | {"cuda": [torch.get_rng_state()]}
    before = torch.get_rng_state()
    torch.rand(1)
    now = torch.get_rng_state()

    with pytest.raises(Mismatch, match="1 CUDA devices was saved"):
        translation.set_random_state(state)

    assert torch.equal(torch.get_rng_state(), now)
    assert not torch.equal(before, now)


def test_what_is_not_ours_is_left_to_others():
    """The door asks every framework; a wrong yes would take someone else's object."""
    for obj in (OrderedDict(), 3, "text", object(), [torch.ones(1)]):
        assert translation.capture(obj) is None


# --- loaders


class Counted(Dataset):
    """A map-style dataset that counts reads, and draws like augmentation does when asked to."""

    def __init__(self, size=20, *, augment=False):
        self.size, self.augment, self.reads = size, augment, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.reads.append(index)
        return torch.tensor(index + (torch.rand(()).item() if self.augment else 0.0), dtype=torch.float64)


def seeded():
    """Return a generator of its own."""
    return torch.Generator().manual_seed(11)


def shared(**settings):
    """Return a loader whose sampler draws from the loader's generator."""
    return DataLoader(Counted(), batch_size=3, shuffle=True, generator=seeded(), **settings)


class Pairs:
    """A batch sampler of a user: draws from the global generator at the first batch, and holds a generator."""

    def __init__(self):
        self.generator = seeded()

    def __len__(self):
        return 10

    def __iter__(self):
        start = int(torch.randint(20, ()))
        for _ in range(10):
            yield [start, int(torch.randint(20, (), generator=self.generator))]


def sharing():
    """Return a loader whose generator is drawn from while batches are made, too."""
    one = seeded()

    def jitter(items):
        return torch.stack(items) + torch.rand((), generator=one, dtype=torch.float64)

    return DataLoader(Counted(), batch_size=3, shuffle=True, generator=one, collate_fn=jitter)


LOADERS = {
    "one generator for order and data": sharing,
    "sequential": lambda **s: DataLoader(Counted(), batch_size=3, **s),
    "shuffled by the global generator": lambda **s: DataLoader(Counted(), batch_size=3, shuffle=True, **s),
    "shuffled by its own generator": shared,
    "augmented": lambda **s: DataLoader(Counted(augment=True), batch_size=3, shuffle=True, drop_last=True, **s),
    "replacement, drawn in portions": lambda **s: DataLoader(
        Counted(), sampler=RandomSampler(range(20), replacement=True, num_samples=75, generator=seeded()), **s
    ),
    "weighted": lambda **s: DataLoader(Counted(), batch_size=3, sampler=WeightedRandomSampler([1.0] * 20, 20), **s),
    "subset": lambda **s: DataLoader(Counted(), batch_size=3, sampler=SubsetRandomSampler(range(15)), **s),
    "distributed": lambda **s: DataLoader(
        Counted(), batch_size=2, sampler=DistributedSampler(Counted(), num_replicas=2, rank=1), **s
    ),
    "no batches": lambda **s: DataLoader(Counted(), batch_size=None, sampler=SubsetRandomSampler(range(9)), **s),
    "batch sampler": lambda **s: DataLoader(
        Counted(), batch_sampler=BatchSampler(RandomSampler(Counted()), 3, drop_last=False), **s
    ),
    "a user's batch sampler": lambda **s: DataLoader(Counted(), batch_sampler=Pairs(), **s),
    "stateful": lambda **s: StatefulDataLoader(Counted(), batch_size=3, shuffle=True, generator=seeded(), **s),
}  # fmt: skip


def epoch_of(loader, number, log, save_after=None, resume=None, *, stop=False):
    """Train one epoch, drawing from the global generator; return what a save after `save_after` batches holds."""
    if isinstance(loader.sampler, DistributedSampler):
        loader.sampler.set_epoch(number)
    saved, count = None, 0
    if resume is None:
        order, before = translation.order_state(loader), translation.random_state()
        batches = iter(loader)
    else:
        order, before, count = resume["order"], resume["before"], resume["skip"]
        translation.set_random_state(before)
        batches = translation.resume_iter(loader, order, count, resume["at_save"])
        translation.set_random_state(resume["now"])
    while True:
        if count == save_after:
            state = {"order": order, "before": before, "at_save": translation.capture(loader)}
            saved = stored(state | {"now": translation.random_state(), "skip": count})
        batch = None if saved and stop else next(batches, None)
        if batch is None:
            return saved
        count += 1
        log.append((number, batch.tolist(), torch.rand(()).item()))


def interrupted(make, epoch, save_after, epochs=3):
    """Return the log of an uninterrupted run and of one stopped twice: after `save_after` batches and one more."""
    torch.manual_seed(5)
    whole, loader, saved = [], make(), None
    for number in range(epochs):
        saved = epoch_of(loader, number, whole, save_after if number == epoch else None) or saved
    del loader
    rest = []
    torch.manual_seed(77)
    saved = epoch_of(make(), epoch, rest, save_after + 1, resume=saved, stop=True)
    torch.manual_seed(78)
    resumed = make()
    epoch_of(resumed, epoch, rest, resume=saved)
    for number in range(epoch + 1, epochs):
        epoch_of(resumed, number, rest)
    return whole[-len(rest) :], rest


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("save_after", [0, 1, 4])
def test_generator_before_iter(name, save_after):
    """A loader draws at iter() and at the first batch; states taken too late resume in another order."""
    for epoch in (0, 1):
        expected, found = interrupted(LOADERS[name], epoch, save_after)

        assert found == expected
        assert {entry[0] for entry in found} == set(range(epoch, 3))


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(
    "name", ["shuffled by the global generator", "shuffled by its own generator", "weighted", "stateful"]
)
def test_the_order_is_kept_with_workers(name, persistent):
    """Workers read ahead: the loader's generator is further than training when the save is made."""

    def make():
        return LOADERS[name](num_workers=2, persistent_workers=persistent)

    for epoch, save_after in ((0, 4), (1, 0), (1, 4)):
        expected, found = interrupted(make, epoch, save_after)

        assert found == expected


def test_persistent_workers_of_an_epoch_between_saves_draw_no_seed_again():
    """They are seeded once; one draw more at the resume and every later shuffle and dropout mask differs."""

    def make():
        return LOADERS["shuffled by the global generator"](num_workers=1, persistent_workers=True)

    torch.manual_seed(5)
    loader, log = make(), []
    epoch_of(loader, 0, log)
    saved = stored({"loader": translation.capture(loader), "random": translation.random_state()})
    expected = []
    for number in (1, 2):
        epoch_of(loader, number, expected)

    resumed, found = make(), []
    torch.manual_seed(77)
    translation.restore(resumed, saved["loader"])
    translation.set_random_state(saved["random"])
    for number in (1, 2):
        epoch_of(resumed, number, found)

    assert found == expected
    translation.restore(loader, {"generators": {}, "workers_running": False})
    assert translation.order_state(loader) is None


def test_fast_skip():
    """Reading what was trained on already takes as long as training did."""
    loader = shared()
    order = stored(translation.order_state(loader))
    expected = [batch.tolist() for batch in loader]
    loader.dataset.reads.clear()

    rest = list(translation.resume_iter(loader, order, 5))

    assert [batch.tolist() for batch in rest] == expected[5:]
    assert len(loader.dataset.reads) == 5  # samples of the last two batches


def test_fast_skip_keeps_settings_and_class():
    """A loader built anew by hand would lose what the user's class or collate function does."""

    class Doubling(DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch * 2

    loader = Doubling(range(7), batch_size=2, collate_fn=lambda items: torch.tensor(items) + 1)
    expected = [batch.tolist() for batch in loader]

    assert [batch.tolist() for batch in translation.resume_iter(loader, None, 2)] == expected[2:]
    assert [batch.tolist() for batch in loader] == expected
    assert [batch.tolist() for batch in translation.resume_iter(loader, None, 4)] == []

    kept = Doubling(range(7), batch_size=2, num_workers=1, persistent_workers=True)
    expected = [batch.tolist() for batch in kept]
    assert [batch.tolist() for batch in translation.resume_iter(kept, None, 2)] == expected[2:]
    assert [batch.tolist() for batch in kept] == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_became_shorter_is_an_error(workers):
    """Going on silently would train the next epoch as if this one were done."""
    with pytest.raises(Mismatch, match=r"5 batches .* ends after 4"):
        next(translation.resume_iter(DataLoader(range(8), batch_size=2, num_workers=workers), None, 5))


def test_a_generator_without_a_state_is_an_error():
    """The order would be another one, with no sign of it."""
    order = translation.order_state(LOADERS["a user's batch sampler"]())

    with pytest.raises(Mismatch, match=r"generators/loader\.generator: only here"):
        translation.resume_iter(shared(), order, 1)
    assert "generators/sampler.generator: only here" in translation.check(shared(), order)


class Stream(IterableDataset):
    """Numbers one after another; with a state when asked to."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 20:
            self.at += 1
            yield self.at - 1
        self.at = 0


class StatefulStream(Stream):
    """The same with the two methods torchdata asks for."""

    def state_dict(self):
        """Where it is."""
        return {"at": self.at}

    def load_state_dict(self, state):
        """Where it was."""
        self.at = state["at"]


def test_an_iterable_dataset_is_read_again_and_says_so():
    """It has no indices to skip; silence would look like a hang."""
    with pytest.warns(UserWarning, match="3 batches are read again"):
        rest = list(translation.resume_iter(DataLoader(Stream(), batch_size=4), None, 3))

    assert [batch.tolist() for batch in rest] == [[12, 13, 14, 15], [16, 17, 18, 19]]
    with pytest.warns(UserWarning, match="read again"), pytest.raises(Mismatch, match="ends after 5"):
        translation.resume_iter(DataLoader(Stream(), batch_size=4), None, 6)


STATEFUL = {
    "shuffled": lambda workers: StatefulDataLoader(
        Counted(), batch_size=3, shuffle=True, generator=seeded(), num_workers=workers
    ),
    "no generator": lambda workers: StatefulDataLoader(Counted(), batch_size=3, shuffle=True, num_workers=workers),
    "stream": lambda workers: StatefulDataLoader(StatefulStream(), batch_size=3, num_workers=workers),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", STATEFUL)
def test_loader_state_is_whole(name, workers):
    """A state taken midway or right after a resume: a fresh loader must go on with the same batches."""

    def make():
        return STATEFUL[name](workers)

    for epoch, save_after in ((0, 2), (1, 0), (1, 5)):
        expected, found = interrupted(make, epoch, save_after)

        assert found == expected


@pytest.mark.parametrize(
    ("name", "plain"), [("shuffled", True), ("no generator", True), *((n, False) for n in STATEFUL)]
)
def test_loader_state_is_whole_between_epochs(name, plain):
    """Torchdata's own finished state draws a second time when it is loaded: the next shuffle would be another one."""
    torch.manual_seed(5)
    loader, expected, found = STATEFUL[name](0), [], []
    epoch_of(loader, 0, [])
    saved = stored({"loader": translation.capture(loader), "random": translation.random_state()})
    for number in (1, 2):
        epoch_of(loader, number, expected)

    torch.manual_seed(77)
    resumed = STATEFUL[name](0)
    translation.restore(resumed, saved["loader"])
    assert same(stored(translation.capture(resumed)), saved["loader"])  # a save right after a resume
    translation.set_random_state(saved["random"])
    batches = iter(resumed) if plain else translation.resume_iter(resumed, saved["loader"], 0)
    found += [(1, batch.tolist(), torch.rand(()).item()) for batch in batches]
    epoch_of(resumed, 2, found)

    assert found == expected


def test_a_tracked_stateful_loader_goes_on_without_our_iterator():
    """Its users iterate it themselves and expect it to continue where it was."""
    loader = STATEFUL["shuffled"](0)
    batches = iter(loader)
    next(batches), next(batches)
    state = stored(translation.capture(loader))
    expected = [batch.tolist() for batch in batches]

    resumed = STATEFUL["shuffled"](0)
    assert translation.check(resumed, state) == []
    translation.restore(resumed, state)

    assert [batch.tolist() for batch in resumed] == expected


def test_a_stateful_loader_does_not_skip_twice():
    """Restored in place first, and resumed by index then, it would leave out what was never trained on."""
    loader = STATEFUL["shuffled"](0)
    order = translation.order_state(loader)
    batches = iter(loader)
    next(batches)
    state = stored(translation.capture(loader))
    expected = [batch.tolist() for batch in batches]

    resumed = STATEFUL["shuffled"](0)
    translation.restore(resumed, state)

    assert [batch.tolist() for batch in translation.resume_iter(resumed, order, 1)] == expected
    assert len(list(resumed)) == len(expected) + 1
    translation.restore(resumed, state)
    translation.restore(resumed, {"generators": order["generators"], "workers_running": False, "loader": None})
    assert len(list(resumed)) == len(expected) + 1


def test_a_stateful_loader_tells_what_it_cannot_take():
    """Torchdata's own answer is an AssertionError in the middle of the first epoch."""
    loader = STATEFUL["stream"](2)
    next(iter(loader))
    state = stored(translation.capture(loader))

    assert translation.check(STATEFUL["stream"](0), state) == ["loader: num_workers 2 in the checkpoint, 0 here"]
    assert "StatefulDataLoader" in translation.check(DataLoader(Stream()), state)[0]


def test_capturing_a_loader_draws_nothing_and_reads_nothing():
    """A save must not change the run it saves."""
    for loader in (shared(), STATEFUL["no generator"](0), DataLoader(TensorDataset(torch.ones(3)))):
        before = torch.get_rng_state()

        translation.capture(loader)
        translation.order_state(loader)

        assert torch.equal(torch.get_rng_state(), before)
