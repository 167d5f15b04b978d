"""Metrics: which ones were measured just now, and what of them an epoch under way has gathered so far."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any

import torch
from torchmetrics import Metric

if TYPE_CHECKING:
    from collections.abc import Mapping

_META = (
    "fx",
    "name",
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "enable_graph",
    "add_dataloader_idx",
    "metric_attribute",
)


def renewed(trainer: Any, before: Mapping[str, Any]) -> dict[str, float]:
    """Callback metrics that are not the very values of `before`: the dict keeps what was measured long ago, too."""
    return numbers({name: value for name, value in trainer.callback_metrics.items() if value is not before.get(name)})


def of_epoch(trainer: Any) -> dict[str, float]:
    """The training metrics of the epoch that has ended; of those that are logged by steps alone, the last."""
    results = trainer.fit_loop.epoch_loop._results  # noqa: SLF001
    steps = {
        name: value for name, value in results.metrics(on_step=True)["callback"].items() if not name.endswith("_step")
    }
    return numbers({**steps, **results.metrics(on_step=False)["callback"]})


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as plain numbers."""
    return {name: float(value) for name, value in values.items()}


def capture(trainer: Any, *, midway: bool) -> dict[str, Any]:
    """What is saved of them: the values callbacks and loggers see, the states of torchmetrics, the sums of an epoch."""
    connector = trainer._logger_connector  # noqa: SLF001
    results = trainer.fit_loop.epoch_loop._results  # noqa: SLF001
    return {
        "callback": dict(connector._callback_metrics),  # noqa: SLF001
        "logged": dict(connector._logged_metrics),  # noqa: SLF001
        "states": {
            name: {"count": metric.update_count, "state": dict(metric.metric_state)}
            for name, metric in _metrics_of(trainer)
            if metric.update_count
        },
        "fx": connector._current_fx,  # noqa: SLF001
        "sums": [_sum(item) for item in results.values() if not item.has_reset] if midway else [],
    }


def restore(trainer: Any, saved: Mapping[str, Any], *, midway: bool) -> None:
    """The reverse. midway: in the middle of an epoch, of which at least one batch is done."""
    connector = trainer._logger_connector  # noqa: SLF001
    device = trainer.strategy.root_device
    connector._callback_metrics = dict(saved["callback"])  # noqa: SLF001
    connector._logged_metrics = dict(saved["logged"])  # noqa: SLF001
    for name, metric in _metrics_of(trainer):
        if name in saved["states"]:
            for key, value in saved["states"][name]["state"].items():
                setattr(metric, key, _moved(value, device))
            metric._update_count = saved["states"][name]["count"]  # noqa: SLF001
            metric._computed = None  # noqa: SLF001
    if midway:
        connector._first_loop_iter = False  # noqa: SLF001  (else the first `log` takes the epoch for a new one)
        connector._current_fx = saved["fx"]  # noqa: SLF001
        for entry in saved["sums"]:
            _put_sum(trainer, entry, device)


def _metrics_of(trainer: Any) -> list[tuple[str, Metric]]:
    found = trainer.lightning_module.named_modules()
    return [(name, module) for name, module in found if isinstance(module, Metric)]


def _moved(value: Any, device: torch.device) -> Any:
    return [each.to(device) for each in value] if isinstance(value, list) else value.to(device)


def _sum(item: Any) -> dict[str, Any]:
    """One metric that has been logged in this epoch: how, and what has come together."""
    meta = item.meta
    reduce = meta.reduce_fx
    return {
        **{name: getattr(meta, name) for name in _META},
        "reduce_fx": reduce.__name__,
        "is_torch": reduce is getattr(torch, reduce.__name__, None),
        "sync_dist": meta.sync.should,
        "rank_zero_only": meta.sync.rank_zero_only,
        "value": item.value if item.is_tensor else None,
        "batch_size": getattr(item, "cumulated_batch_size", None),
    }


def _put_sum(trainer: Any, entry: Mapping[str, Any], device: torch.device) -> None:
    """Log once as it was logged, and put what had come together in the place of the sum."""
    results = trainer.fit_loop.epoch_loop._results  # noqa: SLF001
    is_tensor = entry["value"] is not None
    module = trainer.lightning_module
    value = entry["value"].to(device) if is_tensor else module.get_submodule(entry["metric_attribute"])
    arguments = {name: entry[name] for name in (*_META[2:], "sync_dist", "rank_zero_only")}
    reduce = getattr(torch if entry["is_torch"] else builtins, entry["reduce_fx"])
    results.log(
        entry["fx"],
        entry["name"],
        value,
        reduce_fx=reduce,
        sync_dist_fn=trainer.strategy.reduce,
        batch_size=1,
        **arguments,
    )
    item = results[f"{entry['fx']}.{entry['name']}"]
    if is_tensor:
        item.value = value
        if entry["batch_size"] is not None:
            item.cumulated_batch_size = entry["batch_size"].to(device)
