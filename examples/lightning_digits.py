"""Handwritten digits with Lightning: kill it whenever you like, run it again, and it ends as if nothing had happened.

    python examples/lightning_digits.py --directory runs/digits
    python examples/lightning_digits.py --directory runs/digits      # after a crash: goes on; after the end: says so

The last lines are digests of the final weights, of the optimizer's state, of the metrics and of the history. They are the
same for every run of this script on one machine, however often it was killed.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings

import torch
import xxhash
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from highcamp import Every, Keep
from highcamp.lightning import CheckpointCallback


class Digits(LightningModule):
    """A small network with dropout, a learning rate that falls, and metrics over whole epochs."""

    def __init__(self) -> None:
        """Build the layers."""
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10))
        self.accuracy = MulticlassAccuracy(10)

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """The loss of one batch."""
        images, labels = batch
        scores = self.layers(images)
        loss = nn.functional.cross_entropy(scores, labels)
        self.accuracy(scores, labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        """The loss of one batch that is not trained on."""
        images, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self.layers(images), labels))

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW, and a learning rate that is halved when val_loss stands still."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def loaders() -> tuple[DataLoader[tuple[torch.Tensor, ...]], DataLoader[tuple[torch.Tensor, ...]]]:
    """1,000 images to train on, shuffled, and 797 to validate with."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels))
    train, held_out = torch.utils.data.random_split(data, [1000, 797])
    return DataLoader(train, batch_size=50, shuffle=True), DataLoader(held_out, batch_size=797)


def digest(state: object) -> str:
    """A short digest of nested dicts and lists of tensors and numbers, to the last bit."""
    hasher = xxhash.xxh3_128()

    def add(value: object) -> None:
        if isinstance(value, dict):
            for key in value:
                hasher.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for each in value:
                add(each)
        else:
            hasher.update(
                value.numpy(force=True).tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
            )

    add(state)
    return hasher.hexdigest()


def main() -> None:
    """Train, or go on with training, and print the digests."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--directory", default="runs/lightning-digits", help="the run")
    parser.add_argument("--epochs", type=int, default=8, help="how many to train in all")
    parser.add_argument("--steps", type=int, help="save every so many steps, beside every epoch")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec).*")  # of Lightning itself

    seed_everything(7, verbose=False)
    torch.set_num_threads(1)  # with more, the order of additions may differ between two machines
    train, validation = loaders()
    model = Digits()
    callback = CheckpointCallback(
        arguments.directory,
        monitor="val_loss",
        every=Every(epochs=1, steps=arguments.steps),
        keep=Keep(best=1, last=2),
    )
    trainer = Trainer(
        max_epochs=arguments.epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[EarlyStopping("val_loss", patience=5), callback],
    )  # fmt: skip
    trainer.fit(model, train, validation)

    history = [(row.epoch, row.step, dict(row.metrics)) for row in callback.run.history.epochs()]
    metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    print(f"best: epoch {callback.best.epoch if callback.best else '-'}, {callback.best_model_path}")
    print("weights  ", digest(model.state_dict()))
    print("optimizer", digest(trainer.optimizers[0].state_dict()))
    print("metrics  ", digest(metrics), json.dumps(metrics))
    print("history  ", digest(history), f"{len(history)} epochs")


if __name__ == "__main__":
    main()
