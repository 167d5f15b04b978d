"""How a program ends: whatever is still being saved is saved, and what was not saved is said."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

import highcamp
from highcamp import RunLocked

# A store whose saves are done only when the main program has ended, well or not.
SCENE = """
import os, signal, sys, threading
import numpy as np
from highcamp import Checkpointer, StorageError
from highcamp.storage.local import LocalStore

class Late(LocalStore):
    error = None
    def create(self, path, chunks):
        if path.endswith("manifest.json"):
            threading.main_thread().join()
            if self.error is not None:
                raise self.error
        super().create(path, chunks)

store = Late(sys.argv[1])
state = {"model": {"w": np.ones(1000)}}
"""
ENDINGS = {
    "end": ("", 0),
    "exit 0": ("sys.exit(0)", 0),
    "exit 3": ("sys.exit(3)", 3),
    "error": ("1 / 0", 1),
    "ctrl-c": ("signal.raise_signal(signal.SIGINT)", -signal.SIGINT),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_exit_drains(start, where, ending):
    """A script that ends without `close`: every save under way is lost, some with exit code 0."""
    code, expected = ENDINGS[ending]

    found = start(f"{SCENE}\ncheckpointer = Checkpointer(store)\ncheckpointer.save(state, step=7)\n{code}", where)

    assert found.returncode == expected, found.stderr
    run = highcamp.open(where)
    assert [entry.step for entry in run.checkpoints] == [7]
    assert run.last.verify().ok
    assert "not saved" not in found.stderr
    assert not (where / "owner.json").exists()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_save_that_fails_at_exit_is_said(start, where, ending):
    """A program whose last save failed would end as if it had worked."""
    code, _ = ENDINGS[ending]
    failing = 'store.error = StorageError("the disk is full")'

    found = start(f"{SCENE}\n{failing}\nkept = Checkpointer(store)\nkept.save(state, step=7)\n{code}", where)

    assert found.returncode != 0
    assert "highcamp: not saved: the disk is full\n" in found.stderr
    assert highcamp.open(where).checkpoints == []


def test_a_forgotten_checkpointer_saves_all_the_same(start, where):
    """Nobody holds the Checkpointer any more when the save ends."""
    code = "def train():\n    Checkpointer(store).save(state, step=7)\ntrain()\nimport gc; gc.collect()"

    found = start(f"{SCENE}\n{code}", where)

    assert found.returncode == 0, found.stderr
    assert highcamp.open(where).last.step == 7


def test_a_save_that_fails_at_break_is_said_at_exit(start, where):
    """`break`, and no `close`: nothing is left that could raise the error."""
    code = """
checkpointer = Checkpointer(store, verbose=0)
checkpointer.track(**state)
for epoch in checkpointer.epochs(5):
    store.create = lambda path, chunks: (_ for _ in ()).throw(StorageError("the disk is full"))
    checkpointer.log(loss=1)
    break
"""

    found = start(f"{SCENE}\n{code}", where)

    assert found.returncode == 1
    assert found.stderr == "highcamp: not saved: the disk is full\n"


LOOP = """
import sys, time
import numpy as np
from highcamp import Checkpointer, Every

weights = {"w": np.zeros(3)}
def loop(checkpointer):
    checkpointer.track(model=weights)
    for epoch in checkpointer.epochs(5):
        for batch in checkpointer.batches(range(4)):
            weights["w"] += 1
            if (epoch, batch) == (2, 1) and "stop" in sys.argv:
                print("ready", flush=True)
                while True:  # not signal.pause(): a signal that came just before it would wake nobody
                    time.sleep(0.01)
        checkpointer.log(val_loss=1 / (1 + epoch))

if "with" in sys.argv:
    with Checkpointer(sys.argv[1], monitor="val_loss") as checkpointer:
        loop(checkpointer)
else:
    checkpointer = Checkpointer(sys.argv[1], monitor="val_loss")
    loop(checkpointer)
print(weights["w"][0])
"""


def _signal(where, number, *words):
    """Start LOOP, send it a signal in the middle of its third epoch, and wait for its end."""
    environment = {**os.environ, "PYTHONPATH": os.fspath(highcamp.__path__[0] + "/..")}
    command = [sys.executable, "-c", LOOP, str(where), "stop", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "ready\n"
        while (
            process.poll() is None
        ):  # a step that does not end: the first Ctrl-C waits for its end, a later one does not
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("words", [("with",), ()], ids=["with", "without"])
def test_ctrl_c_twice_keeps_what_was_saved(start, where, words):
    """Ctrl-C, again and again, and the save of the last whole epoch is gone; or half an epoch passes for a whole one."""
    code, errors = _signal(where, signal.SIGINT, *words)

    assert code == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    run = highcamp.open(where)
    assert [(entry.epoch, entry.batch) for entry in run.checkpoints] == [(1, 0), (2, 0)]
    assert all(found.ok for found in run.verify())
    assert run.history.attempts[-1].ended == ("interrupted" if words else None)

    again = start(LOOP, where, "with")
    assert again.stdout == "20.0\n"
    assert "Resumed from step-00000008 (epoch 2, attempt 2); 3 epochs to go" in again.stderr


def test_a_dead_owner_is_taken_over(start, where):
    """A run whose process was killed would be locked for ever."""
    code, _ = _signal(where, signal.SIGKILL, "with")
    assert code == -signal.SIGKILL
    assert (where / "owner.json").exists()

    again = start(LOOP, where, "with")

    assert again.returncode == 0, again.stderr
    assert again.stdout == "20.0\n"
    assert not (where / "owner.json").exists()


def test_a_forked_child_takes_nothing_with_it(start, where):
    """A child that ends, as those of a data loader do, would give the run of its parent away to the next process."""
    code = """
import os, sys
import numpy as np
from highcamp import Checkpointer

checkpointer = Checkpointer(sys.argv[1], verbose=0)
checkpointer.track(model={"w": np.zeros(3)})
for epoch in checkpointer.epochs(2):
    child = os.fork()
    if child == 0:
        if epoch:
            checkpointer.close = None
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.path.exists(sys.argv[1] + "/owner.json"), "given away"
checkpointer.close()
"""

    found = start(code, where)

    assert found.returncode == 0, found.stderr
    assert [entry.epoch for entry in highcamp.open(where).checkpoints] == [1, 2]


def test_the_owner_is_named_to_a_second_process(train, start, where):
    """A script started twice by mistake must say by whom the run is held."""
    code = """
import sys
import numpy as np
from highcamp import Checkpointer, RunLocked
checkpointer = Checkpointer(sys.argv[1], verbose=0)
checkpointer.track(model={"w": np.zeros(3)})
try:
    checkpointer.start()
except RunLocked as error:
    print(error)
"""
    said = []
    train([0.5], each=lambda *_: said.append(start(code, where).stdout))

    assert f"{where} is being written by process {os.getpid()} on " in said[0]
    assert RunLocked.exit_code == 11
