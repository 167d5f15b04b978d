"""Handwritten digits with a loop of one's own in PyTorch: kill it whenever you like, run it again, and it ends the same.

    python examples/torch_digits.py --directory runs/digits
    python examples/torch_digits.py --directory runs/digits      # after a crash: goes on; after the end: says so

Dropout, batch normalization, mixed precision with a gradient scaler, a schedule by steps, a moving average of the weights,
shuffled batches: all that has a state. The last lines are digests of it, of the metrics and of the history. They are the
same for every run of this script on one machine, however often it was killed.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset, random_split

from highcamp import Checkpointer, Every, Keep

if TYPE_CHECKING:
    from highcamp.storage.store import Store


def network() -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(48, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10),
    )  # fmt: skip


def loaders() -> tuple[DataLoader[tuple[torch.Tensor, ...]], DataLoader[tuple[torch.Tensor, ...]]]:
    """1,000 images to train on, shuffled by a generator of their own, and 797 to validate with."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels))
    train, held_out = random_split(data, [1000, 797])
    shuffling = torch.Generator().manual_seed(11)
    return DataLoader(train, batch_size=50, shuffle=True, generator=shuffling), DataLoader(held_out, batch_size=797)


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
    """Loss and accuracy on data that are not trained on."""
    model.eval()
    images, labels = next(iter(loader))
    scores = model(images)
    return {
        "val_loss": nn.functional.cross_entropy(scores, labels),
        "val_accuracy": (scores.argmax(1) == labels).float().mean(),
    }


def train(directory: str | Store, epochs: int, steps: int | None = None, verbose: int = 1) -> dict[str, Any]:
    """Train, or go on with training; what must be the same in the end, by name."""
    torch.manual_seed(7)
    training, held_out = loaders()
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    warming, falling = LinearLR(optimizer, 0.1, total_iters=20), CosineAnnealingWarmRestarts(optimizer, 60)
    scheduler = SequentialLR(optimizer, [warming, falling], [20])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=25)

    with Checkpointer(
        directory,
        monitor="val_loss",
        every=Every(epochs=1, steps=steps),
        keep=Keep(best=1, last=2),
        verbose=verbose,
    ) as checkpointer:
        checkpointer.track(
            model=model, average=average, optimizer=optimizer, scheduler=scheduler, scaler=scaler, loader=training
        )
        for _ in checkpointer.epochs(epochs):
            model.train()
            for images, labels in checkpointer.batches(training):
                with torch.autocast("cpu", torch.float16):
                    loss = nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                average.update_parameters(model)
                checkpointer.log(loss=loss)
            checkpointer.log(evaluate(average, held_out))

        parts = {"weights": model, "average": average, "optimizer": optimizer, "schedule": scheduler, "scaler": scaler}
        final = {name: part.state_dict() for name, part in parts.items()}
        final["history"] = [
            (row.step, row.epoch, row.batch, dict(row.metrics)) for row in checkpointer.run.history.rows
        ]
        digests = {name: digest(state) for name, state in final.items()}
        best = checkpointer.restore("best")  # `model` and `average` hold the best weights now, not the last
        metrics = {name: f"{float(value):.4f}" for name, value in evaluate(average, held_out).items()}
        return digests | {"best": f"{digest(average.state_dict())} epoch {best.epoch}, {metrics}"}


def digest(state: object) -> str:
    """A short digest of nested dicts and lists of tensors and plain values, to the last bit."""
    hasher = xxhash.xxh3_64()

    def add(value: object) -> None:
        if isinstance(value, dict):
            for key in value:
                hasher.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for each in value:
                add(each)
        elif isinstance(value, torch.Tensor):
            hasher.update(value.numpy(force=True).tobytes())
        else:
            hasher.update(repr(value).encode())

    add(state)
    return hasher.hexdigest()


def main() -> None:
    """Train, or go on with training, and print the digests."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--directory", default="runs/torch-digits", help="the run")
    parser.add_argument("--epochs", type=int, default=12, help="how many to train in all")
    parser.add_argument("--steps", type=int, help="save every so many steps, beside every epoch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # with more, the order of additions may differ between two machines
    for name, found in train(arguments.directory, arguments.epochs, arguments.steps).items():
        print(f"{name:9}", found)


if __name__ == "__main__":
    main()
