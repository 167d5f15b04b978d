"""Runs with many checkpoints, and what an import costs: each asked in a new process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from benchmarks.bench import Contestant
from benchmarks.rows.session import Detail, Session
from benchmarks.rows.verdict import Verdict, unmeasured
from benchmarks.rows.words import seconds, spread, times
from benchmarks.worker import ROOT, Failed

if TYPE_CHECKING:
    from benchmarks.bench import Bench

NAME, IMPORT = "checkpoints", "import"
MOST_OPEN, MOST_LS, MOST_IMPORT = 0.25, 0.35, 0.5
QUESTION = """
import sys, time
import highcamp
import highcamp.run.run
began = time.perf_counter()
run = highcamp.open(sys.argv[1])
checkpoints, best = run.checkpoints, run.best
seconds = time.perf_counter() - began
print(f'{{"open": {seconds}, "count": {len(checkpoints)}, "best": {best.step}}}')
"""


def build(directory: Path, count: int) -> None:
    """A run of `count` checkpoints of a tiny state, committed by highcamp itself; the best is the last but one."""
    import numpy as np

    from highcamp import Every, Keep, Monitor
    from highcamp.core.tensorfile import plan
    from highcamp.run.attempt import OngoingAttempt
    from highcamp.run.commit import Part, TensorFile
    from highcamp.storage.store import open_store

    data = np.arange(16, dtype=np.float32).tobytes()
    layout = plan({"w": ("F32", (16,))}, {"format": "pt"})
    file = TensorFile("model.safetensors", layout, lambda: (memoryview(data),))
    part = Part("model", {"w": {"$tensor": "w"}}, (file,))
    attempt = OngoingAttempt(
        open_store(directory), monitor=Monitor("val_loss"), keep=Keep(last=count), every=Every(epochs=1)
    )
    attempt.start(None)
    attempt.note(tracked=["model"])  # writes the monitor down
    for epoch in range(1, count + 1):
        metrics = {"loss": 1 / epoch, "val_loss": abs(count - 1 - epoch) + 0.5}
        attempt.log(epoch * 10, epoch, metrics)
        manifest = attempt.manifest(step=epoch * 10, epoch=epoch, batch=0, metrics=metrics, versions={"highcamp": "0"})
        attempt.commit(manifest, [part])
    attempt.end("complete", count * 10, count)


def measure(bench: Bench) -> None:
    """Runs are built in memory, where fsync costs nothing, and copied to the disk that is measured."""
    memory = Path("/dev/shm")  # noqa: S108  (our own directory in it is made by mkdtemp)
    home = Path(mkdtemp(prefix="highcamp-bench-", dir=memory if os.access(memory, os.W_OK) else bench.scratch))
    turns = []
    try:
        for count in bench.scale.checkpoint_counts:
            bench.say(f"building a run of {count} checkpoints")
            build(home / str(count), count)
            target = Path(bench.place())
            shutil.copytree(home / str(count), target)
            shutil.rmtree(home / str(count))
            turns.append(Contestant("highcamp", partial(_ask, target, count), tensors=count))
    finally:
        shutil.rmtree(home)
    with bench.crew():  # removes the runs
        bench.take_turns(NAME, turns)


def _ask(run: Path, count: int) -> dict[str, float]:
    answer = json.loads(_output("-c", QUESTION, str(run)))
    if answer["count"] != count or answer["best"] != (count - 1) * 10:
        raise ValueError(f"{answer} of a run with {count} checkpoints, the best at step {(count - 1) * 10}")
    began = time.perf_counter()
    listed = _output("-m", "highcamp.cli", "ls", str(run))
    found = {"open": float(answer["open"]), "ls": time.perf_counter() - began}
    if listed.count("\n") < count:
        raise ValueError(f"highcamp ls lists fewer than {count} checkpoints")
    return found


def _output(*arguments: str) -> str:
    """What a new Python process prints. Raises Failed with what it says on standard error."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise Failed(f"{command} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def judge(bench: Bench) -> list[Verdict]:
    """The largest run, and the one for `ls`."""
    most, listed = bench.scale.checkpoint_counts[-1], bench.scale.ls_count
    rows = [
        (f"{most:,} checkpoints in a run: open, list and best", "open", most, MOST_OPEN),
        (f"`highcamp ls` of {listed:,}", "ls", listed, MOST_LS),
    ]
    found = []
    for what, figure, count, allowed in rows:
        took = bench.samples.spread(NAME, "highcamp", figure, tensors=count)
        bound = f"≤ {allowed} s"
        if took is None:
            found.append(unmeasured("checkpoints", what, bound))
            continue
        is_met = took.median <= allowed
        each = f"{seconds(took.median / count)} for each manifest" if figure == "open" else ""
        found.append(Verdict("checkpoints", what, bound, spread(took), is_met, each, "" if is_met else each))
    return found


def detail(bench: Bench) -> list[Detail]:
    """Every count."""
    rows = []
    for count in bench.scale.checkpoint_counts:
        opened, listed = (bench.samples.spread(NAME, "highcamp", what, tensors=count) for what in ("open", "ls"))
        rows.append((f"{count:,}", spread(opened), spread(listed)))
    text = "Each time in a new process; `highcamp ls` is the whole command, the start of Python included."
    return [Detail("Many checkpoints", text, ("checkpoints", "open, list and best", "`highcamp ls`"), rows)]


def measure_import(bench: Bench) -> None:
    """`import highcamp` and `import numpy` in turns, each in a new process."""
    turns = [Contestant(name, partial(_import, name)) for name in ("highcamp", "numpy")]
    bench.take_turns(IMPORT, turns, repeats=bench.scale.imports, before=lambda: None)


def _import(name: str) -> dict[str, float]:
    code = f"import time; t = time.perf_counter(); import {name}; print(time.perf_counter() - t)"
    return {"import": float(_output("-c", code))}


def judge_import(bench: Bench) -> list[Verdict]:
    """One import against the other."""
    ours, other = (bench.samples.spread(IMPORT, name, "import") for name in ("highcamp", "numpy"))
    what, bound = "`import highcamp`", "≤ half of `import numpy`"
    if ours is None or other is None:
        return [unmeasured("import", what, bound)]
    share = ours.median / other.median
    figure = f"{spread(ours)}, {times(share)}"
    return [Verdict("import", what, bound, figure, share <= MOST_IMPORT, f"`import numpy`: {spread(other)}")]


SESSION = Session((NAME,), ("checkpoints",), measure, judge, detail)
IMPORTS = Session((IMPORT,), ("import",), measure_import, judge_import, lambda _: [])
