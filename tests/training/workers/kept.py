"""Train with every step kept in shared memory, once without a stop and once killed again and again.

`kept.py DIRECTORY KIND:SEED…`, with numpy, passed, torch, overlap or loader for KIND. Every training is a process of
its own, forked after the imports, which are slow. It writes the number of every finished step to a pipe. It is killed by
SIGKILL: by its parent at some moment after some steps, or by itself at the N-th event: a step, a copy into shared memory, its
completion, a change of the store, each of them while it trains or while it recovers. Prints one line of JSON for each: what
was lost at each kill, what the next attempt said, and what differs in the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

import highcamp
from highcamp import Checkpointer, Every, Keep
from highcamp.storage.local import LocalStore
from highcamp.training import stream, tier
from highcamp.training.slot import Slot

if any(not each.startswith(("numpy", "passed")) for each in sys.argv[2:]):
    import torch

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    torch.use_deterministic_algorithms(mode=True)

DIRECTORY = Path(sys.argv[1])
EPOCHS, BATCHES = 3, 22
KILLS = {"loader": 2}  # 10 of the others; the run after that is let through
OPTIONS: dict[str, Any] = {"every": Every(steps=20), "memory_every": Every(steps=1), "keep": Keep(best=0, last=1)}


class Fuse:
    """Burns down by one at every event, then kills. 0: never."""

    def __init__(self) -> None:
        self.left = 0
        self.count = 0
        self.where = ""

    def event(self, what: str) -> None:
        """Something happens; the N-th time it is the last thing that does."""
        self.count += 1
        if self.count == self.left:
            os.write(LINES, f"death {what}{self.where}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)


FUSE = Fuse()
LINES = -1  # the pipe to the parent


def watch(kind: type, name: str) -> None:
    """An event before and after every call of a method."""
    original = getattr(kind, name)

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        FUSE.event(f"before {name}")
        result = original(self, *arguments, **options)
        FUSE.event(f"after {name}")
        return result

    setattr(kind, name, watched)


class Deadly(LocalStore):
    """A local store whose process dies when half of a piece is written."""

    def create(self, path: str, chunks: Any) -> None:
        """See `Store.create`."""

        def torn() -> Any:
            for chunk in chunks:
                half = len(chunk) // 2
                yield chunk[:half]
                FUSE.event("within create")
                yield chunk[half:]

        super().create(path, torn())


for change_name in ("append", "replace", "draft", "create", "publish", "withdraw", "remove", "link"):
    watch(Deadly, change_name)
for slot_name in ("begin", "seal", "_write_table", "_store_state", "remove"):
    watch(Slot, slot_name)
watch(stream.Stream, "_copy")
watch(tier.found.Found, "verify")
watch(tier.found.Found, "remove")


class Training:
    """One process's stretch: what it tells its parent."""

    def __init__(self, directory: Path) -> None:
        self.store = Deadly(directory)

    def resumed(self, checkpointer: Checkpointer) -> None:
        """The loop begins."""
        FUSE.where = ""
        last = checkpointer.run.last
        is_whole = last is None or last.verify().ok
        os.write(LINES, f"resumed {checkpointer.step} {last.step if last else 0} {int(is_whole)}\n".encode())

    def done(self, step: int) -> None:
        """A step is finished."""
        os.write(LINES, f"step {step}\n".encode())
        FUSE.event("step")


def train_numpy(training: Training) -> Any:
    """A linear model with momentum, tracked."""
    data = np.random.default_rng(1).standard_normal((BATCHES * 4, 5))
    target = data @ np.arange(5.0) + 1
    model, momentum = {"w": np.zeros(5), "large": np.zeros(30_000)}, [np.zeros(5)]
    with Checkpointer(training.store, **OPTIONS) as checkpointer:
        checkpointer.track(model=model, momentum=momentum)
        checkpointer.start(epochs_planned=EPOCHS)
        training.resumed(checkpointer)
        for _ in checkpointer.epochs(EPOCHS):
            order = list(np.arange(len(data)).reshape(BATCHES, 4))
            for index in checkpointer.batches(order):
                x = data[index] * (np.random.random(5) < 0.8)  # dropout
                momentum[0] *= 0.9
                momentum[0] += x.T @ (x @ model["w"] - target[index]) / len(index)
                model["w"] -= 0.02 * momentum[0] * random.random()
                model["large"] += model["w"][0]
                checkpointer.log(loss=float(model["w"] @ model["w"]))
                training.done(checkpointer.step + 1)
            checkpointer.log(val_loss=np.mean((data @ model["w"] - target) ** 2))
    return {"model": model, "momentum": momentum, "drawn": (random.random(), np.random.random())}


def train_passed(training: Training) -> Any:
    """State that is made anew at every step, and passed."""
    state: dict[str, Any] = {"params": {"w": np.ones(40_000)}, "moments": (np.zeros(40_000),), "count": 0}
    with Checkpointer(training.store, **OPTIONS) as checkpointer:
        state = checkpointer.restore(like=state) or state
        training.resumed(checkpointer)
        for step in range(checkpointer.step + 1, EPOCHS * BATCHES + 1):
            moment = 0.9 * state["moments"][0] + np.random.random() * state["params"]["w"]
            state = {"params": {"w": state["params"]["w"] - 0.01 * moment}, "moments": (moment,), "count": step}
            checkpointer.save_if_due(state, step=step, metrics={"loss": float(state["params"]["w"][0])})
            training.done(step)
        if not checkpointer.run.last or checkpointer.run.last.step < EPOCHS * BATCHES:
            checkpointer.save(state, step=EPOCHS * BATCHES)
    return {"state": state, "drawn": np.random.random()}


def train_torch(training: Training, kind: str) -> Any:
    """A network with dropout behind a frozen layer, AdamW and a schedule by steps."""
    x = torch.randn(BATCHES * 4, 512, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())
    workers = {"num_workers": 2, "multiprocessing_context": "fork"} if kind == "loader" else {}
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, **workers)
    base = torch.nn.Linear(512, 512).requires_grad_(requires_grad=False)  # 1 MiB: linked, not copied
    head = torch.nn.Sequential(torch.nn.Linear(512, 48), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(48, 2))
    model = torch.nn.Sequential(base, head)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=BATCHES * EPOCHS)
    snapshot: Any = "overlap" if kind == "overlap" else "copy"
    with Checkpointer(training.store, snapshot=snapshot, **OPTIONS) as checkpointer:
        checkpointer.track(model=model, optimizer=optimizer, scheduler=scheduler, loader=loader)
        checkpointer.start(epochs_planned=EPOCHS)
        training.resumed(checkpointer)
        for _ in checkpointer.epochs(EPOCHS):
            model.train()
            for inputs, labels in checkpointer.batches(loader):
                if kind == "overlap" and checkpointer.step:
                    training.done(checkpointer.step)  # a large snapshot is completed beside the step that follows it
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(inputs), labels)
                loss.backward()
                optimizer.step()
                scheduler.step()
                checkpointer.log(loss=loss.detach())
                if kind != "overlap":
                    training.done(checkpointer.step + 1)
            model.eval()
            with torch.no_grad():
                checkpointer.log(val_loss=torch.nn.functional.cross_entropy(model(x), data.tensors[1]))
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    moments = [
        {name: np.asarray(value) for name, value in state.items()} for state in optimizer.state_dict()["state"].values()
    ]
    drawn = (random.random(), np.random.random(), torch.rand(2).numpy())
    rate = [group["lr"] for group in optimizer.param_groups]
    return {"model": arrays, "moments": moments, "drawn": drawn, "rate": rate}


def fingerprint(value: Any) -> Any:
    """Every bit of a nested state, as JSON."""
    if isinstance(value, dict):
        return {name: fingerprint(child) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [fingerprint(child) for child in value]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    return repr(value)


def child(directory: Path, kind: str, seed: int, fuse: int, lines: int) -> None:
    """The process that trains."""
    global LINES  # noqa: PLW0603  (one process, one pipe)
    LINES = lines
    said = os.open(directory.with_suffix(".said"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 2)  # nor do orphaned workers of a loader keep the parent's own open
    os.dup2(said, 1)
    FUSE.left, FUSE.where = fuse, " in recovery"
    random.seed(seed)
    np.random.seed(seed)
    training = Training(directory)
    if kind == "numpy":
        result = train_numpy(training)
    elif kind == "passed":
        result = train_passed(training)
    else:
        torch.manual_seed(seed)
        result = train_torch(training, kind)
    directory.with_suffix(".json").write_text(json.dumps(fingerprint(result)))
    os.write(LINES, f"events {FUSE.count}\n".encode())


def attempt(directory: Path, kind: str, seed: int, *, fuse: int = 0, steps: int = 0, seconds: float = 0.0) -> list[str]:
    """Train in a process of its own; returns its lines. steps, seconds: when to kill it from outside."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.close(read)
            child(directory, kind, seed, fuse, write)
            code = 0
        except BaseException:  # noqa: BLE001  (a forked child must not go on as its parent)
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    told = b""
    while piece := os.read(read, 1 << 16):
        told += piece
        if steps and told.count(b"step ") >= steps:
            spent = time.perf_counter() + seconds
            while time.perf_counter() < spent:
                os.sched_yield()
            os.kill(pid, signal.SIGKILL)
            break
        if b"death" in told:
            break
    status = os.waitpid(pid, 0)[1]
    os.set_blocking(read, False)  # orphaned workers of a loader have the other end open
    try:
        while piece := os.read(read, 1 << 16):
            told += piece
    except BlockingIOError:
        pass
    os.close(read)
    if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
        raise SystemExit(directory.with_suffix(".said").read_text())
    return told.decode().splitlines()


def facts(directory: Path) -> dict[str, Any]:
    """What must be the same."""
    run = highcamp.open(directory)
    return {
        "result": json.loads(directory.with_suffix(".json").read_text()),
        "rows": [[row.step, row.epoch, row.batch, fingerprint(row.metrics)] for row in run.history.rows],
        "last": [run.last.step, fingerprint(run.last.metrics)],
        "tensors": {name: fingerprint(run.last.load(name)) for name in run.last.objects},
        "verified": all(found.ok for found in run.verify()),
    }


def compare(kind: str, seed: int) -> dict[str, Any]:
    """Both trainings with one seed."""
    whole, killed = DIRECTORY / f"whole-{kind}-{seed}", DIRECTORY / f"killed-{kind}-{seed}"
    events = int(attempt(whole, kind, seed)[-1].split()[1])
    dice = random.Random(seed)
    acknowledged, kills, is_over = 0, [], False
    while not is_over:
        on_disk = _newest(killed)
        if len(kills) >= KILLS.get(kind, 10):
            lines = attempt(killed, kind, seed)
        elif dice.random() < 0.5:
            lines = attempt(killed, kind, seed, fuse=dice.randrange(1, events // 4))
        else:
            lines = attempt(killed, kind, seed, steps=dice.randrange(1, 12), seconds=dice.random() * 2e-3)
        entry: dict[str, Any] = {"death": next((line for line in lines if line.startswith("death")), "from outside")}
        resumed = next((line.split() for line in lines if line.startswith("resumed")), None)
        if resumed is not None:
            step, last, is_whole = map(int, resumed[1:])
            said = killed.with_suffix(".said").read_text()
            entry |= {
                "lost": acknowledged - step, "recovered": step > on_disk, "whole": bool(is_whole) and last == step,
                "said": f"Recovered step-{step:08d} from shared memory" in said, "resumed": step,
            }  # fmt: skip
            acknowledged = max(acknowledged, step)
        acknowledged = max([acknowledged, *(int(line.split()[1]) for line in lines if line.startswith("step"))])
        is_over = lines[-1].startswith("events")
        kills.append(entry)
    expected, found = facts(whole), facts(killed)
    return {
        "kind": kind,
        "kills": kills,
        "linked": kind not in ("numpy", "passed") and _is_linked(killed),
        "different": {name: [expected[name], found[name]] for name in expected if expected[name] != found[name]},
        "left": [path.name for path in Path(tier.SHM).iterdir() if highcamp.open(killed).run_id in path.name],
    }


def _newest(directory: Path) -> int:
    try:
        last = highcamp.open(directory).last
    except highcamp.RunNotFound:
        return 0
    return last.step if last else 0


def _is_linked(directory: Path) -> bool:
    last = highcamp.open(directory).last
    return any(file.name == "model.1.safetensors" for file in last.files)


if __name__ == "__main__":
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for each in sys.argv[2:]:
        print(json.dumps(compare(each.split(":")[0], int(each.split(":")[1]))), flush=True)
