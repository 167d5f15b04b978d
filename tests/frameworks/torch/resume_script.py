"""Train `examples/torch_digits.py` once without a stop, once killed again and again: `resume_script.py DIRECTORY SEED…`.

Every training is a process of its own, forked after the imports, which are slow. It kills itself by SIGKILL at the N-th
event: an event is a batch, or a change of the store, in whose middle it may die. N is drawn from SEED. At some batches it
is asked to stop by SIGTERM instead, at which it saves first. Prints one line of JSON for each seed: how often it was stopped
and where, where attempts began, and what differs in the end.
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
from pathlib import Path
from typing import Any

import torch

import highcamp

sys.path.append(str(Path(__file__).parents[2]))
from deadly import Deadly

EXAMPLE = Path(highcamp.__file__).parents[1] / "examples" / "torch_digits.py"
DIRECTORY = Path(sys.argv[1])
ASKED = 128 + signal.SIGTERM  # the exit code of one that was asked to stop, and saved
EPOCHS, STEPS = 3, 7  # a save every 7 of 20 batches, and after each epoch
MAX_STOPS = 7  # the attempt after that is let through

torch.set_num_threads(1)  # a pool of threads would not survive the fork
torch.use_deterministic_algorithms(mode=True)


def example() -> Any:
    """The example, as a module."""
    spec = importlib.util.spec_from_file_location("torch_digits", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLE_MODULE = example()


def train(directory: Path, fuse: int) -> None:
    """The example to its end, or to the event number `fuse`."""
    random.seed(0)  # the example draws nothing from it, but its state is saved
    store = Deadly(directory, fuse, deaths=DIRECTORY / "deaths", asking=("batch",))

    def dies(module: torch.nn.Module, _: object) -> None:
        if isinstance(module, torch.nn.Sequential) and module.training:
            store.event("batch")

    torch.nn.modules.module.register_module_forward_pre_hook(dies)
    found = EXAMPLE_MODULE.train(store, EPOCHS, STEPS, verbose=0)
    (directory / "result.json").write_text(json.dumps(found))
    (directory / "events").write_text(str(store.count))


def attempt(directory: Path, fuse: int) -> int | None:
    """Train in a process of its own; the number of its events, or None if it was stopped."""
    child = os.fork()
    if child == 0:
        try:
            train(directory, fuse)
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
    killed = DIRECTORY / f"killed-{seed}"
    (DIRECTORY / "deaths").write_text("")
    dice = random.Random(seed)
    stops, batches = 0, []
    while attempt(killed, dice.randrange(1, EVENTS // 3) if stops < MAX_STOPS else 0) is None:
        stops += 1
        last = highcamp.open(killed).last if (killed / "run.json").exists() else None
        batches.append(last.step % 20 if last is not None else 0)
    expected, found = facts(DIRECTORY / "whole"), facts(killed)
    return {
        "seed": seed,
        "stops": stops,
        "deaths": (DIRECTORY / "deaths").read_text().splitlines(),
        "batches": batches,
        "different": {name: [expected[name], found[name]] for name in expected if expected[name] != found[name]},
    }


if __name__ == "__main__":
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    EVENTS = attempt(DIRECTORY / "whole", 0)
    for each in sys.argv[2:]:
        print(json.dumps(compare(int(each))))
