"""Checkpoint: an immutable, committed copy of the training state at one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from highcamp.core.tree import names
from highcamp.errors import InvalidArgument
from highcamp.run import commit, export, verify
from highcamp.run.history import parse_time
from highcamp.run.reading import Reading

if TYPE_CHECKING:
    import os
    from datetime import datetime
    from pathlib import Path

    import numpy as np

    from highcamp.core.manifest import File, Manifest
    from highcamp.run.tensors import Saved
    from highcamp.run.verify import Verification
    from highcamp.storage.store import Store


@dataclass(frozen=True)
class Checkpoint:
    """An immutable, committed copy of the training state at one step.

    name: its directory's name. metrics: those frozen at the commit, completed by rows logged later at the same step;
    non-finite values included.
    """

    name: str
    manifest: Manifest = field(repr=False)
    metrics: dict[str, float] = field(default_factory=dict)
    store: Store = field(kw_only=True, repr=False, compare=False)

    @property
    def path(self) -> str:
        """Its directory: a path on a local disk, a URL elsewhere."""
        return f"{self.store.url}/{commit.checkpoint_path(self.name)}"

    @property
    def step(self) -> int:
        """Optimizer steps done when the state was captured."""
        return self.manifest.step

    @property
    def epoch(self) -> int:
        """Epochs done when the state was captured."""
        return self.manifest.epoch

    @property
    def batch(self) -> int:
        """Batches done in the epoch that was under way, 0 between epochs."""
        return self.manifest.batch

    @property
    def attempt(self) -> int:
        """The attempt that wrote it."""
        return self.manifest.attempt

    @property
    def sequence(self) -> int:
        """Grows with every commit of the run; decides between two checkpoints of the same step."""
        return self.manifest.sequence

    @property
    def parent(self) -> str | None:
        """The checkpoint that this state grew out of."""
        return self.manifest.parent

    @property
    def created_at(self) -> datetime:
        """When it was committed, UTC."""
        return parse_time(self.manifest.created_at)

    @property
    def files(self) -> tuple[File, ...]:
        """Every file but the manifest: name, size in bytes, digest."""
        return self.manifest.files

    @property
    def objects(self) -> tuple[str, ...]:
        """The names of the objects in it."""
        return tuple(self.manifest.objects)

    @property
    def versions(self) -> dict[str, str]:
        """What it was written with."""
        return dict(self.manifest.versions)

    @property
    def is_healthy(self) -> bool | None:
        """Whether no weight is NaN or infinite, as was seen when it was written; None where that is not known.

        Known are the weights of models, and parts of a passed state with names such as params. NaN is wrong anywhere in
        them, an infinity in what is known to be trained: a mask of infinities is a constant like any other.
        """
        return self.manifest.is_healthy

    @property
    def size_bytes(self) -> int:
        """The bytes of all its files but the manifest."""
        return sum(file.size for file in self.manifest.files)

    def load(self, object: str = "model", *, copy: bool = False) -> dict[str, np.ndarray[Any, Any]]:  # noqa: A002
        """The tensors of one object by path, such as {"dense/kernel": (64, 10) float32}; every byte is verified first.

        The arrays are read-only and mapped from the file: they stay valid if the checkpoint is removed, but not if somebody
        truncates the file in place. With `copy` they are read into memory of their own and writable. Tied tensors appear
        under each of their paths. Raises CheckpointNotFound for an object it does not have, Damaged.
        """
        with Reading(self) as reading:
            skeleton, tensors = reading.load(object, mapped=not copy)
        return {path: tensors[name].numpy() for path, name in names(skeleton).items()}

    def state(self, object: str) -> Any:  # noqa: A002
        """The whole state of one object as plain data: dicts, lists, tuples, numbers, with NumPy arrays as tensors.

        Named tuples come back as dicts of their fields; `restore` with the live object, or `like=`, gives them back.
        Raises CheckpointNotFound, Damaged.
        """
        with Reading(self) as reading:
            return reading.state(object)

    def restore(self, **objects: object) -> None:
        """Put the state of the named objects into live ones, such as `restore(model=model)`.

        Everything is compared before the first object is touched: a Mismatch lists every difference and has changed
        nothing. The bytes are then read straight into the objects' own memory and verified on the way, so Damaged may come
        when the objects are overwritten in part, and says so; if they must survive that, call `verify` first. Raises
        CheckpointNotFound for a name it does not have.
        """
        if not objects:
            raise InvalidArgument(
                "restore() was given no objects", hint="name them as they are saved: restore(model=model)"
            )
        with Reading(self) as reading:
            reading.restore(objects)

    def saved(self, name: str) -> Saved:
        """The saved state of one object, for `passed.fill`; its tensors are not read yet.

        Raises CheckpointNotFound, Damaged.
        """
        return Reading(self).saved(name)

    def verify(self, *, quick: bool = False) -> Verification:
        """Compare every byte with its digest (quick: only names and sizes) and name what is damaged; repairs nothing."""
        return verify.verify_checkpoint(self, quick=quick)

    def export(self, path: str | os.PathLike[str], *, object: str = "model", force: bool = False) -> Path:  # noqa: A002
        """Verify, then write the tensors of one object to `path`, in the format of its suffix.

        `.safetensors`, `.npz`, `.pt` (a state_dict), `.weights.h5` and `.keras` (for models saved by Keras).
        Raises Refused if `path` exists and `force` is not set, InvalidArgument for another suffix, MissingExtra.
        """
        return export.export(self, path, object_name=object, force=force)

    def skeleton(self, name: str) -> Any:
        """The tree of one object as JSON, tensors named; `docs/format.md` has its rules. Raises CheckpointNotFound, Damaged."""
        with Reading(self) as reading:
            return reading.skeleton(name)
