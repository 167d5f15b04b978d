"""A snapshot that is copied while Lightning goes on: the same bytes, and nothing waits before there is need to."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import highcamp
from highcamp import Every, Keep
from highcamp.errors import InvalidArgument
from highcamp.lightning import CheckpointCallback
from highcamp.training.overlap import Overlap

WIDTH = 160  # 100 KiB a layer: smaller arrays are copied at once


class Wide(LightningModule):
    """Automatic optimization; notes what happens."""

    def __init__(self, events=None):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH))
        self.events = [] if events is None else events

    def training_step(self, batch, index):
        self.events.append("forward")
        return self.layers(batch[0]).square().mean()

    def on_after_backward(self):
        self.events.append("backward")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Manual(Wide):
    """Two optimizers, each with half of the weights; the second steps in every second batch."""

    def __init__(self, events=None):
        super().__init__(events)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        first, second = self.optimizers()
        loss = super().training_step(batch, index)
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        if index % 2:
            second.step()
            second.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.layers[0].parameters()), torch.optim.Adam(self.layers[2].parameters())]


class Closing(Wide):
    """An optimizer that needs its closure several times in a step."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=3)


class Foreign(torch.optim.SGD):
    """Of somebody else: changes the weights before it calls the closure."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.999)
        return super().step(closure)


class Sharp(Wide):
    """Uses it."""

    def configure_optimizers(self):
        return Foreign(self.parameters(), lr=0.01)


def data():
    points = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(points), batch_size=3)


@pytest.fixture
def train(tmp_path):
    """Train an epoch of eight batches, saved at every step; returns the run."""

    def fit(name, model, *, every=Every(steps=1), settings=None, **options):  # noqa: B008  (frozen)
        torch.manual_seed(3)
        callback = CheckpointCallback(tmp_path / name, every=every, keep=Keep(last=99), **{"verbose": 0, **options})
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback], **(settings or {}),
        )  # fmt: skip
        trainer.fit(model(), data())
        return highcamp.open(tmp_path / name)

    return fit


def arrays(run):
    """Every array of every checkpoint, as bytes."""
    return [
        {(name, key): value.tobytes() for name in checkpoint.objects for key, value in checkpoint.load(name).items()}
        for checkpoint in run.checkpoints
    ]


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (Wide, {}),
        (Wide, {"accumulate_grad_batches": 2}),
        (Wide, {"gradient_clip_val": 0.1}),
        (Wide, {"precision": "bf16-mixed"}),
        (Manual, {}),
        (Closing, {}),
        (Sharp, {}),
    ],
    ids=["automatic", "accumulating", "clipped", "mixed", "manual", "lbfgs", "foreign"],
)
def test_overlapped_checkpoints_are_those_that_were_copied(train, model, settings):
    """A checkpoint with weights of the next step in it is none."""
    copied = train("copied", model, settings=settings)

    overlapped = train("overlapped", model, settings=settings, snapshot="overlap")

    assert [each.step for each in copied.checkpoints] == [each.step for each in overlapped.checkpoints]
    assert len(copied.checkpoints) >= 4
    assert arrays(copied) == arrays(overlapped)


@pytest.mark.parametrize(
    ("model", "settings"),
    [(Wide, {}), (Wide, {"accumulate_grad_batches": 2}), (Manual, {}), (Closing, {})],
    ids=["automatic", "accumulating", "manual", "lbfgs"],
)
def test_nothing_waits_for_the_copy_before_the_weights_change(train, monkeypatch, model, settings):
    """Lightning's forward and backward run within the step, whose hook would wait for the copy first."""
    events = []
    waits, arms = Overlap.wait, Overlap.arm

    def wait(self):
        if self._armed is not None:
            events.append("wait")
        waits(self)

    def arm(self, *arguments):
        found = arms(self, *arguments)
        events.extend(["copy"] if found is not None else [])
        return found

    monkeypatch.setattr(Overlap, "wait", wait)
    monkeypatch.setattr(Overlap, "arm", arm)

    train("overlapped", lambda: model(events), settings=settings, snapshot="overlap")

    between = [part.partition("wait")[0].split() for part in " ".join(events).split("copy")[1:]]
    assert len(between) >= 3
    assert all("backward" in done for done in between[:-1]), events  # behind the last copy training ends


def test_hooks_are_taken_away(train):
    """The optimizers live on in the user's program."""
    made = []

    class Kept(Wide):
        def configure_optimizers(self):
            made.append(super().configure_optimizers())
            return made[0]

    train("a", Kept, snapshot="overlap")

    assert len(made[0]._optimizer_step_pre_hooks) == 0


def test_memory_is_kept_between_checkpoints(train, capsys):
    """`memory_every` reaches the steps within an epoch, though checkpoints are for epochs only."""
    run = train("a", Wide, every=Every(epochs=1), memory_every=Every(steps=1), verbose=1)

    assert [each.step for each in run.checkpoints] == [8]
    assert "7 snapshots in shared memory" in capsys.readouterr().err


def test_a_cadence_that_finds_itself(train):
    """`Every.auto` weighs what a save costs against the time of training; the end is saved in any case."""
    assert train("a", Wide, every=Every.auto(overhead=0.5)).last.step == 8


def test_staging_bytes_are_the_most_memory(train):
    """A state larger than its staging memory passes through it in pieces, with the same bytes."""
    whole = train("whole", Wide)

    pieces = train("pieces", Wide, staging_bytes=1 << 20)

    assert arrays(whole) == arrays(pieces)


@pytest.mark.parametrize(
    "wrong",
    [{"snapshot": "overlay"}, {"memory_every": 3}, {"staging_bytes": 7}, {"on_error": "ignore"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_arguments_raise_in_the_constructor(tmp_path, wrong):
    """Not at the first save."""
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        CheckpointCallback(tmp_path, **wrong)
