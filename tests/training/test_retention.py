"""Retention in a loop: what stays while training goes on, and when the rest goes."""

from __future__ import annotations

import math
import os
import shutil
import threading

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Damaged, Keep, Mismatch, Refused, StorageError
from highcamp.storage.memory import MemoryStore


class Watched(MemoryStore):
    """Writes down what is published and what is withdrawn, in order, and what there was at each moment."""

    def __init__(self):
        super().__init__()
        self.log = []

    def publish(self, draft, target):
        """Write it down when it is done."""
        super().publish(draft, target)
        self.log.append(("add", target.rpartition("/")[2]))

    def withdraw(self, path, to):
        """Write it down before it is done."""
        self.log.append(("remove", path.rpartition("/")[2], threading.current_thread().name))
        super().withdraw(path, to)


def _flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 0xFF
    file.write_bytes(data)


def test_add_then_remove(train):
    """Removed first, a crash in between leaves nothing at all."""
    store = Watched()

    train([0.5, 0.4, 0.3], directory=store, keep=Keep(best=1, last=1))

    assert [entry[:2] for entry in store.log] == [
        ("add", "step-00000001"),
        ("add", "step-00000002"), ("remove", "step-00000001"),
        ("add", "step-00000003"), ("remove", "step-00000002"),
    ]  # fmt: skip


def test_remove_waits_for_writer():
    """A write that is queued and a removal that is not: the only copy goes before the next one is there."""
    entered, go_on = threading.Event(), threading.Event()

    class Slow(Watched):
        def create(self, path, chunks):
            if path.endswith("2/manifest.json"):
                entered.set()
                assert go_on.wait(60)
            super().create(path, chunks)

    store = Slow()
    with Checkpointer(store, keep=Keep(best=0, last=1), verbose=0) as checkpointer:
        checkpointer.save({"model": {"w": np.zeros(3)}}, step=1).wait()
        pending = checkpointer.save({"model": {"w": np.zeros(3)}}, step=2)
        assert entered.wait(60)
        assert [entry.step for entry in checkpointer.run.checkpoints] == [1]
        assert not pending.is_done
        go_on.set()
        pending.wait()

    assert [entry.step for entry in checkpointer.run.checkpoints] == [2]
    assert store.log[-1][2].startswith("highcamp-save")


@pytest.mark.parametrize(
    "keep", [Keep(best=1, last=0), Keep(best=2, last=0), Keep(best=0, last=1), Keep(best=1, last=1)]
)
def test_last_is_never_removed(train, keep):
    """With a quota for the best alone, the weights to go on from are removed."""
    run = train([0.1, 0.2, 0.9, 0.8, 0.85], directory=MemoryStore(), keep=keep).run

    assert run.last.epoch == 5
    assert run.best.epoch == 1


def test_best_is_never_removed(train):
    """Only the newest stay, and the best was another."""
    run = train([0.9, 0.1] + [0.5] * 10, directory=MemoryStore(), keep=Keep(best=0, last=2)).run

    assert [entry.epoch for entry in run.checkpoints] == [2, 11, 12]


def test_resumed_from_is_protected(train, where):
    """The checkpoint that a run was resumed from is what it falls back to if the first save after it is damaged."""
    train([0.3, 0.5], keep=Keep(best=1, last=1))

    seen = []
    run = train(
        [0.3, 0.5, 0.6, 0.7], keep=Keep(best=1, last=1),
        each=lambda checkpointer, _: seen.append([entry.epoch for entry in checkpointer.run.checkpoints]),
    ).run  # fmt: skip

    assert [entry.epoch for entry in run.checkpoints] == [1, 2, 4]
    assert all({1, 2} <= set(epochs) for epochs in seen)
    run = train([0.3, 0.5, 0.6, 0.7, 0.8], keep=Keep(best=1, last=1)).run
    assert [entry.epoch for entry in run.checkpoints] == [1, 4, 5]


def test_order_is_not_mtime(train, where):
    """After a copy, the newest file times are those of the oldest checkpoints."""
    train([0.5, 0.4, 0.3], keep=Keep(last=3))
    for at, name in enumerate(sorted(path.name for path in (where / "checkpoints").iterdir())):
        for path in (where / "checkpoints" / name, *(where / "checkpoints" / name).iterdir()):
            os.utime(path, (2_000_000_000 - at, 2_000_000_000 - at))

    run = train([0.5, 0.4, 0.3, 0.9], keep=Keep(best=1, last=1)).run

    assert run.history.attempts[-1].resumed_from == "step-00000003"
    assert [entry.epoch for entry in run.checkpoints] == [3, 4]


def test_damaged_ones_do_not_count(train, where):
    """Broken ones push out the whole ones, and nothing can be resumed from."""
    train([0.5, 0.4, 0.3, 0.2], keep=Keep(last=4))
    for step in (3, 4):
        _flip(where / f"checkpoints/step-0000000{step}/model.safetensors")

    run = train([0.5, 0.4, math.nan, math.nan, math.nan], keep=Keep(best=1, last=2)).run

    assert [entry.name for entry in run.checkpoints if entry.verify().ok] == [
        "step-00000002", "step-00000004.2", "step-00000005",
    ]  # fmt: skip
    assert {"step-00000003", "step-00000004"} <= {entry.name for entry in run.checkpoints}


def test_a_damaged_best_protects_the_next_best(train, where):
    """A best that cannot be loaded would keep its place, and the best that can would be removed."""
    train([0.1, 0.2, 0.5, 0.6], keep=Keep(best=1, last=9))
    (where / "checkpoints/step-00000001/model.safetensors").write_bytes(b"")

    run = train([0.1, 0.2, 0.5, 0.6, 0.7], keep=Keep(best=1, last=1)).run

    assert run.best.epoch == 2
    assert [entry.epoch for entry in run.checkpoints] == [1, 2, 4, 5]


def test_keep_does_remove(train):
    """Checkpoints of before a restart never go, and the disk fills up."""
    store = MemoryStore()
    for count in range(1, 8):
        run = train([0.5] * count, directory=store, keep=Keep(best=1, last=2)).run

    assert [entry.epoch for entry in run.checkpoints] == [1, 6, 7]
    assert [name for name in store.list("checkpoints") if name.startswith(".")] == []


def test_keep_every_epochs_and_steps():
    """Milestones stay for ever, whatever else is kept."""
    with Checkpointer(
        MemoryStore(), keep=Keep(best=0, last=1, every_epochs=3, every_steps=10), verbose=0
    ) as checkpointer:
        checkpointer.track(model={"w": np.zeros(3)})
        for _ in checkpointer.epochs(8):
            list(checkpointer.batches(range(5)))

    assert [(entry.epoch, entry.step) for entry in checkpointer.run.checkpoints] == [
        (2, 10), (3, 15), (4, 20), (6, 30), (8, 40),
    ]  # fmt: skip


def test_one_write_for_both(train):
    """Best and last are two full writes of the same weights."""
    store = Watched()

    run = train([0.5, 0.4, 0.3], directory=store, keep=Keep(best=1, last=1)).run

    assert [name for what, name, *_ in store.log if what == "add"] == [
        "step-00000001",
        "step-00000002",
        "step-00000003",
    ]
    assert run.plan().keep == {"step-00000003": ("best 1 of 1", "last 1 of 1", "only whole one")}


def test_pinned_ones_stay(train, where):
    """A pin set while training runs, by another process, must be seen by the next removal."""

    def pin(checkpointer, epoch):
        if epoch == 1:
            checkpointer._saver._writer.drain()
            highcamp.open(where).pin("epoch:1", "paper")

    run = train([0.5, 0.4, 0.3, 0.2, 0.1], keep=Keep(best=1, last=1), each=pin).run

    assert [entry.epoch for entry in run.checkpoints] == [1, 5]
    assert run.checkpoint("pin:paper").epoch == 1


STRIP = Keep(best=1, last=1, best_weights_only=True)


@pytest.fixture
def fit(where):
    """A training script with a model and an optimizer of PyTorch; the loss of each epoch is given."""
    torch = pytest.importorskip("torch")

    def script(losses, *, keep=STRIP, each=None, directory=None, **options):
        torch.manual_seed(5)
        model = torch.nn.Linear(64, 64)
        optimizer = torch.optim.Adam(model.parameters())
        options = {"monitor": "val_loss", "verbose": 0, **options}
        with Checkpointer(directory or where, keep=keep, **options) as checkpointer:
            checkpointer.track(model=model, optimizer=optimizer)
            for epoch in checkpointer.epochs(len(losses)):
                for _ in checkpointer.batches(range(2)):
                    optimizer.zero_grad()
                    model(torch.randn(8, 64)).square().mean().backward()
                    optimizer.step()
                checkpointer.log(val_loss=losses[epoch])
                if each is not None:
                    each(checkpointer, epoch, model)
        return checkpointer, {name: value.detach().clone() for name, value in model.state_dict().items()}

    return script


def test_a_best_gives_back_its_resume_state_and_nothing_else(fit, where):
    """Adam's state is twice the weights: it would be kept for ever beside a best that nobody resumes from."""
    seen = {}

    def remember(_, epoch, model):
        seen[epoch + 1] = {name: value.detach().clone() for name, value in model.state_dict().items()}

    checkpointer, last = fit([0.5, 0.2, 0.4, 0.3], each=remember)

    run = highcamp.open(where)
    assert [(entry.name, entry.objects) for entry in run.checkpoints] == [
        ("step-00000004.2", ("model",)),
        ("step-00000008", ("model", "optimizer", "progress")),
    ]
    assert sorted(path.name for path in (where / "checkpoints/step-00000004.2").iterdir()) == [
        "manifest.json", "model.safetensors", "state.json",
    ]  # fmt: skip
    assert run.best.size_bytes < 0.4 * run.last.size_bytes
    assert all(np.array_equal(run.best.load()[name], value.numpy()) for name, value in seen[2].items())
    assert all(np.array_equal(run.last.load()[name], value.numpy()) for name, value in last.items())
    assert checkpointer.best == run.best
    assert list(run.trash) == []


def test_resume_is_as_exact_as_with_all_of_the_best(fit, where, tmp_path):
    """What is given back must be what nobody needs."""
    losses = [0.5, 0.2, 0.4, 0.3, 0.6, 0.1]
    _, expected = fit(losses, directory=tmp_path / "whole")
    fit(losses[:4])

    checkpointer, found = fit(losses)

    assert all(np.array_equal(found[name].numpy(), value.numpy()) for name, value in expected.items())
    assert checkpointer.run.history.attempts[-1].resumed_from == "step-00000008"
    assert [entry.name for entry in checkpointer.run.checkpoints] == ["step-00000008", "step-00000012"]


def test_the_best_weights_can_be_put_back(fit, where):
    """The one thing a best is kept for."""
    found = {}

    def restore(checkpointer, epoch, model):
        if epoch == 3:
            assert checkpointer.restore("best").name == "step-00000004.2"
            found.update({name: value.detach().clone() for name, value in model.state_dict().items()})

    run = fit([0.5, 0.2, 0.4, 0.3], each=restore)[0].run

    assert all(np.array_equal(run.best.load()[name], value.numpy()) for name, value in found.items())


def test_the_one_resumed_from_gives_back_later(fit):
    """It is what the attempt falls back to, whole; when a later attempt has begun from another one, it is a best like any."""
    fit([0.5, 0.2])
    run = fit([0.5, 0.2, 0.4])[0].run
    assert run.resumed_from == run.best.name == "step-00000004"
    assert run.best.objects == ("model", "optimizer", "progress")

    run = fit([0.5, 0.2, 0.4, 0.6])[0].run

    assert (run.best.name, run.best.objects) == ("step-00000004.2", ("model",))


def test_a_pinned_best_keeps_everything(fit):
    """What a person has named stays as it was named."""

    def pin(checkpointer, epoch, _):
        if epoch == 1:
            checkpointer._saver.raise_failed(wait=True)
            checkpointer.run.pin("epoch:1", "paper")

    run = fit([0.2, 0.5, 0.4, 0.6], each=pin)[0].run
    assert run.best == run.checkpoint("pin:paper")
    assert run.best.objects == ("model", "optimizer", "progress")
    run.unpin("paper")

    run = fit([0.2, 0.5, 0.4, 0.6, 0.7])[0].run

    assert run.best.objects == ("model",)


def test_training_does_not_resume_from_weights_alone(fit, where, capsys):
    """A model with a fresh optimizer trains on without a word, and is another run from then on."""

    def pin(checkpointer, epoch, _):
        if epoch == 1:
            checkpointer._saver.raise_failed(wait=True)
            checkpointer.run.pin("epoch:1", "first")

    fit([0.5, 0.2, 0.4, 0.6], each=pin)
    shutil.rmtree(where / "checkpoints/step-00000008")
    capsys.readouterr()

    run = fit([0.5, 0.2, 0.4], verbose=1, keep=Keep(best=1, last=9))[0].run

    said = capsys.readouterr().err
    assert "step-00000004.2 is passed over and left as it is: it holds weights alone, so training cannot" in said
    assert run.history.attempts[-1].resumed_from == "step-00000002"
    assert [entry.name for entry in run.checkpoints] == [
        "step-00000002", "step-00000004.2", "step-00000004", "step-00000006",
    ]  # fmt: skip


def test_where_only_weights_are_left_it_is_said(fit, where):
    """To begin from the start over the best weights, or to go on without an optimizer, is for a person to decide."""
    torch = pytest.importorskip("torch")
    fit([0.5, 0.2, 0.4])
    file = where / "checkpoints/step-00000006/model.safetensors"
    _flip(file)
    with pytest.raises(
        Damaged, match=r"none is whole: step-00000006; restore\(.best.\) or restore\(.step-00000004.2.\)"
    ):
        fit([0.5, 0.2, 0.4, 0.6])
    shutil.rmtree(where / "checkpoints/step-00000006")
    before = sorted(path.name for path in (where / "checkpoints").iterdir())

    with pytest.raises(Refused, match="nothing that training could resume from: step-00000004.2 holds weights alone"):
        fit([0.5, 0.2, 0.4, 0.6])

    assert sorted(path.name for path in (where / "checkpoints").iterdir()) == before
    model = torch.nn.Linear(64, 64)
    checkpointer = Checkpointer(where, monitor="val_loss", verbose=0)
    checkpointer.track(model=model, optimizer=torch.optim.Adam(model.parameters()))
    assert checkpointer.restore("best").name == "step-00000004.2"
    assert np.array_equal(model.weight.detach().numpy(), highcamp.open(where).best.load()["weight"])


def test_details_are_said(fit, train, where, tmp_path, capsys):
    """Who wonders where the optimizer of the best is, or why it is still there, asks for details."""
    fit([0.2, 0.5, 0.4], verbose=2)
    said = capsys.readouterr().err
    assert "step-00000002 gave back its resume state; its weights are step-00000002.2" in said
    assert "removed step-00000002" in said

    train([0.2, 0.5, 0.4, 0.6], keep=STRIP, verbose=2, directory=tmp_path / "dicts")

    said = capsys.readouterr().err
    assert said.count("step-00000001: keeps its resume state, because its manifest does not tell weights from the") == 1


def test_a_best_that_is_damaged_is_said_and_does_not_end_training(fit, where, capsys):
    """A flipped bit in an old best must cost neither the epochs to come nor what is left of it."""

    def harm(checkpointer, epoch, _):
        if epoch == 1:
            checkpointer._saver.raise_failed(wait=True)
            _flip(where / "checkpoints/step-00000002/state.json")

    run = fit([0.2, 0.5, 0.4, 0.6], each=harm, keep=Keep(best=1, last=2, best_weights_only=True))[0].run

    assert "step-00000002/state.json differs from its digest" in capsys.readouterr().err
    assert [entry.name for entry in run.checkpoints] == ["step-00000002", "step-00000006", "step-00000008"]
    assert run.history.attempts[-1].ended == "complete"


def test_the_next_best_stays_for_a_best_that_is_found_damaged(fit, where, capsys):
    """Removed in the same breath, the second best would be missed as soon as the best turns out to be lost."""
    fit([0.2, 0.3, 0.6, 0.5], keep=Keep(best=1, last=9))
    _flip(where / "checkpoints/step-00000002/state.json")

    run = fit([0.2, 0.3, 0.6, 0.5, 0.7])[0].run

    assert "step-00000002/state.json differs from its digest" in capsys.readouterr().err
    assert [(entry.name, len(entry.objects)) for entry in run.checkpoints] == [
        ("step-00000002", 3), ("step-00000004.2", 1), ("step-00000008", 3), ("step-00000010", 3),
    ]  # fmt: skip


def test_a_full_disk_does_not_keep_the_rest_from_going(where):
    """A few bytes are written before the best gives back; where there is no room for them, removing makes it."""

    class Full(MemoryStore):
        def create(self, path, chunks):
            if "step-00000001.2/" in path:
                raise StorageError(f"create {path}: no space left on device")
            super().create(path, chunks)

    store, parts = Full(), {"params": {"w": np.zeros(3)}, "opt_state": {"m": np.zeros(3)}}
    for keep, steps in ((Keep(best=1, last=9), (1, 2, 3)), (STRIP, (4,))):
        with Checkpointer(store, monitor="val_loss", keep=keep, verbose=0, on_error="warn") as checkpointer:
            checkpointer.restore(like=parts)
            for step in steps:
                checkpointer.save(parts, step=step, metrics={"val_loss": step / 10})

    assert [entry.name for entry in checkpointer.run.checkpoints] == ["step-00000001", "step-00000003", "step-00000004"]
    assert len(checkpointer.run.best.objects) == 3


def test_passed_state_gives_back_too(where):
    """With JAX, parts are told by their names."""
    state = {"params": {"w": np.arange(3.0)}, "ema_params": {"w": np.arange(3.0)}, "opt_state": {"m": np.zeros(3)}}
    with Checkpointer(where, monitor="val_loss", keep=STRIP, verbose=0) as checkpointer:
        for step, loss in ((1, 0.1), (2, 0.2)):
            checkpointer.save(state, step=step, metrics={"val_loss": loss})

    best = highcamp.open(where).best
    assert (best.name, best.objects) == ("step-00000001.2", ("params", "ema_params"))
    with Checkpointer(where, monitor="val_loss", keep=STRIP, verbose=0) as checkpointer:
        checkpointer.restore(like=state)
        now = {name: {"w": np.full(3, 9.0)} for name in best.objects} | {"opt_state": {"m": np.full(3, 7.0)}}
        found = checkpointer.restore("best", like=now)
        with pytest.raises(Mismatch, match="params: only in the checkpoint"):
            checkpointer.restore("best", like={"ema_params": now["ema_params"], "opt_state": now["opt_state"]})
        with pytest.raises(Mismatch, match="batch_stats: only here"):
            checkpointer.restore("best", like={**now, "batch_stats": {"mean": np.zeros(3)}})
        with pytest.raises(Mismatch, match="rng: only here"):
            checkpointer.restore("last", like={**now, "rng": {"m": np.zeros(3)}})
    assert list(found) == list(now)
    assert found["params"]["w"].tolist() == [0, 1, 2]
    assert found["opt_state"] is now["opt_state"]  # what was given back comes from what is there


def test_foreign_files_stay(train, where):
    """What a person has put among the checkpoints is removed with them, or in their place."""
    train([0.5, 0.4, 0.3])
    foreign = where / "checkpoints" / "step-00000001.bak"
    shutil.copytree(where / "checkpoints/step-00000002", where / "checkpoints" / "step-00000009")
    (where / "checkpoints" / "step-00000009" / "manifest.json").unlink()
    foreign.mkdir()
    (foreign / "model.pt").write_bytes(b"mine")
    (where / "checkpoints" / "step-0000000x").write_text("mine")

    run = train([0.5, 0.4, 0.3, 0.2, 0.1], keep=Keep(best=1, last=1)).run

    assert (foreign / "model.pt").read_bytes() == b"mine"
    assert (where / "checkpoints" / "step-0000000x").read_text() == "mine"
    assert (where / "checkpoints" / "step-00000009" / "model.safetensors").exists()
    assert run.last.epoch == 5


def test_leftovers_are_swept(train, where):
    """Half-written saves of dead processes fill the disk, one for each crash."""
    train([0.5])
    pending = where / "checkpoints" / ".pending-step-00000002-0123456789abcdef"
    doomed = where / "checkpoints" / ".trash-step-00000000-01234567-doomed"
    kept = where / "checkpoints" / ".trash-step-00000000-89abcdef"
    for directory in (pending, doomed, kept):
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"x" * 100)

    train([0.5, 0.4])

    assert not pending.exists()
    assert not doomed.exists()
    assert kept.exists()  # removed by a person, who may want it back
