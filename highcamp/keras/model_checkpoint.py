"""ModelCheckpoint: Keras's own callback, with writes that survive and a best that is remembered."""

from __future__ import annotations

import glob
import math
import os
import re
import string
import warnings
from typing import TYPE_CHECKING, Any

import keras
from keras.src.utils import io_utils

from highcamp.errors import Damaged, InvalidArgument, InvalidMetric, StorageError
from highcamp.keras.numbers import as_number
from highcamp.keras.record import SUFFIXES, Record, check_room, read_record, sweep, write_file
from highcamp.keras.state import dtype_of
from highcamp.policy.monitor import Monitor
from highcamp.training.messages import two_numbers

if TYPE_CHECKING:
    from collections.abc import Mapping


class ModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """Drop-in for `keras.callbacks.ModelCheckpoint`: same arguments, same files at the same paths.

        ModelCheckpoint("best.keras", monitor="val_loss", save_best_only=True)

    Where it differs from Keras 3.15:

    - A file is written beside its target under a pending name, made durable, and put in place in one step: a crash, a full
      disk or a power cut leaves the file that was there before.
    - With `save_best_only` the best is remembered across restarts: each file carries the value it was saved for. A file
      that is deleted is forgotten, one saved for another `monitor` or `mode` is not compared. Keras starts from nothing.
    - `best` is raised after the write has succeeded, not before.
    - NaN and infinities never win and never block.
    - A missing metric never overwrites the best: the model is saved only if there is no file yet, with one warning that
      lists the metrics there are. Keras saves over the best.
    - A metric that is an array or text raises InvalidMetric. Keras saves always, or keeps the text as best.
    - `mode="auto"` asks the compiled metrics as Keras does, then the usual names, and raises before or right after the
      first batch, not after the first epoch, and only if `save_best_only` needs it.
    - An integer `save_freq` works with `save_best_only` for training metrics; for `val_…` metrics, which no batch has, it
      is refused. 0, negative numbers, True and False are refused.
    - A path that names a metric which is not there is used without it (and with the epoch), with a warning, instead of
      ending training after the first epoch; `{batch}` without an integer `save_freq` is refused at once.
    - Paths are local. Remote ones (`gs://…`) are refused, because a write there could not be made durable.
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,  # noqa: FBT001, FBT002  (Keras's signature)
        save_weights_only: bool = False,  # noqa: FBT001, FBT002
        mode: str = "auto",
        save_freq: str | int = "epoch",
        initial_value_threshold: float | None = None,
    ) -> None:
        """Arguments and their errors are Keras's; the further ones are InvalidArgument, a ValueError."""
        if isinstance(save_freq, bool) or (isinstance(save_freq, int) and save_freq < 1):
            raise InvalidArgument(
                f"ModelCheckpoint: save_freq is {save_freq!r}", hint='use "epoch", or a number of batches of at least 1'
            )
        super().__init__(
            filepath,
            monitor=monitor,
            verbose=verbose,
            save_best_only=save_best_only,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq=save_freq,
            initial_value_threshold=initial_value_threshold,
        )
        if save_best_only and save_freq != "epoch" and monitor.startswith("val_"):
            raise InvalidArgument(
                f"ModelCheckpoint: {monitor} is measured when an epoch ends, save_freq={save_freq} saves within epochs",
                hint='use save_freq="epoch", or monitor a training metric such as "loss"',
            )
        if initial_value_threshold is not None and not math.isfinite(initial_value_threshold):
            raise InvalidArgument(
                f"ModelCheckpoint: initial_value_threshold is {initial_value_threshold}, not a finite number"
            )
        self._fields = _checked_fields(self.filepath, by_batch=save_freq != "epoch")
        self._threshold: Any = initial_value_threshold
        self._best_path: str | None = None
        self._was_missing = False
        self._told_fields = False
        self._direction: str | None = self.mode if self.mode != "auto" else None

    # ------------------------------------------------------------------------------------------------- Keras's hooks

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Look at what is on disk: leftovers go, the best comes back."""
        del logs
        self._was_missing = False
        self._current_epoch = 0
        literal = _literal_directory(self.filepath)
        sweep(literal)
        if self.save_best_only:
            self._resolve_direction(self.model, is_final=_metrics_are_built(self.model))
            self._recall()

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Save every `save_freq` batches."""
        if self.save_best_only and self._direction is None:
            self._resolve_direction(self.model, is_final=True)  # on TensorFlow metrics exist from here on
            self._recall()
        super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Save after each epoch."""
        if self.save_freq == "epoch":
            self._save_model(epoch=epoch, batch=None, logs=logs)

    def _save_model(self, epoch: int, batch: int | None, logs: Mapping[str, Any] | None) -> None:
        logs = logs or {}
        target = self._get_file_path(epoch, batch, logs)
        value: float | None = None
        if self.save_best_only:
            is_wanted, value = self._is_wanted(epoch, logs, target)
            if not is_wanted:
                return
        elif self.verbose > 0:
            io_utils.print_msg(f"\nEpoch {epoch + 1}: saving model to {target}")
        if os.path.isdir(target):  # noqa: PTH112
            raise StorageError(
                "Please specify a non-directory filepath for ModelCheckpoint. "
                f"Filepath used is an existing directory: {target}",
                path=target,
            )
        record = None
        if self.save_best_only:
            record = Record(self.monitor, str(self._direction), value, epoch + 1, _relative_template(self.filepath))
        model = self.model
        check_room(target, _needed_bytes(model))
        write_file(os.path.realpath(target), model.save_weights if self.save_weights_only else model.save, record)
        if value is not None:
            self.best, self._best_path = (
                value,
                target,
            )  # only now: a save that failed must not keep the next from trying
        if self.verbose > 0:
            io_utils.print_msg(f"\nEpoch {epoch + 1}: finished saving model to {target}")

    def _set_monitor_op(self) -> None:
        self._resolve_direction(self.model, is_final=True)

    def _get_file_path(self, epoch: int, batch: int | None, logs: Mapping[str, Any]) -> str:
        values: dict[str, Any] = {**logs, "epoch": epoch + 1}
        if batch is not None:
            values["batch"] = batch + 1
        path, missing = _fill(self.filepath, values)
        if missing:
            if not self._told_fields:
                self._told_fields = True
                names = ", ".join(sorted(logs)) or "no metrics"
                wanted = ", ".join(f'"{name}"' for name in missing)
                warnings.warn(
                    f"ModelCheckpoint: the path {self.filepath} names {wanted}, but there is only {names}: saving as {path}",
                    stacklevel=2,
                )
            stem, suffix = _split_suffix(path)
            if "epoch" not in self._fields:  # without the missing value all epochs would share one file
                path = f"{stem}-epoch-{epoch + 1:04d}{suffix}"
        return path

    def state_dict(self) -> dict[str, Any]:
        """The batches counted since the last save; the best is not in it, because the files know it."""
        return {"seen": self._batches_seen_since_last_saving, "last": self._last_batch_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        self._batches_seen_since_last_saving, self._last_batch_seen = state["seen"], state["last"]

    # ----------------------------------------------------------------------------------------------------- decisions

    def _is_wanted(self, epoch: int, logs: Mapping[str, Any], target: str) -> tuple[bool, float | None]:
        """Whether this state is to be saved, and its value if it has one; says why."""
        if self._best_path is not None and not os.path.exists(self._best_path):  # noqa: PTH110
            self._recall()  # somebody has deleted it: what it was good for is gone with it
        if logs.get(self.monitor) is None:
            return self._is_first_unmeasured(logs, target), None
        self._resolve_direction(self.model, is_final=True)
        value = _to_float(self.monitor, logs[self.monitor])
        if not math.isfinite(value):
            if self.verbose > 0:
                stays = "there is no best yet" if self.best is None else f"best stays {self.best:.5f}"
                io_utils.print_msg(f"\nEpoch {epoch + 1}: {self.monitor} is {value}; not saved ({stays})")
            return False, value
        if self.best is None or (value < self.best if self._direction == "min" else value > self.best):
            if self.verbose > 0:
                before, after = ("None", f"{value:.5f}") if self.best is None else two_numbers(float(self.best), value)
                io_utils.print_msg(
                    f"\nEpoch {epoch + 1}: {self.monitor} improved from {before} to {after}, saving model to {target}"
                )
            return True, value
        if self.verbose > 0:
            io_utils.print_msg(f"\nEpoch {epoch + 1}: {self.monitor} did not improve from {self.best:.5f}")
        return False, value

    def _is_first_unmeasured(self, logs: Mapping[str, Any], target: str) -> bool:
        there = [path for path, _ in self._files()] or ([target] if os.path.exists(target) else [])  # noqa: PTH110
        if not self._was_missing:
            self._was_missing = True
            names = ", ".join(sorted(logs)) or "no metrics"
            rest = f"{there[0]} stays as it is" if there else "saved, because there is no file yet"
            warnings.warn(
                f"Can save best model only with {self.monitor} available. There is only {names}; {rest}.", stacklevel=2
            )
        return not there

    def _resolve_direction(self, model: Any, *, is_final: bool) -> None:
        """Whether less or more is better. is_final: every metric is known by now, so not knowing is an error."""
        if self._direction is None:
            self._direction = _direction_of(self.monitor, model)
        if self._direction is None and is_final:
            raise InvalidArgument(
                f"ModelCheckpoint: it cannot be told from the name {self.monitor!r} whether less or more of it is better",
                hint="pass mode='min' or mode='max'",
            )
        if self._direction is not None:
            self.monitor_op: Any = keras.ops.less if self._direction == "min" else keras.ops.greater

    # --------------------------------------------------------------------------------------------- what is on the disk

    def _recall(self) -> None:
        """Take the best from the files that are there; the threshold counts as well."""
        self.best = self._threshold
        self._best_path = None
        for path, record in self._files():
            if record is None:
                warnings.warn(
                    f"{path} does not say what it was saved for; the first {self.monitor} will replace it", stacklevel=2
                )
                continue
            if record.value is None or (record.monitor, record.mode) != (self.monitor, self._direction):
                continue
            best = self.best
            if best is None or (record.value < best if self._direction == "min" else record.value > best):
                self.best, self._best_path = record.value, path

    def _files(self) -> list[tuple[str, Record | None]]:
        """The files this template has made, with their records; unreadable ones are named and passed over."""
        pattern = "".join(
            glob.escape(literal) + ("*" if name is not None else "")
            for literal, name, _, _ in string.Formatter().parse(self.filepath)
        )
        found: list[tuple[str, Record | None]] = []
        for path in sorted(glob.glob(pattern)):  # noqa: PTH207  (a template is text, not a path)
            try:
                record = read_record(path)
            except Damaged as error:
                warnings.warn(f"{error}; it does not count as the best", stacklevel=2)
                continue
            if path == self.filepath or (record is not None and record.template == _relative_template(self.filepath)):
                found.append((path, record))
        return found


def _checked_fields(template: str, *, by_batch: bool) -> frozenset[str]:
    """The names in the braces of a path template. Raises InvalidArgument for what can never be filled in."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", template):
        raise InvalidArgument(
            f"ModelCheckpoint: {template} is not a local path, and a write there could not be made durable",
            path=template,
            hint="save locally, or use keras.callbacks.ModelCheckpoint",
        )
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InvalidArgument(
            f"ModelCheckpoint: the path {template} is no template: {error}", hint="write {{ and }} for braces in a name"
        ) from error
    for name in names:
        if not name or name.isdigit() or not re.fullmatch(r"[^.\[\]]+", name):
            raise InvalidArgument(
                f"ModelCheckpoint: the path {template} has {{{name}}}, which names no metric",
                hint="use {epoch}, {batch} or the name of a metric, such as {val_loss:.2f}",
            )
    if "batch" in names and not by_batch:
        raise InvalidArgument(
            f"ModelCheckpoint: the path {template} has {{batch}}, which there is only with an integer save_freq",
            hint="leave {batch} out, or set save_freq to a number of batches",
        )
    _, missing = _fill(template, dict.fromkeys(names, 1))
    if missing:
        raise InvalidArgument(
            f"ModelCheckpoint: the path {template} has a format that no number fits, at {', '.join(missing)}",
            hint="for example {epoch:02d} or {val_loss:.2f}",
        )
    return frozenset(names)


def _fill(template: str, values: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The path with its values, and the names that could not be filled in: they and a separator beside them are left out."""
    parts: list[str] = []
    missing: list[str] = []
    for literal, name, form, conversion in string.Formatter().parse(template):
        parts.append(literal)
        if name is None:
            continue
        field = "{" + name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "") + "}"
        try:
            parts.append(field.format(**values))
        except (KeyError, ValueError, TypeError, IndexError, AttributeError):
            missing.append(name)
            parts.append("\0")
    path = "".join(parts)
    if missing:
        stem, suffix = _split_suffix(path)
        head, slash, tail = stem.rpartition("/")
        tail = re.sub(r"[-_=.,+ ]*\0", "", tail).strip("-_=.,+ ") or ("model" if "\0" in stem else tail)
        path = re.sub(r"[-_=.,+ ]*\0", "", head) + slash + tail + suffix
    return path, missing


def _split_suffix(path: str) -> tuple[str, str]:
    suffix = next(suffix for suffix in SUFFIXES if path.endswith(suffix))
    return path.removesuffix(suffix), suffix


def _literal_directory(template: str) -> str:
    """The directory of a template up to its first field."""
    literal = next(iter(string.Formatter().parse(template)))[0] if "{" in template else template
    return os.path.dirname(literal) or "."  # noqa: PTH120


def _relative_template(template: str) -> str:
    """The template without the directories that it does not make: a moved folder keeps its best."""
    directory = _literal_directory(template)
    return template if directory == "." else template.removeprefix(directory).lstrip("/")


def _direction_of(monitor: str, model: Any) -> str | None:
    name = monitor.removeprefix("val_")
    if name == "loss":
        return "min"
    for metric in compiled_metrics(model):
        if metric.name == name and getattr(metric, "_direction", None) is not None:
            return "max" if metric._direction == "up" else "min"  # noqa: SLF001
    try:
        return Monitor(monitor).mode
    except InvalidArgument:
        return None


def compiled_metrics(model: Any) -> list[Any]:
    """The metrics given to compile(), one by one: Keras keeps them in a container that is a metric itself."""
    found: list[Any] = []
    for metric in getattr(model, "metrics", ()):
        inner = getattr(metric, "metrics", None)
        found += list(inner) if isinstance(inner, list | tuple) else [metric]
    return found


def _needed_bytes(model: Any) -> int:
    """What the weights and the optimizer take at least; files are never smaller."""
    variables = [*model.variables, *(model.optimizer.variables if model.optimizer is not None else ())]
    return sum(math.prod(variable.shape) * dtype_of(variable).itemsize for variable in variables)


def _metrics_are_built(model: Any) -> bool:
    compiled = getattr(model, "_compile_metrics", None)
    return compiled is None or bool(compiled.built)


def _to_float(name: str, value: Any) -> float:
    """A metric as a float. Raises InvalidMetric for arrays and text."""
    number = as_number(value)
    if number is None:
        shape = getattr(value, "shape", ())
        of_shape = f" of shape {tuple(shape)}" if len(shape) else ""
        raise InvalidMetric(
            f"ModelCheckpoint: {name} is a {type(value).__name__}{of_shape}, not a number",
            hint="monitor a metric that is one number per epoch",
        )
    return number
