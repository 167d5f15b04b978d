"""The loop: what belongs to training rather than to an object, as it is saved, and how it goes on from there.

Lightning's own ways to go on fit the hooks in which it saves itself, and lose what comes after them. Ours are set up where
they were left: in the middle of an epoch when the next batch is asked for, between two when the next one begins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher

from highcamp.errors import Mismatch
from highcamp.lightning import metrics
from highcamp.lightning.state import freeze, frozen, kinds
from highcamp.run import live
from highcamp.training.rng import set_random_state

if TYPE_CHECKING:
    import torch

    from highcamp.lightning.loader import TrackedLoader
    from highcamp.run.checkpoint import Checkpoint


@dataclass
class Resume:
    """A checkpoint on its way into a Trainer.

    loaded: what Lightning restores. loop: what is restored here. random: the states of the save. weights_before: the
    model's, until everything is known to fit.
    """

    checkpoint: Checkpoint
    loaded: dict[str, Any]
    loop: dict[str, Any]
    random: dict[str, Any]
    weights_before: dict[str, torch.Tensor] | None = None

    @property
    def path(self) -> str:
        """Where the checkpoint lies."""
        return self.checkpoint.path

    @property
    def batch(self) -> int:
        """Batches done in the epoch under way, 0 between two."""
        return self.checkpoint.batch


def capture(trainer: Any, loader: TrackedLoader | None, *, midway: bool) -> dict[str, Any]:
    """What is saved beside what Lightning saves."""
    fit_loop = trainer.fit_loop
    stopped = trainer.should_stop and any(
        each.stopping_reason.value for each in trainer.callbacks if isinstance(each, EarlyStopping)
    )
    return {
        "place": loader.place() if midway and loader is not None else None,
        "loaders": [] if midway else [live.loader_order(each) for each in _loaders(fit_loop)],
        "validation_loaders": [live.loader_order(each) for each in _loaders(fit_loop.epoch_loop.val_loop)],
        "metrics": metrics.capture(trainer, midway=midway),
        "kinds": kinds(trainer),
        "frozen": frozen(trainer.lightning_module),
        "length": None if math.isinf(fit_loop.max_batches) else int(fit_loop.max_batches),
        "accumulate": trainer.accumulate_grad_batches,
        "stopped": [trainer.max_epochs, trainer.max_steps] if stopped else None,
    }


def prepare(trainer: Any, resume: Resume) -> None:
    """When training is about to go on: keep Lightning from its own way. What `restore` needs comes later."""
    fit_loop = trainer.fit_loop
    fit_loop._restarting = False  # noqa: SLF001  (its setter would decide otherwise)
    fit_loop.epoch_loop.restarting = False
    if not resume.batch:
        fit_loop._resuming_from_checkpoint = False  # noqa: SLF001  (the data begin anew, with the random states of then)
    for optimizer, saved in zip(trainer.optimizers, resume.loaded["optimizer_states"], strict=True):
        live.framework("torch").restore(optimizer, saved)  # again, because torch's own way casts


def go_on(trainer: Any, loader: TrackedLoader, resume: Resume) -> None:
    """In the middle of an epoch: set up the data and the counters as they were when this batch was asked for."""
    if not loader.is_read:
        loader.go_on(resume.loop["place"], resume.batch, where=resume.path)
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop.load_state_dict(resume.loaded["loops"]["fit_loop"], prefix="epoch_loop.")
    epoch_loop.restarting = False
    trainer.fit_loop._data_fetcher.fetched = resume.batch  # noqa: SLF001
    trainer.accumulate_grad_batches = resume.loop["accumulate"]


def restore(trainer: Any, resume: Resume) -> str:
    """What Lightning does not restore, random states last. Returns what was frozen or thawed by it."""
    torch_module = live.framework("torch")
    for name, loop in (("loaders", trainer.fit_loop), ("validation_loaders", trainer.fit_loop.epoch_loop.val_loop)):
        if any(saved is not None for saved in resume.loop[name]):
            loop.setup_data()
        for loader, saved in zip(_loaders(loop), resume.loop[name], strict=False):
            if saved is not None and live.is_torch_loader(loader):
                torch_module.restore(loader, saved)
    metrics.restore(trainer, resume.loop["metrics"], midway=bool(resume.batch))
    changed = freeze(trainer.lightning_module, resume.loop["frozen"])
    set_random_state(resume.random, where=resume.path)
    return changed


def length_difference(trainer: Any, resume: Resume) -> str:
    """In words, that the data have another length now; "" if they have not. Raises Mismatch within an epoch."""
    before, now = resume.loop["length"], trainer.fit_loop.max_batches
    if before is None or before == now:
        return ""
    message = f"{resume.path} was saved with {before} training batches in an epoch, here are {now}"
    if resume.batch:
        hint = "use the same data, batch size and limit_train_batches as when it was saved"
        raise Mismatch(message, path=resume.path, hint=hint)
    return f"{message}: the run goes on, but is another one from here"


def why_only_between_epochs(trainer: Any) -> str:
    """Why nothing can be saved within an epoch; "" if it can."""
    if isinstance(trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher):  # noqa: SLF001
        return "training_step(dataloader_iter) reads batches when it likes, so no place between two of them is known"
    if any(isinstance(each, StochasticWeightAveraging) for each in trainer.callbacks):
        return "StochasticWeightAveraging sets itself up when an epoch begins, and cannot go on in its middle"
    return ""


def is_stopped(trainer: Any, resume: Resume) -> bool:
    """Whether EarlyStopping has ended this run, and no more is planned now than was then."""
    before = resume.loop["stopped"]
    if before is None:
        return False
    pairs = zip((trainer.max_epochs, trainer.max_steps), before, strict=True)  # -1 and None: without an end
    return not any(new != old and (new in (None, -1) or (old not in (None, -1) and new > old)) for new, old in pairs)


def why_complete(trainer: Any, resume: Resume) -> str:
    """Why nothing is left to train."""
    epoch, step = resume.checkpoint.epoch, trainer.global_step
    if is_stopped(trainer, resume):
        return f"EarlyStopping ended it after epoch {epoch}"
    if trainer.max_steps != -1 and step >= trainer.max_steps:
        return f"{step} of {trainer.max_steps} steps"
    return f"{epoch} of {trainer.max_epochs} epochs"


def _loaders(loop: Any) -> list[Any]:
    found = loop._combined_loader  # noqa: SLF001
    return [] if found is None else list(found.flattened)
