"""`highcamp run`: a training script that crashes is started again, with real processes, signals and a terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import highcamp
from highcamp.training.supervisor import Ending, Patience, Supervisor

ROOT = Path(highcamp.__file__).parents[1]

# Six epochs. Words: "crash-2" is killed in epoch 2 unless it was resumed there; "never" crashes before anything is saved;
# "stay-2" says "ready" in epoch 2 and waits there for a signal; "bare" does without highcamp.
TRAIN = """
import os, signal, sys
words = sys.argv[1:]
if "bare" in words:
    open("starts", "a").write("x")
    sys.exit(7)
import numpy as np
from highcamp import Checkpointer

weights = {"w": np.zeros(3)}
with Checkpointer("runs/digits", monitor="val_loss") as checkpointer:
    checkpointer.track(model=weights)
    begun = None
    for epoch in checkpointer.epochs(6):
        begun = epoch if begun is None else begun
        weights["w"] += 1
        if "never" in words:
            sys.exit("no such file: data.npz")
        if f"crash-{epoch}" in words and epoch != begun:
            while checkpointer.run.last is None or checkpointer.run.last.epoch < epoch:
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        if f"stay-{epoch}" in words and epoch != begun:
            ours, theirs = os.pipe()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
                signal.signal(number, lambda number, frame: os.write(theirs, bytes([number])))
            print("ready", flush=True)
            told = os.read(ours, 1)[0]
            print("told", told, flush=True)
            sys.exit(128 + told)
        if f"leave-{epoch}" in words:
            os.kill(os.getpid(), signal.SIGUSR1)
        checkpointer.log(val_loss=1 / (1 + epoch))
print("weights", weights["w"][0])
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with the training script."""
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("HIGHCAMP_RUN", raising=False)
    return tmp_path


def _command(*words, options=()):
    return [
        sys.executable,
        "-m",
        "highcamp.cli",
        "run",
        "--delay",
        "0s",
        *options,
        "--",
        sys.executable,
        "train.py",
        *words,
    ]


def _run(*words, options=(), **others):
    return subprocess.run(
        _command(*words, options=options), capture_output=True, text=True, timeout=100, check=False, **others
    )


def _ours(done):
    """What `highcamp run` itself has said."""
    return [
        line.removeprefix("highcamp run: ") for line in done.stderr.splitlines() if line.startswith("highcamp run: ")
    ]


def _record(place):
    return [json.loads(line) for line in (place / "runs/digits/supervisor.jsonl").read_text().splitlines()]


def test_a_script_that_crashes_is_started_again_until_it_is_done(place):
    """A crash at night costs the night."""
    done = _run("crash-2", "crash-4")

    assert done.returncode == 0, done.stderr
    assert done.stdout == "weights 6.0\n"
    said = _ours(done)
    assert said[0].startswith("attempt 1 ended: killed by SIGKILL, perhaps because memory ran out; ")
    assert said[0].endswith("runs/digits: began anew, saved up to step 2")
    assert said[1] == "starting again in 0 s from step-00000002 (restart 1 of at most 10)"
    assert said[2].endswith("runs/digits: resumed from step-00000002, saved up to step 4")
    assert said[4].startswith("attempt 3 ended: exit code 0; ")
    assert len(said) == 5
    assert [attempt.epoch for attempt in highcamp.open("runs/digits").history.attempts] == [0, 2, 4]


def test_the_end_of_each_attempt_is_noted_in_the_run(place):
    """Months later nobody knows why a run has three attempts; a process that was killed could not write it."""
    _run("crash-2")

    facts = [(line["attempt"], line["exit_code"], line["signal"], line["restarts"]) for line in _record(place)]
    assert facts == [(1, 137, "SIGKILL", True), (2, 0, None, False)]
    assert all(found.ok for found in highcamp.open("runs/digits").verify())


def test_a_run_without_a_crash_goes_unmentioned(place):
    """What stands in front of every training must not add noise to every training."""
    done = _run()

    assert (done.returncode, done.stdout, _ours(done)) == (0, "weights 6.0\n", [])


def test_no_step_gained_twice_in_a_row_ends_it(place):
    """A mistake in the script would be met again and again, at full price for the machine."""
    done = _run("never")

    assert done.returncode == 1
    assert done.stderr.count("no such file: data.npz") == 2
    assert _ours(done)[-1] == "giving up: 2 attempts in a row have not gained a step"


def test_a_script_of_another_kind_is_not_started_for_ever(place):
    """Where no run tells of progress, none is assumed; and it is said how to name the run."""
    done = _run("bare")

    assert done.returncode == 7
    assert Path("starts").read_text() == "xx"
    assert _ours(done)[-1].endswith("no run was written to that could tell, name it with --run")


def test_one_attempt_without_gain_is_forgiven(place):
    """Bad luck twice is no pattern, if there was progress in between."""
    script = TRAIN.replace('if "never" in words:', "if checkpointer.run.history.attempts[-1].number in (2, 4):")
    Path("train.py").write_text(script)

    done = _run("crash-2", "crash-4")

    assert done.returncode == 0, done.stderr
    assert len(highcamp.open("runs/digits").history.attempts) == 5


def test_too_many_restarts_end_it(place):
    """A machine that fails every few minutes should be looked at."""
    done = _run("crash-1", "crash-2", "crash-3", options=["--max-restarts", "2"])

    assert done.returncode == 137
    assert _ours(done)[-1] == "giving up: it was started again 2 times within 3600 s"


def test_the_run_can_be_named(place):
    """A script whose run lies elsewhere would seem to gain nothing."""
    Path("elsewhere").mkdir()
    Path("train.py").rename("elsewhere/train.py")
    script = "import os, sys; os.chdir('../elsewhere'); exec(open('train.py').read())"
    Path("here").mkdir()
    Path("here/train.py").write_text(script)

    blind = _run("crash-2", "crash-3", "crash-4", cwd="here")
    seeing = _run("crash-2", "crash-3", "crash-4", options=["--run", "../elsewhere/runs/digits"], cwd="here")

    assert blind.returncode == 137
    assert "giving up" in blind.stderr
    assert seeing.returncode == 0, seeing.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_is_passed_on_and_the_save_waited_for(place, number):
    """A cluster stops what it has started; if only that hears it, training is killed without a word."""
    process = subprocess.Popen(_command("stay-2"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"

    process.send_signal(number)
    out, errors = process.communicate(timeout=60)

    assert out == f"told {number}\n"
    assert process.returncode == 128 + number
    assert "not started again, because it was asked to stop" in errors
    assert f"stopped by {number.name}" in errors


def test_a_signal_reaches_what_the_command_has_started(place):
    """A shell script around the training would hear it alone, and leave the training to run."""
    command = [*_command()[:-2], "sh", "-c", f"{sys.executable} train.py stay-2; exit $?"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"

    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)

    assert out == f"told {signal.SIGUSR1}\n"


def test_a_signal_between_two_attempts_ends_it(place):
    """Waiting for the next start, it would sleep through the request to stop."""
    command = _command("crash-2", options=["--delay", "1h", "--max-delay", "1h"])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "starting again in 3600 s" not in process.stderr.readline():
        pass

    process.send_signal(signal.SIGTERM)

    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "not started again: SIGTERM" in errors


def test_what_a_crash_leaves_behind_is_gone_before_the_next_start(place):
    """A worker that lives on holds the memory, the port or the run that the next attempt needs."""
    script = """
import os, subprocess, sys
if os.path.exists("left"):
    try:
        os.kill(int(open("left").read()), 0)
    except ProcessLookupError:
        sys.exit(0)
    sys.exit(3)
left = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"], stdout=subprocess.PIPE)
left.stdout.readline()
open("left", "w").write(str(left.pid))
os._exit(1)
"""
    Path("train.py").write_text(script)

    done = _run()

    assert done.returncode == 0, done.stderr


def test_a_command_that_cannot_be_started_is_a_usage_error(place):
    """A mistyped program is no crash."""
    done = subprocess.run(
        [sys.executable, "-m", "highcamp.cli", "run", "pyhton", "train.py"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert done.stderr.startswith("highcamp: pyhton cannot be started: No such file or directory; ")


def test_options_behind_the_command_are_its_own(place):
    """`--json` or `--help` of a training script must not be taken for ours."""
    Path("train.py").write_text("import sys; print(sys.argv[1:])")

    done = subprocess.run(
        [sys.executable, "-m", "highcamp.cli", "run", sys.executable, "train.py", "--json", "--help", "--", "-q"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.stdout == "['--json', '--help', '--', '-q']\n", done.stderr


def test_json_is_one_object_per_line_on_stderr(place):
    """Whoever watches many runs reads lines, and stdout is the script's own."""
    done = _run("crash-2", options=["--json"])

    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert [line["type"] for line in lines] == ["end", "restart", "end"]
    assert {line["schema"] for line in lines} == {"highcamp.run/1"}
    assert (lines[0]["exit_code"], lines[0]["signal"]) == (137, "SIGKILL")
    assert lines[0]["runs"][0]["reached_step"] == 2
    assert done.stdout == "weights 6.0\n"


def test_quiet_says_nothing(place):
    """As with every command."""
    assert _ours(_run("crash-2", options=["--quiet"])) == []


def test_a_training_that_was_asked_to_stop_is_no_crash_whoever_hides_its_exit_code(place):
    """Torchrun ends with 1 in any case: started again at once, a job that must leave its machine would stay on it."""
    wrapper = "import subprocess, sys; subprocess.run([sys.executable, 'train.py', 'leave-3']); sys.exit(1)"
    command = [*_command()[: _command().index("--") + 1], sys.executable, "-c", wrapper]

    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    assert done.returncode == 1
    assert _ours(done)[-1] == "not started again, because it was asked to stop"
    assert [attempt.ended for attempt in highcamp.open("runs/digits").history.attempts] == ["preempted"]


def test_a_deadline_is_no_crash(place):
    """Started again at once, it would meet the same deadline after one step, again and again."""
    Path("train.py").write_text("import sys; open('starts', 'a').write('x'); sys.exit(75)")

    done = _run()

    assert done.returncode == 75
    assert Path("starts").read_text() == "x"
    assert "stopped by a deadline" in _ours(done)[0]


def test_pipes_work_as_under_a_shell(place):
    """Python ignores SIGPIPE; a program that inherits this complains, or never ends."""
    done = subprocess.run(
        [*_command()[:-2], "sh", "-c", "yes | head -n 1"], capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "y\n", "")


def test_nothing_is_noted_in_a_run_that_somebody_else_has_taken_over(place):
    """Two processes would write into one run."""
    Path("train.py").write_text(TRAIN.replace("sys.argv[1:]", '["crash-2"]'))
    taker = """
import subprocess, sys
import numpy as np
from highcamp import Checkpointer
subprocess.run([sys.executable, "train.py"])
with Checkpointer("runs/digits") as checkpointer:
    checkpointer.track(model={"w": np.zeros(3)})
    checkpointer.start()
    subprocess.run(["kill", "-KILL", sys.argv[1]])
    sys.stdin.read()
"""
    script = f"import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {taker!r}, str(os.getpid())], "
    script += "start_new_session=True, stdin=0); time.sleep(60)"
    Path("parent.py").write_text(script)
    process = subprocess.Popen(
        [*_command(options=["--max-restarts", "0"])[:-2], sys.executable, "parent.py"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while "attempt 1 ended" not in process.stderr.readline():
        pass
    there = Path("runs/digits/supervisor.jsonl").exists()

    process.communicate("", timeout=60)

    assert process.returncode == 137
    assert not there


def test_an_ignored_signal_stays_ignored(place):
    """Under `nohup`, closing the terminal would end the training after all."""
    process = subprocess.Popen(
        _command("stay-2"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),  # noqa: PLW1509  (one thread, one call)
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"

    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)

    assert out == f"told {signal.SIGTERM}\n"


@pytest.mark.parametrize(("number", "is_requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_is_asked_to_requeue_when_the_time_is_up(place, monkeypatch, number, is_requeued):
    """Without a requeue the job ends with its time limit; with one after SIGTERM, it could never be cancelled."""
    Path("bin").mkdir()
    Path("bin/scontrol").write_text('#!/bin/sh\necho "$@" >> asked\n')
    Path("bin/scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    process = subprocess.Popen(
        _command("stay-2", options=["--requeue"]), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"

    process.send_signal(number)
    process.communicate(timeout=60)

    assert process.returncode == 128 + number
    assert (Path("asked").read_text() if Path("asked").exists() else "") == ("requeue 4711\n" if is_requeued else "")


class Terminal:
    """A shell's part: a terminal whose foreground group is `highcamp run`, below a process that leads the session."""

    def __init__(self, command):
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, [sys.executable, "-c", SHELL, *command])  # noqa: S606
        self.said = ""

    def read_until(self, text):
        """Wait until `text` has been on the screen; the end of the terminal is an error."""
        while text not in self.said:
            self.said += os.read(self.screen, 4096).decode()
        before, _, self.said = self.said.partition(text)
        return before

    def press(self, key):
        os.write(self.screen, key)

    def close(self):
        """Let the shell end, and give its exit code."""
        self.press(b"\n")
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.screen)  # not before: whoever leads the session is told that the terminal has gone
        return code


# The smallest shell with job control: starts a job in the foreground, says when it stops, goes on with it, says its end.
SHELL = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
def restore():
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    for number in (signal.SIGTTOU, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
job = subprocess.Popen(sys.argv[1:], preexec_fn=restore)
print("shell: job", job.pid, flush=True)
while True:
    _, status = os.waitpid(job.pid, os.WUNTRACED)
    os.tcsetpgrp(0, os.getpgrp())
    if os.WIFSTOPPED(status):
        print("shell: stopped", flush=True)
        input()
        os.tcsetpgrp(0, job.pid)
        os.killpg(job.pid, signal.SIGCONT)
        continue
    print("shell: ended", os.waitstatus_to_exitcode(status), flush=True)
    input()
    os._exit(0)
"""


def test_ctrl_c_reaches_the_training_once(place):
    """The terminal signals its whole foreground group: passed on as well, it is a second Ctrl-C, and the save is given up."""
    script = """
import signal, sys
numbers = {signal.SIGINT, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
print("ready", flush=True)
told = None
while told != signal.SIGTERM:
    told = signal.sigwait(numbers)
    print("told", told.name, flush=True)
sys.exit(130)
"""
    Path("train.py").write_text(script)
    terminal = Terminal(_command())
    terminal.read_until("shell: job")
    job = int(terminal.read_until("\n"))
    terminal.read_until("ready")

    terminal.press(b"\x03")
    terminal.read_until("told SIGINT")
    os.kill(job, signal.SIGTERM)  # had there been a second Ctrl-C, it would be told before this one
    told = terminal.read_until("shell: ended")
    code = terminal.read_until("\n")

    assert "told SIGTERM" in told
    assert "told SIGINT" not in told
    assert code.strip() == "130"
    assert terminal.close() == 0


def test_the_training_may_read_from_the_terminal_and_be_stopped_by_ctrl_z(place):
    """A debugger in the training script, and Ctrl-Z with fg, are how people work."""
    script = """
print("ready", flush=True)
print("read", input(), flush=True)
print("read", input(), flush=True)
"""
    Path("train.py").write_text(script)
    terminal = Terminal(_command())
    terminal.read_until("ready")

    terminal.press(b"one\n")
    terminal.read_until("read one")
    terminal.press(b"\x1a")
    terminal.read_until("shell: stopped")
    terminal.press(b"\n")
    terminal.press(b"two\n")
    terminal.read_until("read two")
    terminal.read_until("shell: ended 0")

    assert terminal.close() == 0


@pytest.mark.parametrize(("recent", "seconds"), [(0, 1), (1, 2), (2, 4), (5, 32), (6, 60), (5000, 60)])
def test_each_restart_waits_twice_as_long(recent, seconds):
    """A machine that is on its knees is not helped by a start every second."""
    assert Patience().delay(recent) == seconds


class _Endings:
    """A script that crashes at given times, always a step further; `Supervisor` is what is tested."""

    was_asked_to_stop = False

    def __init__(self, seconds):
        self.times = iter(seconds)
        self.now = 0.0
        self.delays = []

    def run(self):
        self.now = next(self.times, None) or self.now
        return Ending(1)

    def pause(self, seconds):
        self.delays.append(seconds)
        return None if len(self.delays) < 6 else signal.SIGTERM


def test_only_restarts_within_the_window_count():
    """A run of weeks that fails now and then would be given up one day, and wait longer each time."""
    hours = _Endings([3600.0 * hour for hour in range(1, 9)])
    said = []
    supervisor = Supervisor(hours, list, lambda event, words, **_: said.append(words), Patience(2), lambda: hours.now)
    supervisor._verdict = lambda ending, done: None  # as if each had gained a step

    assert supervisor.supervise() == 128 + signal.SIGTERM
    assert hours.delays == [1.0] * 6
