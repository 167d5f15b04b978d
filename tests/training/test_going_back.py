"""Going back, leaving early, arriving late: what is saved, what is best, what stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Every, Keep, Monitor
from highcamp.errors import Damaged, Refused
from highcamp.storage.memory import MemoryStore


class Doubled:
    """A store of which the next creation fails, as often as asked."""

    def __init__(self) -> None:
        self.store, self.failures = MemoryStore(), 0
        self._create = self.store.create
        self.store.create = self.create

    def create(self, path: str, chunks: object) -> None:
        if self.failures and path.endswith("manifest.json"):
            self.failures -= 1
            raise highcamp.StorageError("injected")
        self._create(path, chunks)


def test_restore_goes_back_to_the_last_checkpoint_again(tmp_path: Path):
    """After a divergence `restore()` would do nothing, and say nothing."""
    model = {"w": np.zeros(2)}
    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.track(model=model)
        for _ in checkpointer.epochs(2):
            model["w"] += 1
            checkpointer.log(val_loss=1.0)
        model["w"][:] = np.nan

        found = checkpointer.restore()

        assert found.epoch == checkpointer.epoch == 2
    assert model["w"].tolist() == [2, 2]


def test_break_keeps_the_best_however_the_iterator_is_held(tmp_path: Path):
    """With a progress bar around it the generator ends late: the best weights would never be saved."""
    model = {"w": np.zeros(1)}
    with Checkpointer(tmp_path, monitor="val_loss", every=Every(epochs=5), verbose=0) as checkpointer:
        checkpointer.track(model=model)
        bar = checkpointer.epochs(9)
        for epoch in bar:
            model["w"][:] = epoch + 1
            checkpointer.log(val_loss=[0.5, 0.01][epoch])
            if epoch == 1:
                break
        checkpointer.restore("best")

        assert model["w"].tolist() == [2]
    assert highcamp.open(tmp_path).best.epoch == 2


def test_best_weights_restored_in_the_loop_do_not_borrow_its_metric(tmp_path: Path):
    """The checkpoint of this epoch would hold the best weights under this epoch's value."""
    model = {"w": np.zeros(1)}
    with Checkpointer(tmp_path, monitor="val_loss", keep=Keep(last=9), verbose=0) as checkpointer:
        checkpointer.track(model=model)
        for epoch in checkpointer.epochs(2):
            model["w"][:] = epoch + 1
            checkpointer.log(val_loss=[0.1, 0.9][epoch])
            if epoch == 1:
                checkpointer.restore("best")

    saved = {entry.metrics["val_loss"]: entry.load()["w"].tolist() for entry in highcamp.open(tmp_path).checkpoints}
    assert saved == {0.1: [1], 0.9: [2]}


def test_what_was_committed_last_is_never_removed_at_once(tmp_path: Path):
    """An acknowledged save of a lower step would be gone before the caller looks at it."""
    with Checkpointer(tmp_path, every=Every(steps=1), keep=Keep(best=0, last=1), verbose=0) as checkpointer:
        checkpointer.save({"w": np.ones(1)}, step=100).wait()

        found = checkpointer.save({"w": np.ones(1)}, step=50).wait()

        assert Path(found.path).is_dir()


def test_prune_leaves_something_whole(tmp_path: Path):
    """Removing the good ones around a damaged newest one would leave nothing."""
    with Checkpointer(tmp_path, every=Every(steps=1), keep=Keep(best=0, last=9), verbose=0) as checkpointer:
        for step in range(1, 5):
            checkpointer.save({"w": np.ones(100)}, step=step)
    file = next(Path(highcamp.open(tmp_path).last.path).glob("state.safetensors"), None)
    file = file or next(Path(highcamp.open(tmp_path).last.path).glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    run = highcamp.open(tmp_path)

    with pytest.raises(Damaged, match="would be all that is left"):
        run.prune(Keep(best=0, last=1))

    assert len(run.checkpoints) == 4


def test_nothing_is_removed_while_the_best_cannot_be_told(tmp_path: Path):
    """Without run.json there is no monitor: the best would go as one of the old ones."""
    with Checkpointer(tmp_path, monitor="val_loss", every=Every(steps=1), keep=Keep(last=9), verbose=0) as checkpointer:
        for step in range(1, 5):
            checkpointer.save({"w": np.ones(1)}, step=step, metrics={"val_loss": step})
    (tmp_path / "run.json").unlink()
    run = highcamp.open(tmp_path)

    with pytest.raises(Refused, match=r"no run\.json"):
        run.prune(Keep(best=1, last=1))
    with pytest.raises(Refused, match=r"no run\.json"):
        run.remove("step:1")
    assert len(run.checkpoints) == 4


def test_a_run_whose_checkpoints_are_all_of_another_is_refused(tmp_path: Path):
    """It would train from the start among checkpoints that it cannot see."""
    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.save({"w": np.ones(1)}, step=1)
    text = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(text.replace(highcamp.open(tmp_path).run_id, "0123456789abcdef"))

    with pytest.raises(Refused, match="another run"):
        Checkpointer(tmp_path, verbose=0).restore(like={"w": np.ones(1)})


def test_a_metric_that_arrives_after_a_restart_ranks_its_checkpoint(tmp_path: Path):
    """Evaluation by another job ends when it ends: its value would be dropped, and the best removed."""
    like = {"w": np.ones(1)}
    with Checkpointer(tmp_path, monitor="val_loss", every=Every(steps=1), keep=Keep(last=9), verbose=0) as first:
        first.save(like, step=5)
        first.save(like, step=10, metrics={"val_loss": 0.5})
    with Checkpointer(tmp_path, monitor="val_loss", every=Every(steps=1), keep=Keep(last=9), verbose=0) as second:
        second.restore(like=like)

        second.log(step=5, val_loss=0.1)

    assert highcamp.open(tmp_path).best.step == 5


def test_a_failed_last_save_is_tried_again_and_not_called_complete():
    """With on_error="warn" a run would end as complete without its last state."""
    scene = Doubled()
    model = {"w": np.zeros(1)}
    ended = []
    for failures in (1, 9):
        with Checkpointer(scene.store, on_error="warn", verbose=0) as checkpointer:
            checkpointer.track(model=model)
            for epoch in checkpointer.epochs(2 if failures == 1 else 3):
                checkpointer.log(val_loss=1.0)
                scene.failures = failures if epoch else 0
        scene.failures = 0
        run = highcamp.open(scene.store)
        ended.append((run.last.epoch, run.history.attempts[-1].ended))

    assert ended == [(2, "complete"), (2, "closed")]


def test_epochs_since_best_is_counted_for_state_that_is_passed(tmp_path: Path):
    """Early stopping in a JAX loop would stop a run that improves with every epoch."""
    values = [0.5, 0.4, 0.6, 0.7]
    with Checkpointer(tmp_path, monitor=Monitor("val_loss"), verbose=0) as checkpointer:
        found = []
        for epoch, value in enumerate(values, start=1):
            checkpointer.save({"w": np.ones(1)}, step=epoch, epoch=epoch, metrics={"val_loss": value})
            found.append(checkpointer.epochs_since_best)

    assert found == [0, 0, 1, 2]


def test_objects_of_ones_own_get_their_tensors_back_as_tensors(tmp_path: Path):
    """An average of weights kept as torch tensors would come back as NumPy arrays, and a tracked tensor as another one."""
    torch = pytest.importorskip("torch")

    class Average:
        def __init__(self) -> None:
            self.shadow = {"w": torch.zeros(2)}

        def state_dict(self) -> dict[str, object]:
            return {"shadow": self.shadow}

        def load_state_dict(self, state: dict[str, object]) -> None:
            self.shadow = state["shadow"]

    for count in (1, 2):
        average, own = Average(), {"t": torch.zeros(2)}
        tensor = own["t"]
        with Checkpointer(tmp_path, verbose=0) as checkpointer:
            checkpointer.track(average=average, own=own)
            for _ in checkpointer.epochs(count):
                tensor += 1
                checkpointer.log(val_loss=1.0)

    assert isinstance(average.shadow["w"], torch.Tensor)
    assert own["t"] is tensor
    assert tensor.tolist() == [2, 2]


def test_a_best_that_was_not_saved_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With a cadence by time the best epoch may have no checkpoint: nobody would notice until the weights are wanted."""
    with Checkpointer(tmp_path, monitor="val_loss", every=Every(seconds=600), verbose=1) as checkpointer:
        checkpointer.track(model={"w": np.zeros(1)})
        for epoch in checkpointer.epochs(3):
            checkpointer.log(val_loss=[0.5, 0.1, 0.9][epoch])

    said = capsys.readouterr().err
    assert "Epoch 2: val_loss improved from 0.50000 to 0.10000, not saved: none is due" in said
    assert "The best, epoch 2 with val_loss 0.1, was not saved" in said


def test_a_loop_that_saves_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`for epoch in range(n)` with log() alone would end without a checkpoint and without a word."""
    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.track(model={"w": np.zeros(1)})
        for _ in range(3):
            checkpointer.log(val_loss=1.0)

    assert "Nothing was saved" in capsys.readouterr().err
    with pytest.raises(highcamp.InvalidMetric, match="a value without a name"):
        Checkpointer(tmp_path / "other", verbose=0).log(0.3)


def test_the_names_of_queries_are_no_pins(tmp_path: Path):
    """A pin called best would sit on a checkpoint that is not the best."""
    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.save({"w": np.ones(1)}, step=1).wait()

    with pytest.raises(Refused, match="a query, not a pin"):
        highcamp.open(tmp_path).pin("last", "best")
