"""Restarts: what goes on, what is compared first, and what is refused."""

from __future__ import annotations

import math
import random
import shutil

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Damaged, Every, InvalidArgument, InvalidState, Keep, Mismatch, Refused, RunLocked


class Stop(Exception):
    """A crash."""


class Counter:
    """An object of the user's own."""

    def __init__(self):
        self.count = 0
        self.loaded = False

    def state_dict(self):
        """What is saved."""
        return {"count": self.count}

    def load_state_dict(self, state):
        """Note that it was called."""
        self.count, self.loaded = state["count"], True


def _flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 0xFF
    file.write_bytes(data)


# What comes back


def test_everything_tracked_comes_back(where):
    """An object that is saved but not restored is a run that goes on with something else."""

    def script(epochs):
        objects = {
            "model": {"w": np.zeros(3), "layers": [np.zeros(2), {"b": np.zeros(1)}], "name": "a", "rate": 0.5},
            "moments": [np.zeros(2), np.zeros(2, np.float16)],
            "own": Counter(),
            "python": random.Random(0),
            "generator": np.random.default_rng(0),
            "legacy": np.random.RandomState(0),
        }
        drawn = []
        with Checkpointer(where, verbose=0) as checkpointer:
            checkpointer.track(**objects)
            for epoch in checkpointer.epochs(epochs):
                objects["model"]["w"] += 1
                objects["model"]["layers"][1]["b"] += objects["generator"].random()
                objects["model"]["rate"] *= 0.5
                objects["model"]["name"] += "b"
                objects["moments"][1] += 2
                objects["own"].count += 1
                drawn.append(
                    (epoch, objects["python"].random(), objects["legacy"].random(), objects["generator"].random())
                )
        return objects, drawn

    _, first = script(2)
    objects, second = script(4)
    shutil.rmtree(where)
    expected, whole = script(4)

    assert first + second == whole
    assert objects["own"].loaded
    assert objects["own"].count == 4
    assert repr(objects["model"]) == repr(expected["model"])
    assert repr(objects["moments"]) == repr(expected["moments"])


def test_arrays_keep_their_identity(where):
    """A model that holds views of its parameters would go on training the old ones."""
    for epochs in (1, 2):
        weights = {"w": np.zeros(3)}
        array = weights["w"]
        with Checkpointer(where, verbose=0) as checkpointer:
            checkpointer.track(model=weights)
            for _ in checkpointer.epochs(epochs):
                array += 1

    assert weights["w"] is array
    assert array.tolist() == [2, 2, 2]


def test_resume_is_lossless(where):
    """Values that go through text or another precision come back almost equal, and the run is another."""
    generator = np.random.default_rng(1)
    saved = {
        "subnormal": np.array([5e-324, -0.0, math.nan, math.inf]),
        "bits": generator.integers(0, 2**32, 100, dtype=np.uint32).view(np.float32),
        "half": generator.integers(0, 2**16, 100, dtype=np.uint16).view(np.float16),
        "plain": 0.1 + 0.2, "nan": math.nan, "big": 2**127, "none": None,
    }  # fmt: skip
    with Checkpointer(where, verbose=0) as checkpointer:
        checkpointer.track(model=saved)
        list(checkpointer.epochs(1))

    live = {key: np.zeros_like(value) if isinstance(value, np.ndarray) else 0 for key, value in saved.items()}
    with Checkpointer(where, verbose=0) as again:
        again.track(model=live)
        again.start()

    for key, value in saved.items():
        if isinstance(value, np.ndarray):
            assert live[key].tobytes() == value.tobytes(), key
        else:
            assert repr(live[key]) == repr(value)


def test_restore_after_track(where):
    """Restored before the objects were tracked, counters come back and weights do not."""
    checkpointer = Checkpointer(where, verbose=0)
    with pytest.raises(InvalidArgument, match=r"epochs\(\) has nothing to save or restore"):
        checkpointer.epochs(3)
    with pytest.raises(InvalidArgument, match=r"restore\(\) has nothing to save or restore"):
        checkpointer.restore()

    checkpointer.track(model={"w": np.zeros(3)})
    checkpointer.start()
    with pytest.raises(InvalidArgument, match=r"track\(\) came after the run was restored"):
        checkpointer.track(optimizer={"m": np.zeros(3)})
    checkpointer.close()


def test_restore_comes_before_the_first_epoch_is_asked_for(where):
    """`restore()` before the loop gives the weights to look at, and the loop goes on from them."""
    for epochs in (2, 3):
        weights = {"w": np.zeros(3)}
        with Checkpointer(where, verbose=0) as checkpointer:
            checkpointer.track(model=weights)
            found = checkpointer.restore()
            assert weights["w"][0] == (2 if found else 0)
            for _ in checkpointer.epochs(epochs):
                weights["w"] += 1

    assert weights["w"][0] == 3


# What is compared


def test_mismatch_lists_everything_and_changes_nothing(where):
    """One difference per attempt, and the objects that were restored before it already overwritten."""
    np.random.seed(0)
    with Checkpointer(where, verbose=0) as checkpointer:
        checkpointer.track(
            model={"kernel": np.ones((3, 4)), "bias": np.ones(4), "gone": np.ones(1)},
            other=Counter(),
            zed={"w": np.ones(2)},
        )
        list(checkpointer.epochs(1))
    files = {path: path.read_bytes() for path in sorted((where / "checkpoints").rglob("*")) if path.is_file()}
    model = {"kernel": np.zeros((3, 5)), "bias": np.zeros(4, np.float32), "new": np.zeros(1)}
    counter, zed = Counter(), {"w": np.zeros(2, np.int64)}
    np.random.seed(7)
    state = np.random.get_state(legacy=False)["state"]["key"].tobytes()

    with pytest.raises(Mismatch) as error, Checkpointer(where, verbose=0) as again:
        again.track(model=model, other=counter, zed=zed)
        list(again.epochs(2))

    assert error.value.message.splitlines()[1:] == [
        "  model/bias: dtype F64 in the checkpoint, F32 here",
        "  model/gone: only in the checkpoint",
        "  model/kernel: shape (3, 4) in the checkpoint, (3, 5) here",
        "  model/new: only here",
        "  zed/w: dtype F64 in the checkpoint, I64 here",
    ]
    assert "nothing was changed" in error.value.message
    assert not any(array.any() for array in (*model.values(), *zed.values()))
    assert not counter.loaded
    assert np.random.get_state(legacy=False)["state"]["key"].tobytes() == state
    assert (again.epoch, again.step) == (0, 0)
    assert {path: path.read_bytes() for path in files} == files
    assert len(again.run.history.attempts) == 1


def test_dtype_is_compared(where):
    """Another precision would be cast without a word, and the run be another."""
    for dtype in (np.float64, np.float32):
        with Checkpointer(where, verbose=0) as checkpointer:
            checkpointer.track(model={"w": np.zeros(3, dtype)})
            if dtype is np.float32:
                with pytest.raises(Mismatch, match="model/w: dtype F64 in the checkpoint, F32 here"):
                    list(checkpointer.epochs(1))
            else:
                list(checkpointer.epochs(1))


def test_missing_key_is_an_error(where):
    """A renamed layer would keep its fresh weights, with a warning that nobody reads."""
    for key in ("w", "weights"):
        with Checkpointer(where, verbose=0) as checkpointer:
            checkpointer.track(model={key: np.zeros(3)})
            if key == "weights":
                with pytest.raises(Mismatch, match="model/w: only in the checkpoint\n  model/weights: only here"):
                    list(checkpointer.epochs(1))
            else:
                list(checkpointer.epochs(1))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model"], "(saved but not tracked: optimizer)"),
        (["model", "optimizer", "ema"], "(tracked but not saved: ema)"),
        (["net", "optimizer"], "(saved but not tracked: model; tracked but not saved: net)"),
    ],
)
def test_other_tracked_names_are_refused(where, names, words):
    """An optimizer that is no longer tracked starts from nothing, and the run goes on as if it had not."""
    with Checkpointer(where, verbose=0) as checkpointer:
        checkpointer.track(model={"w": np.ones(3)}, optimizer={"m": np.ones(3)})
        list(checkpointer.epochs(1))
    live = {name: {"w": np.zeros(3)} for name in names}

    with pytest.raises(Refused) as error, Checkpointer(where, verbose=0) as again:
        again.track(**live)
        list(again.epochs(2))

    assert words in str(error.value)
    assert "for another experiment use another directory" in str(error.value)
    assert not any(tree["w"].any() for tree in live.values())
    assert [entry.epoch for entry in again.run.checkpoints] == [1]
    assert again.run.settings.tracked == ("model", "optimizer")


def test_another_experiment_in_the_directory_is_refused(where):
    """Two models of the same names and other shapes would share a history, and the better loss would remove the other."""
    for shape in (3, 4):
        with Checkpointer(where, monitor="loss", verbose=0) as checkpointer:
            checkpointer.track(model={"w": np.zeros(shape)})
            if shape == 4:
                with pytest.raises(Mismatch, match="use another directory"):
                    list(checkpointer.epochs(2))
            else:
                for _ in checkpointer.epochs(1):
                    checkpointer.log(loss=0.5)

    assert [entry.load()["w"].shape for entry in checkpointer.run.checkpoints] == [(3,)]


def test_checkpoints_of_another_run_are_not_ours(train, where, tmp_path):
    """Copied in from elsewhere, another run's checkpoint would be restored, ranked, and removed by our retention."""
    train([0.5, 0.4])
    train([0.1, 0.05, 0.01], directory=tmp_path / "other")
    shutil.copytree(tmp_path / "other/checkpoints/step-00000003", where / "checkpoints/step-00000003")

    run = train([0.5, 0.4, 0.3, 0.2, 0.1]).run

    assert [entry.name for entry in run.checkpoints] == ["step-00000002", "step-00000004", "step-00000005"]
    assert [name for name, _ in run.unreadable] == ["step-00000003"]
    assert "it belongs to another run" in run.unreadable[0][1]
    assert run.history.attempts[1].resumed_from == "step-00000002"
    assert run.checkpoint("step-00000004").parent == "step-00000003.2"
    assert run.best.epoch == 5
    assert (where / "checkpoints/step-00000003/model.safetensors").exists()


def test_lost_random_state_is_loud(where):
    """Without the state of a generator in use, the run goes on with other random numbers and nobody notices."""
    from highcamp.training.rng import random_state, set_random_state

    state = random_state()
    set_random_state(state, where="run")
    del state["numpy"]

    with pytest.raises(Mismatch, match="run holds no random state of numpy"):
        set_random_state(state, where="run")


@pytest.mark.parametrize("obj", [3, "text", len, (np.zeros(3),), object(), None], ids=lambda obj: type(obj).__name__)
def test_what_has_no_state_is_refused_at_once(where, obj):
    """It would be found out at the end of the first epoch."""
    checkpointer = Checkpointer(where)

    with pytest.raises(InvalidState, match="which has no state to save"):
        checkpointer.track(thing=obj)


def test_state_that_cannot_be_saved_is_found_before_training(where):
    """Hours of an epoch, and then the first save fails on a function in a dict."""
    checkpointer = Checkpointer(where, verbose=0)
    checkpointer.track(model={"w": np.zeros(3), "f": [len]})

    with pytest.raises(InvalidState, match="model/f/0"):
        list(checkpointer.epochs(1))

    assert not (where / "checkpoints").exists()


# Damage


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "state", "manifest"])
def test_resume_falls_back(train, where, capsys, damage):
    """One flipped bit in the newest checkpoint, and the run cannot be resumed at all; or goes on from noise."""
    train([0.5, 0.4, 0.3])
    newest = where / "checkpoints/step-00000003"
    if damage == "truncate":
        (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:-1])
    elif damage == "missing":
        (newest / "model.safetensors").unlink()
    else:
        _flip(newest / {"flip": "model.safetensors", "state": "state.json", "manifest": "manifest.json"}[damage])

    run = train([0.5, 0.4, 0.3, 0.2], verbose=1, keep=Keep(best=1, last=9)).run

    assert run.last.load("model")["w"][0] == 4
    assert run.history.attempts[-1].resumed_from == "step-00000002"
    text = capsys.readouterr().err
    if damage == "flip":
        words = "step-00000003: model.safetensors differs from its digest; resumed from step-00000002 instead"
        assert text.splitlines()[:2] == [
            words, "Resumed from step-00000002 (epoch 2, attempt 2); 2 epochs to go",
        ]  # fmt: skip
    assert newest.exists()


def test_same_step_again(train, where):
    """Fallen back past a damaged step 3 and come to step 3 again, its name is in the way."""
    train([0.5, 0.4, 0.3])
    _flip(where / "checkpoints/step-00000003/model.safetensors")

    run = train([0.5, 0.4, 0.35], keep=Keep(last=5)).run

    assert [entry.name for entry in run.checkpoints] == ["step-00000002", "step-00000003", "step-00000003.2"]
    assert run.last.name == "step-00000003.2"
    assert run.last.verify().ok
    assert not run.checkpoint("step-00000003").verify().ok
    assert run.checkpoint("step:3").name == "step-00000003.2"
    assert [row.metrics["val_loss"] for row in run.history.rows] == [0.5, 0.4, 0.35]


def test_nothing_whole_is_an_error(train, where):
    """Training from the start, over what may still be saved, is for a person to decide."""
    train([0.5, 0.4])
    for file in where.glob("checkpoints/*/model.safetensors"):
        _flip(file)

    with pytest.raises(Damaged, match="has checkpoints, but none is whole: step-00000002, step-00000001") as error:
        train([0.5, 0.4, 0.3])

    assert "highcamp verify" in str(error.value)
    assert len(highcamp.open(where).history.attempts) == 1


def test_a_fallback_names_where_it_ended(train, where, capsys):
    """With two damaged ones, "resumed from" would name the second of them."""
    train([0.5, 0.4, 0.3], keep=Keep(last=3))
    for step in (2, 3):
        _flip(where / f"checkpoints/step-0000000{step}/model.safetensors")
    train([0.5, 0.4, 0.3], keep=Keep(last=3))

    assert capsys.readouterr().err.splitlines() == [
        f"step-0000000{step}: model.safetensors differs from its digest; resumed from step-00000001 instead"
        for step in (3, 2)
    ]


def test_nothing_readable_is_an_error(train, where):
    """With every manifest lost, the run looks like a new one."""
    train([0.5, 0.4])
    for file in where.glob("checkpoints/*/manifest.json"):
        _flip(file)

    with pytest.raises(Damaged, match="none is whole"):
        train([0.5, 0.4, 0.3])


# Where the run is


def test_same_directory_again(train):
    """A second start is an error, or its epochs are not kept."""
    for count in range(1, 5):
        run = train([0.5] * count).run

    assert [attempt.number for attempt in run.history.attempts] == [1, 2, 3, 4]
    assert [row.epoch for row in run.history.rows] == [1, 2, 3, 4]
    assert run.last.epoch == 4


def test_moved_run_keeps_best(train, where, tmp_path):
    """Absolute paths, or a best that is remembered, break when the directory is renamed or copied."""
    train([0.5, 0.1, 0.4])
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    where.rename(moved)

    run = train([0.5, 0.1, 0.4, 0.3, 0.2], directory=moved).run

    assert (run.best.epoch, run.best.load("model")["w"][0]) == (2, 2)
    assert run.best.path == f"{moved}/checkpoints/step-00000002"
    assert not where.exists()
    assert b"runs/digits" not in b"".join(path.read_bytes() for path in moved.rglob("*") if path.is_file())


def test_changed_settings_keep_best(train):
    """With another cadence or retention after a restart, the best score is forgotten."""
    train([0.5, 0.1, 0.4], keep=Keep(best=1, last=2), every=Every(epochs=1))

    run = train([0.5, 0.1, 0.4, 0.3, 0.2], keep=Keep(best=2, last=1), every=Every(epochs=2)).run

    assert run.best.epoch == 2
    assert [entry.epoch for entry in run.rank()] == [2, 5, 3]
    assert (run.keep, run.every) == (Keep(best=2, last=1), "every 2 epochs")


def test_names_are_not_facts(train, where):
    """Facts read off directory names or times of files make an old file the newest."""
    train([0.5, 0.4, 0.3], keep=Keep(last=9))
    (where / "checkpoints/step-00000003").rename(where / "checkpoints/a-copy")
    (where / "checkpoints/step-00000001").rename(where / "checkpoints/step-99999999")

    run = train([0.5, 0.4, 0.3, 0.2], keep=Keep(last=9)).run

    assert run.history.attempts[-1].resumed_from == "a-copy"
    assert [entry.name for entry in run.checkpoints] == ["step-99999999", "step-00000002", "a-copy", "step-00000004"]


def test_a_second_live_writer_is_refused(where):
    """Two processes in one run: each removes what the other has just saved."""
    checkpointer = Checkpointer(where, verbose=0)
    checkpointer.track(model={"w": np.zeros(3)})
    checkpointer.start()
    other = Checkpointer(where, verbose=0)
    other.track(model={"w": np.zeros(3)})

    with pytest.raises(RunLocked, match=r"is being written by process \d+ on .*, since 20"):
        list(other.epochs(1))

    checkpointer.close()
    list(other.epochs(1))
    other.close()


# History


def test_history_across_restarts(train):
    """Only the epochs after the last restart would be in the curve."""
    train([0.5, 0.4])
    train([0.5, 0.4, 0.3])
    run = train([0.5, 0.4, 0.3, math.nan, 0.2]).run

    history = run.history
    assert [(row.attempt, row.epoch) for row in history.rows] == [(1, 1), (1, 2), (2, 3), (3, 4), (3, 5)]
    assert [(attempt.resumed_from, attempt.epoch, attempt.ended) for attempt in history.attempts] == [
        (None, 0, "complete"),
        ("step-00000002", 2, "complete"),
        ("step-00000003", 3, "complete"),
    ]
    assert math.isnan(history.epochs()[3].metrics["val_loss"])


def test_abandoned_rows_are_marked(train, where):
    """The epochs that were trained twice would stand twice in the curve."""
    with pytest.raises(Stop):
        train([0.5, 0.4, 0.3, 0.2, 0.1], every=Every(epochs=2), each=_stop_at(4))
    run = train([0.5, 0.4, 0.35, 0.25, 0.15, 0.05], every=Every(epochs=2), count=6).run

    assert [(row.attempt, row.epoch) for row in run.history.rows] == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 5), (2, 6)]
    shutil.rmtree(where / "checkpoints/step-00000006")
    run = train([0.5, 0.4, 0.35, 0.25, 0.14, 0.04], every=Every(epochs=2), count=6).run

    assert [(row.attempt, row.metrics["val_loss"]) for row in run.history.rows] == [
        (1, 0.5), (1, 0.4), (1, 0.3), (1, 0.2), (3, 0.14), (3, 0.04),
    ]  # fmt: skip
    assert [(row.attempt, row.epoch) for row in run.history.all_rows if row.abandoned] == [(1, 5), (2, 5), (2, 6)]
    assert run.best.metrics["val_loss"] == 0.04


def test_an_abandoned_value_ranks_nothing(train):
    """A value measured on weights that no longer exist would make other weights of the same step the best."""
    with pytest.raises(Stop):
        train([0.5, 0.4, 0.01, None], every=Every(epochs=2), each=_stop_at(2))

    run = train([0.5, 0.4, None, 0.3], keep=Keep(last=9)).run

    assert run.checkpoint("epoch:3").metrics == {}
    assert run.best.epoch == 4
    assert [row.metrics["val_loss"] for row in run.history.all_rows if row.abandoned] == [0.01]


def _stop_at(last):
    def each(checkpointer, epoch):
        if epoch == last:
            checkpointer.progress.is_logged = False  # as if killed: what is logged makes no whole epoch
            raise Stop

    return each
