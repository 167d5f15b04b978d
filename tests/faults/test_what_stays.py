"""What exists, what stays and what goes, at rest and across restarts: the traps of other libraries, one by one."""

from __future__ import annotations

import shutil

import fault_scene as scene
import numpy as np
import pytest

import highcamp
from highcamp import Keep, StorageError
from highcamp.run import commit
from highcamp.storage.local import LocalStore
from highcamp.testing import FaultyStore


@pytest.fixture
def store(place):
    """A local run with two checkpoints."""
    found = LocalStore(place / "run")
    scene.prepare(found, scene.Diary())
    return found


def entries(store):
    """What lies where the checkpoints lie."""
    return store.list("checkpoints")


@pytest.mark.parametrize("kind", scene.STORES)
def test_one_commit_not_two(place, kind):
    """Weights of one step with the counter of another resume wrongly without a word: all files appear at once, or none."""
    real = scene.STORES[kind](place, 1)
    scene.prepare(real, scene.Diary())
    for fail_at in range(2, 6):
        attempt = scene.begin(real)
        attempt._store = FaultyStore(real, fail_at=fail_at, forever=True)
        with pytest.raises(StorageError):
            scene.save(attempt, 3)
        attempt.release()

        run = highcamp.open(real)

        assert [(entry.step, entry.state("model")["count"]) for entry in run.checkpoints] == [(1, 1), (2, 2)]


def test_unfinished_is_invisible(store):
    """An empty directory with the highest number is not the newest checkpoint, and nothing resumes from half of one."""
    where = store.local_path("checkpoints")
    (where / "step-00000007").mkdir()
    shutil.copytree(where / "step-00000002", where / ".pending-step-00000008-0123456789abcdef")
    shutil.copytree(where / "step-00000002", where / "step-00000009", ignore=shutil.ignore_patterns("manifest.json"))

    run = highcamp.open(store)

    assert [entry.step for entry in run.checkpoints] == [1, 2]
    assert run.last.step == 2
    assert [name for name, _ in run.unreadable] == ["step-00000007", "step-00000009"]
    attempt = scene.begin(store)
    assert attempt.run.resumed_from == "step-00000002"
    attempt.release()


def test_only_our_own_leftovers_are_swept(store):
    """What crashes leave must not fill the disk, and only that goes: trash can still be brought back."""
    run = highcamp.open(store)
    attempt = scene.begin(store)
    scene.save(attempt, 3)
    attempt.release()
    where = store.local_path("checkpoints")
    shutil.copytree(where / "step-00000002", where / ".pending-step-00000008-0123456789abcdef")
    shutil.copytree(where / "step-00000002", where / ".trash-step-00000007-01234567-doomed")
    shutil.copytree(where / "step-00000002", where / ".trash-step-00000006-01234567")
    store.local_path(".pending-run.json-0123456789abcdef").write_bytes(b"{")

    attempt = scene.begin(store)
    attempt.release()

    assert sorted(attempt.swept) == [
        ".pending-run.json-0123456789abcdef",
        ".pending-step-00000008-0123456789abcdef",
        ".trash-step-00000007-01234567-doomed",
    ]
    assert scene.leftovers(store) == []
    assert run.trash == {".trash-step-00000006-01234567": "step-00000006"}


def test_foreign_files_and_links_stay(store, place):
    """Whatever people put beside their checkpoints is theirs: no start, save, prune or removal touches it."""
    where = store.local_path("checkpoints")
    (place / "precious").mkdir()
    (place / "precious" / "thesis.tex").write_text("years")
    (where / "README.txt").write_text("mine")
    (where / "my-step-100-backup").mkdir()
    (where / "my-step-100-backup" / "model.safetensors").write_bytes(b"weights")
    (where / "step-00000001-old").mkdir()
    (where / "step-00000099").mkdir()
    (where / "step-00000099" / "notes").write_text("mine")
    (where / ".hidden").mkdir()
    (where / ".trash-mine").mkdir()
    (where / "linked").symlink_to(place / "precious")
    (where / ".pending-linked").symlink_to(place / "precious")
    store.local_path("notes.md").write_text("mine")
    before = {name for name in entries(store) if not name.startswith((".pending-", "step-0000000"))}

    for step in (3, 4, 5, 6):
        attempt = scene.begin(store)
        scene.save(attempt, step)
        attempt.prune()
        attempt.run.prune(Keep(best=0, last=1))
        attempt.run.empty_trash()
        attempt.end("closed", step, step)

    assert before <= set(entries(store))
    assert ".pending-linked" not in entries(store)  # our pattern: the link goes, what it leads to stays
    assert (place / "precious" / "thesis.tex").read_text() == "years"
    assert (where / "my-step-100-backup" / "model.safetensors").read_bytes() == b"weights"
    assert (where / "step-00000099" / "notes").read_text() == "mine"
    assert store.local_path("notes.md").read_text() == "mine"


def test_overwrite_adds_first(store):
    """Saving a step again makes a second checkpoint; the first goes later, by policy, and never before."""
    first = {path: path.read_bytes() for path in store.local_path("checkpoints/step-00000002").iterdir()}
    attempt = scene.begin(store)

    entry = scene.save(attempt, 2, 0.05)

    assert entry.name == "step-00000002.2"
    assert {path: path.read_bytes() for path in first} == first
    assert (attempt.run.best, attempt.run.last) == (entry, entry)
    assert attempt.run.checkpoint("step:2") == entry
    attempt.release()


def test_last_is_a_query(store):
    """A link or a file that names the last one can be missing or wrong; the manifests cannot."""
    attempt = scene.begin(store)
    scene.save(attempt, 3)
    attempt.end("closed", 3, 3)
    assert not any(path.is_symlink() for path in store.local_path("").rglob("*"))
    for name in ("run.json", "history", "pins"):
        store.remove(name)

    run = highcamp.open(store)

    assert run.last.step == 3
    assert [entry.step for entry in run.checkpoints] == [1, 2, 3]


def test_copied_in_is_not_trash(store, place):
    """A run copied with other tools is a run: no rename has to have happened, the manifest is the mark."""
    shutil.copytree(store.local_path(""), place / "elsewhere", copy_function=shutil.copyfile)
    copied = LocalStore(place / "elsewhere")

    scene.look(copied, scene.Diary())
    attempt = scene.begin(copied)
    attempt.end("closed", 2, 2)

    assert attempt.swept == []
    assert [entry.step for entry in highcamp.open(copied).checkpoints] == [1, 2]


def test_two_checkpoints_of_one_step_keep_their_own_metrics(store):
    """A step that was saved twice has two models and two values; the value of one must not rank the other."""
    attempt = scene.begin(store)
    first = scene.save(attempt, 3, 0.05)
    second = scene.save(attempt, 3, 0.9)
    attempt.log(3, 3, {"val_accuracy": 0.7})
    attempt.release()

    run = highcamp.open(store)

    assert run.checkpoint(first.name).metrics == {"val_loss": 0.05, "val_accuracy": 0.7}
    assert run.checkpoint(second.name).metrics == {"val_loss": 0.9, "val_accuracy": 0.7}
    assert run.best.name == first.name
    assert run.last.name == second.name


def test_a_name_given_again_is_another_checkpoint(store):
    """A run that stays open must not rank a new checkpoint by what an older one of the same name once said."""
    run = highcamp.open(store)
    attempt = scene.begin(store)
    first = scene.save(attempt, 3, 0.01)
    assert run.best == first
    store.remove(commit.checkpoint_path(commit.withdraw(store, first.name)))

    second = scene.save(attempt, 3, 0.9)
    attempt.release()

    assert second.name == first.name
    assert (run.best.step, run.last.sequence) == (2, second.sequence)
    assert run.last.manifest == second.manifest


def test_what_a_killed_pin_has_left_is_swept(tmp_path):
    """Each pin that dies in the middle would leave a file that nobody ever removes."""
    from highcamp import Checkpointer

    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.save({"model": {"w": np.ones(2)}}, step=1).wait()
        checkpointer.run.pin("last", "paper")
    (tmp_path / "pins/.pending-paper.json-0123456789abcdef").write_text("{")

    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.restore(like={"model": {"w": np.ones(2)}})

    assert [path.name for path in (tmp_path / "pins").iterdir()] == ["paper.json"]
