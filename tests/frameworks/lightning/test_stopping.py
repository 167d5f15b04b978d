"""Asked to stop by a signal: one save where `fit` is, the conventional exit code, and a rerun that ends the same."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import highcamp
from highcamp import Every
from highcamp.lightning import CheckpointCallback


class Line(LightningModule):
    """A straight line with dropout."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    def training_step(self, batch, index):
        loss = self.layers(batch[0]).square().mean()
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.layers(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class AskAt(Callback):
    """Signals its own process within a batch of training or, if `stage` says so, of validation."""

    def __init__(self, epoch, batch, stage="train", signum=signal.SIGTERM):
        self.at, self.stage, self.signum = (epoch, batch), stage, signum

    def on_train_batch_start(self, trainer, module, batch, index):
        self._ask(trainer, "train", index)

    def on_validation_batch_start(self, trainer, module, batch, index, dataloader_idx=0):
        self._ask(trainer, "validation", index)

    def _ask(self, trainer, stage, index):
        if (stage, (trainer.current_epoch, index)) == (self.stage, self.at):
            os.kill(os.getpid(), self.signum)


@pytest.fixture
def train(tmp_path):
    """Train three epochs of six batches; returns the Trainer, and the exit code."""

    def fit(name, *callbacks, every=Every(epochs=1)):  # noqa: B008  (frozen)
        torch.manual_seed(5)
        points = torch.randn(12, 2)
        callback = CheckpointCallback(tmp_path / name, "val_loss", every=every, verbose=0)
        trainer = Trainer(
            max_epochs=3, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, num_sanity_val_steps=0,
            enable_model_summary=False, default_root_dir=tmp_path, callbacks=[*callbacks, callback],
        )  # fmt: skip
        try:
            trainer.fit(
                Line(),
                DataLoader(TensorDataset(points), batch_size=2, shuffle=True),
                DataLoader(TensorDataset(points), batch_size=4),
            )
        except SystemExit as stop:
            return trainer, stop.code
        return trainer, 0

    return fit


def _rows(path):
    return [(row.epoch, row.step, row.metrics) for row in highcamp.open(path).history.epochs()]


@pytest.mark.parametrize("every", [Every(epochs=1), Every(epochs=5), Every(steps=4)], ids=str)
@pytest.mark.parametrize(
    ("at", "place"),
    [((1, 2), (1, 3)), ((1, 0), (1, 1)), ((1, 5), (2, 0)), ((1, 1, "validation"), (2, 0)), ((0, 0), (0, 1))],
    ids=["batch", "first", "last", "validation", "very_first"],
)
def test_a_stop_loses_nothing_and_the_rerun_ends_the_same(tmp_path, train, every, at, place):
    """A machine that is taken away says so seconds before, whatever the cadence: by then no epoch may be over."""
    whole, _ = train("whole", every=every)

    _, code = train("stopped", AskAt(*at), every=every)

    last = highcamp.open(tmp_path / "stopped").last
    assert (code, (last.epoch, last.batch)) == (143, place)
    resumed, code = train("stopped", every=every)
    assert code == 0
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert _rows(tmp_path / "whole") == _rows(tmp_path / "stopped")


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2])
def test_the_exit_code_names_the_signal(train, signum):
    """Slurm and a shell tell from it what has happened."""
    assert train("a", AskAt(1, 2, signum=signum))[1] == 128 + signum
