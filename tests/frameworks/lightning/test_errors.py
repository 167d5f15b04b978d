"""Training that fails with our callback in it fails as it would without: the same error, at once, and nothing is lost."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import highcamp
from highcamp import Every
from highcamp.errors import Mismatch
from highcamp.lightning import CheckpointCallback


class OwnError(Exception):
    """Of the user's program."""


class Line(LightningModule):
    """A straight line that may fail in a batch."""

    def __init__(self, fail_at=None, width=1, optimizer=torch.optim.SGD):
        super().__init__()
        self.layer, self.fail_at, self.kind = nn.Linear(2, width), fail_at, optimizer

    def training_step(self, batch, index):
        if (self.current_epoch, index) == self.fail_at:
            raise OwnError("of the user")
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return self.kind(self.parameters(), lr=0.1)


@pytest.fixture
def make(tmp_path):
    """A Trainer of two epochs of four batches, and its data."""

    def trainer(*callbacks):
        made = Trainer(
            max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, callbacks=list(callbacks),
        )  # fmt: skip
        return made, DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)

    return trainer


def _barriers(trainer, monkeypatch):
    """Names of the barriers that are waited at from now on."""
    found = []
    monkeypatch.setattr(trainer.strategy, "barrier", lambda name=None, *_, **__: found.append(name))
    return found


def test_no_barrier_on_error(tmp_path, make, monkeypatch):
    """One process fails; were the others met at a barrier, all would wait, and nobody would see the error."""
    plain, data = make()
    plain.callbacks = [each for each in plain.callbacks if not hasattr(each, "save_last")]
    expected = _barriers(plain, monkeypatch)
    with pytest.raises(OwnError):
        plain.fit(Line((1, 2)), data)
    trainer, data = make(CheckpointCallback(tmp_path / "run", every=Every(steps=1, epochs=1), verbose=0))
    found = _barriers(trainer, monkeypatch)

    with pytest.raises(OwnError, match="of the user"):
        trainer.fit(Line((1, 2)), data)

    assert found == expected


def test_handler_raises_again(tmp_path, make):
    """Attaching anything stops other engines from raising; here the error is the user's own, and the run says how it ended."""
    trainer, data = make(CheckpointCallback(tmp_path / "run", every=Every(steps=1), verbose=0))

    with pytest.raises(OwnError, match="of the user"):
        trainer.fit(Line((1, 2)), data)

    run = highcamp.open(tmp_path / "run")
    assert [attempt.ended for attempt in run.history.attempts] == ["error"]
    assert (run.last.epoch, run.last.batch) == (1, 2)  # exception_drains: the save under way is committed


def test_an_error_of_training_hides_no_error_of_a_save(tmp_path, make, capsys):
    """The last save has failed as well: that is said, and does not take the place of the user's error."""

    class Unwritable(Line):
        def training_step(self, batch, index):
            if (self.current_epoch, index) == (1, 1):
                (tmp_path / "run" / "checkpoints").write_text("in the way")
            return super().training_step(batch, index)

    trainer, data = make(CheckpointCallback(tmp_path / "run", every=Every(steps=6), verbose=0))

    with pytest.raises(OwnError, match="of the user"):
        trainer.fit(Unwritable((1, 2)), data)

    assert "not saved: " in capsys.readouterr().err


def test_all_differences_of_a_model_are_one_error_and_nothing_is_half_restored(tmp_path, make):
    """A tour of errors, each after a restart, is no help."""
    trainer, data = make(CheckpointCallback(tmp_path / "run", verbose=0))
    trainer.fit(Line(), data)
    model = Line(width=3)
    before = [each.clone() for each in model.parameters()]
    again, data = make(CheckpointCallback(tmp_path / "run", verbose=0))

    with pytest.raises(Mismatch) as caught:
        again.fit(model, data)

    assert all(name in str(caught.value) for name in ("layer.weight", "layer.bias"))
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("save_top_k", "keep=Keep(best=…)"),
        ("save_last", "keep=Keep(last=1)"),
        ("every_n_train_steps", "every=Every(steps=…)"),
        ("every_n_epochs", "every=Every(epochs=…)"),
        ("train_time_interval", "every=Every(seconds=…)"),
        ("dirpath", "directory"),
        ("mode", "Monitor"),
        ("snapshots", "snapshot"),
    ],
)
def test_names_typed_by_habit_are_answered_with_ours(tmp_path, typed, ours):
    """ModelCheckpoint's own names would be taken in silence, and nothing of what was meant would happen."""
    with pytest.raises(TypeError) as caught:
        CheckpointCallback(tmp_path, **{typed: 1})

    assert typed in str(caught.value)
    assert ours in str(caught.value)
