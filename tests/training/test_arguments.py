"""Arguments as people type them: wrong ones are refused where they are typed, in words that say what to type."""

from __future__ import annotations

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, InvalidArgument, Keep, Refused, RunNotFound
from highcamp.training import arguments

NAMES = {
    "traversal": "../escape", "absolute": "/etc/passwd", "nul": "a\0b", "newline": "a\nb", "long": "x" * 300, "empty": "",
    "dots": "..", "hidden": ".hidden", "space": "a b", "backslash": "a\\b", "device": "nul", "accent": "modèle",
    "trailing newline": "model\n", "number": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("filepath", "directory"),
        ("mode", 'monitor=Monitor("val_loss", mode="min")'),
        ("save_best_only", "keep=Keep(best=1, last=1)"),
        ("save_weights_only", 'run.best.load("model")'),
        ("save_freq", "every=Every(steps=…)"),
        ("initial_value_threshold", "the best is found again after a restart"),
        ("backup_dir", "directory"),
        ("save_top_k", "keep=Keep(best=…)"),
        ("save_last", "keep=Keep(last=1)"),
        ("every_n_train_steps", "every=Every(steps=…)"),
        ("every_n_epochs", "every=Every(epochs=…)"),
        ("train_time_interval", "every=Every(seconds=…)"),
        ("dirpath", "directory"),
        ("metric_for_best_model", "monitor"),
        ("greater_is_better", 'mode="max"'),
        ("load_best_model_at_end", 'restore("best")'),
        ("save_total_limit", "keep=Keep(last=…)"),
        ("resume_from_checkpoint", "the same script goes on by itself"),
        ("to_save", "track(model=…)"),
        ("n_saved", "keep=Keep(best=…)"),
        ("max_to_keep", "keep=Keep(last=…)"),
        ("save_interval_steps", "every=Every(steps=…)"),
        ("best_fn", "monitor"),
        ("total_limit", "keep=Keep(last=…)"),
        ("save_folder", "directory"),
        ("montior", "monitor"),
        ("kep", "keep"),
        ("zzz", "one of directory, monitor, every, keep, snapshot, memory_every, staging_bytes, on_error, verbose"),
    ],
)
def test_an_unknown_keyword_names_ours(where, name, ours):
    """Who comes from another library types its names, and would have to look for ours."""
    with pytest.raises(TypeError) as error:
        Checkpointer(where, **{name: 1})

    assert str(error.value).startswith(f"Checkpointer has no argument {name!r}; use ")
    assert ours in str(error.value)


def test_every_known_habit_names_something(where):
    """A row of the table that names nothing leaves somebody standing."""
    for name, ours in arguments._HABITS.items():
        assert ours
        with pytest.raises(TypeError):
            Checkpointer(where, **{name: 1})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 3}, "keep is 3, not a Keep; for example keep=Keep(best=1, last=2)"),
        ({"every": Keep()}, "not a Every; for example every=Every(epochs=1)"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; use 'raise' or 'warn'"),
        ({"monitor": 3}, 'for example monitor="val_loss"'),
        ({"monitor": "quality"}, "does not tell whether less or more of it is better"),
        ({"monitor": "val_loss\n"}, "not a name"),
    ],
)
def test_a_wrong_argument_is_refused_in_the_constructor(where, options, words):
    """Found at the first save, after the first epoch, it has cost that epoch."""
    with pytest.raises(InvalidArgument) as error:
        Checkpointer(where, **options)

    assert words in str(error.value)
    assert not where.exists()


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_tracked_name_never_becomes_a_path(where, tmp_path, name):
    """An object called `../../x` would be written outside of the run."""
    checkpointer = Checkpointer(where)

    with pytest.raises(InvalidArgument if isinstance(name, str) else TypeError) as error:
        checkpointer.track(**{name: {"w": np.zeros(3)}})

    assert not isinstance(name, str) or len(str(error.value)) < 400
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["progress", "Progress", "MODEL"])
def test_a_name_that_is_taken_is_refused(where, name):
    """Two objects in one file, or two files that are one where capitals do not count."""
    checkpointer = Checkpointer(where)
    checkpointer.track(model={"w": np.zeros(3)})

    with pytest.raises(InvalidArgument, match="is tracked already, or the name is highcamp's own"):
        checkpointer.track(**{name: {"w": np.zeros(3)}})


def test_a_directory_that_is_a_file_is_refused(tmp_path):
    """It would be found out at the end of the first epoch; or the file be gone."""
    path = tmp_path / "model.keras"
    path.write_bytes(b"weights")

    for place in (path, path / "run"):
        with pytest.raises((Refused, InvalidArgument), match="is a file, not a directory"):
            Checkpointer(place)
    with pytest.raises(RunNotFound):
        highcamp.open(path)
    assert path.read_bytes() == b"weights"


def test_a_directory_that_may_not_be_written_to_is_refused(tmp_path, start):
    """It would be found out at the end of the first epoch."""
    (tmp_path / "closed").mkdir(mode=0o555)
    code = """
import os, sys
from highcamp import Checkpointer, Refused
import highcamp.storage.local, numpy
if os.geteuid() == 0:
    os.setuid(65534)  # root may write everywhere
try:
    Checkpointer(sys.argv[1])
except Refused as error:
    sys.exit("may not be written to by this user" not in str(error))
sys.exit(2)
"""

    for place in (tmp_path / "closed", tmp_path / "closed" / "run", tmp_path / "closed" / "a" / "b"):
        assert start(code, place).returncode == 0


@pytest.mark.parametrize(
    "place",
    ["", "s3://bucket/run", "gs://bucket/run", "az://c/run", "http://host/run", "memory://", None, 3, b"run", "a\0b"],
)
def test_no_silent_no_save(place):
    """A place that cannot be written to, and no word: no error and no file."""
    with pytest.raises((InvalidArgument, TypeError)):
        Checkpointer(place)


def test_a_directory_with_other_things_in_it_is_left_alone(where, train):
    """What lies there already is somebody's."""
    where.mkdir(parents=True)
    (where / "notes.txt").write_text("mine")
    (where / "checkpoints").mkdir()
    (where / "checkpoints" / "my-step-100-backup").mkdir()
    (where / "checkpoints" / "my-step-100-backup" / "weights").write_text("mine")

    run = train([0.5, 0.4, 0.3, 0.2], keep=Keep(best=1, last=1)).run

    assert (where / "notes.txt").read_text() == "mine"
    assert (where / "checkpoints" / "my-step-100-backup" / "weights").read_text() == "mine"
    assert [entry.epoch for entry in run.checkpoints] == [4]


def test_a_path_may_be_a_path(tmp_path, train):
    """A str or an os.PathLike, with a `~`, spaces or any alphabet in them."""
    for name in ("plain", "with space", "日本語", "~"):
        assert train([0.5], directory=tmp_path / name).run.last.epoch == 1
        assert highcamp.open(str(tmp_path / name)).last.epoch == 1
