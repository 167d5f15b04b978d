"""Overlap: the snapshot is copied while the next forward and backward run, and is complete before the weights change.

What is copied late are the parameters that tracked optimizers hold, and the state of these optimizers: between two steps
nothing else should write to them. Before the first of the optimizers steps, a hook waits for the copy, taking a share of
it. What else may write is looked for: a tripwire makes such a snapshot an error, never a checkpoint.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import os
import threading
import time
from operator import is_
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from highcamp.core.array import DistantArray
from highcamp.errors import Torn
from highcamp.run import live

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from highcamp.core.array import HostArray
    from highcamp.training.recall import Recall
    from highcamp.training.snapshot import Shot
    from highcamp.training.stream import Share

LEAST_BYTES = 64 << 10
"""Of an array that is copied late: below it, looking after it takes longer than copying it."""
SAMPLES = 8
"""Places of an array that are compared, eight bytes at each: no update of the whole of it leaves all of them as they were."""
_WORD_BYTES = 8
_STEP_BYTES = 8  # step counters are this long or shorter


class _Wire(NamedTuple):
    """Where to look whether something writes to an array. tensor: of the framework. name: for the error.

    probe: a word from the beginning of each stride.
    """

    array: HostArray
    tensor: object
    name: str
    stride: int
    probe: memoryview


Late: TypeAlias = "dict[int, _Wire | None]"
"""By `id` the arrays that may be copied late; no wire is needed for what cannot change."""


class _Watched:
    """One optimizer. steps: how often its hook has fired since it was last asked.

    late, counters: what it writes to, as far as it is tracked: arrays that may be copied late, and step counters.
    """

    __slots__ = ("_capture", "_parameters", "counters", "late", "optimizer", "remove", "steps")

    def __init__(self, optimizer: object) -> None:
        self.optimizer = optimizer
        self.steps = 0
        self.remove: Callable[[], None] = lambda: None
        self.late: list[_Wire] = []
        self.counters: list[_Wire] = []
        self._capture, self._parameters = -1, list[object]()

    def look(self, recall: Recall, arrays: Mapping[str, Mapping[str, HostArray]]) -> None:
        """Find out what it writes to, if that can have changed since the last time."""
        parameters = live.parameters(self.optimizer)
        is_known = self._capture == recall.version and len(parameters) == len(self._parameters)
        if is_known and all(map(is_, parameters, self._parameters)):
            return
        names = {id(array): f"{name}/{key}" for name, entries in arrays.items() for key, array in entries.items()}
        self.late, self.counters = [], []
        for tensor in live.owned(self.optimizer):
            array = recall.of(tensor)
            if array is None or isinstance(array, DistantArray):
                continue
            if array.nbytes >= LEAST_BYTES:
                self.late.append(_wire(array, tensor, names.get(id(array), "a tensor")))
            elif array.nbytes <= _STEP_BYTES:
                self.counters.append(_wire(array, tensor, names.get(id(array), "an optimizer")))
        self._capture, self._parameters = recall.version, parameters


class Overlap:
    """One copy under way at a time, and the barrier in front of the tracked optimizers' steps."""

    def __init__(self) -> None:
        """Nothing is watched."""
        self._pid = os.getpid()
        self._watched: list[_Watched] = []
        self._armed: _Armed | None = None
        self._counters: list[_Wire] = []
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

    def late(self, recall: Recall, arrays: Mapping[str, Mapping[str, HostArray]]) -> Late:
        """The arrays that may be copied late.

        An optimizer whose hook has not fired since the last snapshot is not trusted to have one: its step may be compiled.
        """
        found: Late = {}
        for entries in arrays.values():
            found |= {id(array): None for array in entries.values() if array.is_immutable}
        self._counters = []
        for watched in self._watched:
            if watched.steps:
                watched.look(recall, arrays)
                found |= {id(wire.array): wire for wire in watched.late}
                self._counters += watched.counters
            watched.steps = 0
        return found

    def arm(self, shot: Shot, late: Late) -> Callable[[], None] | None:
        """Begin to copy what is late, in a thread of its own; the barrier is up until it is complete.

        Returns what waits for that and raises Torn if something else has written meanwhile; None if nothing is late.
        """
        if not shot.stream.has_late:
            return None
        wires = [wire for array in shot.stream.late_arrays() if (wire := late.get(id(array))) is not None]
        self._armed = armed = _Armed(shot, wires, self._counters)
        shot.stream.inspect(armed.inspect)
        try:
            # Not of `threading`: to start one of those is to wait until it runs, a tenth of what the loop waits for.
            _thread.start_new_thread(armed.run, ())
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
        self._watched, self._counters = [], []

    def _step_begins(self, watched: _Watched) -> None:
        watched.steps += 1
        if self._armed is not None:
            self.wait()


class _Armed:
    """The late part of one snapshot. ready: it is copied, and the tripwires have been looked at.

    wires: of the arrays that are copied late. counters: of the step counters of the optimizers.
    """

    def __init__(self, shot: Shot, wires: Sequence[_Wire], counters: Sequence[_Wire]) -> None:
        self.stream = shot.stream
        self.ready = threading.Event()
        self._claim = threading.Lock()
        self._wires, self._counters = {id(wire.array): wire for wire in wires}, counters
        self._samples = {id(wire.array): wire.probe.tobytes() for wire in wires}
        self._counts = [wire.array.data.tobytes() for wire in counters]
        self._writes = live.writes([wire.tensor for wire in wires])
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
            self._wires, self._counters = {}, ()  # lets go of the tensors
            self.ready.set()

    def inspect(self, share: Share, copy: memoryview) -> None:
        """Compare a copy with what was there when the snapshot began; in a ring, it is not there for long."""
        wire = self._wires.get(id(share.array))
        if wire is not None:
            first = -(-share.offset // wire.stride)
            found = _probe(copy[first * wire.stride - share.offset :], wire.stride).tobytes()
            if not self._samples[id(share.array)].startswith(found, first * _WORD_BYTES):
                self._error = self._error or _torn(wire.name, "was written to")

    def confirm(self) -> None:
        """Wait for the end. Raises Torn."""
        self.ready.wait()
        if self._error is not None:
            raise self._error

    def _torn(self) -> Torn | None:
        wires = list(self._wires.values())
        for wire, before, now in zip(wires, self._writes, live.writes([wire.tensor for wire in wires]), strict=True):
            if now != before:
                return _torn(wire.name, "was written to")
        for wire, count in zip(self._counters, self._counts, strict=True):
            if wire.array.data.tobytes() != count:
                return _torn(wire.name, "has stepped without its hooks")
        return None


def _wire(array: HostArray, tensor: object, name: str) -> _Wire:
    stride = array.nbytes // SAMPLES // _WORD_BYTES * _WORD_BYTES or _WORD_BYTES
    return _Wire(array, tensor, name, stride, _probe(array.data, stride))


def _probe(data: memoryview, stride: int) -> memoryview:
    """A word from the beginning of each stride."""
    whole = len(data) // _WORD_BYTES * _WORD_BYTES
    return data[:whole].cast("Q")[:: stride // _WORD_BYTES]


def _torn(name: str, what: str) -> Torn:
    return Torn(
        f"{name} {what} while the snapshot was copied, so this checkpoint is not saved",
        hint='use snapshot="copy", or let only the tracked optimizers change the weights between two steps',
    )
