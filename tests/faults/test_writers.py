"""Several processes at one run: one writes, any number read, and whoever removes takes nothing that somebody holds."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import fault_scene as scene
import msgspec
import numpy as np
import pytest

import highcamp
from highcamp import CheckpointNotFound, Keep, RunLocked
from highcamp.run import commit, owner
from highcamp.storage.local import LocalStore
from highcamp.storage.memory import MemoryStore

NOW = datetime(2026, 1, 31, tzinfo=UTC)
WRITER = """
import sys
import fault_scene as scene
from highcamp.storage.local import LocalStore
attempt = scene.begin(LocalStore(sys.argv[1]))
scene.save(attempt, 3)
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def writer(path):
    """Another process that writes to the run, until it is killed."""
    places = [str(Path(__file__).parent), str(Path(highcamp.__file__).parent.parent)]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def never(_):
    """A fake way to wait, for owners that can be looked up."""
    pytest.fail("watched a process of this machine instead of looking it up")


def take(store, watch=never, directory=None):
    """Become the owner, and give the run back."""
    held = owner.take(store, directory, NOW, watch)
    held.release()
    return held


@pytest.mark.timeout(60)
def test_a_second_writer_is_refused_and_a_dead_one_taken_over_at_once(place):
    """Two jobs in one directory would prune each other's checkpoints; a crashed one must not lock the run for ever."""
    store = LocalStore(place / "run")
    scene.prepare(store, scene.Diary())
    with writer(place / "run") as process:
        expected = rf"{place}/run is being written by process {process.pid} on {socket.gethostname()}, since 20.*; wait"
        with pytest.raises(RunLocked, match=expected):
            scene.begin(store)
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(RunLocked, match=str(process.pid)):  # asleep, as after closing a laptop, is not dead
            take(store, directory=place / "run")
        assert [entry.step for entry in highcamp.open(store).checkpoints] == [1, 2, 3]

        process.kill()  # not waited for yet: a zombie counts as dead
        while b") Z " not in Path(f"/proc/{process.pid}/stat").read_bytes():
            os.sched_yield()
        attempt = scene.begin(store)

        assert attempt._ownership.number == 2
        assert attempt.run.last.step == 3
        attempt.release()


def test_a_second_writer_in_the_same_process_is_refused(place):
    """A notebook cell that is run twice is a second writer too."""
    store = LocalStore(place / "run")
    attempt = scene.begin(store)
    with pytest.raises(RunLocked, match=f"process {os.getpid()} "):
        scene.begin(LocalStore(place / "run"))

    attempt.end("closed", 0, 0)

    scene.begin(store).release()


def elsewhere(**changes):
    """The record of an owner on another machine."""
    record = owner.Owner(
        host="node17", boot="b", namespace="pid:[1]", pid=4242, started="99", since="2026-01-30T00:00:00.000Z", number=3
    )
    return msgspec.structs.replace(record, **changes)


def test_a_live_owner_elsewhere_is_watched_and_left_alone():
    """Its process number means nothing here, but its record counts up."""
    store, waited = MemoryStore(), []
    owner._write(store, elsewhere())

    def watch(seconds):
        waited.append(seconds)
        owner._write(store, elsewhere(beat=1))

    with pytest.raises(RunLocked, match="process 4242 on node17, since 2026-01-30"):
        take(store, watch)

    assert waited == [owner.WATCH_SECONDS]
    assert owner.WATCH_SECONDS > 2 * owner.BEAT_SECONDS


@pytest.mark.parametrize("then", ["still", "gone", "torn"])
def test_an_owner_elsewhere_that_stands_still_is_taken_over(then):
    """A node that was switched off says nothing any more; a day's wait would cost more than it protects."""
    store, waited = MemoryStore(), []
    owner._write(store, elsewhere())

    def watch(seconds):
        waited.append(seconds)
        if then == "gone":
            store.remove(owner.OWNER)
        elif then == "torn":
            store.replace(owner.OWNER, b'{"host": "no')

    held = take(store, watch)

    assert held.number == 4
    assert len(waited) == 1
    assert store.list("") == []


def test_an_owner_elsewhere_followed_by_another_is_alive():
    """Two waited for the same dead owner, and the other one was first."""
    store = MemoryStore()
    owner._write(store, elsewhere())

    with pytest.raises(RunLocked, match="node17"):
        take(store, lambda _: owner._write(store, elsewhere(pid=5, number=4)))


def test_a_process_number_used_again_is_no_owner():
    """Numbers come round; the time a process began tells it from its namesake."""
    store = MemoryStore()
    here = {"host": socket.gethostname(), "boot": owner._boot(), "namespace": owner._namespace()}
    owner._write(store, elsewhere(pid=os.getppid(), started="1", **here))

    assert take(store).number == 4


def test_another_boot_is_another_machine():
    """After a reboot the numbers mean nothing; the record stands still and is taken over."""
    store, waited = MemoryStore(), []
    owner._write(store, elsewhere(host=socket.gethostname(), boot="before", pid=os.getpid()))

    assert take(store, waited.append).number == 4
    assert waited == [owner.WATCH_SECONDS]


@pytest.mark.parametrize("data", [b"", b"{", b"null", b"[" * 50_000, b"\xff", b"x" * (1 << 17), b'{"pid": "many"}'])
def test_a_record_that_cannot_be_read_holds_nobody(data):
    """A crash on a file system that tears files must not lock the run until somebody finds out which file to remove."""
    store = MemoryStore()
    store.replace(owner.OWNER, data)

    assert take(store).number == 1


class Ticks:
    """An event that lets a loop go round a number of times."""

    def __init__(self, count):
        self.left = count

    def wait(self, seconds):
        """Whether to stop."""
        self.left -= 1
        return self.left < 0


def test_the_beat_counts_up_and_never_over_a_successor():
    """A writer that slept through its own takeover must not throw the new one out."""
    store = MemoryStore()
    held = owner.take(store, None, NOW, never)
    held.release()
    owner._write(store, held._owner)
    held._stop = Ticks(3)
    held._keep_alive()
    assert owner._read(store).beat == 3

    successor = elsewhere()
    owner._write(store, successor)
    held._stop = Ticks(3)
    held._keep_alive()

    assert owner._read(store) == successor


def test_giving_back_leaves_a_successor_alone():
    """The same when the sleeper ends: the run is not his to give any more."""
    store = MemoryStore()
    held = owner.take(store, None, NOW, never)
    successor = elsewhere()
    owner._write(store, successor)

    held.release()
    held.release()

    assert owner._read(store) == successor


# ---------------------------------------------------------------------------------------------------- those who remove


class Interrupting:
    """A store that calls somebody else before its N-th operation that moves or removes."""

    def __init__(self, store, at, call):
        self._store, self._left, self._call = store, at, call
        self.happened = False

    def __getattr__(self, name):
        return getattr(self._store, name)

    def _count(self):
        self._left -= 1
        if self._left == 0:
            self.happened = True
            self._call()

    def withdraw(self, path, to):
        """Count."""
        self._count()
        self._store.withdraw(path, to)

    def remove(self, path):
        """Count."""
        self._count()
        self._store.remove(path)


def many(store, count=6):
    """A run of some checkpoints, the second of which is the best."""
    attempt = scene.begin(store)
    for step in range(1, count + 1):
        scene.save(attempt, step, 0.05 if step == 2 else step / 10)
    attempt.end("closed", count, count)


@pytest.mark.parametrize("kind", scene.STORES)
@pytest.mark.parametrize("forever", [False, True], ids=["to trash", "for good"])
def test_two_pruners(place, kind, forever):
    """At every point of one prune another one runs through: each goes once, and what is protected stays."""
    for at in itertools.count(1):
        real = scene.STORES[kind](place, at)
        many(real)
        other = highcamp.open(real)
        store = Interrupting(real, at, lambda other=other: other.prune(Keep(best=1, last=1)))
        if forever:
            attempt = scene.begin(real)
            attempt._store = attempt.run.store = store
            attempt.prune()
            attempt.release()
        else:
            highcamp.open(store).prune(Keep(best=1, last=1))

        run = highcamp.open(real)
        assert [entry.step for entry in run.checkpoints] == [2, 6]
        assert all(result.ok for result in run.verify())
        gone = sorted(run.trash.values())
        assert len(gone) == len(set(gone))
        if not forever:
            assert gone == [f"step-0000000{step}" for step in (1, 3, 4, 5)]
        if not store.happened:
            return


def test_two_pruners_at_the_same_time(place):
    """The same without knowing where they meet."""
    store = LocalStore(place / "run")
    many(store, 24)
    start, errors = threading.Barrier(4), []

    def prune():
        start.wait()
        try:
            highcamp.open(place / "run").prune(Keep(best=1, last=2))
        except Exception as error:  # noqa: BLE001  (shown by the assertion)
            errors.append(error)

    threads = [threading.Thread(target=prune) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    run = highcamp.open(store)
    assert errors == []
    assert [entry.step for entry in run.checkpoints] == [2, 23, 24]
    assert sorted(run.trash.values()) == [f"step-{step:08d}" for step in range(1, 23) if step != 2]


@pytest.mark.parametrize("kind", scene.STORES)
@pytest.mark.parametrize("doomed", [False, True], ids=["to trash", "for good"])
def test_a_pin_set_while_pruning_holds(place, kind, doomed):
    """Whoever was told that a checkpoint is pinned finds it, whatever a prune was about to do at that moment."""
    for at in itertools.count(1):
        real = scene.STORES[kind](place, at)
        many(real)
        kept = []

        def pin(real=real, kept=kept):
            with contextlib.suppress(CheckpointNotFound):
                kept.append(highcamp.open(real).pin("step:4", "paper").name)

        store = Interrupting(real, at, pin)
        attempt = scene.begin(real)
        attempt._store = attempt.run.store = store
        (attempt.prune if doomed else attempt.run.prune)()
        attempt.release()

        run = highcamp.open(real)
        assert run.pins == ({"paper": "step-00000004"} if kept else {})
        assert [entry.step for entry in run.checkpoints] == ([2, 4, 6] if kept else [2, 6])
        if not store.happened:
            return


@pytest.mark.timeout(120)
def test_a_reader_against_a_pruner(place):
    """Evaluation reads the best, over and over, while training replaces it 200 times: whole, or gone, never half."""
    store = LocalStore(place / "run")
    scene.prepare(store, scene.Diary())
    done, problems, loaded = threading.Event(), [], []

    def read():
        while not done.is_set():
            for _ in range(5):
                entry = highcamp.open(place / "run").best
                if entry is None:
                    problems.append("there was no best for a moment")
                    continue
                try:
                    arrays = entry.load("model")
                except CheckpointNotFound:
                    continue  # replaced since it was asked for: ask again
                except Exception as error:  # noqa: BLE001  (shown by the assertion)
                    problems.append(error)
                    continue
                loaded.append(entry.step)
                if not np.array_equal(arrays["kernel"], scene.state(entry.step)["kernel"]):
                    problems.append(f"{entry.name} has other weights")
                break
            else:
                problems.append("the best was gone five times in a row")

    reader = threading.Thread(target=read)
    reader.start()
    attempt = scene.begin(store, Keep(best=1, last=1))
    try:
        for step in range(3, 203):
            scene.save(attempt, step, 1 / step / 100)
            attempt.prune()
    finally:
        attempt.release()
        done.set()
        reader.join()

    assert problems == []
    assert len(set(loaded)) > 3


def test_a_checkpoint_removed_while_it_is_read_is_gone_not_damaged(place):
    """An evaluation that was overtaken should ask again; one that met damage should wake somebody."""
    store = LocalStore(place / "run")
    many(store)
    entry = highcamp.open(store).checkpoint("step:1")

    store.remove(commit.checkpoint_path(commit.withdraw(store, entry.name)))

    for ask in (entry.load, entry.state):
        with pytest.raises(CheckpointNotFound, match="step-00000001 was removed while it was read; ask the run again"):
            ask("model")
