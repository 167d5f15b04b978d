"""Unchanged tensors: bytes that are on the disk already are linked, and every checkpoint is complete by itself."""

from __future__ import annotations

import copy
import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import highcamp
from highcamp import Checkpointer, Every, Keep
from highcamp.errors import Damaged
from highcamp.storage.local import LocalStore
from highcamp.storage.memory import MemoryStore
from highcamp.training import unchanged

BASE, HEAD = "base.weight", "head.weight"
BASE_BYTES = 600 * 600 * 4  # more than it takes to be linked


class Loop:
    """A training of a head on a base that is frozen; what is saved is remembered."""

    def __init__(self, where, *, is_frozen=True, names=("model",), **options):
        torch.manual_seed(7)
        self.model = torch.nn.ModuleDict(
            {"base": torch.nn.Linear(600, 600, bias=False), "head": torch.nn.Linear(8, 8, bias=False)}
        )
        self.base.requires_grad_(not is_frozen)
        self.checkpointer = Checkpointer(where, every=Every(steps=1), keep=Keep(last=99), verbose=0, **options)
        self.checkpointer.track(**dict.fromkeys(names, self.model))
        self.checkpointer.start()
        self.saved = {}

    @property
    def base(self):
        """The weight that stays."""
        return self.model["base"].weight

    def save(self, *, wait=True):
        """Train the head a little, and save."""
        with torch.no_grad():
            self.model["head"].weight += 1
        step = self.checkpointer.step + 1
        self.saved[step] = {key: value.clone().numpy() for key, value in self.model.state_dict().items()}
        pending = self.checkpointer.save(step=step)
        if wait:
            pending.wait()
        return pending

    def look(self):
        """Close, and assert that everything saved is on the disk, whole; the new bytes of each checkpoint."""
        self.checkpointer.close()
        run = self.checkpointer.run
        assert all(result.ok for result in run.verify())
        for entry in run.checkpoints:
            found = entry.load("model")
            assert all(np.array_equal(found[key], value) for key, value in self.saved[entry.step].items())
        return new_bytes(run)


def new_bytes(run):
    """What each checkpoint has added to the disk, as the file system tells it and as the history says."""
    seen, found = set(), []
    for entry in run.checkpoints:
        files = [path.stat() for path in Path(entry.path).glob("*.safetensors")]
        found.append(sum(each.st_size for each in files if each.st_ino not in seen))
        seen |= {each.st_ino for each in files}
    said = {each.step: each.cost.new_bytes for each in run.history.saves}
    assert [said.get(entry.step) for entry in run.checkpoints] == found
    return found


def test_a_frozen_base_is_written_once(tmp_path):
    """95 % of the parameters are frozen: without links each checkpoint writes all of them again."""
    loop = Loop(tmp_path)
    for _ in range(4):
        loop.save()

    first, *others = loop.look()

    assert first > BASE_BYTES
    changed = 8 * 8 * 4 + 3 * 4096 + 16_000  # the head, headers, and the random states
    assert max(others) < changed


def test_bytes_written_are_at_most_a_tenth_more_than_what_changed(tmp_path):
    """The bound of the design, with a head large enough that headers do not count."""
    loop = Loop(tmp_path)
    loop.model["head"] = torch.nn.Linear(500, 500, bias=False)
    for _ in range(3):
        loop.save()

    assert max(loop.look()[1:]) <= 1.1 * 500 * 500 * 4


def test_each_checkpoint_is_removable_by_itself(tmp_path):
    """A checkpoint that needs another one is lost with it."""
    loop = Loop(tmp_path)
    for _ in range(4):
        loop.save()
    loop.look()
    run = highcamp.open(tmp_path)

    for entry in run.checkpoints[:-1]:
        run.remove(entry.name)
        run.empty_trash()
        assert all(result.ok for result in run.verify())

    assert np.array_equal(run.last.load("model")[BASE], loop.saved[4][BASE])
    assert (Path(run.last.path) / "model.1.safetensors").stat().st_nlink == 1


def test_it_goes_on_after_a_restart(tmp_path):
    """A job that is restarted every hour would write everything every hour."""
    first = Loop(tmp_path)
    first.save()
    first.look()
    second = Loop(tmp_path)
    second.saved |= first.saved

    second.save()

    assert second.look()[1] < BASE_BYTES / 10


def test_it_goes_on_after_a_rewind(tmp_path):
    """Back to the last checkpoint after a bad step, in the middle of an attempt."""
    loop = Loop(tmp_path)
    for _ in range(2):
        loop.save()
    loop.checkpointer.restore()

    loop.save()

    assert loop.look()[2] < BASE_BYTES / 10


def test_a_wrong_hint_is_never_believed(tmp_path):
    """requires_grad is False, and somebody writes to it all the same: truth is the bytes."""
    loop = Loop(tmp_path)
    for _ in range(4):
        loop.base.data[3, 3].add_(1)
        loop.save()

    assert min(loop.look()) > BASE_BYTES


def test_a_tensor_that_was_calm_for_long_may_change(tmp_path):
    """What has not moved for many saves is linked; at the first change it is written, and the others are linked on."""
    loop = Loop(tmp_path, is_frozen=False)
    loop.model["calm"] = torch.nn.Linear(700, 700, bias=False)
    for number in range(8):
        if number == 6:
            loop.base.data[0, 0].add_(1)
        loop.save()

    found = loop.look()

    calm = 700 * 700 * 4
    assert min(found[:2]) > BASE_BYTES + calm
    assert max(found[4], found[5]) < BASE_BYTES / 10
    assert found[6] > BASE_BYTES
    assert found[7] < BASE_BYTES + calm + 100_000


def test_unfreezing_and_freezing_in_the_middle(tmp_path):
    """Gradual unfreezing: from one epoch to the next another half of the model is trained."""
    loop = Loop(tmp_path)
    loop.save()
    loop.save()
    loop.base.requires_grad_(requires_grad=True)
    for _ in range(3):
        loop.base.data.add_(1)
        loop.save()
    loop.base.requires_grad_(requires_grad=False)
    for _ in range(5):
        loop.save()

    found = loop.look()

    assert found[1] < BASE_BYTES / 10
    assert min(found[2:5]) > BASE_BYTES
    assert max(found[8:]) < BASE_BYTES / 10


def test_an_object_may_have_the_name_of_a_second_file(tmp_path):
    """`model` beside `model.1`: one must not take the file of the other."""
    loop = Loop(tmp_path, names=("model", "model.1", "model.1.1"))
    for _ in range(3):
        loop.save()

    loop.look()

    run = highcamp.open(tmp_path)
    for name in ("model", "model.1", "model.1.1"):
        assert np.array_equal(run.last.load(name)[BASE], loop.saved[3][BASE])
        assert np.array_equal(run.last.load(name)[HEAD], loop.saved[3][HEAD])


def test_an_object_that_does_not_change_at_all_is_linked_whole(tmp_path):
    """A teacher beside the student."""
    loop = Loop(tmp_path)
    teacher = copy.deepcopy(loop.model["base"])
    loop.checkpointer.close()
    shutil.rmtree(tmp_path)
    with Checkpointer(tmp_path, every=Every(steps=1), keep=Keep(last=99), verbose=0) as checkpointer:
        checkpointer.track(teacher=teacher, student=torch.nn.Linear(2, 2))
        for step in (1, 2, 3):
            checkpointer.save(step=step)

    files = [Path(entry.path) / "teacher.safetensors" for entry in checkpointer.run.checkpoints]
    assert len({path.stat().st_ino for path in files}) == 1
    assert max(new_bytes(checkpointer.run)[1:]) < BASE_BYTES / 10


def test_a_state_that_is_passed_is_compared_too(tmp_path):
    """NumPy arrays carry no hint; after some saves without a change they are linked."""
    state = {"model": {"base": np.arange(200_000.0), "head": np.zeros(3)}}
    with Checkpointer(tmp_path, keep=Keep(last=99), verbose=0) as checkpointer:
        for step in range(1, 7):
            state["model"]["head"] += 1
            checkpointer.save(copy.deepcopy(state), step=step)

    assert new_bytes(checkpointer.run)[-1] < 100_000
    assert [entry.load("model")["head"][0] for entry in checkpointer.run.checkpoints] == [1, 2, 3, 4, 5, 6]
    assert all(result.ok for result in checkpointer.run.verify())


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP])
def test_a_file_system_without_links_gets_copies(tmp_path, monkeypatch, code):
    """Some FUSE, network and union mounts refuse; the checkpoints are the same, and nothing wrong is said of them."""

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    loop = Loop(tmp_path)
    for _ in range(6):
        loop.save()

    assert min(loop.look()) > BASE_BYTES
    assert loop.checkpointer._saver._source._unchanged._refusals == unchanged.MAX_REFUSALS


def test_a_file_with_too_many_links_is_written_anew_and_linked_again(tmp_path, monkeypatch):
    """ext4 allows 65,000 names of a file; the 65,001st checkpoint is one like the others."""
    plain, refused = os.link, []

    def link(source, target, **options):
        if Path(source).stat().st_nlink >= 3:
            refused.append(source)
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        plain(source, target, **options)

    monkeypatch.setattr(os, "link", link)
    loop = Loop(tmp_path)
    for _ in range(8):
        loop.save()

    found = loop.look()
    assert len(refused) == 2
    assert [size > BASE_BYTES for size in found] == [True, False, False, True, False, False, True, False]


class Meddling(LocalStore):
    """Calls `meddle` before a link."""

    meddle = None

    def link(self, source, path):
        """Let somebody at the file first."""
        if self.meddle:
            self.meddle(self.local_path(source))
        super().link(source, path)


def test_a_parent_removed_by_hand_meanwhile_is_copied_from_what_is_open(tmp_path):
    """Somebody frees space between the comparison and the link."""
    store = Meddling(tmp_path)
    loop = Loop(store)
    loop.save()
    store.meddle = lambda path: shutil.rmtree(path.parent)

    loop.save()

    store.meddle = None
    loop.save()
    assert [entry.step for entry in loop.checkpointer.run.checkpoints] == [2, 3]
    found = loop.look()
    assert found[0] > BASE_BYTES
    assert found[1] < BASE_BYTES / 10


def _truncate(path):
    os.truncate(path, 5000)


def _overwrite(path):
    with path.open("r+b") as file:
        file.seek(10_000)
        file.write(b"stranger")


def _replace(path):
    size = path.stat().st_size
    path.unlink()
    path.write_bytes(b"x" * size)


@pytest.mark.parametrize("when", ["between two saves", "at the link"])
@pytest.mark.parametrize("change", [_truncate, _overwrite, _replace])
def test_a_parent_changed_by_a_stranger_is_never_committed(tmp_path, change, when):
    """The digest in the manifest would be that of the file as it was."""
    store = Meddling(tmp_path)
    loop = Loop(store)
    loop.save()
    loop.save()
    loop.checkpointer._saver.raise_failed(wait=True)
    if when == "at the link":
        store.meddle = change
        with pytest.raises(Damaged, match="was replaced or changed, so it was not linked"):
            loop.save()
        store.meddle = None
    else:
        change(Path(loop.checkpointer.run.last.path) / "model.1.safetensors")

    loop.save()
    loop.save()
    loop.checkpointer.close()

    run = highcamp.open(tmp_path)
    assert [entry.verify().ok for entry in run.checkpoints[-2:]] == [True, True]
    assert np.array_equal(run.last.load("model")[BASE], loop.base.numpy())
    sizes = [path.stat() for path in Path(run.last.path).glob("model.1.*")]
    assert sizes[0].st_nlink == 2  # linked again, to the first that was written after it


def test_it_works_on_other_stores():
    """A store of another kind shares the bytes in its own way."""
    store = MemoryStore()
    loop = Loop(store)
    for _ in range(3):
        loop.save()
    loop.checkpointer.close()

    files = [
        store._files[f"checkpoints/{entry.name}/model.1.safetensors"] for entry in loop.checkpointer.run.checkpoints
    ]
    assert files[0] is files[1] is files[2]
    assert all(result.ok for result in highcamp.open(store).verify())


def test_overlap_and_links_together(tmp_path):
    """The frozen part is linked, the trained part is copied late, and both are what they were."""
    loop = Loop(tmp_path, snapshot="overlap")
    for _ in range(3):
        loop.save()

    assert max(loop.look()[1:]) < BASE_BYTES / 10


def test_no_file_stays_open(tmp_path):
    """Each save that links holds a file open; a thousand of them are too many."""
    loop = Loop(tmp_path)
    loop.save()
    loop.save()
    loop.checkpointer._saver.raise_failed(wait=True)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        loop.save()
    loop.checkpointer._saver.raise_failed(wait=True)

    assert len(list(Path("/proc/self/fd").iterdir())) == before
    loop.look()
