"""A Trainer's state as the objects of a checkpoint, and back.

Lightning gathers it in one dict and takes it from one: the callback gives it that dict in the place of a file's, so all
hooks of modules, data modules and callbacks are called as they would be, in Lightning's order.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging

from highcamp.core.tree import flatten
from highcamp.errors import InvalidState
from highcamp.lightning.barrier import Optimizers
from highcamp.lightning.part import Part
from highcamp.run import live

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MODEL, OPTIMIZERS, TRAINER, LOOP = "model", "optimizers", "trainer", "loop"
HYPER_PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")
_TYPES = ("hparams_type", "datamodule_hparams_type")  # classes, which only `load_from_checkpoint` asks for


class TrainerState:
    """The state of one Trainer: its model, its optimizers, the rest of what Lightning saves, and the loop.

    optimizers: the part that has them, once they are made. is_capturing: it is being gathered. left_out: hyper-parameters
    that are no plain values.
    """

    def __init__(self, trainer: Any, loop: Callable[[], dict[str, Any]], is_midway: Callable[[], bool]) -> None:
        """loop: gives what Lightning does not save. is_midway: whether batches of an epoch under way are done."""
        self._trainer, self._loop, self._is_midway = trainer, loop, is_midway
        self.is_ready = False  # before training begins, hooks that are asked for their state may not have any yet
        self.is_capturing = False
        self.left_out: list[str] = []
        self._gathered: dict[str, Any] = {}
        self.optimizers = Optimizers(partial(self._give, OPTIMIZERS))
        self.parts = {
            name: self.optimizers if name == OPTIMIZERS else Part(partial(self._give, name), is_weights=name == MODEL)
            for name in (MODEL, OPTIMIZERS, TRAINER, LOOP)
        }

    def saved(self) -> dict[str, Any]:
        """What was restored, as the dict that Lightning reads from its own files."""
        return as_lightning({name: part.saved for name, part in self.parts.items()})

    def _give(self, name: str) -> Any:
        if not self.is_ready:
            return {}
        if name not in self._gathered:  # gathered once for the four of them
            self.is_capturing = True
            try:
                self._gathered = self._gather()
            finally:
                self.is_capturing = False
        return self._gathered.pop(name)

    def _gather(self) -> dict[str, Any]:
        checkpoint = self._trainer._checkpoint_connector.dump_checkpoint(False)  # noqa: FBT003, SLF001  (the whole state)
        if not self._is_midway():
            # The next epoch may have been counted as ready already. None of Lightning's patterns of restarts fits then.
            for tracker in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                tracker.update(dict.fromkeys(("ready", "started", "completed"), tracker["processed"]))
        for key in _TYPES:
            checkpoint.pop(key, None)
        for key in HYPER_PARAMETERS:
            if key in checkpoint:
                checkpoint[key] = self._plain(checkpoint[key])
        model, optimizers = checkpoint.pop("state_dict"), checkpoint.pop("optimizer_states")
        model = with_parameters(self._trainer.lightning_module, model)
        return {MODEL: model, OPTIMIZERS: optimizers, TRAINER: checkpoint, LOOP: self._loop()}

    def _plain(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The hyper-parameters that files can hold. Training goes on without the others; they are the script's to make."""
        kept = {}
        for name, value in parameters.items():
            try:
                flatten(value, live.as_array, where=name)
            except InvalidState:
                if name not in self.left_out:
                    self.left_out.append(name)
            else:
                kept[name] = value
        return kept


def with_parameters(module: torch.nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A module's state with the parameters themselves in the place of tensors that are only views of them.

    Views are new ones each time; parameters are known again, and say which of them are trained.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    found = dict(state)
    for name, value in state.items():
        parameter = parameters.get(name)
        if isinstance(value, torch.Tensor) and parameter is not None and _is_view_of_all(value, parameter):
            found[name] = parameter
    return found


def _is_view_of_all(value: torch.Tensor, parameter: torch.Tensor) -> bool:
    if torch.nn.parameter.is_lazy(value) or torch.nn.parameter.is_lazy(parameter) or type(value) is not torch.Tensor:
        return False
    same = (value.shape, value.dtype, value.device) == (parameter.shape, parameter.dtype, parameter.device)
    return same and value.stride() == parameter.stride() and value.data_ptr() == parameter.data_ptr()


def as_lightning(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Objects of a checkpoint as the dict that Lightning reads from its own files; some may be missing."""
    checkpoint = dict(objects.get(TRAINER) or {})
    for name, key in ((MODEL, "state_dict"), (OPTIMIZERS, "optimizer_states")):
        if name in objects:
            checkpoint[key] = objects[name]
    return checkpoint


def kinds(trainer: Any) -> dict[str, list[str]]:
    """The classes of optimizers and schedulers: their states alone do not always tell them apart."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return {"optimizer": list(map(_kind, trainer.optimizers)), "scheduler": list(map(_kind, schedulers))}


def _kind(obj: object) -> str:
    return f"{type(obj).__module__}.{type(obj).__qualname__}"


def frozen(module: torch.nn.Module) -> dict[str, list[str]]:
    """What of a model is not trained: parameters without a gradient, normalizations that do not track their statistics."""
    norms = (entry for entry in module.named_modules() if isinstance(entry[1], torch.nn.modules.batchnorm._NormBase))  # noqa: SLF001
    return {
        "parameters": [name for name, parameter in module.named_parameters() if not parameter.requires_grad],
        "statistics": [name for name, norm in norms if not norm.track_running_stats],
    }


def freeze(module: torch.nn.Module, saved: Mapping[str, list[str]]) -> str:
    """The reverse of `frozen`: callbacks that thaw a model epoch by epoch do not do so again. Returns what has changed."""
    now = frozen(module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in saved["parameters"])
    for name in {*now["statistics"], *saved["statistics"]}:
        module.get_submodule(name).track_running_stats = name not in saved["statistics"]  # type: ignore[assignment]
    return ", ".join(sorted(name for key in now for name in {*now[key]} ^ {*saved[key]}))


def model_differences(module: torch.nn.Module, saved: Mapping[str, Any], *, strict: bool) -> list[str]:
    """One line for each tensor of another name, shape or dtype. `load_state_dict` would tell after it has copied others.

    strict: whether names that are on one side only are differences.
    """
    here = module.state_dict()
    lines = []
    for name in sorted(here.keys() | saved.keys()):
        if name in here and name in saved:
            pair = saved[name], here[name]
            if all(isinstance(each, torch.Tensor) and not torch.nn.parameter.is_lazy(each) for each in pair):
                old, new = (f"{str(each.dtype).removeprefix('torch.')} {tuple(each.shape)}" for each in pair)
                if old != new:
                    lines.append(f"model/{name}: {old} in the checkpoint, {new} here")
        elif strict:
            lines.append(f"model/{name}: {'only here' if name in here else 'only in the checkpoint'}")
    return lines


def training_differences(
    trainer: Any, checkpoint: Mapping[str, Any], saved_kinds: Mapping[str, list[str]]
) -> list[str]:
    """One line for each difference of optimizers, schedulers and precision. Changes nothing."""
    lines = []
    now = kinds(trainer)
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    pairs = (
        ("optimizer", trainer.optimizers, checkpoint["optimizer_states"]),
        ("scheduler", schedulers, checkpoint["lr_schedulers"]),
    )
    for word, objects, states in pairs:
        before = saved_kinds[word]
        if word == "scheduler" and any(isinstance(each, StochasticWeightAveraging) for each in trainer.callbacks):
            continue  # it takes away what is there, and puts its own in that place when the epoch begins
        if len(before) != len(objects):
            lines.append(f"{word}s: {_listed(before)} in the checkpoint, {_listed(now[word])} here")
            continue
        for index, (obj, state, old, new) in enumerate(zip(objects, states, before, now[word], strict=True)):
            where = word if len(objects) == 1 else f"{word} {index}"
            if old != new:
                lines.append(f"{where}: {old} in the checkpoint, {new} here")
            else:
                lines += [f"{where}/{line}" for line in live.framework("torch").check(obj, state)]
    plugin = trainer.precision_plugin
    before = sorted(key for key in checkpoint if key.endswith("Precision"))
    if before and type(plugin).__qualname__ not in before:
        lines.append(f"precision: {_listed(before)} in the checkpoint, {type(plugin).__qualname__} here")
    return lines


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
