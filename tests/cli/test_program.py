"""The program as a whole: help, errors, exit codes, pipes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from highcamp.cli.program import COMMANDS
from highcamp.cli.topics import TOPICS

LISTED = [
    "demo", "ls", "show", "best", "log", "plot", "verify", "prune", "rm", "undelete", "pin", "unpin", "export", "run",
]  # fmt: skip


def test_help_lists_every_command_without_importing_one(start):
    """The help is the first thing that is typed; it must be whole, and at once."""
    done = start("--help")

    assert done.code == 0
    assert [name for name in LISTED if not re.search(rf"^  {name} +\S", done.out, re.MULTILINE)] == []


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "help"])
def test_every_command_explains_itself(call, name):
    """A command without help is known to its author alone."""
    done = call(name, "--help")

    assert done.code == 0
    assert done.out.startswith(f"Usage: highcamp {name} ")
    assert all(option in done.out for option in ("--json", "--quiet", "--debug", "--help"))
    assert done.err == ""


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_has_a_page(call, topic):
    """References, exit codes and environment variables belong to no single command."""
    done = call("help", topic)

    assert done.code == 0
    assert len(done.out.splitlines()) >= 5


def test_help_of_a_command_is_its_help(call):
    """`highcamp help ls` is what many type first."""
    assert call("help", "ls").out.strip() == call("ls", "--help").out.strip()


def test_help_lists_the_topics(call):
    """A page that nobody finds is not there."""
    assert all(f"highcamp help {topic}" in call("help").out for topic in TOPICS)


def test_version_is_told(call):
    """The first question in any report of a mistake."""
    assert re.fullmatch(r"highcamp \d+\.\d+\.\d+\S*\n", call("--version").out)


@pytest.mark.parametrize(("typed", "meant"), [("lst", "ls"), ("plt", "plot"), ("exprot", "export"), ("LS", "ls")])
def test_a_mistyped_command_gets_the_nearest_name(call, typed, meant):
    """A list of fourteen commands is no answer to one wrong letter."""
    done = call(typed)

    assert done.code == 2
    assert f"did you mean {meant}?" in done.err
    assert "Traceback" not in done.err


def test_a_mistyped_option_gets_the_nearest_name(call, run):
    """As for commands."""
    done = call("ls", run.path, "--revers")

    assert done.code == 2
    assert "--reverse" in done.err


def test_a_usage_error_is_an_object_too(call):
    """A program that asked for JSON cannot read sentences."""
    done = call("lst", "--json")

    error = json.loads(done.err)["error"]
    assert done.code == error["exit_code"] == 2
    assert error["code"] == "usage"
    assert done.out == ""


def test_an_error_is_one_paragraph(call, run):
    """A trace-back hides the sentence that helps."""
    done = call("show", f"{run.path}@step:99")

    assert done.code == 12
    assert done.out == ""
    assert len(done.err.splitlines()) == 1
    assert "has no checkpoint 'step:99'; there are best, last," in done.err


def test_debug_shows_the_rest(call, run):
    """Whoever mends highcamp needs the trace-back."""
    done = call("show", f"{run.path}@step:99", "--debug")

    assert done.code == 12
    assert "Traceback" in done.err


def test_an_error_is_an_object_with_json(call, run):
    """Programs look at the code, and show message and hint."""
    done = call("show", f"{run.path}@step:99", "--json")

    error = json.loads(done.err)["error"]
    assert (error["code"], error["exit_code"], error["path"]) == ("checkpoint_not_found", 12, run.path)
    assert error["message"]
    assert error["hint"].startswith("there are")


def test_no_run_is_exit_code_10(call, tmp_path, monkeypatch):
    """Scripts tell "not yet trained" from "broken"."""
    monkeypatch.chdir(tmp_path)

    done = call("ls")

    assert done.code == 10
    assert "highcamp demo" in done.err


def test_a_closed_pipe_ends_quietly(run):
    """`highcamp log | head -1` must not print a trace-back."""
    process = subprocess.Popen(
        [sys.executable, "-m", "highcamp.cli", "log", run.path],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    process.stdout.close()

    said = process.stderr.read()
    process.stderr.close()

    assert process.wait(60) == 141
    assert said == b""


def test_ctrl_c_is_exit_code_130_and_leaves_no_child(tmp_path):
    """A demo that was interrupted must not go on training in the background."""
    pytest.importorskip("sklearn")
    process = subprocess.Popen(
        [sys.executable, "-m", "highcamp.cli", "demo", "--epochs", "500", "--no-crash", "--out", str(tmp_path / "d")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=_environment(),
    )  # fmt: skip
    while not process.stdout.readline().startswith(" 1  Load"):  # the training has begun
        pass
    process.send_signal(signal.SIGINT)

    _, said = process.communicate(timeout=60)

    assert process.returncode == 130
    assert said.strip() == "interrupted"
    programs = b"".join(path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
    assert str(tmp_path / "d").encode() not in programs


def test_names_that_stdout_cannot_spell_are_escaped(start, run):
    """A log of a machine without UTF-8 ends at the first accent otherwise."""
    named = Path(run.path).rename(Path(run.path).with_name("größe-数"))

    done = start("show", named, env={"PYTHONIOENCODING": "ascii"})

    assert done.code == 0
    assert "gr\\xf6\\xdfe-\\u6570" in done.out


def test_ls_loads_neither_numpy_nor_rich_in_a_pipe(run):
    """The answer is promised within a third of a second; NumPy alone takes a third of that."""
    code = (
        "import sys; from highcamp.cli.program import main; code = main(['ls', sys.argv[1]]);"
        "sys.exit(','.join({'numpy', 'rich', 'matplotlib', 'torch', 'keras'} & set(sys.modules)) or code)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, run.path], capture_output=True, text=True, env=_environment(), check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


def _environment():
    return {"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": "/usr/bin:/bin", "HOME": "/tmp"}  # noqa: S108
