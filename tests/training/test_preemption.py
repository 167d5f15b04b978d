"""Preemption: a signal or a deadline sets a flag, the next step boundary saves once, and the process ends as is usual."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Every
from highcamp.errors import InvalidArgument, StorageError
from highcamp.training import preemption as room
from highcamp.training.deadline import DEADLINE, FAR_SECONDS, SLURM_END, deadline_of
from highcamp.training.preemption import LEAD_SECONDS, SIGNALS, Preemption

ROOT = Path(highcamp.__file__).parents[1]


@pytest.fixture
def heard():
    """A Preemption that listens; afterwards every handler is as it was."""
    room._listeners = ()  # a test before this one may have left a training open
    room._give_back()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    made = Preemption()
    yield made
    made.remove()
    for number, handler in before.items():
        signal.signal(number, handler)


def _started(code, *words, **environment):
    """A program that says what it does line by line, and goes on when it is sent a line."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **environment},
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the room alone

# A loop of five steps; after each it says so and waits for a line. BEFORE is what the user has done first.
LOOP = """
import os, signal, sys
from highcamp.training.preemption import Preemption
BEFORE
preemption = Preemption()
preemption.install()
for step in range(5):
    print("step", step, flush=True)
    sys.stdin.readline()
    if preemption.is_asked:
        print("saved", step, preemption.reason, preemption.exit_code, flush=True)
        preemption.stop()
print("done", flush=True)
"""


def _stopped_in_step(step, *numbers, before="", **environment):
    """Exit code, and what the loop said from the signals on, all of which arrive within one step."""
    with _started(LOOP.replace("BEFORE", before), **environment) as process:
        for _ in range(step):
            process.stdout.readline()
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.stdout.readline() == f"step {step}\n"
        for number in numbers:
            process.send_signal(number)
        out, errors = process.communicate("\n" * 5, timeout=60)
    return process.returncode, out, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signal_sets_a_flag(number):
    """Saving inside the handler hangs on a lock that the interrupted code holds; unhandled, the step is lost."""
    code, out, errors = _stopped_in_step(3, number)

    assert out == f"saved 3 {number.name} {128 + number}\n"
    assert code == 128 + number
    assert errors == ""


@pytest.mark.parametrize("before", ["", "signal.signal(signal.SIGINT, signal.SIG_DFL)"])
def test_ctrl_c_ends_as_ctrl_c_does_but_saved(before):
    """A shell goes on with its loop over seeds if the script that it started ends in any other way."""
    code, out, errors = _stopped_in_step(2, signal.SIGINT, before=before)

    assert out == "saved 2 Ctrl-C 130\n"
    assert code == -signal.SIGINT  # which a shell counts as 130
    assert errors.endswith("KeyboardInterrupt\n")


def test_the_second_signal_is_not_a_second_stop():
    """Clusters send SIGTERM again and again; schedulers send SIGUSR1 first and SIGTERM later."""
    code, out, _ = _stopped_in_step(1, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)

    assert out.count("saved") == 1
    assert code in (128 + signal.SIGUSR1, 128 + signal.SIGTERM)  # two at once come in the order of their numbers


def test_the_first_reason_stays(heard):
    """The exit code tells a job script what to do next: a SIGTERM that follows SIGUSR1 would turn a requeue into an end."""
    heard.install()

    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGTERM)

    assert (heard.reason, heard.exit_code) == ("SIGUSR1", 128 + signal.SIGUSR1)


def test_one_ctrl_c_that_comes_twice_is_one(heard):
    """The terminal and a program that passes signals on both deliver it, a moment apart."""
    heard.install()

    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)

    assert heard.reason == "Ctrl-C"
    with pytest.raises(KeyboardInterrupt):
        heard.stop()


def test_only_ctrl_c_is_impatient(heard, monkeypatch):
    """A second SIGTERM is no wish to lose the step, even where a handler of the user ends the program."""

    def leave(*_):
        raise SystemExit(5)

    signal.signal(signal.SIGTERM, leave)
    heard.install()
    monkeypatch.setattr(room, "SAME_PRESS_SECONDS", -1.0)

    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)

    assert heard.is_asked


def test_ctrl_c_twice_stops_at_once():
    """A person who does not want to wait for the end of a long step must not have to find the process number."""
    with _started(LOOP.replace("BEFORE", "")) as process:
        assert process.stdout.readline() == "step 0\n"
        while process.poll() is None:  # it waits for a line that does not come
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        out, errors = process.communicate()

    assert process.returncode == -signal.SIGINT
    assert out == ""
    assert errors.endswith("KeyboardInterrupt\n")


def test_a_handler_of_the_user_is_called_too():
    """A logger or a framework that listens to the same signal would be deaf."""
    before = "signal.signal(signal.SIGTERM, lambda number, frame: print('user', number, frame is not None))"

    code, out, _ = _stopped_in_step(1, signal.SIGTERM, before=before)

    assert out == "user 15 True\nsaved 1 SIGTERM 143\n"
    assert code == 143


def test_a_handler_that_ends_the_program_does_so_after_the_save():
    """`sys.exit` in a handler, as many scripts have it, would tear the step apart and lose it."""
    before = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))"

    code, out, _ = _stopped_in_step(1, signal.SIGTERM, before=before)

    assert out == "saved 1 SIGTERM 143\n"
    assert code == 5


def test_an_ignored_signal_stays_ignored():
    """A job in the background of a script has Ctrl-C ignored on purpose."""
    before = "signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)"

    code, out, _ = _stopped_in_step(0, signal.SIGINT, signal.SIGTERM, before=before)

    assert out.splitlines()[-1] == "done"
    assert code == 0


def test_a_program_that_has_forgotten_its_training_ends_as_ever():
    """A notebook or a server would have to be killed by force."""
    code = (
        LOOP.replace("BEFORE", "").split("for step")[0]
        + "del preemption; print('ready', flush=True); sys.stdin.readline()"
    )
    with _started(code) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)

        assert process.wait(60) == -signal.SIGTERM


def test_a_forked_child_is_not_the_trainer():
    """A data-loader worker would outlive its SIGTERM, or save what it has a copy of."""
    code = """
import os, signal, sys, time
from highcamp.training.preemption import Preemption
preemption = Preemption()
preemption.install()
ours, theirs = os.pipe()
child = os.fork()
if child == 0:
    os.write(theirs, b"up" if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else b"no")
    time.sleep(60)
    os._exit(0)
print(os.read(ours, 2).decode())
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), preemption.is_asked)
signal.raise_signal(signal.SIGTERM)
print(preemption.is_asked)
"""

    out, errors = _started(code).communicate(timeout=60)

    assert out == f"up\n{-signal.SIGTERM} False\nTrue\n", errors


def test_the_handlers_that_were_there_come_back(heard):
    """After training, Ctrl-C and SIGTERM would still wait for a step that never ends."""

    def own(*_):
        raise AssertionError("not called")

    signal.signal(signal.SIGUSR1, own)
    before = [signal.getsignal(number) for number in SIGNALS]

    heard.install()
    heard.install()
    during = [signal.getsignal(number) for number in SIGNALS]
    heard.remove()

    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert not set(map(id, during)) & set(map(id, before))


def test_the_first_to_leave_does_not_cut_off_the_others(heard):
    """Two trainings in one process, and the second would not be saved."""
    other = Preemption()
    heard.install()
    other.install()

    heard.remove()
    signal.raise_signal(signal.SIGTERM)

    assert (heard.is_asked, other.is_asked) == (False, True)
    other.remove()


def test_a_handler_installed_later_is_left_in_its_place(heard):
    """Lightning puts its own in front of ours, with ours behind it; taking ours away must not take its."""
    called = []
    signal.signal(signal.SIGTERM, lambda *_: called.append("first"))
    heard.install()
    ours = signal.getsignal(signal.SIGTERM)

    def later(number, frame):
        called.append("later")
        ours(number, frame)

    signal.signal(signal.SIGTERM, later)
    signal.raise_signal(signal.SIGTERM)
    was_asked = heard.is_asked
    heard.remove()
    still_there = signal.getsignal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)

    assert was_asked
    assert still_there is later
    assert not ours.is_live
    assert called == ["later", "first"] * 2


def test_a_handler_of_ours_that_was_put_back_hears_nothing(heard):
    """Lightning ends by putting back what it found, which may be ours of a training that is over."""
    heard.install()
    ours = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: None)
    heard.remove()
    signal.signal(signal.SIGTERM, ours)
    again = Preemption()

    again.install()
    signal.raise_signal(signal.SIGTERM)
    again.remove()

    assert again.is_asked
    assert not heard.is_asked


def test_listening_again_behind_another_handler_hears_once(heard):
    """Where another handler was put in front of ours, one Ctrl-C would be heard by two of ours, one behind the other."""
    called = []
    signal.signal(signal.SIGINT, lambda *_: called.append("first"))
    heard.install()
    ours = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda number, frame: (called.append("later"), ours(number, frame)))

    heard.install()
    signal.raise_signal(signal.SIGINT)

    assert heard.is_asked
    assert called == ["later", "first"]
    assert [handler.is_live for handler in (ours, signal.getsignal(signal.SIGINT))] == [False, True]


def test_a_handler_outside_python_is_left_alone(heard):
    """`faulthandler.register(SIGUSR1)` shows where a training hangs; it would end that training instead."""
    with Path(os.devnull).open("w") as nowhere:
        faulthandler.register(signal.SIGUSR1, file=nowhere)
        try:
            heard.install()
            signal.raise_signal(signal.SIGUSR1)
        finally:
            faulthandler.unregister(signal.SIGUSR1)

    assert not heard.is_asked
    assert heard.unheard == {"SIGUSR1": "a handler outside Python has it"}


def test_a_signal_may_arrive_while_anything_is_locked(heard):
    """It arrives within any instruction: a lock in the handler hangs for ever, now and then."""
    heard.install()

    with room._lock:
        signal.raise_signal(signal.SIGTERM)

    assert heard.reason == "SIGTERM"


def test_another_thread_can_only_ask_by_hand(heard):
    """Training in a thread of a server must not fail because it cannot listen."""
    thread = threading.Thread(target=heard.install)
    thread.start()
    thread.join()

    heard.ask("the server is shutting down")

    assert sorted(heard.unheard) == sorted(number.name for number in SIGNALS)
    assert (heard.is_asked, heard.reason, heard.exit_code) == (True, "the server is shutting down", 75)


def test_what_is_no_longer_used_is_forgotten(heard):
    """One entry for each training of a long session would stay for ever."""
    for _ in range(5):
        Preemption().install()
    gc.collect()

    heard.install()

    assert len(room._listeners) == 1


def test_a_deadline_asks_while_there_is_time_to_save(heard, monkeypatch):
    """At the deadline itself the process is killed."""
    monkeypatch.setenv(DEADLINE, str(time.time() + LEAD_SECONDS + 1000))
    heard.install()
    before = heard.is_asked

    heard.expect(save_seconds=30)
    still_not = heard.is_asked
    heard.expect(save_seconds=600)
    heard.expect(save_seconds=1)  # the slowest counts

    assert (before, still_not, heard.is_asked) == (False, False, True)
    assert heard.reason in ("deadline in 1060 s", "deadline in 1059 s")
    assert heard.exit_code == 75
    with pytest.raises(SystemExit) as stopped:
        heard.stop()
    assert stopped.value.code == 75


def test_the_end_of_a_slurm_job_is_a_deadline():
    """Whoever forgets `--signal` would lose what was done since the last save."""
    now = time.time()

    assert deadline_of({SLURM_END: f"{now + 100:.0f}"}) == round(now + 100)
    assert deadline_of({SLURM_END: "4294967295"}) is None  # a job without a time limit
    assert deadline_of({SLURM_END: "Unknown"}) is None
    assert deadline_of({SLURM_END: f"{now + 100:.0f}", DEADLINE: ""}) is None  # taken back by hand
    assert deadline_of({SLURM_END: f"{now + 100:.0f}", DEADLINE: f"{now + 50}"}) == pytest.approx(now + 50)
    assert deadline_of({}) is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("2026-01-31T08:00:00Z", 1769846400.0),
        ("2026-01-31 09:00:00+01:00", 1769846400.0),
        ("1769846400.5", 1769846400.5),
    ],
)
def test_a_deadline_is_seconds_or_an_iso_time(given, expected):
    """`date +%s` and `date -Is` are what people have at hand."""
    assert deadline_of({DEADLINE: given}) == expected


@pytest.mark.parametrize("given", ["3600", "tomorrow", "nan", "-5", "2026-13-01", "8h"])
def test_a_deadline_that_is_no_time_is_refused(given):
    """Taken for the year 1970, it would end training after its first step; ignored, it would be missed."""
    with pytest.raises(InvalidArgument, match="HIGHCAMP_DEADLINE is .*, not a time; give seconds since the epoch"):
        deadline_of({DEADLINE: given})


def test_a_deadline_years_away_is_none():
    """Slurm and people write "never" as the largest number."""
    assert deadline_of({DEADLINE: str(time.time() + 2 * FAR_SECONDS)}) is None


# ---------------------------------------------------------------------------------------------- a training, interrupted

# Four epochs of six batches, with momentum, shuffling, dropout and an evaluation, all of which draw random numbers; saved
# each epoch and every four steps. AT says where it announces itself and waits for a line, in its second epoch:
#   step 2   in the third step          save     within the save after the tenth step, in the loop's own thread
#   step 5   in the last step           writing  within the eleventh step, while the tenth is being written
#   batches  between the last step and what is logged of the training        evaluation  within the evaluation
TRAIN = """
import json, random, signal, sys, threading, time
import numpy as np
import highcamp
from highcamp import Checkpointer, Every, Keep
from highcamp.storage.local import LocalStore

place, at = sys.argv[1], sys.argv[2]
begun, writing = [], threading.Event()

def pause(where):
    if where == at and not begun:
        begun.append(where)
        print("ready", flush=True)
        sys.stdin.readline()

class Slow(LocalStore):
    def create(self, path, chunks):
        if at == "writing" and "step-00000010" in path and path.endswith("manifest.json"):
            writing.set()
            while not checkpointer.preemption.is_asked:
                time.sleep(0.001)
        super().create(path, chunks)

class Momentum:
    def __init__(self):
        self.values = {"w": np.zeros(5), "b": np.zeros(())}
    def state_dict(self):
        if checkpointer.step == 10:
            pause("save")
        return self.values
    def load_state_dict(self, saved):
        self.values = {name: np.array(value) for name, value in saved.items()}

class Batches:
    def __iter__(self):
        order = np.random.permutation(21)
        return (order[at : at + 4] for at in range(0, 21, 4))
    def __len__(self):
        return 6

np.random.seed(1)
random.seed(1)
data = np.random.default_rng(1).standard_normal((21, 5))
target = data @ np.arange(5.0) + 1
model, momentum, noise = {"w": np.zeros(5), "b": np.zeros(())}, Momentum(), np.random.default_rng(2)
with Checkpointer(
    Slow(place), monitor="val_loss", every=Every(epochs=1, steps=4), keep=Keep(best=1, last=99)
) as checkpointer:
    checkpointer.track(model=model, momentum=momentum, noise=noise)
    for epoch in checkpointer.epochs(4):
        for batch, index in enumerate(checkpointer.batches(Batches())):
            if epoch == 1:
                pause(f"step {batch}")
            if at == "deadline" and (epoch, batch) == (1, 2):
                checkpointer.preemption.expect(save_seconds=1e9)
            if at == "writing" and (epoch, batch) == (1, 4):
                writing.wait()
                pause("writing")
            mask = np.random.random(5) < 0.8
            x = data[index] * mask + 0.01 * noise.standard_normal((len(index), 5))
            error = x @ model["w"] + model["b"] - target[index]
            for name, gradient in (("w", x.T @ error), ("b", error.sum())):
                momentum.values[name] *= 0.9
                momentum.values[name] += gradient / len(index)
                model[name] -= 0.02 * momentum.values[name]
            checkpointer.log(loss=float(error @ error))
        if epoch == 1:
            pause("batches")
        checkpointer.log(train_loss=float(error @ error))
        losses = []
        for _ in range(3):
            mask = np.random.random(5) < 0.8
            losses.append(np.mean((data * mask @ model["w"] + model["b"] - target) ** 2))
            if epoch == 1 and len(losses) == 2:
                pause("evaluation")
        checkpointer.log(val_loss=np.mean(losses))
rows = [(row.step, row.epoch, row.batch, row.metrics) for row in highcamp.open(place).history.rows]
drawn = (random.random(), np.random.random(), noise.random())
state = [model["w"].tolist(), model["b"].tolist(), momentum.values["w"].tolist(), drawn]
free = [signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler) for number in (2, 10, 12, 15)]
print(json.dumps({"state": state, "rows": rows, "free": free}))
"""
UNTOUCHED = [4, 6, 10, 12, 16, 18, 22, 24]  # the steps that are saved when nothing happens


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the training ends with if nothing interrupts it."""
    return _trained(tmp_path_factory.mktemp("whole") / "run")


def _trained(place):
    """Train to the end, and give what it has ended with."""
    with _started(TRAIN, place, "never") as process:
        out, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return out


def _stopped(place, at, *numbers, **environment):
    """Train until it waits, send it the signals, and let it go on; its exit code and what it said."""
    with _started(TRAIN, place, at, **environment) as process:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        for number in numbers:
            process.send_signal(number)
        out, errors = process.communicate("\n", timeout=100)
    assert out == ""
    return process.returncode, errors


def _saved(place):
    run = highcamp.open(place)
    assert all(found.ok for found in run.verify())
    assert run.history.attempts[-1].ended == "preempted"
    assert not (place / "owner.json").exists()
    return [entry.step for entry in run.checkpoints]


def test_a_training_leaves_the_signals_as_they_were(whole):
    """What comes after training could be ended by force alone."""
    assert '"free": [true, true, true, true]' in whole


@pytest.mark.parametrize(
    ("at", "saved"),
    [
        ("step 2", [4, 6, 9]),
        ("step 5", [4, 6, 10, 12]),
        ("save", [4, 6, 10]),
        ("writing", [4, 6, 10, 11]),
        ("batches", [4, 6, 10, 12]),
        ("evaluation", [4, 6, 10, 12]),
    ],
)
def test_stop_signals(tmp_path, whole, at, saved):
    """A step lost, saved twice or saved torn: a preempted run would end elsewhere than one that nobody disturbed."""
    code, errors = _stopped(tmp_path / "run", at, signal.SIGTERM)

    assert code == 143
    assert _saved(tmp_path / "run") == saved
    assert errors.splitlines()[-1] == f"SIGTERM: saved step-{saved[-1]:08d}, stopping with exit code 143"
    assert _trained(tmp_path / "run") == whole


@pytest.mark.parametrize(
    ("numbers", "code", "word"),
    [
        ([signal.SIGUSR1], 128 + signal.SIGUSR1, "SIGUSR1"),
        ([signal.SIGUSR2], 128 + signal.SIGUSR2, "SIGUSR2"),
        ([signal.SIGINT], -signal.SIGINT, "Ctrl-C"),
        ([signal.SIGTERM, signal.SIGTERM], 143, "SIGTERM"),
    ],
)
def test_each_signal_saves_once(tmp_path, whole, numbers, code, word):
    """Each cluster has its own way to say it; a person has Ctrl-C."""
    found, errors = _stopped(tmp_path / "run", "step 2", *numbers)

    assert found == code
    assert f"{word}: saved step-00000009, stopping with exit code {code % 128 + 128 if code > 0 else 130}" in errors
    assert _saved(tmp_path / "run") == [4, 6, 9]
    assert _trained(tmp_path / "run") == whole


def test_a_second_signal_in_the_last_save_harms_nothing(tmp_path, whole):
    """Clusters lose patience: the save that the first signal has asked for must survive the second."""
    place = tmp_path / "run"
    with _started(TRAIN, place, "writing") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            process.send_signal(signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.001)

    run = highcamp.open(place)
    assert process.returncode in (143, -signal.SIGUSR1)  # once everything is saved, a signal means what it always means
    assert all(found.ok for found in run.verify())
    assert [entry.step for entry in run.checkpoints] == [4, 6, 10, 11]
    assert _trained(place) == whole


def test_a_deadline_saves_and_ends_with_75(tmp_path, whole):
    """The end of a job is known; training that does not look at the clock loses what it has done since its last save."""
    place = tmp_path / "run"
    with _started(TRAIN, place, "deadline", HIGHCAMP_DEADLINE=str(time.time() + 1e5)) as process:
        _, errors = process.communicate(timeout=100)

    assert process.returncode == 75
    assert "deadline in " in errors.splitlines()[-1]
    assert _saved(place) == [4, 6, 9]
    assert _trained(place) == whole


def test_a_deadline_that_is_no_time_is_said_before_training(tmp_path):
    """After a night of training it is too late to mend a typing mistake."""
    with _started(TRAIN, tmp_path / "run", "never", HIGHCAMP_DEADLINE="8h") as process:
        _, errors = process.communicate(timeout=100)

    assert process.returncode == 1
    assert "HIGHCAMP_DEADLINE is '8h', not a time" in errors
    assert highcamp.open(tmp_path / "run").checkpoints == []


def test_asked_before_the_first_step_nothing_is_written(tmp_path):
    """A checkpoint of step 0 would hide in which state a run was left, and one of what was just restored says nothing."""

    def script():
        with Checkpointer(tmp_path / "run", verbose=0) as checkpointer:
            weights = {"w": np.zeros(3)}
            checkpointer.track(model=weights)
            if (tmp_path / "run").exists():
                checkpointer.preemption.ask()
            for epoch in checkpointer.epochs(3):
                if epoch == 1:
                    checkpointer.preemption.ask()
                weights["w"] += 1

    with pytest.raises(SystemExit) as stopped:
        script()
    first = [entry.step for entry in highcamp.open(tmp_path / "run").checkpoints]
    with pytest.raises(SystemExit):
        script()

    run = highcamp.open(tmp_path / "run")
    assert stopped.value.code == 75
    assert [entry.step for entry in run.checkpoints] == first == [1, 2]
    assert [attempt.ended for attempt in run.history.attempts] == ["preempted", "preempted"]


def test_before_training_a_signal_means_what_it_always_means(tmp_path):
    """Reading the data may take long, and nothing is lost; the run must not even begin to exist."""
    code = """
import sys
import numpy as np
from highcamp import Checkpointer
checkpointer = Checkpointer(sys.argv[1])
checkpointer.track(model={"w": np.zeros(3)})
print("ready", flush=True)
sys.stdin.readline()
"""
    with _started(code, tmp_path / "run") as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)

    assert process.returncode == -signal.SIGTERM
    assert not (tmp_path / "run").exists()


def test_a_signal_as_training_ends_is_not_forgotten(tmp_path):
    """What follows training may take an hour, and a cluster does not wait; the run is complete all the same."""

    def script():
        with Checkpointer(tmp_path / "run", verbose=0) as checkpointer:
            checkpointer.track(model={"w": np.zeros(3)})
            finish = checkpointer._saver.raise_failed
            for _ in checkpointer.epochs(1):
                checkpointer._saver.raise_failed = lambda **how: (
                    checkpointer.preemption.ask(exit_code=143),
                    finish(**how),
                )
            raise AssertionError("went on")

    with pytest.raises(SystemExit) as stopped:
        script()

    run = highcamp.open(tmp_path / "run")
    assert stopped.value.code == 143
    assert run.last.epoch == 1


def test_state_that_is_passed_is_saved_too(tmp_path):
    """In JAX the state is in nobody's hands but the loop's: `save_if_due` has it."""
    place = tmp_path / "run"

    def script(*, ask_at):
        with Checkpointer(place, every=Every(steps=1000), verbose=0) as checkpointer:
            state = checkpointer.restore(like={"w": np.zeros(3), "step": 0}) or {"w": np.zeros(3), "step": 0}
            while state["step"] < 10:
                state = {"w": state["w"] + 1, "step": state["step"] + 1}
                if state["step"] == ask_at:
                    checkpointer.preemption.ask("SIGTERM", 143)
                checkpointer.save_if_due(state, step=state["step"], metrics={"loss": 1 / state["step"]})
            return state

    with pytest.raises(SystemExit) as stopped:
        script(ask_at=7)
    saved = [entry.step for entry in highcamp.open(place).checkpoints]

    assert stopped.value.code == 143
    assert saved == [7]
    assert highcamp.open(place).history.attempts[-1].ended == "preempted"
    assert script(ask_at=None)["w"].tolist() == [10.0] * 3


def test_a_save_that_fails_is_not_called_saved(tmp_path):
    """Exit code 143 says to a cluster that all is well."""
    with (
        pytest.raises(StorageError, match="the disk is full"),
        Checkpointer(tmp_path / "run", verbose=0) as checkpointer,
    ):
        checkpointer.track(model={"w": np.zeros(3)})
        for _ in checkpointer.epochs(3):
            checkpointer.preemption.ask()
            checkpointer.run.store.create = _full


def _full(*_):
    raise StorageError("the disk is full")


def test_after_an_error_in_a_function_ctrl_c_is_not_swallowed(tmp_path):
    """In a notebook a training that has failed is still open; nobody would look at the flag again."""

    def script(weights):
        checkpointer.track(model=weights)
        for _ in checkpointer.epochs(3):
            raise ZeroDivisionError

    checkpointer = Checkpointer(tmp_path / "run", verbose=0)
    with pytest.raises(ZeroDivisionError) as kept:  # its frames, and so the loop, stay alive
        script({"w": np.zeros(3)})

    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)

    assert not checkpointer.preemption.is_asked
    del kept
    checkpointer.close()


def test_within_the_loop_ctrl_c_waits_for_the_end_of_the_step(tmp_path, capsys):
    """As above, where it does train: in a function that it calls, below a generator that counts, it must be heard."""

    def step(weights):
        signal.raise_signal(signal.SIGINT)
        weights["w"] += 1

    def counted(epochs):
        yield from epochs

    def script(weights):
        with Checkpointer(tmp_path / "run") as checkpointer:
            checkpointer.track(model=weights)
            for _ in counted(checkpointer.epochs(3)):
                for _ in checkpointer.batches(range(5)):
                    step(weights)

    with pytest.raises(KeyboardInterrupt):
        script({"w": np.zeros(3)})

    assert [entry.step for entry in highcamp.open(tmp_path / "run").checkpoints] == [1]
    assert capsys.readouterr().err.splitlines() == ["Ctrl-C: saved step-00000001, stopping with exit code 130"]


WORKERS = """
import os, sys, threading, time
import torch
from highcamp import Checkpointer, Every, Keep

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, at):
        if at == 22 and sys.argv[2] == "stop":
            print("ready", flush=True)
            time.sleep(1000)
        return torch.tensor([float(at)])

torch.manual_seed(0)
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), 1e-3)
class Loader:
    def __iter__(self):
        batches = iter(torch.utils.data.DataLoader(Data(), batch_size=4, num_workers=2))
        for place in range(len(self)):
            print("fetching", place, flush=True)
            yield next(batches)
    def __len__(self):
        return 10
loader = Loader()
with Checkpointer(sys.argv[1], keep=Keep(last=9), verbose=0) as checkpointer:
    checkpointer.track(model=model, optimizer=optimizer)
    for epoch in checkpointer.epochs(1):
        for batch in checkpointer.batches(loader):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
print([parameter.item() for parameter in model.parameters()])
"""


def test_ctrl_c_that_ends_the_workers_of_a_loader_first_saves_all_the_same(tmp_path):
    """A terminal tells every process of its group: the loader fails while the loop waits for a batch."""
    pytest.importorskip("torch")
    whole = subprocess.run(
        [sys.executable, "-c", WORKERS, str(tmp_path / "whole"), "never"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    command = [sys.executable, "-c", WORKERS, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, "stop"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, process_group=0
    ) as process:
        waiting = {"ready\n", "fetching 5\n"}
        while waiting:
            waiting.discard(process.stdout.readline())
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=100)
    stopped = [(entry.step, entry.batch) for entry in highcamp.open(tmp_path / "run").checkpoints]
    again = subprocess.run([*command, "never"], capture_output=True, text=True, check=True, env=environment)

    assert process.returncode == -signal.SIGINT
    assert stopped == [(5, 5)]
    assert again.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1]
