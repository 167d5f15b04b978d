"""The peers: other ways to save the same state, each with the best of its settings that was found.

A peer that does not fsync is given one, for durable has to mean the same for all; both times are told.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from benchmarks.limits import read_through
from benchmarks.peak import Peak
from benchmarks.states import Spec, TorchState, difference, digests, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch


class State(Protocol):
    """What is saved: a torch model and its optimizer."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    def tree(self) -> dict[str, Any]:
        """The state dicts of both, tensors live."""

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Every tensor by a path, as views of the live memory."""


class Peer(ABC):
    """One way to save: `start` begins a save, `fill` puts a saved state back. The last save is kept, earlier ones go."""

    settings = ""

    def __init__(self, directory: str, state: State | Mapping[str, Any], *, frozen: float = 0.0) -> None:
        """directory: its own, empty. state: what to save, or the fields of the `Spec` to build it from."""
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._count = 0
        self.build(state, frozen)
        self.expect()
        self._peak = Peak()
        self._peak.begin()
        self.open()

    def build(self, state: State | Mapping[str, Any], frozen: float) -> None:
        """Build the live state."""
        if isinstance(state, dict):
            state = TorchState(Spec(**state), frozen=frozen)
        self.state = cast("State", state)

    def open(self) -> None:  # noqa: B027  (most have nothing to set up)
        """Set up whatever lasts from save to save."""

    @property
    def path(self) -> Path:
        """Where the save under way, or the last one, lies."""
        return self.directory / f"save-{self._count}"

    @abstractmethod
    def start(self) -> Callable[[], object]:
        """Save to `path`; returns when the loop may go on, with what waits until the peer calls it done."""

    @abstractmethod
    def fill(self) -> None:
        """Put the last save into the live state."""

    def live(self) -> dict[str, np.ndarray[Any, Any]]:
        """Every live tensor by path."""
        return self.state.arrays()

    def scramble(self) -> None:
        """Overwrite the live state, so that a restore which does nothing is noticed."""
        for tensor in tensors(self.state.tree()).values():
            tensor.detach().fill_(0.5)

    def save(self) -> dict[str, float]:
        """Change the state, then save it.

        Seconds from the call until the loop goes on, until the peer calls it done, until it is durable; bytes on disk.
        """
        self.change()
        self.expect()
        before = self.advance()
        began = time.perf_counter()
        wait = self.start()
        paused = time.perf_counter()
        wait()
        done = time.perf_counter()
        self.flush()
        durable = time.perf_counter()
        found = {"pause": paused - began, "done": done - began, "durable": durable - began}
        self.forget(before)
        return found | {"disk_bytes": float(disk_bytes(self.path))}

    def advance(self) -> Path:
        """The next save goes to a path of its own; returns the one before."""
        before = self.path
        self._count += 1
        return before

    def change(self) -> None:
        """Change every tensor that is trained, for what has not changed since the last save need not be written again."""
        import torch

        with torch.no_grad():
            torch._foreach_add_(self.trained(), 1e-3)

    def trained(self) -> list[torch.Tensor]:
        """The live tensors that training changes."""
        found: list[torch.Tensor] = [weight for weight in self.state.model.parameters() if weight.requires_grad]
        return [*found, *(tensor for parts in self.state.optimizer.state.values() for tensor in parts.values())]

    def expect(self) -> None:
        """The live state as it is now is what the next save has to hold."""
        self._expected = digests(self.live())

    def barrier(self) -> None:  # noqa: B027  (most have copied everything when `start` returns)
        """What a loop calls before the optimizer changes the weights."""

    def flush(self) -> None:
        """Make sure of what the peer itself has not: every file and every directory is fsynced, the parent too."""
        sync_below(self.path)

    def forget(self, before: Path) -> None:
        """Remove an earlier save, outside of what is timed."""
        if before.is_dir():
            shutil.rmtree(before)
        else:
            before.unlink(missing_ok=True)

    def restore(self, *, is_warm: bool) -> dict[str, float]:
        """Seconds to put the last save back into the live state, which is compared afterwards. Raises ValueError."""
        self.scramble()
        if is_warm:
            read_through(self.path)
        began = time.perf_counter()
        self.fill()
        seconds = time.perf_counter() - began
        self.compare()
        return {"restore_warm" if is_warm else "restore_cold": seconds}

    def check(self) -> dict[str, float]:
        """Load the last save and compare it, bit for bit. Raises ValueError naming a tensor that differs."""
        self.scramble()
        self.fill()
        self.compare()
        return {}

    def compare(self) -> None:
        """Whether the live state is what it was built as. Raises ValueError."""
        wrong = difference(digests(self.live()), self._expected)
        if wrong:
            raise ValueError(f"{type(self).__name__}: {wrong} is not what was saved")

    def facts(self) -> dict[str, float]:
        """The memory taken by saving, at its peak, on top of the state and the imported libraries."""
        grown = self._peak.grown_bytes()
        return {} if grown is None else {"peak_bytes": float(grown)}

    def settle(self) -> dict[str, float]:
        """No more saves follow: give staging memory back."""
        return {}


def sync_below(path: Path) -> None:
    """Fsync a file, or a directory with everything in it, and the directory that names it."""
    inner = [Path(root) for root, _, _ in os.walk(path)] if path.is_dir() else []
    files = [path for folder in inner for path in folder.iterdir() if path.is_file()]
    for entry in [*files, *inner, *([] if inner else [path]), path.parent]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def disk_bytes(path: Path) -> int:
    """The bytes of a file, or of every file below a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def nothing() -> None:
    """Nothing is left to wait for."""


def _copy_into(live: Any, loaded: Any) -> None:
    """Copy loaded tensors into the live ones of the same path, which also touches every byte of a lazy load."""
    import torch

    found = tensors(loaded)
    with torch.no_grad():
        for path, tensor in tensors(live).items():
            tensor.copy_(found[path])


class TorchSave(Peer):
    """`torch.save` of both state dicts."""

    settings = "torch.save of the state dicts, then fsync; torch.load(mmap=True, weights_only=True) and copy_"

    def start(self) -> Callable[[], object]:
        """It writes before it returns."""
        import torch

        torch.save(self.state.tree(), self.path)
        return nothing

    def fill(self) -> None:
        """Load and copy into the live tensors."""
        import torch

        _copy_into(self.state.tree(), torch.load(self.path, mmap=True, weights_only=True))


class Safetensors(Peer):
    """`safetensors.torch.save_file` of all tensors in one file; what is no tensor is not saved."""

    settings = "safetensors.torch.save_file of the tensors, then fsync; load_file and copy_"

    def start(self) -> Callable[[], object]:
        """It writes before it returns."""
        from safetensors.torch import save_file

        save_file(tensors(self.state.tree()), self.path)
        return nothing

    def fill(self) -> None:
        """Load and copy into the live tensors."""
        import torch
        from safetensors.torch import load_file

        found = load_file(self.path)
        with torch.no_grad():
            for path, tensor in tensors(self.state.tree()).items():
                tensor.copy_(found[path])


def _dcp() -> Any:
    """The package; its names are public, but not declared to type checkers."""
    import torch.distributed.checkpoint as dcp

    return dcp


class Dcp(Peer):
    """`torch.distributed.checkpoint`, one process."""

    settings = "dcp.save with FileSystemWriter (it fsyncs its files), no_dist; dcp.load into the live tensors"

    def open(self) -> None:
        """Its note that there is one process only is no news."""
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def start(self) -> Callable[[], object]:
        """It writes before it returns."""
        dcp = _dcp()
        dcp.save(self.state.tree(), storage_writer=dcp.FileSystemWriter(self.path), no_dist=True)
        return nothing

    def fill(self) -> None:
        """Read into the live tensors."""
        dcp = _dcp()
        dcp.load(self.state.tree(), storage_reader=dcp.FileSystemReader(self.path), no_dist=True)


class DcpAsync(Dcp):
    """`dcp.async_save` by a thread, staging memory kept from save to save.

    is_staged_behind: the copy into staging memory runs in a thread too; `barrier` waits for it.
    """

    settings = "dcp.async_save by a thread, one DefaultStager for all saves; dcp.load into the live tensors"

    def __init__(
        self, directory: str, state: State | Mapping[str, Any], *, is_staged_behind: bool = False, frozen: float = 0.0
    ) -> None:
        """See the class."""
        self._is_staged_behind = is_staged_behind
        super().__init__(directory, state, frozen=frozen)

    def open(self) -> None:
        """Staging memory is allocated by the first save."""
        super().open()
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=self._is_staged_behind,
            use_non_blocking_copy=False,
        )
        self._stager = DefaultStager(options)
        self._staged: Callable[[], object] = nothing

    def start(self) -> Callable[[], object]:
        """It copies, or begins to, and returns."""
        dcp = _dcp()
        response: Any = dcp.async_save(
            self.state.tree(),
            storage_writer=dcp.FileSystemWriter(self.path),
            async_stager=self._stager,
            no_dist=True,
        )
        if not self._is_staged_behind:
            return response.result  # type: ignore[no-any-return]
        self._staged = response.staging_completion.result
        return response.upload_completion.result  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """What a loop calls before the optimizer changes the weights."""
        self._staged()

    def settle(self) -> dict[str, float]:
        """Give the staging memory back."""
        self._stager.close()
        return {}


class Orbax(Peer):
    """Orbax's asynchronous checkpointer, with the same shapes as JAX arrays, which are never changed in place."""

    settings = (
        "AsyncCheckpointer(PyTreeCheckpointHandler(use_compression=False)), the fastest of its settings here; it copies "
        "nothing before it returns, because JAX arrays do not change; restored into new arrays"
    )

    def build(self, state: State | Mapping[str, Any], frozen: float) -> None:
        """Only from a `Spec`; nothing is frozen, for it writes everything anyway."""
        del frozen
        import jax.numpy as jnp

        spec = Spec(**cast("dict[str, Any]", state))
        generator = np.random.default_rng(0)
        self._tree: dict[str, Any] = {
            name: {part: jnp.asarray(generator.random(shape, np.float32)) for part in ("weight", "mu", "nu")}
            | {"count": jnp.asarray(1.0)}
            for name, shape in spec.shapes().items()
        }

    def open(self) -> None:
        """One checkpointer for all saves."""
        import logging

        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)
        self._checkpointer: Any = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))

    def start(self) -> Callable[[], object]:
        """It returns when nothing more is read from the arrays' devices."""
        import orbax.checkpoint as ocp

        self._checkpointer.save(self.path.absolute(), args=ocp.args.PyTreeSave(self._tree))
        return self._checkpointer.wait_until_finished  # type: ignore[no-any-return]

    def fill(self) -> None:
        """New arrays take the place of the live ones."""
        import jax
        import orbax.checkpoint as ocp

        arguments = ocp.checkpoint_utils.construct_restore_args(self._tree)
        restore = ocp.args.PyTreeRestore(item=self._tree, restore_args=arguments)
        self._tree = self._checkpointer.restore(self.path.absolute(), args=restore)
        jax.block_until_ready(self._tree)  # type: ignore[no-untyped-call]

    def live(self) -> dict[str, np.ndarray[Any, Any]]:
        """Every array by path."""
        return {
            f"{name}/{part}": np.asarray(array) for name, parts in self._tree.items() for part, array in parts.items()
        }

    def change(self) -> None:
        """New arrays take the place of the live ones."""
        import jax

        self._tree = jax.block_until_ready(jax.tree.map(lambda array: array + 1e-3, self._tree))  # type: ignore[no-untyped-call]

    def scramble(self) -> None:
        """New arrays of other values take the place of the live ones."""
        import jax
        import jax.numpy as jnp

        self._tree = jax.tree.map(jnp.zeros_like, self._tree)

    def settle(self) -> dict[str, float]:
        """It keeps no memory between saves."""
        self._checkpointer.wait_until_finished()
        return {}
