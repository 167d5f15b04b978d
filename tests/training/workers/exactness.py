"""Train once without a stop, once killed again and again, and compare: `exactness.py numpy|torch DIRECTORY SEED…`.

Every training is a process of its own, forked after the imports, which are slow. It kills itself by SIGKILL at the N-th
event: an event is a batch, or a change of the store, in whose middle it may die. N is drawn from SEED. Prints one line of
JSON for each seed: how often it was killed and where, and what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

import highcamp
from highcamp import Checkpointer, Every, Keep

sys.path.append(str(Path(__file__).parents[2]))
from deadly import Deadly

KIND, DIRECTORY = sys.argv[1], Path(sys.argv[2])
if KIND == "torch":
    import torch

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    torch.use_deterministic_algorithms(mode=True)

EPOCHS = 3
MAX_KILLS = 12  # the run after that is let through


class Batches:
    """Batches of indices in an order drawn from NumPy's global generator when it is iterated over."""

    def __iter__(self) -> Any:
        order = np.random.permutation(21)
        return (order[at : at + 4] for at in range(0, 21, 4))

    def __len__(self) -> int:
        return 6

    def __getitem__(self, at: int) -> Any:
        raise AssertionError("items are not what iterating gives")


def train_numpy(store: Deadly, seed: int) -> dict[str, Any]:
    """A linear model with momentum; returns everything that must be the same."""
    data = np.random.default_rng(1).standard_normal((21, 5))
    target = data @ np.arange(5.0) + 1
    np.random.seed(seed)
    random.seed(seed)
    model = {"w": np.zeros(5), "b": np.zeros(()), "decay": 1.0}
    momentum = [np.zeros(5), np.zeros(())]
    noise = np.random.default_rng(seed)
    loader = Batches()
    with Checkpointer(
        store, monitor="val_loss", every=Every(epochs=1, steps=4), keep=Keep(best=1, last=2), verbose=0
    ) as checkpointer:
        checkpointer.track(model=model, momentum=momentum, noise=noise)
        for _ in checkpointer.epochs(EPOCHS):
            for index in checkpointer.batches(loader):
                store.event("batch")
                mask = np.random.random(5) < 0.8  # dropout
                x = data[index] * mask + 0.01 * noise.standard_normal((len(index), 5))
                error = x @ model["w"] + model["b"] - target[index]
                for moment, parameter, gradient in zip(
                    momentum, (model["w"], model["b"]), (x.T @ error, error.sum()), strict=True
                ):
                    moment *= 0.9
                    moment += gradient / len(index)
                    parameter -= 0.02 * model["decay"] * moment
                model["decay"] *= 0.99 + 0.001 * random.random()
                checkpointer.log(loss=float(error @ error))
            checkpointer.log(val_loss=np.mean((data @ model["w"] + model["b"] - target) ** 2))
    return {"model": model, "momentum": momentum, "drawn": (random.random(), np.random.random(), noise.random())}


def train_torch(store: Deadly, seed: int) -> dict[str, Any]:
    """A network with dropout and batch statistics, AdamW and a schedule by steps; returns what must be the same."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    x = torch.randn(22, 5, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())
    generator = torch.Generator().manual_seed(seed) if seed % 2 else None
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, generator=generator)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Dropout(0.4), torch.nn.Linear(8, 2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6 * EPOCHS)
    with Checkpointer(
        store, monitor="val_loss", every=Every(epochs=1, steps=4), keep=Keep(best=1, last=2), verbose=0
    ) as checkpointer:
        checkpointer.track(model=model, optimizer=optimizer, scheduler=scheduler, loader=loader)
        for _ in checkpointer.epochs(EPOCHS):
            model.train()
            for inputs, labels in checkpointer.batches(loader):
                store.event("batch")
                optimizer.zero_grad()
                inputs = inputs + 0.1 * torch.randn_like(inputs) * random.random() * np.random.random()
                loss = torch.nn.functional.cross_entropy(model(inputs), labels)
                loss.backward()
                optimizer.step()
                scheduler.step()
                checkpointer.log(loss=loss.detach())
            model.eval()
            with torch.no_grad():
                checkpointer.log(val_loss=torch.nn.functional.cross_entropy(model(x), data.tensors[1]))
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    moments = [
        {name: np.asarray(value) for name, value in state.items()} for state in optimizer.state_dict()["state"].values()
    ]
    rate = [group["lr"] for group in optimizer.param_groups]
    drawn = (random.random(), np.random.random(), torch.rand(2).numpy(), next(iter(loader))[1].numpy())
    return {"model": arrays, "moments": moments, "rate": rate, "drawn": drawn}


def fingerprint(value: Any) -> Any:
    """Every bit of a nested state, as JSON."""
    if isinstance(value, dict):
        return {name: fingerprint(child) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [fingerprint(child) for child in value]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    return repr(value)


def attempt(directory: Path, seed: int, fuse: int) -> int | None:
    """Train in a process of its own; the number of its events, or None if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            store = Deadly(directory, fuse, deaths=DIRECTORY / "deaths")
            result = (train_torch if KIND == "torch" else train_numpy)(store, seed)
            (directory / "result.json").write_text(json.dumps(fingerprint(result)))
            (directory / "events").write_text(str(store.count))
        except BaseException:  # noqa: BLE001  (a forked child must not go on as its parent)
            traceback.print_exc()
            os._exit(70)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if status != 0:
        raise SystemExit(f"the training ended with {status}")
    return int((directory / "events").read_text())


def facts(directory: Path) -> dict[str, Any]:
    """What must be the same."""
    run = highcamp.open(directory)
    return {
        "result": json.loads((directory / "result.json").read_text()),
        "rows": [[row.step, row.epoch, row.batch, fingerprint(row.metrics)] for row in run.history.rows],
        "best": [run.best.step, fingerprint(run.best.metrics)],
        "last": [run.last.step, fingerprint(run.last.metrics)],
        "tensors": {name: fingerprint(run.last.load(name)) for name in run.last.objects},
        "verified": all(found.ok for found in run.verify()),
        "complete": run.is_complete,
    }


def compare(seed: int) -> dict[str, Any]:
    """Both trainings with one seed."""
    whole, killed = DIRECTORY / f"whole-{seed}", DIRECTORY / f"killed-{seed}"
    deaths = DIRECTORY / "deaths"
    deaths.write_text("")
    events = attempt(whole, seed, 0)
    dice = random.Random(seed)
    kills = 0
    while attempt(killed, seed, dice.randrange(1, events // 3) if kills < MAX_KILLS else 0) is None:
        kills += 1
    expected, found = facts(whole), facts(killed)
    return {
        "kills": kills,
        "attempts": len(highcamp.open(killed).history.attempts),
        "deaths": deaths.read_text().splitlines(),
        "different": {name: [expected[name], found[name]] for name in expected if expected[name] != found[name]},
    }


if __name__ == "__main__":
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for each in sys.argv[3:]:
        print(json.dumps(compare(int(each))))
