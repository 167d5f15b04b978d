"""Overlap: the snapshot is copied while the next forward and backward run, and is complete before the weights change.

What is copied late are the parameters that tracked optimizers hold, and the state of these optimizers: between two steps
nothing else should write to them. Before the first of the optimizers steps, a hook waits for the copy, taking a share of
it. What else may write is looked for: a tripwire makes such a snapshot an error, never a checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from highcamp.core.array import DistantArray
from highcamp.errors import Torn
from highcamp.run import live

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from highcamp.core.array import HostArray
    from highcamp.training.recall import Recall
    from highcamp.training.snapshot import Shot
    from highcamp.training.stream import Share

LEAST_BYTES = 64 << 10
"""Of an array that is copied late: below it, looking after it takes longer than copying it."""
SAMPLES = 16
"""Places of an array that are compared, eight bytes at each: no update of the whole of it leaves all of them as they were."""
_WORD_BYTES = 8
_STEP_BYTES = 8  # step counters are this long or shorter


class _Wire(NamedTuple):
    """What one array was like when the snapshot began. tensor: of the framework. name: for the error."""

    tensor: object
    writes: int
    sample: bytes
    stride: int
    name: str


class _Watched:
    """One optimizer. steps: how often its hook has fired since it was last asked."""

    __slots__ = ("optimizer", "remove", "steps")

    def __init__(self, optimizer: object) -> None:
        self.optimizer = optimizer
        self.steps = 0
        self.remove: Callable[[], None] = lambda: None


class Overlap:
    """One copy under way at a time, and the barrier in front of the tracked optimizers' steps."""

    def __init__(self) -> None:
        """Nothing is watched."""
        self._pid = os.getpid()
        self._watched: list[_Watched] = []
        self._armed: _Armed | None = None
        self._waited = 0.0

    def watch(self, tracked: Mapping[str, object]) -> None:
        """Put the barrier in front of every optimizer among the tracked objects that can have one."""
        self.close()
        for obj in tracked.values():
            watched = _Watched(obj)
            remove = live.before_step(obj, functools.partial(self._step_begins, watched))
            if remove is not None:
                watched.remove = remove
                self._watched.append(watched)

    def late(self, recall: Recall, arrays: Mapping[str, Mapping[str, HostArray]]) -> dict[int, object]:
        """The arrays that may be copied late: `id` of the array -> the tensor, None for one that cannot change.

        An optimizer whose hook has not fired since the last snapshot is not trusted to have one: its step may be compiled.
        """
        found: dict[int, object] = {}
        for entries in arrays.values():
            found |= {id(array): None for array in entries.values() if array.is_immutable}
        for watched in self._watched:
            if watched.steps:
                for tensor in live.owned(watched.optimizer):
                    array = recall.of(tensor)
                    if array is not None and not isinstance(array, DistantArray) and array.nbytes >= LEAST_BYTES:
                        found[id(array)] = tensor
            watched.steps = 0
        return found

    def arm(self, shot: Shot, tensors: Mapping[int, object], recall: Recall) -> Callable[[], None] | None:
        """Begin to copy what is late, in a thread of its own; the barrier is up until it is complete.

        Returns what waits for that and raises Torn if something else has written meanwhile; None if nothing is late.
        """
        if not shot.stream.has_late:
            return None
        steps = [
            (array, array.data.tobytes(), shot.names.get(id(array), "an optimizer"))
            for watched in self._watched
            for tensor in live.owned(watched.optimizer)
            if (array := recall.of(tensor)) is not None and array.nbytes <= _STEP_BYTES
        ]
        wires = {
            id(array): _wire(array, tensor, shot.names.get(id(array), "a tensor"))
            for array in shot.stream.late_arrays()
            if (tensor := tensors.get(id(array))) is not None
        }
        self._armed = armed = _Armed(shot, wires, steps)
        shot.stream.inspect(armed.inspect)
        try:
            threading.Thread(target=armed.run, name="highcamp-overlap", daemon=True).start()
        except RuntimeError as error:  # no more threads: then it is copied here, unless it needs one that reads
            if shot.stream.is_ring:
                shot.stream.abort(error)
            armed.run()
        except BaseException as error:  # Ctrl-C, and the thread may run all the same
            shot.stream.abort(error)
            armed.run()
            raise
        return armed.confirm

    def wait(self) -> None:
        """Wait until the copy under way is complete, taking a share of it; never raises what has gone wrong with it.

        Ctrl-C is raised, and the barrier stays up. A forked child waits for nothing: neither the memory nor the thread
        that copies is there.
        """
        armed = self._armed
        if armed is None:
            return
        if os.getpid() == self._pid:
            began = time.monotonic()
            try:
                with contextlib.suppress(Exception):  # it is the save's error, and surfaces there
                    armed.stream.fill(late=True)
                armed.ready.wait()
            finally:
                self._waited += time.monotonic() - began
        self._armed = None

    def take_waited(self) -> float:
        """Seconds that the barrier has cost the loop since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Take the barrier away."""
        self.wait()
        for watched in self._watched:
            watched.remove()
        self._watched = []

    def _step_begins(self, watched: _Watched) -> None:
        watched.steps += 1
        if self._armed is not None:
            self.wait()


class _Armed:
    """The late part of one snapshot. ready: it is copied, and the tripwires have been looked at.

    wires: by the `id` of their arrays. steps: the step counters of the optimizers, what they were, and their names.
    """

    def __init__(self, shot: Shot, wires: dict[int, _Wire], steps: list[tuple[HostArray, bytes, str]]) -> None:
        self.stream = shot.stream
        self.ready = threading.Event()
        self._claim = threading.Lock()
        self._wires, self._steps = wires, steps
        self._error: BaseException | None = None

    def run(self) -> None:
        """Copy until nothing is left, then look at the tripwires. Only the first call does."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            self.stream.fill(late=True)
            self.stream.wait_filled(late=True)
            self._error = self._error or self._torn()
        except BaseException as error:  # noqa: BLE001  (raised by `confirm`, in the thread that commits)
            self._error = error
            self.stream.abort(error)
        finally:
            self._wires, self._steps = {}, []  # lets go of the tensors
            self.ready.set()

    def inspect(self, share: Share, copy: memoryview) -> None:
        """Compare a copy with what was there when the snapshot began; in a ring, it is not there for long."""
        wire = self._wires.get(id(share.array))
        if wire is not None:
            first = -(-share.offset // wire.stride)
            found = _sample(copy[first * wire.stride - share.offset :], wire.stride)
            if not wire.sample[first * _WORD_BYTES :].startswith(found):
                self._error = self._error or _torn(wire.name, "was written to")

    def confirm(self) -> None:
        """Wait for the end. Raises Torn."""
        self.ready.wait()
        if self._error is not None:
            raise self._error

    def _torn(self) -> Torn | None:
        for wire in self._wires.values():
            if live.writes(wire.tensor) != wire.writes:
                return _torn(wire.name, "was written to")
        for array, before, name in self._steps:
            if array.data.tobytes() != before:
                return _torn(name, "has stepped without its hooks")
        return None


def _wire(array: HostArray, tensor: object, name: str) -> _Wire:
    stride = array.nbytes // SAMPLES // _WORD_BYTES * _WORD_BYTES
    return _Wire(tensor, live.writes(tensor), _sample(array.data, stride), stride, name)


def _sample(data: memoryview, stride: int) -> bytes:
    """A word from the beginning of each stride."""
    whole = len(data) // _WORD_BYTES * _WORD_BYTES
    return data[:whole].cast("Q")[:: stride // _WORD_BYTES].tobytes()


def _torn(name: str, what: str) -> Torn:
    return Torn(
        f"{name} {what} while the snapshot was copied, so this checkpoint is not saved",
        hint='use snapshot="copy", or let only the tracked optimizers change the weights between two steps',
    )
