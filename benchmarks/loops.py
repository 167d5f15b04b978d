"""Training loops that save: how long a step is held up, and what saving costs a whole stretch of training."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from benchmarks import limits
from benchmarks.ours import Ours
from benchmarks.peers import Dcp, DcpAsync, Peer, TorchSave, nothing
from benchmarks.states import Spec, TorchState, digests, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

SAVERS: dict[str, type[Peer]] = {"highcamp": Ours, "torch.save": TorchSave, "dcp.save": Dcp, "dcp.async_save": DcpAsync}


class Step:
    """One training step that follows a save: the pause is the call, and what holds up the optimizer's step."""

    def __init__(self, directory: str, spec: Mapping[str, Any], saver: str, options: Mapping[str, Any]) -> None:
        """saver: of `SAVERS`. options: for it."""
        import torch

        random.seed(0)  # random states are saved too, and every contestant must have the same
        np.random.seed(0)  # noqa: NPY002  (the global generator is what is saved)
        torch.manual_seed(0)
        self._state = TorchState(Spec(**spec))
        self._saver: Peer = SAVERS[saver](directory, self._state, **options)

    def save(self) -> dict[str, float]:
        """Seconds that the loop is held up by the call and by the barrier, their sum, and until it is durable."""
        state, saver = self._state, self._saver
        state.forward_and_backward()
        state.optimizer.step()
        saver.expect()
        before = saver.advance()
        began = time.perf_counter()
        wait = saver.start()
        called = time.perf_counter()
        state.forward_and_backward()
        released: list[float] = []
        # Added anew before each step, so that it is the last of the hooks: a barrier of the saver comes before it.
        hook = state.optimizer.register_step_pre_hook(lambda *_: released.append(time.perf_counter()))
        reached = time.perf_counter()
        saver.barrier()
        state.optimizer.step()
        hook.remove()
        wait()
        saver.flush()
        durable = time.perf_counter()
        saver.forget(before)
        call, barrier = called - began, released[0] - reached
        hidden = reached - called
        return {"call": call, "barrier": barrier, "pause": call + barrier, "hidden": hidden, "durable": durable - began}

    def check(self) -> dict[str, float]:
        """Load the last save and compare it with the state at that moment, bit for bit."""
        return self._saver.check()

    def file_digests(self) -> dict[str, str]:
        """Of highcamp's last checkpoint."""
        return cast("Ours", self._saver).file_digests()

    def settle(self) -> dict[str, float]:
        """No more saves follow."""
        return self._saver.settle()


class Gpt:
    """A small transformer with its AdamW and data made from a seed; every contestant trains the same."""

    def __init__(self, width: int, blocks: int, tokens: int) -> None:
        """width: of the embedding, a multiple of 16. tokens: per sequence."""
        import torch

        torch.manual_seed(0)
        self._tokens = tokens
        layer = torch.nn.TransformerEncoderLayer(
            width, width // 16, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.model: torch.nn.Module = torch.nn.Sequential(
            torch.nn.Embedding(VOCABULARY, width),
            torch.nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False),
            torch.nn.Linear(width, VOCABULARY),
        )
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self._generator = torch.Generator().manual_seed(1)

    def tree(self) -> dict[str, Any]:
        """The state dicts of both, tensors live."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Every tensor by a path, as views of the live memory."""
        return {path: tensor.detach().numpy() for path, tensor in tensors(self.tree()).items()}

    def step(self, barrier: Callable[[], object]) -> None:
        """One step; `barrier` is called before the weights change."""
        import torch

        batch = torch.randint(0, VOCABULARY, (SEQUENCES, self._tokens + 1), generator=self._generator)
        logits = self.model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        barrier()
        self.optimizer.step()


VOCABULARY = 1_000
SEQUENCES = 4


class RawSaver(Peer):
    """What any saver has to do: copy into warm memory, and write it directly in a thread. No digest, no commit."""

    settings = "a copy into warm memory, then a thread that writes it with O_DIRECT and fsyncs: nothing else"

    def open(self) -> None:
        """Memory for one copy."""
        self._memory = limits.memory(sum(array.nbytes for array in self.live().values()))

    def start(self) -> Callable[[], object]:
        """Copy and begin to write."""
        at = 0
        for array in self.live().values():
            np.copyto(self._memory[at : at + array.nbytes], array.reshape(-1).view(np.uint8))
            at += array.nbytes
        thread = threading.Thread(target=limits.write_direct, args=(self.path, self._memory, at))
        thread.start()
        return thread.join

    def fill(self) -> None:
        """Read it back."""
        loaded, at = np.fromfile(self.path, np.uint8), 0
        for array in self.live().values():
            array.reshape(-1).view(np.uint8)[:] = loaded[at : at + array.nbytes]
            at += array.nbytes


class Training:
    """A training loop that saves every so many steps, or never."""

    def __init__(self, directory: str, shape: Mapping[str, int], saver: str | None, options: Mapping[str, Any]) -> None:
        """shape: of the `Gpt`. saver: of `SAVERS`, "raw", or None for no saves."""
        self._state = Gpt(**shape)
        self._state.step(nothing)  # before this the optimizer has no state
        kinds = SAVERS | {"raw": RawSaver}
        self._saver = kinds[saver](directory, self._state, **options) if saver else None
        self._left: list[Path] = []

    def segment(self, steps: int, every: int) -> dict[str, float]:
        """Seconds for `steps` steps with a save after the first, and each `every` further ones, all of them durable."""
        state, saver = self._state, self._saver
        wait: Callable[[], object] = nothing
        barrier = saver.barrier if saver else nothing
        before: list[Path] = []
        began = time.perf_counter()
        for step in range(steps):
            state.step(barrier)
            if saver is None or step % every:
                continue
            wait()
            before.append(saver.advance())
            wait = saver.start()
            if wait is nothing:  # it has written already: durable means now
                saver.flush()
        wait()
        seconds = time.perf_counter() - began
        for path in before:
            assert saver is not None
            saver.forget(path)
        return {"segment": seconds}

    def weights(self) -> dict[str, str]:
        """Digests of the whole state, which must be the same whoever saves."""
        return digests(self._state.arrays())

    def size(self) -> dict[str, float]:
        """Bytes of the state."""
        return {"state_bytes": float(sum(array.nbytes for array in self._state.arrays().values()))}

    def settle(self) -> dict[str, float]:
        """No more saves follow."""
        return self._saver.settle() if self._saver else {}
