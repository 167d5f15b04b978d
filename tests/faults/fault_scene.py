"""What the fault tests share: a small run whose bytes follow from its steps, work on it, and a look at what is left.

A plain module and no fixture, because the processes that are killed import it too. NumPy only: no framework.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from highcamp.core.tree import flatten
from highcamp.errors import CheckpointNotFound, HighcampError, Refused, StorageError
from highcamp.policy.cadence import Every
from highcamp.policy.monitor import Monitor
from highcamp.policy.retention import Keep
from highcamp.run import live
from highcamp.run.attempt import OngoingAttempt
from highcamp.run.run import Run
from highcamp.storage import direct
from highcamp.storage.local import LocalStore
from highcamp.storage.memory import MemoryStore
from highcamp.testing import FaultyStore
from highcamp.training import unchanged
from highcamp.training.snapshot import Snapshot
from highcamp.training.unchanged import Unchanged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from highcamp.core.array import HostArray
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.storage.store import Store

MONITOR = Monitor("val_loss")
KEEP = Keep(best=1, last=1)
STRIP = replace(KEEP, best_weights_only=True)
STORAGE_ERRORS = (StorageError,)
LOSSES = {1: 0.5, 2: 0.2, 3: 0.4, 4: 0.1, 5: 0.3, 6: 0.25, 7: 0.22}
"""Step -> val_loss; steps 1 and 2 are saved before the fault, the others under it. The best changes at step 4."""


LARGE = 64 << 10
"""Bytes from which on, in these tests, a piece goes past the page cache, and a file that has not changed is linked."""
BASE = np.arange(LARGE // 2, dtype=np.uint32)
"""A part of the state that no step changes."""


def state(step: int) -> dict[str, Any]:
    """The training state at a step: three arrays and a plain number, all of which tell the step, and one that never changes."""
    rng = np.random.default_rng(step)
    return {
        "kernel": rng.standard_normal((7, 5), dtype=np.float32),
        "bias": np.full(5, step, np.int64),
        "moments": rng.integers(0, 256, LARGE + LARGE // 2, np.uint8),
        "base": BASE,
        "count": step,
    }


def _as_array(leaf: object) -> HostArray | None:
    array = live.as_array(leaf)
    return replace(array, is_still=True) if array is not None and leaf is BASE else array


_unchanged: weakref.WeakKeyDictionary[OngoingAttempt, Unchanged] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _small_is_large() -> Iterator[None]:
    with mock.patch.object(direct, "LEAST_BYTES", LARGE), mock.patch.object(unchanged, "LEAST_BYTES", LARGE):
        yield


def begin(store: Store, keep: Keep = KEEP) -> OngoingAttempt:
    """Begin the next attempt of the run in `store`, going on from its last checkpoint."""
    attempt = OngoingAttempt(store, monitor=MONITOR, keep=keep, every=Every(epochs=1))
    try:
        attempt.note(tracked=["model", "schedule"])
        attempt.start(last := attempt.run.last)
    except BaseException:
        attempt.release()
        raise
    known = _unchanged[attempt] = Unchanged(store)
    with contextlib.suppress(HighcampError):  # then the first checkpoint is written whole
        if last is not None:
            known.learn_from_disk(last)
    return attempt


def save(attempt: OngoingAttempt, step: int, loss: float | None = None) -> Checkpoint:
    """Log and commit one step: two objects, one of which has no tensors; every other step through a ring."""
    loss = LOSSES[step] if loss is None else loss
    attempt.log(step, step, {"val_loss": loss})
    manifest = attempt.manifest(step=step, epoch=step, batch=0, metrics={"val_loss": loss}, versions={})
    flats = {
        "model": replace(flatten(state(step), _as_array, where="model"), weights=True),
        "schedule": flatten({"rate": 1 / step}, _as_array, where="schedule"),
    }
    known = _unchanged[attempt]
    with _small_is_large():
        groups = known.groups({name: flat.arrays for name, flat in flats.items()})
        shot = Snapshot(None if step % 2 else LARGE).take(flats, groups)
        filling = threading.Thread(target=shot.fill, daemon=True)
        filling.start()
        if not shot.stream.is_ring:
            filling.join()
        try:
            checkpoint, digests = attempt.commit(manifest, shot.parts)
        finally:
            shot.close()
            filling.join()
        known.learn(checkpoint, shot.tables(digests), could_link=shot.could_link)
    return checkpoint


class Diary:
    """What was acknowledged, and what was begun that may have happened: it decides what has to be there afterwards."""

    def __init__(self, write: Callable[[str], object] | None = None) -> None:
        """write: also called with each line, for a diary that outlives its process."""
        self.lines: list[str] = []
        self._write = write

    def note(self, line: str) -> None:
        """Add a line such as "saved step-00000003 3 0.4"."""
        self.lines.append(line)
        if self._write is not None:
            self._write(line)

    @property
    def saved(self) -> dict[str, tuple[int, float]]:
        """Checkpoints that were acknowledged: name -> (step, val_loss)."""
        rows = (line.split() for line in self.lines if line.startswith("saved "))
        return {name: (int(step), float(loss)) for _, name, step, loss in rows}

    @property
    def pins(self) -> dict[str, str]:
        """Pins that were acknowledged, and that nobody has begun to take away."""
        found: dict[str, str] = {}
        for line in self.lines:
            word, *rest = line.split()
            if word == "pinned":
                found[rest[0]] = rest[1]
            elif word == "unpinning":
                found.pop(rest[0], None)
        return found


def prepare(store: Store, diary: Diary) -> None:
    """Two checkpoints and a pin, before anything fails."""
    attempt = begin(store)
    for step in (1, 2):
        diary.note(f"saved {save(attempt, step).name} {step} {LOSSES[step]}")
    attempt.run.pin("step:1", "paper")
    diary.note("pinned paper step-00000001")
    attempt.end("complete", 2, 2)


def work(
    store: Store, diary: Diary, errors: tuple[type[BaseException], ...] = STORAGE_ERRORS, *, keep: Keep = KEEP
) -> None:
    """An attempt that saves, prunes, pins, removes and brings back; what fails is gone over, as with on_error="warn"."""
    try:
        attempt = begin(store, keep)
    except errors:
        return
    run = attempt.run
    gone = (*errors, CheckpointNotFound, Refused)  # after a failure the pin may be on another one, or none
    try:
        for step in (3, 4, 5):
            with contextlib.suppress(*errors):
                diary.note(f"saved {save(attempt, step).name} {step} {LOSSES[step]}")
                attempt.prune()
        with contextlib.suppress(*errors):
            diary.note(f"pinned candidate {run.pin('last', 'candidate').name}")
        with contextlib.suppress(*errors):
            diary.note(f"saved {save(attempt, 6).name} 6 {LOSSES[6]}")
            attempt.prune()
        diary.note("unpinning candidate")
        with contextlib.suppress(*gone):
            name = run.unpin("candidate")
            run.remove(name)
            run.undelete(name)
            run.remove(name)
        with contextlib.suppress(*errors):
            run.prune(Keep(best=1, last=2))
            run.empty_trash()
        with contextlib.suppress(*errors):
            diary.note(f"saved {save(attempt, 7).name} 7 {LOSSES[7]}")
            attempt.prune()
            attempt.end("complete", 7, 7)
    finally:
        attempt.release()


def look(store: Store, diary: Diary, *, hides_drafts: bool = True) -> Run:
    """Open the run as a new process would, and assert that everything acknowledged is there and all that is there is whole.

    hides_drafts: whether the store shows nothing of an unfinished save; object stores show files without a manifest.
    """
    run = Run(store)
    listed = {entry.name: entry for entry in run.checkpoints}
    for entry in listed.values():
        found = entry.verify()
        assert found.ok, f"{entry.name} is listed and {found.state}: {found.findings}"
        tree = entry.state("model")
        assert tree.keys() == state(entry.step).keys()
        assert all(np.array_equal(tree[key], value) for key, value in state(entry.step).items()), entry.name
        if entry.manifest.is_weights_only:
            assert entry.objects == ("model",)
        else:
            assert entry.state("schedule") == {"rate": 1 / entry.step}
        assert entry.metrics == {"val_loss": LOSSES.get(entry.step, 0.05)}
    if hides_drafts:
        assert run.unreadable == [], f"half of a save is seen: {run.unreadable}"
    _look_at_acknowledged(run, listed, diary)
    return run


def _look_at_acknowledged(run: Run, listed: dict[str, Checkpoint], diary: Diary) -> None:
    saved, pins = diary.saved, diary.pins
    assert {pin: run.pins.get(pin) for pin in pins} == pins, "an acknowledged pin is gone"
    if not saved:
        return
    best = min(saved, key=lambda name: (saved[name][1], saved[name][0]))
    last = max(saved, key=lambda name: saved[name])
    found = [entry.name for entry in listed.values() if entry.step == saved[best][0]]  # or its weights alone
    assert found, f"the best, {best}, is gone; there are {sorted(listed)}"
    assert last in listed, f"the last, {last}, is gone; there are {sorted(listed)}"
    assert run.best is not None
    assert run.last is not None
    assert run.best.metrics["val_loss"] <= saved[best][1], "a worse one is the best now"
    assert run.last.step >= saved[last][0]
    assert not run.last.manifest.is_weights_only
    assert set(pins.values()) <= set(listed), "a pinned checkpoint is gone"
    if run.resumed_from is not None:
        assert run.resumed_from in listed, "the checkpoint resumed from is gone"
    if len(saved) == 1:
        assert set(saved) <= set(listed)


def leftovers(store: Store) -> list[str]:
    """Whatever looks like a save or a removal that was never finished."""
    found = [(above, name) for above in ("", "checkpoints", "history") for name in store.list(above)]
    return [
        f"{above}/{name}"
        for above, name in found
        if name.startswith(".pending-") or name.endswith("-doomed") or (name == "owner.json" and not above)
    ]


def start_again(store: Store, diary: Diary, *, hides_drafts: bool = True, keep: Keep = KEEP) -> None:
    """The next process: it takes the run over, sweeps, saves, prunes and ends; assert that all of it works."""
    attempt = begin(store, keep)
    try:
        assert [path for path in leftovers(store) if path != "/owner.json"] == [], "not swept"
        if keep.best_weights_only:
            _finish_stripping(attempt)
        entry = save(attempt, 8, 0.05)
        diary.note(f"saved {entry.name} 8 0.05")
        look(store, diary, hides_drafts=hides_drafts)
        attempt.prune()
        attempt.end("complete", 8, 8)
    finally:
        attempt.release()
    run = look(store, diary, hides_drafts=hides_drafts)
    assert (run.best, run.last) == (entry, entry)
    assert leftovers(store) == []
    assert len({row.number for row in run.history.attempts}) == len(run.history.attempts)


def _finish_stripping(attempt: OngoingAttempt) -> None:
    """The next prune goes on where the one before died: of a best that nothing else keeps, only the weights are left."""
    run = attempt.run
    before = run.best
    attempt.prune()
    best = run.best
    assert all(entry.verify().ok for entry in run.checkpoints)
    assert best is not None
    assert before is not None
    assert best.step == before.step
    assert len([entry for entry in run.checkpoints if entry.step == best.step]) == 1
    others = {run.resumed_from, *run.pins.values(), run.last.name if run.last else None}
    assert best.manifest.is_weights_only or best.name in others


STORES: dict[str, Callable[[Path, int], Store]] = {
    "memory": lambda _, n: MemoryStore(str(n)),
    "local": lambda place, n: LocalStore(place / str(n)),
}


def fail_at_each(make_store: Callable[[int], Store], *, torn: bool, forever: bool, keep: Keep = KEEP) -> list[str]:
    """Fail operation 1, 2, 3, … of the work and look after each; returns the operations of the run that went through."""
    for n in itertools.count(1):
        real, diary = make_store(n), Diary()
        hides_drafts = isinstance(real, LocalStore)
        prepare(real, diary)
        store = FaultyStore(real, fail_at=n, torn=torn, forever=forever)
        try:
            work(store, diary, keep=keep)
            look(real, diary, hides_drafts=hides_drafts)
            start_again(real, diary, hides_drafts=hides_drafts, keep=keep)
        except Exception as problem:
            what = store.operations[n - 1] if store.failed else "nothing"
            problem.add_note(f"after operation {n} had failed ({what}); {'; '.join(diary.lines)}")
            raise
        if not store.failed:
            return store.operations
    raise AssertionError("it ends when the work goes through")
