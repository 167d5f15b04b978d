"""What a PyTorch loop is given that does not fit: said at once, all of it, and nothing is half-restored."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from highcamp import Checkpointer, Every, InvalidArgument, InvalidState, Mismatch, Refused, RunLocked
from highcamp.storage.memory import MemoryStore

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with this torch


def net(width=4):
    """A small model."""
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def made(kind=torch.optim.AdamW, model=None):
    """A model, an optimizer and a schedule."""
    model = model or net()
    optimizer = kind(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": optimizer, "scheduler": lr_scheduler.StepLR(optimizer, 2)}


def stepped(kind=torch.optim.AdamW):
    """The same after a step."""
    objects = made(kind)
    for parameter in objects["model"].parameters():
        parameter.grad = torch.ones_like(parameter)
        if kind is torch.optim.SparseAdam:
            parameter.grad = parameter.grad.to_sparse()
    objects["optimizer"].step()
    return objects


def run(store, epochs, objects):
    """As many epochs of nothing."""
    with Checkpointer(store, verbose=0) as checkpointer:
        checkpointer.track(**objects)
        for _ in checkpointer.epochs(epochs):
            torch.rand(1)


def saved(**objects):
    """A run with these objects."""
    store = MemoryStore()
    run(store, 1, objects)
    return store


def facts(objects):
    """Everything that a restore could change, as text."""
    states = {name: part.state_dict() for name, part in objects.items()}
    return repr((states, torch.get_rng_state().tolist()))


def check_refused(store, objects, error, *words):
    """Restoring raises `error` with all of `words`, and has changed nothing."""
    before = facts(objects)

    with pytest.raises(error) as caught:
        run(store, 2, objects)

    for word in words:
        assert word in str(caught.value)
    assert facts(objects) == before


def test_a_model_that_was_changed_lists_every_difference():
    """One error after the other, a start of the script for each, and half of the layers overwritten."""
    changed = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4).double(), nn.Linear(4, 2, bias=False), nn.PReLU())

    check_refused(
        saved(**stepped()),
        made(model=changed),
        Mismatch,
        "14 differences, nothing was changed",
        "model/0.weight: shape (4, 3) in the checkpoint, (5, 3) here",
        "model/1.running_mean: dtype F32 in the checkpoint, F64 here",
        "model/2.bias: only in the checkpoint",
        "model/3.weight: only here",
        "optimizer/state/0/exp_avg: shape (4, 3) in the checkpoint, the parameter has (5, 3)",
    )


KINDS = ["Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SGD", "RMSprop", "Adagrad"]


@pytest.mark.parametrize("here", KINDS)
@pytest.mark.parametrize("before", [*KINDS, "SparseAdam"])
@pytest.mark.filterwarnings("ignore:.*sparse:UserWarning")
def test_an_optimizer_of_another_class_is_refused(before, here):
    """The moments of one would be read as those of the other, or be missing in the middle of the first step."""
    store = saved(**stepped(getattr(torch.optim, before)))
    objects = made(getattr(torch.optim, here))

    if before == here:
        run(store, 2, objects)
    else:
        check_refused(store, objects, Mismatch, f"optimizer/class_name: {before} in the checkpoint, {here} here")


def test_a_class_of_ones_own_counts_as_the_one_it_derives_from():
    """Somebody who logs the size of each step in a subclass has not changed the optimizer."""

    class Talkative(torch.optim.AdamW):
        """One's own."""

    class Own(torch.optim.Optimizer):
        """One that derives from none."""

        def __init__(self, parameters, lr):
            super().__init__(parameters, {"lr": lr})

    run(saved(**stepped()), 2, made(Talkative))
    check_refused(saved(**made(Own)), made(torch.optim.SGD), Mismatch, "class_name: Own in the checkpoint, SGD here")


def test_a_state_without_the_class_is_taken():
    """One that was saved before classes were, or elsewhere."""
    import highcamp.torch as translation

    objects, again = stepped(), made()
    state = objects["optimizer"].state_dict()

    assert translation.check(again["optimizer"], state) == []
    translation.restore(again["optimizer"], state)
    assert repr(again["optimizer"].state_dict()) == repr(state)


def test_a_scheduler_that_is_missing_is_told():
    """It would begin anew, or what it had done would be lost."""
    without = {name: part for name, part in made().items() if name != "scheduler"}

    check_refused(saved(**stepped()), without, Refused, "saved but not tracked: scheduler")
    check_refused(saved(**without), made(), Refused, "tracked but not saved: scheduler")


@pytest.mark.parametrize(
    ("scheduler", "path"),
    [
        (lr_scheduler.LambdaLR, "scheduler/lr_lambdas/0/shape"),
        (
            lambda o, f: lr_scheduler.ChainedScheduler([lr_scheduler.MultiplicativeLR(o, f)]),
            "scheduler/_schedulers/0/lr_lambdas/0/shape",
        ),
    ],
)
def test_a_schedule_with_code_in_its_state_is_refused_by_path(scheduler, path):
    """PyTorch saves what an object that makes a schedule knows; code in it cannot be saved, and is not lost in silence."""

    class Schedule:
        """Holds a function."""

        def __init__(self):
            self.shape = lambda epoch: 0.9**epoch

        def __call__(self, epoch):
            return self.shape(epoch)

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(InvalidState, match="code is not part of the state") as error:
        saved(model=model, optimizer=optimizer, scheduler=scheduler(optimizer, Schedule()))

    assert error.value.path == path


# ------------------------------------------------------------------------------------------------------------ loaders


def read(store, loader, *, batches=None):
    """Train on `batches` of the first epoch, or on all that is left."""
    with Checkpointer(store, every=Every(steps=1), verbose=0) as checkpointer:
        checkpointer.track(loader=loader)
        for _ in checkpointer.epochs(1):
            for _ in checkpointer.batches(loader):
                if checkpointer.step + 1 == batches:
                    checkpointer.save().wait()
                    return


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize(("size", "batch_size", "length"), [(20, 4, 5), (30, 2, 15), (10, 2, 5)])
def test_a_loader_of_another_length_is_refused_within_an_epoch(kind, size, batch_size, length):
    """Of a larger batch as many would be skipped: rows trained on twice, or never."""
    store = MemoryStore()
    read(store, kind(range(20), batch_size=2), batches=3)

    with pytest.raises(
        Mismatch, match=rf"saved after 3 of 10 batches .* has {length}; use the same data and batch size"
    ):
        read(store, kind(range(size), batch_size=batch_size))

    read(store, kind(range(20), batch_size=2))


def test_a_loader_of_another_length_is_said_between_epochs(capsys):
    """More data from here on may be meant; a forgotten option is not, and nobody would notice."""

    def epochs(store, size, count):
        loader = DataLoader(range(size), batch_size=2)
        with Checkpointer(store, verbose=0) as checkpointer:
            checkpointer.track(loader=loader)
            for _ in checkpointer.epochs(count):
                list(checkpointer.batches(loader))

    store = MemoryStore()
    epochs(store, 20, 2)
    epochs(store, 20, 3)
    assert capsys.readouterr().err == ""
    epochs(store, 30, 5)

    said = capsys.readouterr().err
    assert said.count("was saved with 10 training batches in an epoch, here are 15: the run goes on") == 1
    epochs(store, 30, 6)
    assert capsys.readouterr().err == ""


# -------------------------------------------------------------------------------------------------- names and places


@pytest.mark.parametrize("name", ["a/b", "../model", ".hidden", "", "two words", "größe", "x" * 101, "a\nb", "a\0b"])
def test_a_name_that_is_no_file_name_is_refused(name):
    """It would become one."""
    checkpointer = Checkpointer(MemoryStore(), verbose=0)

    with pytest.raises(InvalidArgument, match="cannot become a file name"):
        checkpointer.track(**{name: net()})


@pytest.mark.parametrize("name", ["model", "MODEL", "progress"])
def test_a_name_that_is_taken_is_refused(name):
    """The second would overwrite the first, on some file systems also if only the case differs."""
    checkpointer = Checkpointer(MemoryStore(), verbose=0)
    checkpointer.track(model=net())

    with pytest.raises(InvalidArgument, match="tracked already"):
        checkpointer.track(**{name: net()})


def test_two_checkpointers_on_one_run_are_told_apart(tmp_path):
    """Both would save, and each prune what the other needs."""
    with Checkpointer(tmp_path, verbose=0) as first, Checkpointer(tmp_path, verbose=0) as second:
        first.track(**made())
        second.track(**made())
        epochs = first.epochs(2)
        next(epochs)

        with pytest.raises(RunLocked, match="is being written by"):
            next(second.epochs(2))

        assert list(epochs) == [1]
    assert [entry.epoch for entry in first.run.checkpoints] == [1, 2]


# ------------------------------------------------------------------------------------------------ tensors of other kinds


class Graph(nn.Module):
    """Holds a matrix."""

    def __init__(self, *, is_sparse):
        super().__init__()
        matrix = torch.eye(3)
        self.register_buffer("matrix", matrix.to_sparse() if is_sparse else matrix)


def quantized():
    """Its weights are integers and scales, in one object that is no tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3)), dtype=torch.qint8)


OTHERS = {
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "model/weight", "materialize it first"),
    "sparse": (lambda: Graph(is_sparse=True), "model/matrix", "to_dense"),
    "quantized": (quantized, "model/0._packed_params.dtype", "is a torch.dtype"),
    "lazy": (lambda: nn.LazyLinear(2), "model/weight", "run one batch through the module first"),
}
PLAIN = {
    "meta": lambda: nn.Linear(2, 2),
    "sparse": lambda: Graph(is_sparse=False),
    "quantized": lambda: nn.Sequential(nn.Linear(3, 3)),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.filterwarnings("ignore:.*[qQ]uantiz")
def test_a_model_of_tensors_without_plain_bytes_is_refused_by_path(kind):
    """At the first save and not at the first resume; the run is not spoilt by it."""
    make, path, words = OTHERS[kind]
    store = MemoryStore()

    with pytest.raises(InvalidState, match=words) as error:
        run(store, 1, {"model": make()})

    assert error.value.path == path
    run(store, 1, {"model": net()})


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.filterwarnings("ignore:.*[qQ]uantiz")
def test_such_a_model_cannot_take_a_state_either(kind):
    """Bytes that are read into nothing are lost without a word."""
    make, path, words = OTHERS[kind]

    with pytest.raises(InvalidState, match=words) as error:
        run(saved(model=PLAIN[kind]()), 2, {"model": make()})

    assert error.value.path == path
