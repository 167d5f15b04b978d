"""A run as it is on disk: opened to look at, pinned, pruned, taken out of the trash."""

from __future__ import annotations

import json
import math
import os
import shutil
from datetime import UTC, datetime

import msgspec
import numpy as np
import pytest

import highcamp
from highcamp import (
    CheckpointNotFound,
    Damaged,
    InvalidArgument,
    Keep,
    Mismatch,
    Monitor,
    Refused,
    RunNotFound,
    Unreadable,
)
from highcamp.core.manifest import decode, encode
from highcamp.run.history import append_events, log_event
from highcamp.storage.memory import MemoryStore

NAMES = ["step-00000010", "step-00000020", "step-00000030", "step-00000040"]


class ReadOnly:
    """A store that cannot be written to: whatever is not reading is an error."""

    def __init__(self, store):
        self.inner, self.url, self.list, self.open = store, store.url, store.list, store.open
        self.read, self.read_each = store.read, store.read_each

    def size(self, path):
        """Pass on."""
        return self.inner.size(path)

    def publish(self, *_):
        """Not for a reader."""
        raise AssertionError("a reader has written")

    create = draft = withdraw = remove = replace = append = publish


def _files(where):
    return {
        path.relative_to(where): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in where.rglob("*")
        if path.is_file()
    }


def _flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 0xFF
    file.write_bytes(data)


# Looking


def test_a_reader_writes_nothing(run, where):
    """Looking at a run that trains, or at one on a read-only disk, must leave no trace and need no lock."""
    before = _files(where)
    reader = highcamp.open(ReadOnly(run.store))

    assert reader.best.epoch == 2
    assert reader.last.verify().ok
    assert all(found.ok for found in reader.verify())
    assert reader.checkpoint("best~1").load()["dense/bias"][0] == 4
    assert len(reader.history.rows) == 4
    assert reader.plan(Keep(last=1)).remove == ("step-00000010", "step-00000030")
    assert reader.prune(Keep(last=1), dry_run=True).remove
    reader.best.restore(model={"dense": {"kernel": np.zeros((2, 3), np.float32), "bias": np.zeros(3)}, "rate": 0.0})
    assert (reader.settings, reader.pins, reader.trash, reader.unreadable, reader.is_complete) == (
        run.settings, {}, {}, [], True,
    )  # fmt: skip
    assert reader.size_bytes == sum(entry.size_bytes for entry in run.checkpoints)
    assert _files(where) == before


def test_repr_says_where_it_is(run, where):
    """`<highcamp.run.run.Run object at 0x7f…>` tells nobody anything."""
    assert repr(run) == f"Run({str(where)!r})"
    assert repr(run.best) == "Checkpoint(name='step-00000020', metrics={'val_loss': 0.2, 'loss': 1.0})"


def test_a_checkpoint_knows_its_facts(run, where):
    """What can be told of a checkpoint without reading its tensors."""
    best = run.best

    assert (best.name, best.step, best.epoch, best.batch, best.attempt, best.sequence) == (NAMES[1], 20, 2, 0, 1, 2)
    assert best.metrics == {"val_loss": 0.2, "loss": 1.0}
    assert best.path == f"{where}/checkpoints/step-00000020"
    assert best.parent == "step-00000010"
    assert abs((datetime.now(UTC) - best.created_at).total_seconds()) < 3600
    assert best.created_at.tzinfo is UTC or best.created_at.utcoffset().total_seconds() == 0
    assert best.objects == ("model", "steps", "progress")
    assert best.versions["numpy"] == np.__version__
    on_disk = sum(
        path.stat().st_size for path in (where / "checkpoints" / best.name).iterdir() if path.name != "manifest.json"
    )
    assert best.size_bytes == on_disk


def test_what_is_not_there_is_said(run, tmp_path):
    """An empty directory, or a mistyped one, is no run."""
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere", MemoryStore()):
        with pytest.raises(RunNotFound, match="there is no run at"):
            highcamp.open(place)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(CheckpointNotFound, match="holds no object 'optimizer'; it holds model, steps, progress"):
        run.last.load("optimizer")


def test_loaded_arrays_are_read_only(run):
    """A write into a mapped file would change the checkpoint."""
    arrays = run.last.load()

    assert set(arrays) == {"dense/kernel", "dense/bias"}
    with pytest.raises(ValueError, match="read-only"):
        arrays["dense/bias"][0] = 9
    copied = run.last.load(copy=True)
    copied["dense/bias"][0] = 9
    assert run.last.verify().ok
    shutil.rmtree(run.last.path)
    assert arrays["dense/bias"][0] == 4


def test_restore_of_one_object(run):
    """Weights for evaluation, without the rest."""
    model = {"dense": {"kernel": np.zeros((2, 3), np.float32), "bias": np.zeros(3)}, "rate": 0.0}

    run.best.restore(model=model)

    assert (model["dense"]["kernel"][0, 0], model["rate"]) == (2, 0.5)
    with pytest.raises(Mismatch, match="model/dense/bias: shape"):
        run.best.restore(model={"dense": {"kernel": np.zeros((2, 3), np.float32), "bias": np.zeros(4)}, "rate": 0.0})
    with pytest.raises(InvalidArgument, match="was given no objects"):
        run.best.restore()
    with pytest.raises(CheckpointNotFound):
        run.best.restore(model=model, optimizer={})


def test_state_is_plain_data(run):
    """Any tool, any language: nothing of ours is needed to read it."""
    state = run.best.state("model")

    assert list(state) == ["dense", "rate"]
    assert state["rate"] == 0.5
    assert state["dense"]["bias"].tolist() == [2, 2, 2]
    assert run.best.state("progress")["step"] == 20


# run.json


def test_run_json_says_what_the_run_is(run, where):
    """Whoever finds the directory in a year looks there first."""
    document = json.loads((where / "run.json").read_text("utf-8"))

    assert document["format"] == 1
    assert document["run_id"] == run.run_id == run.last.manifest.run_id
    assert len(document["run_id"]) == 16
    assert document["monitor"] == {"metric": "val_loss", "mode": "min", "min_delta": 0.0}
    assert document["keep"] == {"best": 1, "last": 100}
    assert document["every"] == "every epoch"
    assert document["epochs_planned"] == 4
    assert document["tracked"] == ["model", "steps"]
    assert run.created_at <= run.checkpoints[0].created_at


def test_a_run_without_run_json_works(run, where):
    """It holds hints; the checkpoints are the facts."""
    run_id = run.run_id
    (where / "run.json").unlink()

    again = highcamp.open(where)

    assert [entry.name for entry in again.checkpoints] == NAMES
    assert again.last.epoch == 4
    assert (again.run_id, again.monitor, again.best) == (run_id, None, None)
    assert again.rank(Monitor("val_loss"))[0].epoch == 2


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b'{"format": 1}', b'{"format": 1, "run_id": 3, "created_at": ""}', b"\xff", b"nan",
        b'{"format": 1, "run_id": "a", "created_at": "", "keep": {"best": 0, "last": 0}}',
        b'{"format": 1, "run_id": "a", "created_at": "", "keep": {"unknown": 1}}',
        b'{"format": 1, "run_id": "a", "created_at": "", "monitor": {"metric": "x", "mode": "auto"}}',
    ],
)  # fmt: skip
def test_a_damaged_run_json_is_said(run, where, content):
    """Torn or edited, it must be neither believed nor silently replaced."""
    (where / "run.json").write_bytes(content)

    with pytest.raises(Damaged, match=r"run\.json"):
        _ = highcamp.open(where).settings
    assert [entry.name for entry in highcamp.open(where).checkpoints] == NAMES
    assert (where / "run.json").read_bytes() == content


def test_a_newer_run_json_is_unreadable(run, where):
    """A newer version may mean something else by the same words."""
    (where / "run.json").write_text('{"format": 2, "run_id": "a"}')

    with pytest.raises(Unreadable, match="has format version 2, this highcamp reads up to 1; install a newer highcamp"):
        _ = highcamp.open(where).settings


# Pins


def test_a_pin_names_and_protects(run, where):
    """The checkpoint of a paper is removed by the next retention."""
    run.pin("best", "paper")
    run.pin("best", "paper")  # twice is once
    run.pin("step:10", "first.try-1")

    assert run.pins == {"paper": "step-00000020", "first.try-1": "step-00000010"}
    assert json.loads((where / "pins/paper.json").read_text("utf-8"))["checkpoint"] == "step-00000020"
    assert run.checkpoint("pin:paper").epoch == 2
    assert run.prune(Keep(best=0, last=1)).keep["step-00000010"] == ("pin:first.try-1",)
    with pytest.raises(Refused, match="pin paper is on step-00000020; unpin paper first"):
        run.pin("last", "paper")
    with pytest.raises(Refused, match="is protected: pin:first.try-1"):
        run.remove("step:10")
    assert run.unpin("paper") == "step-00000020"
    with pytest.raises(CheckpointNotFound, match=r"has no pin 'paper'; pins: first\.try-1"):
        run.unpin("paper")
    assert run.unpin("first.try-1") == "step-00000010"
    assert run.remove("step:10") == "step-00000010"


@pytest.mark.parametrize("name", ["../paper", "a/b", "", ".hidden", "a\0", "a\n", "x" * 300, "con", "é", 3])
def test_a_pin_never_becomes_a_path(run, where, name):
    """A pin called `../../x` would be a file somewhere else."""
    before = _files(where)

    with pytest.raises(InvalidArgument, match="cannot become a file name"):
        run.pin("best", name)

    assert _files(where) == before


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"checkpoint": 3}', b"\xff\xfe", b'{"checkpoint": "../../etc"}']
)
def test_a_damaged_pin_points_nowhere(run, where, content):
    """One torn pin would hide all the others, or the run."""
    run.pin("step:10", "good")
    (where / "pins/bad.json").write_bytes(content)
    (where / "pins/notes.txt").write_bytes(b"mine")

    assert run.pins["good"] == "step-00000010"
    with pytest.raises(CheckpointNotFound):
        run.checkpoint("pin:bad")
    assert "step-00000010" not in run.prune(Keep(best=0, last=1)).remove


# Removing


def test_removed_ones_come_back(run, where):
    """A mistake with `rm` would cost the weights."""
    before = _files(where / "checkpoints" / "step-00000010")

    assert run.remove("step:10") == "step-00000010"
    assert "step-00000010" not in [entry.name for entry in run.checkpoints]
    assert list(run.trash.values()) == ["step-00000010"]
    assert run.undelete("step-00000010") == "step-00000010"

    assert {path: data for path, (data, _) in _files(where / "checkpoints" / "step-00000010").items()} == {
        path: data for path, (data, _) in before.items()
    }
    assert run.trash == {}


def test_undelete_beside_a_new_one_of_the_same_name(run):
    """Brought back, it must not take the place of what has been saved since."""
    run.remove("step:10")
    trash = next(iter(run.trash))
    shutil.copytree(run.checkpoint("step:20").path, f"{run.path}/checkpoints/step-00000010")

    assert run.undelete(trash) == "step-00000010.2"
    assert run.checkpoint("step-00000010.2").epoch == 1


def test_undelete_of_what_is_not_there(run):
    """The answer names what can be had."""
    run.remove("step:10")

    with pytest.raises(CheckpointNotFound, match=r"step-00000077 is not in the trash of .*; there is step-00000010"):
        run.undelete("step-00000077")
    assert run.empty_trash() == ["step-00000010"]
    assert run.trash == {}
    with pytest.raises(CheckpointNotFound, match="there is nothing"):
        run.undelete("step-00000010")


@pytest.mark.parametrize(("reference", "reason"), [("best", "best"), ("last", "last")])
def test_best_and_last_are_not_removed(run, reference, reason):
    """One command too many, and the best is gone."""
    with pytest.raises(Refused, match=f"is protected: the {reason}"):
        run.remove(reference)
    assert len(run.checkpoints) == 4


def test_prune_says_why(run):
    """A plan without reasons cannot be checked before it is followed."""
    plan = run.prune(Keep(best=2, last=1))

    assert plan.keep == {
        "step-00000020": ("best 1 of 2",),
        "step-00000040": ("best 2 of 2", "last 1 of 1"),
    }
    assert plan.remove == ("step-00000010", "step-00000030")
    assert [entry.name for entry in run.checkpoints] == ["step-00000020", "step-00000040"]
    assert sorted(run.trash.values()) == ["step-00000010", "step-00000030"]


# Damage


def test_a_truncated_best_is_passed_over(run):
    """The best is asked for when it is needed most: it must be one that can be loaded."""
    file = run.store.local_path("checkpoints/step-00000020/model.safetensors")
    file.write_bytes(file.read_bytes()[:-5])

    assert run.best.epoch == 4
    assert run.checkpoint("best").epoch == 4
    assert [found.state for found in run.verify()] == ["whole", "truncated", "whole", "whole"]
    assert run.prune(Keep(best=1, last=1), dry_run=True).keep["step-00000020"] == ("damaged: not touched",)


def test_a_manifest_of_the_future_is_left_alone(run, where):
    """An older version would remove, or misread, what a newer one has written."""
    file = where / "checkpoints/step-00000040/manifest.json"
    file.write_text(file.read_text("utf-8").replace('"format": 1', '"format": 2'))
    before = _files(where / "checkpoints/step-00000040")

    again = highcamp.open(where)

    assert again.last.epoch == 3
    assert [name for name, _ in again.unreadable] == ["step-00000040"]
    assert "format version 2" in again.unreadable[0][1]
    again.prune(Keep(best=1, last=1))
    assert _files(where / "checkpoints/step-00000040") == before


def test_empty_manifest_is_unreadable(run, where):
    """One empty file, and the whole run cannot be listed."""
    (where / "checkpoints/step-00000030/manifest.json").write_bytes(b"")
    (where / "checkpoints/step-00000099").mkdir()

    again = highcamp.open(where)

    assert [entry.name for entry in again.checkpoints] == [NAMES[0], NAMES[1], NAMES[3]]
    assert dict(again.unreadable)["step-00000099"] == "it has no manifest, so it is no checkpoint"
    assert "no digest of itself" in dict(again.unreadable)["step-00000030"]


def test_a_run_looks_again(run, where):
    """A reader that remembers would show a best that is gone, and miss one that is new."""
    assert run.best.epoch == 2
    shutil.rmtree(where / "checkpoints/step-00000020")

    assert run.best.epoch == 4
    assert math.isclose(run.best.metrics["val_loss"], 0.3)


def _facts(run):
    return [(entry.name, entry.manifest, repr(entry.metrics)) for entry in run.checkpoints], run.unreadable


def _damaged(data):
    return data.replace(b'"epoch": 2', b'"epoch": 7')


def _swapped(file, data):
    """Another file takes the name, of the same size, and as old as the first."""
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


def _made_large(file):
    os.truncate(file, 1 << 40)


def _made_fifo(file):
    file.unlink()
    os.mkfifo(file)


def _made_directory(file):
    file.unlink()
    file.mkdir()


def _made_link(file):
    file.replace(file.with_name("aside"))
    file.symlink_to("aside")


CHANGES = {
    "a manifest damaged in place": lambda file: file.write_bytes(_damaged(file.read_bytes())),
    "a manifest replaced by a damaged one": lambda file: _swapped(file, _damaged(file.read_bytes())),
    "a manifest with a byte more": lambda file: file.write_bytes(file.read_bytes() + b"\n"),
    "a manifest cut short": lambda file: os.truncate(file, 100),
    "an empty manifest": lambda file: os.truncate(file, 0),
    "a huge manifest": _made_large,
    "no manifest": lambda file: file.unlink(),
    "a FIFO": _made_fifo,
    "a directory": _made_directory,
    "a link": _made_link,
    "the manifest of another one": lambda file: shutil.copy(file.parent.parent / NAMES[2] / file.name, file),
    "no checkpoint": lambda file: shutil.rmtree(file.parent),
    "a short file": lambda file: os.truncate(file.with_name("model.safetensors"), 5),
    "a long file": lambda file: os.truncate(file.with_name("model.safetensors"), 1 << 20),
    "no file": lambda file: file.with_name("model.safetensors").unlink(),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_questions_is_seen(run, where, change):
    """What is remembered from one question to the next saves time; it must never be the answer."""
    assert (run.best.epoch, run.last.epoch) == (2, 4)
    assert run.plan(Keep(best=1, last=1)).remove == run.doomed(Keep(best=1, last=1)).remove == (NAMES[0], NAMES[2])

    CHANGES[change](where / "checkpoints" / NAMES[1] / "manifest.json")

    assert (run.best.epoch, run.last.epoch) == (4, 4)
    assert _facts(run) == _facts(highcamp.open(where))
    assert run.plan(Keep(best=1, last=1)).remove == run.doomed(Keep(best=1, last=1)).remove
    is_whole = change == "the manifest of another one"  # it then is a second copy of that one
    assert (NAMES[1] in run.plan(Keep(best=1, last=1)).remove) == is_whole


def test_a_manifest_written_anew_is_read_anew(run, where):
    """The same name, the same size, the same times, another value: the old one must not rank it."""
    file = where / "checkpoints" / NAMES[0] / "manifest.json"
    manifest = decode(file.read_bytes(), where="")
    assert run.best.epoch == 2
    better = msgspec.structs.replace(manifest, metrics={**manifest.metrics, "val_loss": 0.1})
    _swapped(file, encode(better))

    assert (run.best.epoch, run.best.metrics["val_loss"]) == (1, 0.1)
    run.best.metrics["val_loss"] = 0.9
    assert run.best.metrics["val_loss"] == 0.1
    _swapped(file, encode(manifest))
    assert (run.best.epoch, run.checkpoints[0].metrics["val_loss"]) == (2, 0.5)


def test_what_is_given_out_can_be_changed(run):
    """Somebody rounds the numbers of a checkpoint for a table; the next question must not hear of it."""
    for entry in [*run.checkpoints, *run.rank(), run.best, run.last]:
        entry.metrics["val_loss"] = 99.0
        entry.metrics["other"] = 1.0

    assert [repr(entry.metrics["val_loss"]) for entry in run.checkpoints] == ["0.5", "0.2", "nan", "0.3"]
    assert set(run.best.metrics) == {"val_loss", "loss"}


def test_a_row_logged_between_two_questions_counts(run):
    """A validation that takes an hour comes long after its checkpoint; until then there is no accuracy to rank by."""
    monitor = Monitor("val_accuracy")
    assert run.rank(monitor) == []
    before = run.checkpoints

    for step, value in ((30, 0.9), (10, 0.8)):
        row = log_event(step, step // 10, {"val_accuracy": value, "val_loss": 0.0}, datetime.now(UTC))
        append_events(run.store, 1, 1, [row], durable=True)

    assert [entry.epoch for entry in run.rank(monitor)] == [3, 1]
    assert [entry.manifest for entry in run.checkpoints] == [entry.manifest for entry in before]
    assert run.best.epoch == 2
    assert "val_accuracy" not in before[2].metrics
    append_events(run.store, 1, 1, [log_event(30, 3, {"val_f1": 0.7}, datetime.now(UTC))], durable=True)
    assert repr(run.checkpoints[2].metrics) == "{'val_loss': nan, 'loss': 1.0, 'val_accuracy': 0.9, 'val_f1': 0.7}"


def test_settings_changed_between_two_questions_count(run, where):
    """The next Checkpointer may watch another metric; whose files lie here is for run.json to say."""
    assert run.best.epoch == 2
    document = json.loads((where / "run.json").read_text("utf-8"))
    for changes, epoch in (({"monitor": {"metric": "val_loss", "mode": "max"}}, 1), ({"monitor": None}, None)):
        (where / "run.json").write_text(json.dumps({**document, **changes}))
        assert (run.best.epoch if run.best else None) == epoch
    (where / "run.json").write_text(json.dumps({**document, "run_id": "f" * 16}))
    assert (run.best, run.last, len(run.unreadable)) == (None, None, 4)


class Counting(ReadOnly):
    """A store that remembers which sizes it was asked for."""

    def __init__(self, store):
        super().__init__(store)
        self.asked = []

    def size(self, path):
        """Pass on."""
        self.asked.append(path)
        return self.inner.size(path)


def test_only_what_decides_is_looked_at(run):
    """After each save the writer prunes: a look at every file of thousands of checkpoints would cost more than the save."""
    store = Counting(run.store)
    reader = highcamp.open(store)
    for ask, seen in (
        (lambda: reader.best, {NAMES[1]}),
        (lambda: reader.last, {NAMES[3]}),
        (lambda: reader.checkpoints, set()),
        (lambda: reader.doomed(Keep(last=9)), set()),
        (lambda: reader.doomed(Keep(best=1, last=2)), {NAMES[0], NAMES[1], NAMES[2], NAMES[3]}),
    ):
        store.asked.clear()
        ask()
        assert {path.split("/")[1] for path in store.asked if path.startswith("checkpoints/")} == seen


def test_a_name_that_fits_no_store_hides_nothing(run, where):
    """One directory with an odd name, made by a person or a slip of the shell, and the whole run could not be listed."""
    (where / "checkpoints" / "step\\00000010").mkdir()
    (where / "checkpoints" / "a\nb").mkdir()

    assert [entry.name for entry in run.checkpoints] == NAMES
    assert [name for name, _ in run.unreadable] == ["a\nb"]
    assert len(list(run.verify())) == 5
