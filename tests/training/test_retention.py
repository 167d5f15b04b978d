"""Retention in a loop: what stays while training goes on, and when the rest goes."""

from __future__ import annotations

import math
import os
import shutil
import threading

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Keep
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
