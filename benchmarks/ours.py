"""highcamp as a contestant: the same orders as the peers, through its public names only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import highcamp
from benchmarks.peers import Peer, State
from highcamp import Checkpointer, Every, Keep

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ALL = Keep(best=0, last=1_000_000)  # what goes is removed outside of what is timed, as for the peers


class Ours(Peer):
    """A Checkpointer that tracks model and optimizer. options: given to it by name."""

    settings = "Checkpointer.track(model, optimizer), save(); run.last.restore(model, optimizer), digests checked"

    def __init__(
        self,
        directory: str,
        state: State | Mapping[str, Any],
        *,
        options: Mapping[str, Any] | None = None,
        frozen: float = 0.0,
    ) -> None:
        """options: `keep` and `memory_every` as the fields of Keep and Every."""
        self._options = {"keep": ALL, **(options or {})}
        for name, kind in (("keep", Keep), ("memory_every", Every)):
            if isinstance(self._options.get(name), dict):
                self._options[name] = kind(**self._options[name])
        super().__init__(directory, state, frozen=frozen)

    def open(self) -> None:
        """The attempt begins when the live state is known, as in a training script."""
        self._run = self.directory / "run"
        self.checkpointer = Checkpointer(self._run, every=Every(steps=1), verbose=0, **self._options)
        self.checkpointer.track(model=self.state.model, optimizer=self.state.optimizer)
        self.checkpointer.restore()

    @property
    def path(self) -> Path:
        """The checkpoint of the save under way, or of the last one."""
        return self._run / "checkpoints" / f"step-{self._count:08d}"

    def start(self) -> Callable[[], object]:
        """It copies, or begins to, and returns."""
        return self.checkpointer.save(step=self._count).wait

    def flush(self) -> None:
        """It is durable when `wait` returns."""

    def forget(self, before: Path) -> None:
        """Remove what is not the last one, outside of what is timed."""
        del before
        run = highcamp.open(self._run)
        run.prune(Keep(best=0, last=1))
        run.empty_trash()

    def fill(self) -> None:
        """From the open run into the live objects."""
        checkpoint = highcamp.open(self._run).last
        if checkpoint is None:
            raise LookupError("nothing was saved")
        checkpoint.restore(model=self.state.model, optimizer=self.state.optimizer)

    def file_digests(self) -> dict[str, str]:
        """The digests of the tensor files of the last checkpoint, as its manifest has them."""
        checkpoint = highcamp.open(self._run).last
        files = checkpoint.files if checkpoint else ()
        return {file.name: file.digest for file in files if file.name.endswith(".safetensors")}

    def settle(self) -> dict[str, float]:
        """Give the staging memory back."""
        self.checkpointer.close()
        return {}


class OursPartly(Ours):
    """Most of the parameters are frozen."""

    def save(self) -> dict[str, float]:
        """Also the bytes that this process has had written to the disk meanwhile, and those that had changed."""
        before = written_bytes()
        found = super().save()
        os.sync()
        changed = sum(tensor.nbytes for tensor in self.trained())
        return found | {"written_bytes": float(written_bytes() - before), "changed_bytes": float(changed)}


def written_bytes() -> int:
    """The bytes that this process has had written to block devices, as the kernel counts them."""
    lines = Path("/proc/self/io").read_text("ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))
