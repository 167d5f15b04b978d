"""Training loops with and without highcamp in which nothing is due: what a step takes longer."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from highcamp import Every

if TYPE_CHECKING:
    from collections.abc import Callable

    Fit: TypeAlias = Callable[[int, "Setup | None"], list[float]]
    """So many steps; when each of them began."""

CADENCES = {"epochs": Every(epochs=1), "steps": Every(steps=1_000_000, seconds=3600.0)}
"""Where a callback may sleep until the epoch ends, and where it has to look after every step."""


@dataclass(frozen=True)
class Setup:
    """Where highcamp saves, and when."""

    directory: Path
    every: Every


EMPTY = Setup(Path(), Every(epochs=1))
"""A callback of the framework's own in its place, that does nothing."""

WARMING = 0.2  # of a fit: compilation, caches, the first steps of everybody


class Idle:
    """Fits of one epoch of a model with eight weights, by turns with and without highcamp: all that is left is overhead."""

    def __init__(self, directory: str, framework: str, cadence: str, steps: int) -> None:
        """directory: its own. framework: of `FITS`. cadence: of `CADENCES`. steps: of each fit."""
        self._directory, self._steps = Path(directory), steps
        self._directory.mkdir(parents=True, exist_ok=True)
        self._every = CADENCES[cadence]
        self._framework = framework
        self._fit = FITS[framework]()
        self._count = 0

    def turn(self) -> dict[str, float]:
        """Seconds of a step, medians of one fit each; "cost" is what it takes longer with highcamp.

        "floor" is what it takes longer with a callback that does nothing, in a framework that has callbacks.
        """
        self._count += 1
        setups = {
            "without": None,
            "empty": EMPTY,
            "with": Setup(self._directory / str(self._count), self._every),
        }
        names = [who for who in setups if who != "empty" or self._framework in WITH_CALLBACKS]
        found = {}
        for who in names if self._count % 2 else reversed(names):  # whoever comes first has the colder caches
            marks = np.array(self._fit(self._steps, setups[who]))
            found[who] = float(statistics.median(np.diff(marks[int(WARMING * len(marks)) :])))
        costs = {"cost": found["with"] - found["without"]}
        return found | costs | ({"floor": found["empty"] - found["without"]} if "empty" in found else {})


def _torch() -> Fit:
    """A loop of one's own."""
    import torch

    torch.set_num_threads(1)
    model = torch.nn.Linear(4, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train(batches: Any) -> list[float]:
        marks = []
        for (batch,) in batches:
            marks.append(time.perf_counter())
            optimizer.zero_grad()
            model(batch).sum().backward()
            optimizer.step()
        return marks

    def fit(steps: int, setup: Setup | None) -> list[float]:
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(2 * steps, 4)), batch_size=2)
        if setup is None:
            return train(loader)
        from highcamp import Checkpointer

        with Checkpointer(setup.directory, every=setup.every, verbose=0) as checkpointer:
            checkpointer.track(model=model, optimizer=optimizer)
            marks = [train(checkpointer.batches(loader)) for _ in checkpointer.epochs(1)]
        return marks[0]

    return fit


def _jax() -> Fit:
    """State that is passed: `save_if_due` after each step."""
    import jax
    import jax.numpy as jnp

    state = {"params": jnp.zeros(8)}
    advance = jax.jit(lambda state: {"params": state["params"] * 0.9 + 0.1})

    def fit(steps: int, setup: Setup | None) -> list[float]:
        from highcamp import Checkpointer

        current, marks = advance(state), []
        if setup is None:
            for _ in range(steps):
                marks.append(time.perf_counter())
                current = advance(current)
            return marks
        with Checkpointer(setup.directory, every=setup.every, verbose=0) as checkpointer:
            for step in range(steps):
                marks.append(time.perf_counter())
                current = advance(current)
                checkpointer.save_if_due(current, step=step + 1, epoch=0)
        return marks

    return fit


def _keras() -> Fit:
    """`Model.fit`; the marks are made where a batch is asked for."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, use_bias=False)])
    model.compile("sgd", "mse")
    x, y = np.zeros((2, 4), np.float32), np.zeros((2, 2), np.float32)

    class Data(keras.utils.PyDataset):  # type: ignore[misc]
        """The same batch again and again."""

        def __init__(self, steps: int) -> None:
            super().__init__()
            self.steps = steps
            self.marks: list[float] = []

        def __len__(self) -> int:
            return self.steps

        def __getitem__(self, at: int) -> Any:
            self.marks.append(time.perf_counter())
            return x, y

    def fit(steps: int, setup: Setup | None) -> list[float]:
        data = Data(steps)
        callbacks: list[Any] = []
        if setup is EMPTY:
            callbacks = [keras.callbacks.Callback()]
        elif setup is not None:
            from highcamp.keras import CheckpointCallback

            callbacks = [CheckpointCallback(setup.directory, None, every=setup.every, verbose=0)]
        model.fit(data, epochs=1, shuffle=False, verbose=0, callbacks=callbacks)
        return data.marks

    return fit


def _lightning() -> Fit:
    """`Trainer.fit` of Lightning; the marks are made where a training step begins."""
    import logging

    import lightning.pytorch as pl
    import torch

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning|torch")

    class Module(pl.LightningModule):
        """One layer."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2, bias=False)
            self.marks: list[float] = []

        def training_step(self, batch: Any, _: int) -> Any:
            self.marks.append(time.perf_counter())
            return self.layer(batch[0]).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def fit(steps: int, setup: Setup | None) -> list[float]:
        callbacks: list[Any] = []
        if setup is EMPTY:
            callbacks = [pl.callbacks.Checkpoint()]
        elif setup is not None:
            from highcamp.lightning import CheckpointCallback

            callbacks = [CheckpointCallback(setup.directory, None, every=setup.every, verbose=0)]
        module = Module()
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(2 * steps, 4)), batch_size=2)
        pl.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=setup is not None, callbacks=callbacks,
        ).fit(module, loader)  # fmt: skip
        return module.marks

    return fit


def _transformers() -> Fit:
    """`Trainer.train` of Transformers; the marks are made where the model is called."""
    import tempfile

    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()

    class Model(torch.nn.Module):
        """One layer."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2, bias=False)
            self.marks: list[float] = []

        def forward(self, x: Any) -> Any:
            self.marks.append(time.perf_counter())
            return {"loss": self.layer(x).sum()}

    def fit(steps: int, setup: Setup | None) -> list[float]:
        callbacks: list[Any] = []
        if setup is EMPTY:
            callbacks = [transformers.TrainerCallback()]
        elif setup is not None:
            from highcamp.transformers import CheckpointCallback

            callbacks = [CheckpointCallback(setup.directory, every=setup.every, verbose=0)]
        rows = [{"x": torch.rand(4)} for _ in range(2 * steps)]
        with tempfile.TemporaryDirectory() as place:
            arguments = transformers.TrainingArguments(
                place, save_strategy="no", logging_strategy="no", num_train_epochs=1, per_device_train_batch_size=2,
                report_to="none", disable_tqdm=True, use_cpu=True, remove_unused_columns=False, max_grad_norm=0.0,
            )  # fmt: skip
            model = Model()
            trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        return model.marks

    return fit


FITS: dict[str, Callable[[], Fit]] = {
    "torch": _torch,
    "jax": _jax,
    "keras": _keras,
    "lightning": _lightning,
    "transformers": _transformers,
}
WITH_CALLBACKS = ("keras", "lightning", "transformers")
