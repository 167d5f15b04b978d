"""The owner: at most one live process writes to a run, and a dead one is taken over."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from highcamp.errors import RunLocked, StorageError
from highcamp.run import owner
from highcamp.storage.memory import MemoryStore
from highcamp.testing import FaultyStore

NOW = datetime(2026, 1, 31, 8, tzinfo=UTC)


@pytest.fixture
def store():
    """Where the run is."""
    return MemoryStore()


@pytest.fixture
def take(store):
    """Take the run over, without waiting; everything taken is given back in the end."""
    taken = []

    def now(watch=lambda _: None, place=store):
        taken.append(owner.take(place, None, NOW, watch))
        return taken[-1]

    yield now
    for each in taken:
        each.release()


def _record(store, **changes):
    """The record of some other process."""
    here = {
        "host": socket.gethostname(), "boot": owner._boot(), "namespace": owner._namespace(), "pid": os.getpid(),
        "started": owner._started(os.getpid()), "since": "2026-01-01T00:00:00.000Z",
    }  # fmt: skip
    record = owner.Owner(**{**here, **changes})
    owner._write(store, record)
    return record


def test_it_says_who_holds_the_run(store, take):
    """Which process on which machine, and since when, is what somebody needs to stop it."""
    take()

    found = owner.current(store)

    assert (found.host, found.pid, found.since) == (socket.gethostname(), os.getpid(), "2026-01-31T08:00:00.000Z")
    with pytest.raises(RunLocked) as error:
        owner.take(store, None, NOW)
    assert str(error.value) == (
        f"memory://unnamed is being written by process {os.getpid()} on {socket.gethostname()}, "
        "since 2026-01-31T08:00:00.000Z; wait for it, stop it, or use another directory"
    )


def test_given_back_it_is_free(store, take):
    """The next process would wait for nothing."""
    first = take()
    first.release()
    first.release()

    assert owner.current(store) is None
    assert store.list("") == []
    assert take().number == 1


def test_a_dead_process_is_taken_over(store, take):
    """A run whose process was killed would be locked for ever."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    _record(store, pid=process.pid, started="12345", number=4)

    assert owner.current(store) is None
    assert take(watch=pytest.fail).number == 5


def test_a_live_process_is_not(store, take):
    """The parent of this test is alive; nobody waits to find that out."""
    parent = os.getppid()
    _record(store, pid=parent, started=owner._started(parent))

    assert owner.current(store).pid == parent
    with pytest.raises(RunLocked, match=f"process {parent} on"):
        take(watch=pytest.fail)


def test_a_number_used_again_is_no_owner(store, take):
    """Process numbers come round: another program with the number of the dead one would hold the run."""
    parent = os.getppid()
    _record(store, pid=parent, started="1")

    assert owner.current(store) is None
    assert take(watch=pytest.fail).number == 2


def test_a_zombie_is_dead(store, take):
    """Killed, but its parent has not looked: it will never write again."""
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as process:
        started = owner._started(process.pid)
        process.stdout.read()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        _record(store, pid=process.pid, started=started)
        assert take(watch=pytest.fail).number == 2


@pytest.mark.parametrize("elsewhere", [{"host": "other"}, {"boot": "other"}, {"namespace": "pid:[1]"}])
def test_a_process_elsewhere_is_watched(store, take, elsewhere):
    """It cannot be looked up: who stands still is dead, who goes on is not."""
    record = _record(store, **elsewhere)
    waited = []

    def beats(seconds):
        waited.append(seconds)
        owner._write(store, msgspec.structs.replace(record, beat=1))

    assert owner.current(store) is not None
    with pytest.raises(RunLocked):
        take(watch=beats)
    assert waited == [owner.WATCH_SECONDS]
    assert take(watch=lambda _: None).number == 2


def test_another_that_takes_it_meanwhile_is_not_overtaken(store, take):
    """Two that watch the same dead owner must not both take over."""
    _record(store, host="other")

    with pytest.raises(RunLocked):
        take(watch=lambda _: _record(store, host="third", number=2))


def test_gone_while_watched_it_is_free(store, take):
    """It ended well while we waited."""
    _record(store, host="other")

    assert take(watch=lambda _: store.remove(owner.OWNER)).number == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 3}', b"\xff", b"[" * 50_000, b" " * (1 << 17)])
def test_a_torn_record_holds_nothing(store, take, content):
    """A crash while it was written would lock the run for ever."""
    store.replace(owner.OWNER, content)

    assert owner.current(store) is None
    take(watch=pytest.fail)


def test_a_successor_keeps_the_run(store, take):
    """A process that stood still, was taken over and goes on must not remove the record of its successor."""
    first = take()
    successor = _record(store, number=2, since="2026-02-01T00:00:00.000Z")

    first.release()

    assert owner._read(store) == successor


def test_a_record_that_cannot_be_removed_is_no_error(store):
    """The disk fails at the very end: training is done, and the record names a process that will be dead."""
    failing = FaultyStore(store, fail_at=2)
    held = owner.take(failing, None, NOW)

    held.release()

    assert store.list("") == [owner.OWNER]
    owner.take(store, None, NOW).release()  # by this process again: it knows that it gave the run back


def test_a_run_that_cannot_be_taken_is_an_error(store):
    """Without a record, a second process would not see the first."""
    with pytest.raises(StorageError, match="injected"):
        owner.take(FaultyStore(store, fail_at=1), None, NOW)


def test_the_beat_goes_on(store, monkeypatch):
    """Seen from elsewhere, a process that does not beat is dead."""
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.001)
    beats = set()
    held = owner.take(store, None, NOW)
    while len(beats) < 3:
        beats.add(owner._read(store).beat)
    held.release()

    assert held._owner.beat >= max(beats)
    assert owner._read(store) is None


def test_two_that_start_together_decide_one_after_the_other(tmp_path):
    """Both look, both see nobody, both write: two owners."""
    import filelock

    with filelock.FileLock(tmp_path / ".owner.lock"):
        assert not (tmp_path / owner.OWNER).exists()
    code = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from highcamp.errors import RunLocked
from highcamp.run import owner
from highcamp.storage.local import LocalStore
place = Path(sys.argv[1])
try:
    held = owner.take(LocalStore(place), place, datetime.now(UTC))
    print("taken", flush=True)
except RunLocked:
    print("locked", flush=True)
sys.stdin.read()
"""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(owner.__file__).parents[2])},
        )
        for _ in range(4)
    ]  # fmt: skip
    said = [process.stdout.readline().strip() for process in started]
    for process in started:
        process.communicate("")

    assert sorted(said) == ["locked", "locked", "locked", "taken"]
