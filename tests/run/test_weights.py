"""A best that gives back its resume state: what is written, what is linked, what is left, and what it is told from."""

from __future__ import annotations

import json
import math
import shutil

import msgspec
import numpy as np
import pytest
import torch

import highcamp
from highcamp import Checkpointer, CheckpointNotFound, Every, Keep, Monitor, Refused, RunLocked, StorageError
from highcamp.core.manifest import encode
from highcamp.run import live, weights
from highcamp.run.attempt import OngoingAttempt
from highcamp.run.run import Run
from highcamp.storage.local import LocalStore
from highcamp.storage.memory import MemoryStore
from highcamp.testing import FaultyStore
from highcamp.training.snapshot import Snapshot

KEEP = Keep(best=1, last=1, best_weights_only=True)
ALL = Keep(best=1, last=100)
PARAMS, MOMENTS = 250_000, 500_000  # bytes


def state(step):
    """A passed state: its weights, and twice as much for an optimizer."""
    rng = np.random.default_rng(step)
    return {
        "params": {"kernel": rng.random(PARAMS // 8)},
        "opt_state": {"moments": rng.random(MOMENTS // 8), "count": step},
    }


def save_all(place, losses, *, keep=ALL, begin=1, **options):
    """Save one step for each loss, from the newest checkpoint on; returns the run."""
    with Checkpointer(place, monitor="val_loss", keep=keep, verbose=0, **options) as checkpointer:
        checkpointer.restore(like=state(0))
        for step, loss in enumerate(losses, start=begin):
            checkpointer.save(state(step), step=step, epoch=step, metrics={} if loss is None else {"val_loss": loss})
    return checkpointer.run


def names(run):
    """Of all checkpoints, in their order."""
    return [entry.name for entry in run.checkpoints]


@pytest.fixture
def made(where):
    """Three steps, everything kept; the second is the best."""
    return save_all(where, [0.5, 0.2, 0.3])


def disk_bytes(directory):
    """What the files below it take, each counted once."""
    found = {path.stat().st_ino: path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file()}
    return sum(found.values())


# What it comes to


def test_the_bytes_come_free_and_no_weights_are_written_again(where):
    """Stripped by copying, each best would cost its weights a second time, and an interrupted copy the best itself."""
    store = FaultyStore(LocalStore(where), fail_at=0)
    with Checkpointer(store, monitor="val_loss", keep=KEEP, verbose=0) as checkpointer:
        checkpointer.save(state(1), step=1, metrics={"val_loss": 0.2}).wait()
        file = where / "checkpoints/step-00000001/params.safetensors"
        known, digests = file.stat(), highcamp.open(where).best.files
        alone = disk_bytes(where / "checkpoints")
        checkpointer.save(state(2), step=2, metrics={"val_loss": 0.3})

    best = highcamp.open(where).best
    now = (where / "checkpoints/step-00000001.2/params.safetensors").stat()
    assert best.name == "step-00000001.2"
    assert (now.st_ino, now.st_mtime_ns, now.st_nlink) == (known.st_ino, known.st_mtime_ns, 1)
    assert [operation for operation in store.operations if "step-00000001.2" in operation] == [
        "draft checkpoints/step-00000001.2",
        *(entry for entry in store.operations if ".pending-step-00000001.2" in entry),
    ]
    written = [entry for entry in store.operations if ".pending-step-00000001.2" in entry]
    assert [(entry.split()[0], entry.rpartition("/")[2]) for entry in written] == [
        ("link", "params.safetensors"),
        ("create", "state.json"),
        ("create", "manifest.json"),
        ("publish", "step-00000001.2"),
    ]
    assert disk_bytes(where / "checkpoints") < 2 * alone - MOMENTS
    assert [entry for entry in digests if entry.name == "params.safetensors"] == [
        entry for entry in best.files if entry.name == "params.safetensors"
    ]
    assert best.verify().ok
    assert np.array_equal(best.load("params")["kernel"], state(1)["params"]["kernel"])
    assert np.array_equal(best.state("params")["kernel"], state(1)["params"]["kernel"])


def test_the_facts_are_those_of_the_old_one(where):
    """Weights of which nobody knows the epoch, the values and the origin are worth little."""
    made = save_all(where, [0.5, 0.2])
    old = made.best
    with Checkpointer(where, monitor="val_loss", keep=ALL, verbose=0) as checkpointer:
        checkpointer.restore(like=state(0))
        checkpointer.log(
            step=2, val_accuracy=0.9, grad_norm=math.nan
        )  # measured later, by an attempt that went on from it
        checkpointer.save(state(3), step=3, epoch=3, metrics={"val_loss": 0.4})
        checkpointer.save(state(4), step=4, epoch=4, metrics={"val_loss": 0.4})
    save_all(where, [0.4], begin=5)

    made.prune(KEEP)

    best = made.best
    assert best.name == "step-00000002.2"
    assert repr(best.metrics) == repr({"val_loss": 0.2, "val_accuracy": 0.9, "grad_norm": math.nan})
    assert best.manifest.nonfinite == {"grad_norm": "nan"}
    kept = ("run_id", "step", "epoch", "batch", "attempt", "owner", "parent", "created_at", "versions")
    assert all(getattr(best.manifest, name) == getattr(old.manifest, name) for name in kept)
    assert (best.manifest.weights_of, best.manifest.is_weights_only) == (old.sequence, True)
    assert best.sequence > made.last.sequence
    assert best.objects == ("params",)
    document = json.loads((where / "checkpoints/step-00000002.2/manifest.json").read_text("utf-8"))
    assert document["weights_of"] == old.sequence
    assert document["objects"]["params"]["weights"] is True


def test_a_metric_that_comes_later_still_counts(where):
    """A validation that runs behind the training must find its checkpoint, whatever became of it."""
    with Checkpointer(where, monitor="val_loss", keep=KEEP, verbose=0) as checkpointer:
        for step, loss in ((1, 0.2), (2, 0.3), (3, 0.4)):
            checkpointer.save(state(step), step=step, metrics={"val_loss": loss}).wait()
        checkpointer.log(step=1, val_accuracy=0.8)

    best = highcamp.open(where).best
    assert (best.name, best.metrics) == ("step-00000001.2", {"val_loss": 0.2, "val_accuracy": 0.8})


def attempt_from(store, reference, commits, *, behind=None):
    """An attempt that goes on from a checkpoint: [(step, metrics when it is committed, metrics of the step, later)].

    behind: what it logs first, of earlier steps.
    """
    attempt = OngoingAttempt(store, monitor=Monitor("val_loss"), keep=ALL, every=Every(epochs=1))
    attempt.note(tracked=["opt_state", "params"])
    attempt.start(attempt.run.checkpoint(reference) if reference else None)
    for step, metrics in (behind or {}).items():
        attempt.log(step, step, metrics)
    for step, metrics, later in commits:
        shot = Snapshot().take(live.capture_state(state(step)))
        shot.fill()
        facts = attempt.manifest(step=step, epoch=step, batch=0, metrics=metrics, versions={})
        attempt.commit(facts, shot.parts)
        attempt.log(step, step, {**metrics, **later})
    attempt.end("closed", 0, 0)


@pytest.mark.parametrize("keep", [Keep(best=1, last=4, best_weights_only=True), ALL], ids=["stripped", "whole"])
def test_a_step_saved_anew_by_a_later_attempt(keep):
    """The weights are taken last, so their sequence is the highest: they must not pass for the newer commit of the step."""
    store = MemoryStore()
    attempt_from(store, None, [(1, {"val_loss": 0.5}, {}), (2, {"val_loss": 0.2}, {"recall": 0.1})])
    attempt_from(store, "step:1", [(2, {"val_loss": 0.2}, {"recall": 0.2}), (3, {"val_loss": 0.7}, {})])
    attempt_from(store, "step:3", [(4, {"val_loss": 0.8}, {})])
    attempt_from(store, "step:4", [(5, {"val_loss": 0.9}, {})])
    # What is behind an attempt and was committed twice: of the newer one, the older was left behind.
    attempt_from(store, "step:5", [], behind={2: {"precision": 0.9}})
    run = Run(store)

    run.prune(keep)

    (older, newer) = (entry for entry in run.checkpoints if entry.step == 2)
    assert run.best == older  # ties keep the older
    assert (older.attempt, older.metrics) == (1, {"val_loss": 0.2, "recall": 0.1})
    assert (newer.attempt, newer.metrics) == (2, {"val_loss": 0.2, "recall": 0.2, "precision": 0.9})
    assert older.manifest.is_weights_only == keep.best_weights_only
    assert not newer.manifest.is_weights_only
    assert run.checkpoint("step:2") == run.checkpoint("epoch:2") == newer


def test_weights_taken_from_the_older_of_two_do_not_hide_the_newer(where):
    """`step:2` means the newest state of that step, and later rows belong to it, also when the older one was stripped."""
    with Checkpointer(where, monitor="val_loss", keep=ALL, verbose=0) as checkpointer:
        for step, loss in ((1, 0.9), (2, 0.1), (2, 0.5), (3, 0.6)):
            checkpointer.save(state(step), step=step, epoch=step, metrics={"val_loss": loss}).wait()
    run = highcamp.open(where)
    assert names(run) == ["step-00000001", "step-00000002", "step-00000002.2", "step-00000003"]

    run.prune(Keep(best=2, last=1, best_weights_only=True))

    assert [(entry.name, entry.manifest.weights_of) for entry in run.checkpoints] == [
        ("step-00000002.3", 2),
        ("step-00000002.4", 3),
        ("step-00000003", msgspec.UNSET),
    ]
    assert run.best.name == "step-00000002.3"
    assert run.checkpoint("step:2").name == run.checkpoint("epoch:2").name == "step-00000002.4"


def test_a_name_that_was_free_again_brings_no_metrics_with_it():
    """What an attempt measured on the checkpoint that it went on from is no value of weights that have its name now."""
    store = MemoryStore()
    attempt_from(store, None, [(2, {"val_loss": 0.2}, {}), (2, {"val_loss": 0.3}, {})])
    attempt_from(store, "step-00000002.2", [(3, {"val_loss": 0.8}, {})], behind={2: {"recall": 0.9}})
    attempt_from(store, "step-00000003", [(4, {"val_loss": 0.9}, {})])
    run, keep = Run(store), Keep(best=2, last=1, best_weights_only=True)
    run.pin("step-00000002", "first")
    run.prune(keep)
    assert run.checkpoint("step-00000002.3").metrics == {"val_loss": 0.3, "recall": 0.9}
    run.unpin("first")

    run.prune(keep)

    assert run.best.name == "step-00000002.2"
    assert run.best.metrics == {"val_loss": 0.2}


# By hand


def test_pruned_by_hand(made, where):
    """A run that is finished gives back as much as one that trains."""
    plan = made.prune(KEEP, dry_run=True)
    assert (plan.strip, plan.remove) == (("step-00000002",), ("step-00000001",))
    assert names(made) == ["step-00000001", "step-00000002", "step-00000003"]

    made.prune(KEEP)

    assert names(made) == ["step-00000002.2", "step-00000003"]
    assert (made.best.name, made.last.name) == ("step-00000002.2", "step-00000003")
    assert sorted(made.trash.values()) == ["step-00000001", "step-00000002"]
    assert (where / "checkpoints/step-00000002.2/params.safetensors").stat().st_nlink == 2  # the trash has it too
    made.empty_trash()
    assert (where / "checkpoints/step-00000002.2/params.safetensors").stat().st_nlink == 1
    assert made.best.verify().ok
    assert not (where / "owner.json").exists()
    assert made.prune(KEEP).strip == ()
    assert names(made) == ["step-00000002.2", "step-00000003"]


def test_brought_back_it_is_whole_again(made):
    """A person who wants the optimizer of the best back gets it, for as long as something keeps it."""
    made.prune(KEEP)

    made.undelete("step-00000002")

    assert names(made) == ["step-00000002", "step-00000002.2", "step-00000003"]
    assert made.best.name == "step-00000002"  # the older of two that are the same
    assert made.checkpoint("step:2").name == made.checkpoint("epoch:2").name == "step-00000002"
    assert made.plan(ALL).remove == ("step-00000002.2",)
    assert made.plan(KEEP).remove == ("step-00000002",)
    made.pin("step-00000002", "paper")
    assert made.prune(KEEP).remove == ("step-00000002.2",)
    assert np.array_equal(made.best.load("opt_state")["moments"], state(2)["opt_state"]["moments"])


def test_weights_alone_beside_it_take_no_metrics_from_the_whole_one():
    """Two of one step are two states, to the later of which later rows belong; these two are one."""
    store = MemoryStore()
    attempt_from(store, None, [(step, {"val_loss": loss}, {}) for step, loss in ((1, 0.2), (2, 0.3), (3, 0.4))])
    attempt_from(store, "step:3", [], behind={1: {"recall": 0.9}})
    run = Run(store)
    run.prune(Keep(best=1, last=2, best_weights_only=True))

    run.undelete("step-00000001")

    metrics = {"val_loss": 0.2, "recall": 0.9}
    assert [(entry.step, entry.metrics) for entry in run.checkpoints][:2] == [(1, metrics), (1, metrics)]


def test_nobody_strips_a_run_that_trains(made, where):
    """Two processes that write checkpoints give out the same numbers, and one sweeps what the other is writing."""
    with Checkpointer(where, monitor="val_loss", keep=ALL, verbose=0) as checkpointer:
        checkpointer.restore(like=state(0))
        with pytest.raises(RunLocked, match="is being written by process"):
            highcamp.open(where).prune(KEEP)
        assert names(made) == ["step-00000001", "step-00000002", "step-00000003"]
        highcamp.open(where).prune(Keep(best=1, last=2))  # nothing is written for this

    assert names(made) == ["step-00000002", "step-00000003"]


def test_a_store_that_cannot_link_copies(made, where):
    """On a file system without links the weights are written again; they must not be lost for that."""

    class Unlinked(LocalStore):
        def link(self, source, path):
            raise StorageError(f"link {source} {path}: not supported")

    Run(Unlinked(where)).prune(KEEP)

    best = highcamp.open(where).best
    assert best.name == "step-00000002.2"
    assert best.verify().ok
    assert (where / "checkpoints/step-00000002.2/params.safetensors").stat().st_nlink == 1


def test_altered_weights_are_not_copied(made, where):
    """A copy with a new digest would turn damage into a whole best."""

    class Unlinked(LocalStore):
        def link(self, source, path):
            raise StorageError(f"link {source} {path}: not supported")

    file = where / "checkpoints/step-00000002/params.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    with pytest.raises(highcamp.Damaged, match="differs from its digest, so it was not copied"):
        Run(Unlinked(where)).prune(KEEP)

    assert "step-00000002" in names(made)
    assert [path.name for path in (where / "checkpoints").glob(".pending-*")] == []


def test_what_is_not_whole_afterwards_is_not_trusted(made, where):
    """Another process may remove what we have just written; then the old one must stay."""

    class Meddled(LocalStore):
        def publish(self, draft, target):
            super().publish(draft, target)
            (where / target / "params.safetensors").unlink()

    with pytest.raises(StorageError, match=r"step-00000002.2 is not whole, .*; step-00000002 stays as it is"):
        Run(Meddled(where)).prune(KEEP)

    assert made.best.name == "step-00000002"
    assert made.best.verify().ok


def test_a_memory_store_does_the_same():
    """The reference against which other stores are tested."""
    run = save_all(MemoryStore(), [0.5, 0.2, 0.3])

    run.prune(KEEP)

    assert names(run) == ["step-00000002.2", "step-00000003"]
    assert run.best.verify().ok


# Last


def test_weights_alone_are_never_the_last(made, where):
    """`last` is what training resumes from, wherever it is asked."""
    made.pin("step:1", "first")
    made.prune(KEEP)
    shutil.rmtree(where / "checkpoints/step-00000003")

    assert (made.last.name, made.checkpoint("last").name) == ("step-00000001", "step-00000001")
    with pytest.raises(CheckpointNotFound, match="has no checkpoint 'last~1'"):
        made.checkpoint("last~1")
    with pytest.raises(Refused, match="is protected: the last, pin:first"):
        made.remove("step:1")
    made.unpin("first")
    shutil.rmtree(where / "checkpoints/step-00000001")
    assert (made.last, made.best.name) == (None, "step-00000002.2")
    assert not made.is_complete
    with pytest.raises(CheckpointNotFound, match="there are best, step-00000002.2$"):
        made.checkpoint("last")


# Which objects are weights


def test_objects_of_torch():
    """Told by what they are: a model under any name is one, and nothing else is because of its name."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    average = torch.optim.swa_utils.AveragedModel(model)
    others = {
        "model": {"w": np.zeros(2)},
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
        "scaler": torch.amp.GradScaler("cpu"),
        "generator": torch.Generator(),
        "loader": torch.utils.data.DataLoader(range(4)),
        "dice": np.random.default_rng(1),
    }

    assert [live.capture(name, obj).weights for name, obj in (("a", model), ("b", average))] == [True, True]
    assert [name for name, obj in others.items() if live.capture(name, obj).weights] == []


def test_parts_of_a_passed_state():
    """Trees of arrays have no type that tells; their names in Flax, Keras and their examples do."""
    named = ["params", "model", "variables", "weights", "batch_stats", "ema", "ema_params", "params_ema"]
    others = ["opt_state", "optimizer", "rng", "state", "model_state", "schema", "emat", "step_count"]

    flats = live.capture_state({name: {"a": np.zeros(2)} for name in [*named, *others]})

    assert [name for name, flat in flats.items() if flat.weights] == named
    assert not live.capture_state([np.zeros(2)])["state"].weights


def test_the_flag_is_a_fact_of_the_manifest(made):
    """Whoever strips years later must not guess."""
    flags = {name: found.weights for name, found in made.last.manifest.objects.items()}

    assert flags == {"params": True, "opt_state": False, "progress": False}
    assert made.last.manifest.is_divisible


def _without_flags(where):
    for file in where.glob("checkpoints/step-*/manifest.json"):
        manifest = highcamp.open(where).checkpoint(file.parent.name).manifest
        objects = {
            name: msgspec.structs.replace(found, weights=msgspec.UNSET) for name, found in manifest.objects.items()
        }
        file.write_bytes(encode(msgspec.structs.replace(manifest, objects=objects)))


def test_without_the_flag_nothing_is_stripped(made, where):
    """Manifests of before do not say what is weights; a guess could cost the weights."""
    _without_flags(where)
    assert "weights" not in (where / "checkpoints/step-00000002/manifest.json").read_text("utf-8")

    plan = highcamp.open(where).prune(KEEP)

    assert (plan.strip, plan.indivisible) == ((), ("step-00000002",))
    assert highcamp.open(where).best.objects == ("params", "opt_state", "progress")


@pytest.mark.parametrize("parts", [("params", "ema"), ("opt_state", "rng")], ids=["all", "none"])
def test_where_all_or_none_are_weights_nothing_is_stripped(made, parts):
    """A checkpoint without anything in it, or a second one of the same, helps nobody."""
    manifest = made.best.manifest
    flags = live.capture_state({name: {"a": np.zeros(2)} for name in parts})
    objects = {
        name: msgspec.structs.replace(manifest.objects["params"], weights=flat.weights) for name, flat in flags.items()
    }

    assert not msgspec.structs.replace(manifest, objects=objects).is_divisible


def test_the_policy_is_recorded(where):
    """`highcamp ls` and the next prune by hand must know what was asked for."""
    run = save_all(where, [0.5], keep=KEEP)
    assert json.loads((where / "run.json").read_text("utf-8"))["keep"] == {
        "best": 1,
        "last": 1,
        "best_weights_only": True,
    }
    assert highcamp.open(where).keep == KEEP

    save_all(where, [0.4], begin=2)

    assert json.loads((where / "run.json").read_text("utf-8"))["keep"] == {"best": 1, "last": 100}
    assert run.keep == ALL
    document = json.loads((where / "run.json").read_text("utf-8"))
    for wrong in ({"best": True}, {"last": True}, {"best_weights_only": 1}, {"best_weights_only": None}):
        (where / "run.json").write_text(json.dumps({**document, "keep": wrong}))
        with pytest.raises(highcamp.Damaged, match=r"is no run\.json"):
            _ = highcamp.open(where).keep


def test_taking_needs_the_state(made, where):
    """`state.json` says where each tensor hangs: altered, it must stop the work before anything goes."""
    file = where / "checkpoints/step-00000002/state.json"
    file.write_bytes(file.read_bytes().replace(b"kernel", b"kernle"))

    with pytest.raises(highcamp.Damaged, match=r"state\.json differs from its digest"):
        weights.take(made.best, 9)

    assert names(made) == ["step-00000001", "step-00000002", "step-00000003"]
    assert made.rank(Monitor("val_loss"))[0].name == "step-00000002"
