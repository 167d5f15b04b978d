"""Reading: lets Lightning load a highcamp checkpoint wherever it takes the path of a `.ckpt`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
from lightning.pytorch.plugins import CheckpointIO

from highcamp.errors import Refused
from highcamp.lightning.part import Part
from highcamp.lightning.state import MODEL, OPTIMIZERS, TRAINER, as_lightning
from highcamp.run.run import open_run

if TYPE_CHECKING:
    from highcamp.lightning.loop import Resume
    from highcamp.run.checkpoint import Checkpoint


class RunIO(CheckpointIO):
    """Reads checkpoints of highcamp's runs; everything else is left to the CheckpointIO that was there before."""

    def __init__(self, inner: CheckpointIO, resume: Resume | None) -> None:
        """resume: of the training that begins, None if there is none or it is a fresh start."""
        self.inner, self._resume = inner, resume

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """See CheckpointIO."""
        self.inner.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """See CheckpointIO. Raises Refused for another place than the one the run goes on from, Damaged."""
        found, resume = _checkpoint_at(path), self._resume
        if resume is not None:
            # Of its own accord Lightning looks for what its handler of Slurm's signals has saved; ours is of a later step.
            if Path(path).name.startswith("hpc_ckpt_") or (found is not None and found.path == resume.path):
                return resume.loaded
            raise Refused(
                f"fit(ckpt_path={str(path)!r}): the run goes on from {resume.path}, and would be mixed with another state",
                path=resume.path,
                hint="leave ckpt_path out; to train on from other weights, give CheckpointCallback another directory",
            )
        if found is None:
            loaded: dict[str, Any] = self.inner.load_checkpoint(path, *arguments, **keywords)
            return loaded
        parts = {name: Part(dict, is_weights=False) for name in (MODEL, OPTIMIZERS, TRAINER) if name in found.objects}
        found.restore(**parts)
        return {
            "pytorch-lightning_version": lightning.__version__,
            **as_lightning({name: part.saved for name, part in parts.items()}),
        }

    def remove_checkpoint(self, path: Any) -> None:
        """See CheckpointIO."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """See CheckpointIO."""
        self.inner.teardown()


def _checkpoint_at(path: Any) -> Checkpoint | None:
    """The checkpoint whose directory this is; None for any other path."""
    place = Path(path)
    if not (place / "manifest.json").is_file() or place.parent.name != "checkpoints":
        return None
    return open_run(place.parent.parent).checkpoint(place.name)
