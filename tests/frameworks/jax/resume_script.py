"""Train `examples/jax_digits.py` once without a stop, once killed again and again: `resume_script.py DIRECTORY SEED…`.

Every training is a process of its own, forked after the imports, which are slow, and before JAX has made its threads. It
kills itself by SIGKILL at the N-th event: an event is a batch, or a change of the store, in whose middle it may die. N is
drawn from SEED. At some batches it is asked to stop by SIGTERM instead, at which it saves first. Prints one line of JSON for
each seed: how often it was stopped and where, where attempts began, and what differs in the end.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import signal
import sys
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax  # noqa: F401  (before the fork: it takes a second)

import highcamp
from highcamp import Checkpointer, Every

sys.path.append(str(Path(__file__).parents[2]))
from deadly import Deadly

EXAMPLE = Path(highcamp.__file__).parents[1] / "examples" / "jax_digits.py"
DIRECTORY = Path(sys.argv[1])
ASKED = 128 + signal.SIGTERM  # the exit code of one that was asked to stop, and saved
EPOCHS, STEPS = 3, 7  # a save every 7 of 20 batches, and after each epoch
MAX_STOPS = 5  # the attempt after that is let through
WAYS = [{}, {"snapshot": "overlap"}, {"memory_every": Every(steps=2)}]  # by SEED


def example() -> Any:
    """The example, as a module."""
    spec = importlib.util.spec_from_file_location("jax_digits", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLE_MODULE = example()


def train(directory: Path, fuse: int, way: dict[str, Any]) -> None:
    """The example to its end, or to the event number `fuse`."""
    random.seed(0)  # the example draws nothing from it, but its state is saved
    store = Deadly(directory, fuse, deaths=DIRECTORY / "deaths", asking=("batch",))
    step = EXAMPLE_MODULE.step

    def dies(*arguments: Any) -> Any:
        store.event("batch")
        return step(*arguments)

    EXAMPLE_MODULE.step, EXAMPLE_MODULE.Checkpointer = dies, partial(Checkpointer, **way)
    found = EXAMPLE_MODULE.train(store, EPOCHS, STEPS, verbose=0)
    result = {
        "state": EXAMPLE_MODULE.digest(found["state"]), "history": repr(found["history"]), "best": found["best"].step,
    }  # fmt: skip
    (directory / "result.json").write_text(json.dumps(result))
    (directory / "events").write_text(str(store.count))


def attempt(directory: Path, fuse: int, way: dict[str, Any]) -> int | None:
    """Train in a process of its own; the number of its events, or None if it was stopped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # of JAX, which has no threads yet
        child = os.fork()
    if child == 0:
        try:
            train(directory, fuse, way)
        except SystemExit as ended:
            os._exit(ended.code)
        except BaseException:  # noqa: BLE001  (a forked child must not go on as its parent)
            traceback.print_exc()
            os._exit(70)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) in (-signal.SIGKILL, ASKED):
        return None
    if status != 0:
        raise SystemExit(f"the training ended with {status}")
    return int((directory / "events").read_text())


def facts(directory: Path) -> dict[str, Any]:
    """What must be the same."""
    run = highcamp.open(directory)
    digests = {
        f"{name}/{path}": hashlib.sha256(array.tobytes()).hexdigest()
        for name in run.last.objects
        for path, array in run.last.load(name).items()
    }
    return {
        **json.loads((directory / "result.json").read_text()),
        "rows": [[row.step, row.epoch, row.batch, repr(sorted(row.metrics.items()))] for row in run.history.rows],
        "names": [run.best.name.partition(".")[0], run.last.name.partition(".")[0]],
        "tensors": digests,
        "metrics": [repr(run.best.metrics), repr(run.last.metrics)],
        "verified": all(found.ok for found in run.verify()),
        "complete": run.is_complete,
    }


def compare(seed: int) -> dict[str, Any]:
    """One training that is stopped, beside the one that was not."""
    killed, way = DIRECTORY / f"killed-{seed}", WAYS[seed % len(WAYS)]
    (DIRECTORY / "deaths").write_text("")
    dice = random.Random(seed)
    stops = 0
    while attempt(killed, dice.randrange(1, EVENTS // 3) if stops < MAX_STOPS else 0, way) is None:
        stops += 1
    expected, found = facts(DIRECTORY / "whole"), facts(killed)
    return {
        "seed": seed,
        "stops": stops,
        "deaths": (DIRECTORY / "deaths").read_text().splitlines(),
        "batches": sorted({start.batch for start in highcamp.open(killed).history.attempts}),
        "different": {name: [expected[name], found[name]] for name in expected if expected[name] != found[name]},
    }


if __name__ == "__main__":
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    EVENTS = attempt(DIRECTORY / "whole", 0, {})
    for each in sys.argv[2:]:
        print(json.dumps(compare(int(each))), flush=True)
