"""`highcamp demo`: trains, kills, starts again, and shows what was kept."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from highcamp.cli.arguments import refer, shown_path
from highcamp.cli.demo import story
from highcamp.cli.demo.screen import INDENT, Screen
from highcamp.cli.log import attempt_facts, history_table
from highcamp.cli.look import look
from highcamp.cli.program import command
from highcamp.cli.table import Column, Table
from highcamp.cli.text import count, numbers, plain, size
from highcamp.errors import HighcampError, InvalidArgument, MissingExtra, Refused, RunNotFound, StorageError
from highcamp.run.run import open_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from highcamp.cli.look import Look
    from highcamp.cli.output import Output

BACKENDS = ("torch", "jax", "tensorflow")
DIRECTORY = "highcamp-demo"
LOG = "training.log"
CURVE = "curve.png"
COLUMNS = ("loss", "accuracy", "val_loss", "val_accuracy")
POLL_SECONDS = 0.02  # an epoch of the demo takes a tenth of a second
LOG_LINES = 12  # of a training that failed; the rest is in the file


@dataclass
class Training:
    """One process that trains. facts: what it told; killed_in: the epoch in which it was killed, None if it was not."""

    process: subprocess.Popen[str]
    events: queue.Queue[dict[str, Any]] = field(default_factory=queue.Queue)
    killed_in: int | None = None


@command(epilog="Needs: pip install 'highcamp[demo]'. Nothing is downloaded: the images come with scikit-learn.")
@click.option(
    "--backend", type=click.Choice(BACKENDS), help="Keras backend; KERAS_BACKEND, or the first that is installed."
)
@click.option(
    "--epochs", type=click.IntRange(min=1), default=50, show_default=True, metavar="N", help="How long to train."
)
@click.option("--no-crash", is_flag=True, help="Do not kill the training.")
@click.option(
    "--out", metavar="DIR", help=f"The run's directory; {DIRECTORY} by default, or the next free {DIRECTORY}-N."
)
def demo(output: Output, backend: str | None, epochs: int, no_crash: bool, out: str | None) -> int:  # noqa: FBT001
    """Train a small network on real images, kill it in the middle, let it go on, and look at what was kept."""
    began = time.monotonic()
    chosen = _backend(backend)
    directory = _directory(out)
    screen = Screen(output)
    _welcome(screen, chosen, epochs, directory, crash=not no_crash)
    results, killed_in = _train(screen, directory, chosen, epochs, crash=not no_crash)
    run = open_run(directory)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its first start tells about fonts, which is no news here
    curve = run.plot(directory / CURVE)
    seen = look(run)
    seconds = time.monotonic() - began
    _show(screen, seen, results, curve)
    _farewell(screen, seen, seconds)
    if output.as_json:
        output.json("demo/1", **_facts(seen, results, curve, chosen, killed_in, seconds))
    return 0


def _backend(asked: str | None) -> str:
    """The Keras backend to use. Raises MissingExtra naming everything that is not there."""
    packages = {"keras": "keras", "scikit-learn": "sklearn", "matplotlib": "matplotlib"}
    missing = [name for name, module in packages.items() if not _is_installed(module)]
    if missing:
        raise MissingExtra(
            f"the demo needs {', '.join(missing)}, not installed here", hint="pip install 'highcamp[demo]'"
        )
    named = asked or os.environ.get("KERAS_BACKEND")
    if named and named not in BACKENDS:
        raise InvalidArgument(f"KERAS_BACKEND is {named!r}", hint=f"the demo runs on {', '.join(BACKENDS)}")
    if named and not _is_installed(named):
        package = named if named == "tensorflow" else f"'highcamp[{named}]'"
        raise MissingExtra(
            f"the backend {named} is not installed", hint=f"pip install {package}, or choose another --backend"
        )
    found = named or next((name for name in BACKENDS if _is_installed(name)), None)
    if found is None:
        raise MissingExtra(f"none of {', '.join(BACKENDS)} is installed", hint="pip install 'highcamp[demo]'")
    return found


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _directory(out: str | None) -> Path:
    """A directory for the run in which there is nothing yet. Raises Refused."""
    if out is not None:
        path = Path(out)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise Refused(
                f"{path} is not empty", path=str(path), hint="name a new directory with --out, or remove it first"
            )
    else:
        names = [DIRECTORY, *(f"{DIRECTORY}-{n}" for n in range(2, 1000))]
        path = next((Path(name) for name in names if not Path(name).exists()), Path(DIRECTORY))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path} cannot be made: {error.strerror}", path=str(path), errno=error.errno) from error
    return path


def _welcome(screen: Screen, backend: str, epochs: int, directory: Path, *, crash: bool) -> None:
    middle = "is killed in the middle, and goes on" if crash else "and keeps its best epoch"
    screen.say(f"A small network learns to read digits, {middle}.", style="bold")
    screen.say(f"Keras on {backend}, {count(epochs, 'epoch')}; everything is written to {plain(shown_path(directory))}")
    screen.say()


def _train(
    screen: Screen, directory: Path, backend: str, epochs: int, *, crash: bool
) -> tuple[dict[str, Any], int | None]:
    """Train to the end, through one crash. Returns what the evaluation found, and the epoch in which it was killed."""
    half = epochs // 2 if crash else 0
    killed_in = None
    if half:
        first = _start(directory, backend, epochs)
        results = _watch(screen, first, directory, epochs, kill_after=half, done=0)
        killed_in = first.killed_in
        if killed_in is None:
            return results, None  # it was faster than we were
        screen.say(
            f"{' ' * INDENT}Killed in epoch {killed_in} by SIGKILL: no code could run any more to save anything.",
            style="bold red",
        )
        screen.say(f"{' ' * INDENT}Now the same script is started again, with nothing changed.")
    elif crash:
        screen.say(f"{' ' * INDENT}One epoch has no middle: nothing will be killed.")
    second = _start(directory, backend, epochs)
    return _watch(screen, second, directory, epochs, kill_after=None, done=killed_in - 1 if killed_in else 0), killed_in


def _start(directory: Path, backend: str, epochs: int) -> Training:
    """Start the training script in a process of its own; what frameworks print goes to a file."""
    environment = {
        "OMP_NUM_THREADS": "1",  # more threads would only wait for each other: the network is small
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_PLATFORMS": "cpu",
        **os.environ,
        "KERAS_BACKEND": backend,
        "PYTHONUNBUFFERED": "1",
    }
    arguments = [sys.executable, "-m", "highcamp.cli.demo.training", str(directory), "--epochs", str(epochs)]
    log = (directory / LOG).open("a", encoding="utf-8")
    with log:
        process = subprocess.Popen(  # noqa: S603  (our own script)
            arguments, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
        )
    training = Training(process)
    threading.Thread(target=_listen, args=(training, directory / LOG), daemon=True).start()
    return training


def _listen(training: Training, log: Path) -> None:
    """Sort what the script prints: its own lines become events, those of frameworks go to the file."""
    if training.process.stdout is None:
        return
    for line in training.process.stdout:
        try:
            told = json.loads(line)
        except ValueError:
            told = None
        if isinstance(told, dict):
            training.events.put(told)
        else:
            with log.open("a", encoding="utf-8") as file:
                file.write(line)


def _watch(
    screen: Screen, training: Training, directory: Path, epochs: int, *, kill_after: int | None, done: int
) -> dict[str, Any]:
    """Follow the training to its end, or kill it in the epoch after `kill_after`; returns what the evaluation found."""
    process = training.process
    results: dict[str, Any] = {}
    is_again = done > 0

    def hear() -> bool:
        """Take in what was told; whether the training itself begins."""
        begins = False
        while not training.events.empty():
            told = training.events.get()
            step = told.get("step")
            if step is None:
                results.update(told)
            elif step == 7 or not is_again:
                screen.step(step, story.TITLES[step], story.step_sentence(told, epochs))
            begins = begins or step == 6
        return begins

    try:
        with screen.waiting("loading Keras"):
            while training.events.empty() and process.poll() is None:
                time.sleep(POLL_SECONDS)
        while not hear() and process.poll() is None:
            time.sleep(POLL_SECONDS)
        if is_again:
            _say_resumed(screen, process, directory, epochs, done)
        with screen.progress(epochs, done) as move:
            _follow(training, directory, move, kill_after=kill_after, epochs=epochs)
        while process.poll() is None or not training.events.empty():
            hear()
            time.sleep(POLL_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    time.sleep(POLL_SECONDS)  # the last line may still be on its way through the pipe
    hear()
    if training.killed_in is None and (process.returncode != 0 or "best" not in results):
        _raise_failure(directory, process.returncode)
    return results


def _follow(
    training: Training,
    directory: Path,
    move: Callable[[int, float | None, int | None], None],
    *,
    kill_after: int | None,
    epochs: int,
) -> None:
    """Move the bar by what the history says, until training ends or is killed."""
    process, seen_epoch = training.process, -1
    began: dict[int, float] = {}
    while True:
        is_over = process.poll() is not None
        epoch, best, best_epoch = _progress(directory)
        if epoch != seen_epoch:
            seen_epoch = epoch
            began.setdefault(epoch, time.monotonic())
            move(epoch, best, best_epoch)
        if kill_after is not None and epoch >= kill_after and not is_over:
            # Half an epoch later is the middle of one.
            times = sorted(began.values())
            steps = sorted(later - earlier for earlier, later in itertools.pairwise(times[1:]))
            time.sleep(steps[len(steps) // 2] / 2 if steps else 0.0)
            process.send_signal(signal.SIGKILL)
            process.wait()
            training.killed_in = _progress(directory)[0] + 1
            return
        if is_over or epoch >= epochs or not training.events.empty():
            return
        time.sleep(POLL_SECONDS)


def _progress(directory: Path) -> tuple[int, float | None, int | None]:
    """(epochs done, lowest val_loss, its epoch) as the history on disk says."""
    try:
        rows = open_run(directory).history.epochs()
    except RunNotFound:
        return 0, None, None
    losses = [(row.metrics["val_loss"], row.epoch) for row in rows if row.metrics.get("val_loss") is not None]
    best = min(losses, default=(None, None))
    return max((row.epoch for row in rows), default=0), *best


def _say_resumed(screen: Screen, process: subprocess.Popen[str], directory: Path, epochs: int, done: int) -> None:
    """Where the second attempt goes on, as soon as the history says so."""
    while process.poll() is None:
        attempts = open_run(directory).history.attempts
        if len(attempts) > 1:
            origin = attempts[-1]
            rest = count(epochs - origin.epoch, "epoch")
            screen.say(
                f"{' ' * INDENT}It goes on by itself from {origin.resumed_from}, the end of epoch {origin.epoch}; {rest} to go.",
                style="bold green",
            )
            if origin.epoch < done:
                words = f"The checkpoint of epoch {done} was not on disk yet; nothing half-written is used."
                screen.say(" " * INDENT + words)
            return
        time.sleep(POLL_SECONDS)


def _raise_failure(directory: Path, code: int | None) -> None:
    path = directory / LOG
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    tail = "\n".join(f"  {line}" for line in lines)
    raise HighcampError(
        f"the training of the demo ended with code {code}; its last words:\n{tail}\n",
        path=str(path),
        hint=f"all of them are in {path}",
    )


def _show(screen: Screen, seen: Look, results: dict[str, Any], curve: Path) -> None:
    last, best = results["last"], results["best"]
    is_same = seen.best is not None and seen.last is not None and seen.best.name == seen.last.name
    screen.say()
    screen.say("History", style="bold")
    table = history_table(seen, seen.epochs, COLUMNS)
    columns = [each for each in table.columns if each.title not in ("STEP", "TIME", "ATTEMPT")]
    screen.table(Table(columns, table.signs, table.styles, table.notes))
    screen.say(story.best_and_last(seen))
    screen.say()
    screen.say("Test images", style="bold")
    epochs = [str(each.epoch) if each else "-" for each in (seen.last, seen.best)]
    screen.table(
        Table(
            [
                Column("WEIGHTS", ["last", "best"], drop=0),
                Column("EPOCH", epochs, right=True),
                Column("CORRECT", [str(each["right"]) for each in (last, best)], right=True),
                Column("accuracy", [f"{each['accuracy']:.1%}" for each in (last, best)], right=True, drop=0),
                Column("loss", numbers([last["loss"], best["loss"]]), right=True),
            ],
            signs=[" ", "*"],
            styles=["", "green"],
        )
    )
    screen.say(story.on_the_test_set(last, best, is_same=is_same))
    screen.say()
    screen.say("Kept, and why", style="bold")
    rows = list(seen.checkpoints)
    screen.table(
        Table(
            [
                Column("CHECKPOINT", [each.name for each in rows], drop=0),
                Column("EPOCH", [str(each.epoch) for each in rows], right=True),
                Column("val_loss", numbers([each.metrics.get("val_loss") for each in rows]), right=True),
                Column("SIZE", [size(each.size_bytes) for each in rows], right=True),
                Column(
                    "KEPT BECAUSE",
                    [", ".join(seen.reasons(each.name)) or "not pruned yet" for each in rows],
                    flexible=True,
                ),
            ],
            signs=["*" if seen.best and each.name == seen.best.name else " " for each in rows],
            styles=["green" if seen.best and each.name == seen.best.name else "" for each in rows],
        )
    )
    saved = max((each.sequence for each in rows), default=0)
    screen.say(f"Written: {count(saved, 'checkpoint')}; what no rule keeps has made room for the next.")
    screen.say(f"The curve is in {plain(shown_path(curve))}")


def _farewell(screen: Screen, seen: Look, seconds: float) -> None:
    where, best = refer(seen.run), refer(seen.run, "best")
    screen.say()
    screen.say(f"That took {seconds:.0f} s. Try next:", style="bold")
    program = Path(sys.executable).with_name("highcamp")
    typed = "highcamp" if shutil.which("highcamp") or not program.exists() else shown_path(program)
    for line in (f"ls {where}", f"log {where}", f"verify {where}", f"export {best} -o model.safetensors"):
        screen.say(f"  {typed} {line}")


def _facts(
    seen: Look, results: dict[str, Any], curve: Path, backend: str, killed_in: int | None, seconds: float
) -> dict[str, Any]:
    return {
        "run": seen.run.path,
        "backend": backend,
        "epochs": seen.epoch,
        "killed_in_epoch": killed_in,
        "attempts": [attempt_facts(attempt) for attempt in seen.history.attempts],
        "best": {**(seen.facts(seen.best) if seen.best else {}), "test": results["best"]},
        "last": {**(seen.facts(seen.last) if seen.last else {}), "test": results["last"]},
        "kept": [seen.facts(each) for each in seen.checkpoints],
        "curve": str(curve.absolute()),
        "log": str((curve.parent / LOG).absolute()),
        "seconds": round(seconds, 1),
    }
