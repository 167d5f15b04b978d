"""What Ctrl-C, a fork or a takeover in the middle of a save must not do: a checkpoint that is whole and wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Every, Keep
from highcamp.errors import RunLocked
from highcamp.run import owner
from highcamp.storage.memory import MemoryStore
from highcamp.training.staging import Staging

if TYPE_CHECKING:
    from pathlib import Path

SLOW = """
import os, signal, sys, threading, time
import numpy as np
import highcamp
from highcamp import Checkpointer, Every, Keep
from highcamp.storage.local import LocalStore

class SlowStore(LocalStore):
    def create(self, path, chunks):
        def slowly():
            for chunk in chunks:
                if path.endswith("model.safetensors") and "00000002" in path:
                    started.set(); time.sleep(0.4)
                yield chunk
        super().create(path, slowly())

started = threading.Event()
def interrupt():
    started.wait(); time.sleep(0.1); os.kill(os.getpid(), signal.SIGINT)

c = Checkpointer(SlowStore(sys.argv[1]), every=Every(steps=1), keep=Keep(last=9), verbose=0)
w = np.zeros(200_000)
def save(step):
    w[:] = step
    return c.save({"model": {"w": w}}, step=step)
save(1).wait()
threading.Thread(target=interrupt, daemon=True).start()
save(2)
try:
    save(3)
except KeyboardInterrupt:
    print("interrupted")
save(4)
c.close()
for entry in highcamp.open(sys.argv[1]).checkpoints:
    print(entry.step, entry.verify().state, set(entry.load("model")["w"].tolist()))
"""


def test_an_interrupt_while_waiting_for_a_save_tears_no_checkpoint(tmp_path: Path):
    """The snapshot being written would be filled with the next state: whole by its digests, and wrong."""
    done = subprocess.run(
        [sys.executable, "-c", SLOW, str(tmp_path / "run")], capture_output=True, text=True, check=False, timeout=60
    )

    lines = done.stdout.splitlines()
    assert lines[0] == "interrupted", done.stderr
    found = {line.split()[0]: line for line in lines[1:]}
    assert found["2"] == "2 whole {2.0}"
    assert all(line == f"{step} whole {{{step}.0}}" for step, line in found.items())


def test_an_interrupt_while_memory_is_prepared_leaves_no_zeros(monkeypatch: pytest.MonkeyPatch):
    """The thread that faults memory in would zero what the snapshot has just copied."""
    staging, go_on = Staging(1 << 16), threading.Event()
    touch = staging._touch
    monkeypatch.setattr(staging, "_touch", lambda: (go_on.wait(), touch()))
    staging.prepare()
    previous = signal.signal(signal.SIGALRM, _interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            staging.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    threading.Timer(0.1, go_on.set).start()

    staging.wait()  # must wait again, not take the running thread for one that has ended
    staging.view[:4] = b"text"

    assert bytes(staging.view[:4]) == b"text"


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_owner_that_was_taken_over_writes_and_removes_nothing(tmp_path: Path):
    """A process that stood still long enough to be taken for dead would prune its successor's checkpoints."""
    checkpointer = Checkpointer(tmp_path, every=Every(steps=1), keep=Keep(best=0, last=1), verbose=0)
    checkpointer.save({"w": np.ones(3)}, step=1).wait()
    record = owner._read(checkpointer.run.store)
    import msgspec

    owner._write(checkpointer.run.store, msgspec.structs.replace(record, pid=record.pid + 1, number=record.number + 1))

    with pytest.raises(RunLocked, match="nothing was written"):
        checkpointer.save({"w": np.zeros(3)}, step=2).wait()
    assert [entry.step for entry in highcamp.open(tmp_path).checkpoints] == [1]
    checkpointer.close()


def test_the_manifest_says_how_often_the_run_has_changed_hands(tmp_path: Path):
    """Whoever reads two histories of one run must be able to tell the later owner from the earlier."""
    for step in (1, 2):
        checkpointer = Checkpointer(tmp_path, every=Every(steps=1), verbose=0)
        checkpointer.restore(like={"w": np.ones(3)})
        checkpointer.save({"w": np.ones(3)}, step=step).wait()
        checkpointer._saver._attempt._ownership._stop.set()  # as if killed: the record stays
        owner._held.clear()

    assert [entry.manifest.owner for entry in highcamp.open(tmp_path).checkpoints] == [1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_writes_nothing_into_the_run(tmp_path: Path):
    """A data-loader worker has a copy of everything: its rows would take the place of the parent's."""
    with Checkpointer(tmp_path, monitor="val_loss", every=Every(steps=1), verbose=0) as checkpointer:
        checkpointer.save({"w": np.ones(3)}, step=1).wait()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                checkpointer.log(val_loss=9.0, step=1)
            except RunLocked:
                checkpointer.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        checkpointer.log(val_loss=0.1, step=1)

    run = highcamp.open(tmp_path)
    assert [row.metrics for row in run.history.rows] == [{"val_loss": 0.1}]
    assert run.history.attempts[0].ended == "closed"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("call", ["save", "log", "note", "sync"])
def test_a_child_forked_while_the_run_is_written_does_not_hang(tmp_path: Path, call):
    """The writer's lock is never given back in the child: a worker that asks for it would wait for ever."""
    with Checkpointer(tmp_path, monitor="val_loss", every=Every(steps=1), verbose=0) as checkpointer:
        checkpointer.save({"w": np.ones(3)}, step=1).wait()
        checkpointer._saver.raise_failed(wait=True)
        attempt = checkpointer._saver.attempt
        calls = {
            "save": lambda: checkpointer.save({"w": np.ones(3)}, step=2),
            "log": lambda: checkpointer.log(val_loss=9.0, step=1),
            "note": lambda: attempt.note(epochs_planned=3),
            "sync": attempt.sync,
        }
        with attempt._lock:
            child = os.fork()
            if child == 0:
                code = 1
                signal.alarm(30)  # a child that hangs is killed
                try:
                    calls[call]()
                except RunLocked:
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_waiting_goes_on_after_an_interrupt():
    """`close` would give the run back while its last save is still being written."""
    store, go_on = MemoryStore(), threading.Event()
    plain = store.create

    def create(path: str, chunks: object) -> None:
        go_on.wait(10)
        plain(path, chunks)

    checkpointer = Checkpointer(store, every=Every(steps=1), verbose=0)
    checkpointer.restore(like={"w": np.ones(3)})
    store.create = create
    pending = checkpointer.save({"w": np.ones(3)}, step=1)
    previous = signal.signal(signal.SIGALRM, _interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            checkpointer.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    held = owner._read(store) is not None
    go_on.set()

    assert pending.wait(10).step == 1
    assert held
    checkpointer._saver._attempt.release()
    time.sleep(0)
