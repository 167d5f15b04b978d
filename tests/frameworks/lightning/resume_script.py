"""Train once without a stop, once killed again and again, and compare: `resume_script.py DIRECTORY CASE:SEED…`.

Every training is a process of its own, forked after the imports, which are slow. It kills itself by SIGKILL at the N-th
event: an event is a batch, or a change of the store, in whose middle it may die. N is drawn from SEED. Some batches end with
SIGTERM instead, at which it saves and stops. Prints one line of JSON for each: how often that was and where, and what differs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import MeanSquaredError

import highcamp
from highcamp import Every, Keep
from highcamp.lightning import CheckpointCallback

sys.path.append(str(Path(__file__).parents[2]))
from deadly import Deadly

DIRECTORY = Path(sys.argv[1])
ASKED = 128 + signal.SIGTERM  # the exit code of one that was asked to stop, and saved
MAX_KILLS = 4  # the run after that is let through

torch.set_num_threads(1)  # a pool of threads would not survive the fork
torch.use_deterministic_algorithms(mode=True)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Mortal(Callback):
    """Dies at batches; counts in hooks of every kind, which is a state of its own."""

    def __init__(self, store: Deadly) -> None:
        self.store, self.counts = store, {"epoch": 0, "batch": 0, "validation": 0}

    def state_dict(self) -> dict[str, int]:
        return dict(self.counts)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.counts = dict(state)

    def on_train_epoch_start(self, trainer, module) -> None:
        self.counts["epoch"] += 1
        random.random()

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        self.counts["batch"] += 1
        self.store.event("batch")

    def on_validation_end(self, trainer, module) -> None:
        if not trainer.sanity_checking:
            self.counts["validation"] += 1
            self.store.event("validation")


def data(count: int, seed: int) -> TensorDataset:
    """Points, and a curve through them."""
    points = torch.rand(count, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(points, points.sin().sum(1, keepdim=True))


class Noisy(TensorDataset):
    """Points with noise that is drawn when they are read, by three generators, as augmentations do."""

    def __getitem__(self, index: int) -> Any:
        points, values = super().__getitem__(index)
        return points + 0.1 * torch.rand(()) + 0.1 * random.random() + 0.1 * np.random.random(), values


class Stream(IterableDataset):
    """Points one after the other, without a length; their order is drawn from the global generator."""

    def __iter__(self) -> Any:
        whole = data(26, seed=1)
        for index in torch.randperm(26).tolist():
            yield whole[index]


class Network(LightningModule):
    """Dropout, BatchNorm, metrics by steps and by epochs, one of torchmetrics, and state of its own in hooks."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters({"case": "a word", "loss": nn.functional.mse_loss})
        self.case = case
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 1)
        self.error = MeanSquaredError()
        self.smoothed = 0.0

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(points))

    def loss(self, batch: Any) -> torch.Tensor:
        if isinstance(batch, dict):
            return sum(self.loss(each) for each in batch.values())
        points, values = batch
        return nn.functional.mse_loss(self(points), values)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.error(loss.detach().reshape(1), torch.zeros(1))
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_least", loss, on_step=False, on_epoch=True, reduce_fx="min")
        self.log("train_error", self.error, on_step=False, on_epoch=True)
        if index < 2:
            self.log("train_early", loss + torch.rand(()), on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(batch) + 0.01 * torch.rand(()))

    def on_train_batch_end(self, outputs, batch, index) -> None:
        self.smoothed = 0.9 * self.smoothed + float(self.head.bias.detach()[0])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["a b/c"] = {"smoothed": self.smoothed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.smoothed = checkpoint["a b/c"]["smoothed"]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW((each for each in self.parameters() if each.requires_grad), lr=1e-2)
        scheduler = self.case.get("scheduler")
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": scheduler(self, optimizer)}


class Adversaries(Network):
    """Two optimizers, stepped by hand, one of them every other batch, with a schedule for each."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        for turn, (optimizer, scheduler) in enumerate(zip(self.optimizers(), self.lr_schedulers(), strict=True)):
            if turn == 0 or index % 2 == 0:
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, index) if turn == 0 else self.loss(batch))
                optimizer.step()
                scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.SGD(self.backbone.parameters(), lr=1e-2, momentum=0.9),
            torch.optim.Adam(self.head.parameters(), lr=1e-2),
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(each, 0.95) for each in optimizers]


class Source(LightningDataModule):
    """Data that count how often they were asked for, and have a shuffled validation of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def train_dataloader(self) -> Any:
        half, _ = torch.utils.data.random_split(data(40, seed=1), [26, 14])  # what it draws must be drawn again
        return DataLoader(half, batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(3)
        return DataLoader(data(8, seed=2), batch_size=4, shuffle=True, generator=generator)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.asked += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = state["asked"]


def shuffled(dataset: Any = None, **options: Any) -> Any:
    return DataLoader(data(26, seed=1) if dataset is None else dataset, batch_size=4, shuffle=True, **options)


def plateau(module: LightningModule, optimizer: Any) -> dict[str, Any]:
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.3)
    return {
        "scheduler": scheduler,
        "monitor": "val_loss",
        "strict": False,
        "interval": module.case.get("interval", "epoch"),
    }


def one_cycle(module: LightningModule, optimizer: Any) -> dict[str, Any]:
    total = module.trainer.estimated_stepping_batches  # sets up the data, and draws for them, before training begins
    return {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=total), "interval": "step"}


def by_epochs(_: LightningModule, optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


class Thaw(BackboneFinetuning):
    """Unfreezes the backbone at the second epoch."""

    def __init__(self) -> None:
        super().__init__(unfreeze_backbone_at_epoch=1, verbose=False)


# What differs from case to case: the model, its data, the settings, the cadence.
CASES: dict[str, dict[str, Any]] = {
    "epochs": {"scheduler": by_epochs, "every": Every(epochs=1)},
    "accumulating": {
        "scheduler": one_cycle,
        "settings": {"accumulate_grad_batches": 2, "val_check_interval": 2},
        "every": Every(steps=1, epochs=1),
        "train": lambda: shuffled(generator=torch.Generator().manual_seed(5)),
    },
    "rare_validation": {
        "scheduler": plateau,
        "settings": {"check_val_every_n_epoch": 2, "max_epochs": 4, "gradient_clip_val": 0.5},
        "every": Every(steps=5, epochs=1),
        "train": lambda: shuffled(Noisy(*data(26, seed=1).tensors)),
    },
    "plateau_by_steps": {
        "scheduler": plateau,
        "interval": "step",
        "settings": {"val_check_interval": 1},
        "every": Every(steps=1),  # a stop that was asked for saves out of turn: of every second step, the best may be another
    },
    "adversaries": {"model": Adversaries, "every": Every(steps=3, epochs=1), "settings": {"val_check_interval": 0.5}},
    "steps": {
        "settings": {"max_steps": 17, "limit_train_batches": 0.7, "max_epochs": -1},
        "every": Every(steps=2, epochs=1),
        "module": Source,
    },
    "two_loaders": {
        "train": lambda: {"long": shuffled(), "short": shuffled(data(10, seed=4))},
        "every": Every(steps=3, epochs=1),
    },
    "shortest": {
        "train": lambda: CombinedLoader({"long": shuffled(), "short": shuffled(data(18, seed=4))}, "min_size"),
        "every": Every(steps=2, epochs=1),
    },
    "streamed": {
        "train": lambda: DataLoader(Stream(), batch_size=4),
        "every": Every(steps=2, epochs=1),
        "scheduler": by_epochs,
    },
    "stateful": {
        "train": lambda: StatefulDataLoader(data(26, seed=1), batch_size=4, shuffle=True),
        "every": Every(steps=2, epochs=1),
    },
    "workers": {
        "train": lambda: shuffled(num_workers=1, persistent_workers=True),
        "every": Every(steps=3, epochs=1),
        "settings": {"max_epochs": 2},
    },
    "averaged": {"callbacks": lambda: [EMAWeightAveraging(decay=0.8)], "every": Every(steps=3, epochs=1)},
    "swa": {
        "callbacks": lambda: [StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=1)],
        "settings": {"max_epochs": 4},
        "scheduler": by_epochs,
        "every": Every(epochs=1),
        "unlike": ("callbacks", "schedulers"),  # what it has put in its place is not there before the first epoch
    },
    "thawed": {"callbacks": lambda: [Thaw()], "every": Every(steps=4, epochs=1)},
    "scaled": {
        "settings": {"precision": None, "max_epochs": 2},
        "plugins": lambda: [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3))],
        "callbacks": lambda: [GradientAccumulationScheduler({0: 1, 1: 2})],
        "every": Every(steps=2, epochs=1),
    },
    "stopped": {
        "callbacks": lambda: [EarlyStopping("val_loss", patience=1, min_delta=0.5)],
        "settings": {"max_epochs": 30},
        "every": Every(steps=3, epochs=1),
    },
}  # fmt: skip


def train(store: Deadly, name: str, seed: int) -> dict[str, Any]:
    """Train one case; returns everything that must be the same."""
    case = CASES[name]
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    settings = {"max_epochs": 3, **case.get("settings", {})}
    mortal = Mortal(store)
    others = case.get("callbacks", list)()
    callback = CheckpointCallback(store, monitor="val_loss", every=case["every"], keep=Keep(best=1, last=2), verbose=0)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=DIRECTORY, callbacks=[mortal, *others, callback], plugins=case.get("plugins", list)(), **settings,
    )  # fmt: skip
    model = case.get("model", Network)(case)
    module = case["module"]() if "module" in case else None
    if module is None:
        trainer.fit(model, case.get("train", shuffled)(), DataLoader(data(8, seed=2), batch_size=4))
    else:
        trainer.fit(model, datamodule=module)
    found = {
        "model": model.state_dict(), "smoothed": model.smoothed, "asked": module and module.asked,
        "optimizers": [each.state_dict() for each in trainer.optimizers],
        "schedulers": [vars_of(each.scheduler) for each in trainer.lr_scheduler_configs],
        "callbacks": {each.state_key: each.state_dict() for each in trainer.callbacks},
        "metrics": trainer.callback_metrics, "logged": trainer.logged_metrics,
        "counted": [trainer.global_step, trainer.current_epoch, trainer.fit_loop.epoch_loop._batches_that_stepped],
        "precision": trainer.precision_plugin.state_dict(),
    }  # fmt: skip
    final = fingerprint(found)
    callback.restore("best", model)
    final["best"] = fingerprint(model.state_dict())
    return final


def vars_of(scheduler: Any) -> Any:
    return {key: value for key, value in scheduler.state_dict().items() if not callable(value)}


def fingerprint(value: Any) -> Any:
    """Every bit of a nested state, as JSON."""
    if isinstance(value, dict):
        return {str(name): fingerprint(child) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [fingerprint(child) for child in value]
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    return repr(value)


def attempt(directory: Path, name: str, seed: int, fuse: int) -> int | None:
    """Train in a process of its own; the number of its events, or None if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            store = Deadly(directory, fuse, deaths=DIRECTORY / "deaths", asking=("batch", "validation"))
            result = train(store, name, seed)
            (directory / "result.json").write_text(json.dumps(result))
            (directory / "events").write_text(str(store.count))
        except BaseException as error:  # noqa: BLE001  (a forked child must not go on as its parent)
            if isinstance(error, SystemExit) and error.code == ASKED:
                os._exit(ASKED)
            traceback.print_exc()
            os._exit(70)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) in (-signal.SIGKILL, -signal.SIGTERM, ASKED):
        return None
    if status != 0:
        raise SystemExit(f"the training of {name} ended with {status}")
    return int((directory / "events").read_text())


def facts(directory: Path) -> dict[str, Any]:
    """What must be the same."""
    run = highcamp.open(directory)
    return {
        "result": json.loads((directory / "result.json").read_text()),
        "rows": [[row.step, row.epoch, row.batch, fingerprint(row.metrics)] for row in run.history.rows],
        "best": [run.best.step, fingerprint(run.best.metrics)],
        "last": [run.last.step, run.last.epoch, run.last.batch, fingerprint(run.last.metrics)],
        "tensors": {name: fingerprint(run.last.load(name)) for name in run.last.objects},
        "verified": all(found.ok for found in run.verify()),
        "complete": run.is_complete,
    }


def compare(name: str, seed: int) -> dict[str, Any]:
    """One case, whole and killed."""
    whole, killed = (DIRECTORY / name / each for each in ("whole", "killed"))
    for directory in (whole, killed):
        directory.mkdir(parents=True)
    (DIRECTORY / "deaths").unlink(missing_ok=True)
    events = attempt(whole, name, seed, 0)
    draw = random.Random(seed)
    kills = 0
    begun = []
    while kills < MAX_KILLS:
        ended = attempt(killed, name, seed, draw.randrange(3, max(4, int(events / 2))))
        if ended is not None:
            break
        kills += 1
        last = highcamp.open(killed).last if (killed / "run.json").exists() else None
        begun.append(last.batch if last else 0)
    else:
        attempt(killed, name, seed, 0)
    attempt(killed, name, seed, 0)  # of a run that is complete: nothing is left to train
    expected, found = facts(whole), facts(killed)
    for key in CASES[name].get("unlike", ()):
        del expected["result"][key], found["result"][key]
    different = {key: [expected[key], found[key]] for key in expected if expected[key] != found[key]}
    deaths = (DIRECTORY / "deaths").read_text().splitlines() if kills else []
    return {
        "case": name,
        "kills": kills,
        "deaths": deaths,
        "batches": begun,
        "events": events,
        "different": narrowed(different),
    }


def narrowed(different: dict[str, Any]) -> dict[str, Any]:
    """Of nested dicts only what differs."""
    found = {}
    for key, (expected, other) in different.items():
        if isinstance(expected, dict) and isinstance(other, dict):
            pairs = {name: [expected.get(name), other.get(name)] for name in expected.keys() | other.keys()}
            found[key] = narrowed({name: pair for name, pair in pairs.items() if pair[0] != pair[1]})
        else:
            found[key] = [expected, other]
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Lightning's advice on tiny loaders
    for argument in sys.argv[2:]:
        case_name, _, number = argument.partition(":")
        print(json.dumps(compare(case_name, int(number or 0))), flush=True)
