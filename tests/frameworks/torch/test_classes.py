"""Every class that PyTorch has, in a loop: stopped in mid-epoch and run again, it ends as if it had not been."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from highcamp import Checkpointer, Every
from highcamp.storage.memory import MemoryStore

# JAX, imported by a neighbouring test, warns of every fork; the workers here use neither it nor threads
pytestmark = [
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata 0.11 with this torch
]


class Halt(Exception):
    """Ends a training in its middle."""


def bits(tree):
    """A state with each tensor as dtype, shape and bytes; functions as what they are."""
    if isinstance(tree, torch.Tensor):
        return str(tree.dtype), tuple(tree.shape), tree.detach().numpy().tobytes()
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [bits(value) for value in tree]
    return tree


def make_loader(kind=DataLoader, **options):
    """Seven shuffled batches."""
    data = TensorDataset(torch.randn(21, 4, generator=torch.Generator().manual_seed(2)))
    return kind(data, batch_size=3, shuffle=True, **options)


def train(store, make, *, halt_after=None, loads=make_loader):
    """Two epochs of seven batches; returns the states of what `make` makes, and how many batches were trained on."""
    torch.manual_seed(1)
    model = make_model()
    objects = make(model)
    loader = loads()
    optimizers = [part for part in objects.values() if isinstance(part, torch.optim.Optimizer)]
    schedulers = [part for part in objects.values() if isinstance(part, lr_scheduler.LRScheduler)]
    done = 0
    with Checkpointer(store, every=Every(steps=5), verbose=0) as checkpointer:
        checkpointer.track(model=model, loader=loader, **objects)
        for _ in checkpointer.epochs(2):
            for (batch,) in checkpointer.batches(loader):
                if checkpointer.step == halt_after:
                    raise Halt

                def closure(batch=batch):
                    for optimizer in optimizers:
                        optimizer.zero_grad()
                    loss = model(batch).square().mean()
                    loss.backward()
                    return loss

                for optimizer in optimizers:
                    loss = optimizer.step(closure)
                for scheduler in schedulers:
                    scheduler.step(*([loss.detach()] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
                done += 1
    states = {
        name: bits(part.get_state() if isinstance(part, torch.Generator) else part.state_dict())
        for name, part in {"model": model, **objects}.items()
    }
    rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]
    return states | {"rates": rates, "drawn": torch.rand(2).tolist()}, done


def make_model():
    """Two layers without biases (Muon takes matrices only), with dropout between them."""
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Dropout(0.3), nn.Linear(6, 2, bias=False))


def check_exact(make, **options):
    """Train in one go, and in two; the second of the two trains only what is left of the epoch, and the next one."""
    whole, _ = train(MemoryStore(), make, **options)
    store = MemoryStore()
    with pytest.raises(Halt):
        train(store, make, halt_after=12, **options)

    resumed, done = train(store, make, **options)

    assert resumed == whole
    assert done == 4  # of 14: ten were done at the save, three of them in the second epoch


def of_parameters(kind, **options):
    """What makes an optimizer of all parameters."""
    return lambda model: {"optimizer": kind(model.parameters(), **options)}


def sparse(model):
    """SparseAdam for an embedding, which alone has sparse gradients, beside Adam for the rest."""
    rows = nn.Embedding(3, 4, sparse=True)
    model.register_forward_pre_hook(lambda _, inputs: inputs[0] + rows(torch.arange(3)))
    return {
        "rows": rows,
        "optimizer": torch.optim.Adam(model.parameters()),
        "sparse": torch.optim.SparseAdam(rows.parameters(), lr=0.1),
    }


OPTIMIZERS = {
    "Adafactor": of_parameters(torch.optim.Adafactor),
    "Muon": of_parameters(torch.optim.Muon, lr=0.01),
    "Adadelta": of_parameters(torch.optim.Adadelta),
    "Adagrad": of_parameters(torch.optim.Adagrad, lr_decay=0.1),
    "Adam": of_parameters(torch.optim.Adam, amsgrad=True),
    "Adamax": of_parameters(torch.optim.Adamax),
    "AdamW": of_parameters(torch.optim.AdamW),
    "ASGD": of_parameters(torch.optim.ASGD, t0=3.0),
    "LBFGS": of_parameters(torch.optim.LBFGS, max_iter=3, history_size=4),
    "NAdam": of_parameters(torch.optim.NAdam),
    "RAdam": of_parameters(torch.optim.RAdam),
    "RMSprop": of_parameters(torch.optim.RMSprop, momentum=0.9, centered=True),
    "Rprop": of_parameters(torch.optim.Rprop),
    "SGD": of_parameters(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "SparseAdam": sparse,
}
WAYS = [
    (name, way)
    for name in OPTIMIZERS
    for way in ("foreach", "fused", "maximize")
    if name != "SparseAdam" and way in inspect.signature(getattr(torch.optim, name)).parameters
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on(name):
    """Momentum lost or a step counted from 0 shows only as a slightly worse model."""
    check_exact(OPTIMIZERS[name])


@pytest.mark.parametrize(("name", "way"), WAYS, ids=[f"{name}-{way}" for name, way in WAYS])
def test_every_implementation_of_an_optimizer_goes_on(name, way):
    """Fused ones keep their step count as a tensor on the device, the others on the host."""
    check_exact(of_parameters(getattr(torch.optim, name), **{way: True}))


def of_sgd(make):
    """What makes an optimizer and a scheduler on it; a momentum that OneCycleLR and CyclicLR move too."""

    def build(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return {"optimizer": optimizer, "scheduler": make(optimizer)}

    return build


class Decay:
    """A schedule as an object: PyTorch saves what it knows."""

    def __init__(self):
        self.calls = 0

    def __call__(self, epoch):
        self.calls += 1
        return 0.99**self.calls


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR of an object": lambda o: lr_scheduler.LambdaLR(o, Decay()),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 1 - 0.01 * epoch),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 4),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 12]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=12),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=12),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.CosineAnnealingLR(o, 5), lr_scheduler.ExponentialLR(o, 0.9)],
        [3, 12],
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 20, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6, eta_min=0.01),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.5, total_iters=12), lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, threshold=0.5, cooldown=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, T_mult=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=15),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=12),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on(name):
    """A schedule that begins again heats up a model that had cooled down."""
    check_exact(of_sgd(SCHEDULERS[name]))


def test_no_class_of_torch_is_left_out():
    """A class that a newer PyTorch brings is one that nobody has tried."""

    def classes(module, parent):
        found = {name for name, each in vars(module).items() if inspect.isclass(each) and issubclass(each, parent)}
        return found - {parent.__name__, f"_{parent.__name__}"}

    assert classes(torch.optim, torch.optim.Optimizer) == set(OPTIMIZERS)
    expected = {name for name in SCHEDULERS if " " not in name}
    found = classes(lr_scheduler, lr_scheduler.LRScheduler) | classes(swa_utils, lr_scheduler.LRScheduler)
    assert found == expected


def test_several_optimizers_and_schedulers_go_on():
    """As in a GAN: each has its own parameters, steps and schedule."""

    def make(model):
        first = torch.optim.AdamW(model[0].parameters(), lr=0.05, foreach=True)
        second = torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
        return {
            "generating": first,
            "judging": second,
            "rate": lr_scheduler.ExponentialLR(first, 0.9),
            "other_rate": lr_scheduler.StepLR(second, 4),
        }

    check_exact(make)


LOADERS = {
    "a generator": lambda: make_loader(generator=torch.Generator().manual_seed(3)),
    "workers": lambda: make_loader(num_workers=2),
    "persistent workers": lambda: make_loader(num_workers=1, persistent_workers=True),
    "stateful": lambda: make_loader(StatefulDataLoader),
    "stateful, workers": lambda: make_loader(
        StatefulDataLoader, num_workers=2, generator=torch.Generator().manual_seed(3)
    ),
    "stateful, workers, one generator for all": lambda: make_loader(StatefulDataLoader, num_workers=2),
}


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_goes_on(name):
    """Batches trained on twice, or never, make another training."""
    check_exact(OPTIMIZERS["AdamW"], loads=LOADERS[name])


def device_generators():
    """Generators of every device that is here."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return {f"on_{device.replace(':', '_')}": torch.Generator(device).manual_seed(7) for device in devices}


def test_generators_go_on():
    """Noise that is drawn from a generator of its own, on each device that is here."""

    def make(model):
        generators = device_generators()

        def noisy(_, inputs):
            noise = [torch.randn(4, generator=each, device=each.device).cpu() for each in generators.values()]
            return inputs[0] + 0.1 * torch.stack(noise).sum(0)

        model.register_forward_pre_hook(noisy)
        return {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), **generators}

    check_exact(make)
