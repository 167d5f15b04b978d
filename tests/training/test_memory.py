"""Snapshots in shared memory, end to end: a killed training goes on at most one step back, and nothing is left behind."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
import urllib.parse
from pathlib import Path

import msgspec
import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Every, Keep
from highcamp.errors import InvalidArgument, Refused, StorageError
from highcamp.storage.local import LocalStore
from highcamp.training import found, identity, memory, recovery, slot
from highcamp.training.tier import SHM

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="shared memory of this kind is Linux's"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning"),
]
as_root = pytest.mark.skipif(os.geteuid() != 0 and not os.environ.get("CI"), reason="mounts")

STEPS = 60  # of the training below, in two epochs
OFF = "no snapshots are kept in shared memory"
CLONE_NEWNS = 0x00020000  # linux/sched.h


def slots(where):
    """The files in shared memory that belong to runs below `where`."""
    own = urllib.parse.quote_from_bytes(os.fsencode(os.path.realpath(where))).encode()
    found = []
    for path in Path(SHM).glob(f"highcamp-{os.geteuid()}-*.[01]"):
        try:
            with path.open("rb") as file:
                if own in file.read(slot.HEADER_BYTES):
                    found.append(path)
        except FileNotFoundError:  # another test's, gone meanwhile
            continue
    return sorted(found)


@pytest.fixture(autouse=True)
def swept(tmp_path):
    """Nothing of a test that failed is left in shared memory."""
    yield
    for path in slots(tmp_path):
        path.unlink()


def train(where, *, at=lambda checkpointer: None, weights=None, **options):
    """Train to the end; `weights["w"]` is the number of steps done. Returns the weights, and what was said.

    at: called at the end of every step, before it is counted.
    """
    weights = {"w": np.zeros(1000)} if weights is None else weights
    said = []
    options = {"every": Every(steps=20), "memory_every": Every(steps=1), "keep": Keep(best=0, last=2), **options}
    with Checkpointer(where, **options) as checkpointer:
        checkpointer.voice.write = said.append
        checkpointer.track(model=weights)
        for _ in checkpointer.epochs(2):
            for _ in checkpointer.batches(range(STEPS // 2)):
                weights["w"] += 1
                at(checkpointer)
    return weights, said


def die_in(step):
    """For `train`: be killed at the end of a step, before it is counted, when nothing is being written."""

    def die(checkpointer):
        if checkpointer.step + 1 == step:
            checkpointer._saver.raise_failed(wait=True)
            os.kill(os.getpid(), signal.SIGKILL)

    return die


def raise_in(step):
    """For `train`: a bug that shows at the end of a step."""

    def fail(checkpointer):
        if checkpointer.step + 1 == step:
            raise KeyError(step)

    return fail


def in_child(work):
    """Run `work` in a forked child and return how that ended: 0, an exit code, or minus the signal's number."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            work()
            code = 0
        except SystemExit as ended:
            code = ended.code
        except BaseException:  # noqa: BLE001  (told by the exit code)
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def with_shared_memory(*mount, work):
    """Run `work` in a child that sees shared memory of its own: `mount` is what mounts it."""

    def isolated():
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "unshare")
        subprocess.run(["/bin/mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["/bin/mount", *mount, SHM], check=True)
        work()

    return in_child(isolated)


def killed(where, step, **options):
    """Train until it is killed in `step`."""
    assert in_child(lambda: train(where, at=die_in(step), **options)) == -signal.SIGKILL


def flip(path):
    """Change one byte of the snapshot in a slot."""
    with path.open("r+b") as file:
        file.seek(slot.HEADER_BYTES + 100)
        (byte,) = file.read(1)
        file.seek(slot.HEADER_BYTES + 100)
        file.write(bytes([byte ^ 1]))


def steps(where):
    """The steps that have a checkpoint on disk."""
    return [entry.step for entry in highcamp.open(where).checkpoints]


def recovered(said):
    """The checkpoint that was taken from shared memory, if one was."""
    return next((line.split()[1] for line in said if line.startswith("Recovered ")), None)


# -------------------------------------------------------------------------------------------- killed at any moment


@pytest.mark.parametrize("cases", ["numpy:1 passed:4", "torch:1 overlap:2 loader:1"])
def test_a_training_killed_again_and_again_loses_one_step_at_most_and_ends_the_same(tmp_path, start, cases):
    """The promise of `memory_every=Every(steps=1)`: no kill costs more than the step it fell into."""
    done = start("kept.py", tmp_path, *cases.split())

    assert done.returncode == 0, f"kept.py {tmp_path} {cases}\n{done.stderr[-4000:]}"
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["kind"] for each in results] == [case.split(":")[0] for case in cases.split()]
    for each in results:
        assert each["different"] == {}, each
        assert each["left"] == [], each
        for kill in each["kills"]:
            assert kill.get("lost", 0) <= 1, (kill, each)
            assert kill.get("whole", True), (kill, each)
            assert kill.get("said") == kill.get("recovered"), (kill, each)
        assert sum(kill.get("recovered", False) for kill in each["kills"]) > len(each["kills"]) // 3, each
        assert each["linked"] or each["kind"] in ("numpy", "passed"), each


class Dying(LocalStore):
    """A store that kills its process at the N-th change, until it is told to stop."""

    left = 0

    def create(self, path, chunks):
        self._event()
        super().create(path, chunks)
        self._event()

    def draft(self, path):
        self._event()
        return super().draft(path)

    def publish(self, draft, path):
        self._event()
        super().publish(draft, path)
        self._event()

    def _event(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_while_it_recovers_the_next_start_recovers(tmp_path):
    """The snapshot is given up when it is on the disk, and not before."""
    killed(tmp_path, 28)
    ended, deaths = [], 0

    def work():
        store = Dying(str(tmp_path))
        store.left = deaths + 1
        train(store, at=die_in(28))

    while not ended or ended[-1]:
        assert in_child(work) == -signal.SIGKILL
        newest = highcamp.open(tmp_path).last
        ended.append(0 if newest.step == 27 else 1)
        assert newest.verify().ok
        assert newest.step == 27 or slots(tmp_path)
        deaths += 1
    weights, said = train(tmp_path)

    assert len(ended) > 5
    assert recovered(said) is None
    assert any("Resumed from step-00000027" in line for line in said)
    assert set(weights["w"]) == {STEPS}


def test_of_state_that_grows_while_it_is_written_nothing_is_mixed_up(tmp_path, monkeypatch):
    """A slot that is made larger must not be one that somebody completes or reads at this moment."""
    monkeypatch.setattr(memory, "QUICK_BYTES", 0)  # completed in the background, as large ones are
    weights = {"w": np.zeros(1 << 16)}

    def grow(checkpointer):
        weights[f"more/{checkpointer.step}"] = np.full(1 << 14, checkpointer.step + 1.0)

    train(tmp_path, at=grow, weights=weights, every=Every(steps=3), keep=Keep(last=50))

    for entry in highcamp.open(tmp_path).checkpoints:
        found = entry.load("model")
        assert set(found["w"]) == {entry.step}
        assert len(found) == entry.step + 1
        assert all(set(value) == {int(name[5:]) + 1} for name, value in found.items() if name != "w")


# ------------------------------------------------------------------------------------------------ what is recovered


def test_a_run_without_a_checkpoint_goes_on_from_shared_memory(tmp_path):
    """Most crashes come early, before anything has been saved."""
    killed(tmp_path, 8)

    weights, said = train(tmp_path)

    assert said[0] == "Recovered step-00000007 from shared memory (there is nothing on disk yet)"
    assert said[1].startswith("Resumed from step-00000007 (epoch 0, batch 7 of the next, attempt 2)")
    assert set(weights["w"]) == {STEPS}
    assert slots(tmp_path) == []


def test_a_recovered_checkpoint_is_like_any_other(tmp_path):
    """Whoever looks at the run later must see where it came from, and be able to trust it."""
    killed(tmp_path, 28)
    killed(tmp_path, 28)  # in the first step after the restart, before anything was taken

    run = highcamp.open(tmp_path)

    assert steps(tmp_path) == [20, 27]
    assert all(found.ok for found in run.verify())
    assert set(run.last.load("model")["w"]) == {27.0}
    assert (run.last.attempt, run.last.parent, run.last.batch) == (1, "step-00000020", 27)


def test_metrics_logged_after_the_snapshot_rank_the_recovered_checkpoint(tmp_path):
    """They were measured on this very state; without them the best would be another one after a crash."""

    def work():
        checkpointer = Checkpointer(tmp_path, monitor="val_loss", every=Every(steps=5), memory_every=Every(steps=1))
        for step in range(1, 8):
            checkpointer.save_if_due({"w": np.full(9, float(step))}, step=step)
            checkpointer.log(val_loss=1 / step, step=step)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == -signal.SIGKILL

    with Checkpointer(tmp_path, monitor="val_loss") as checkpointer:
        state = checkpointer.restore(like={"w": np.zeros(9)})

    assert set(state["w"]) == {7}
    assert (checkpointer.best.step, dict(checkpointer.best.metrics)) == (7, {"val_loss": 1 / 7})


@pytest.mark.parametrize(("removed", "begins"), [([25], 32), ([30], 32), ([20, 25, 30], 0)])
def test_what_is_unchanged_is_found_in_whichever_checkpoint_has_it(tmp_path, removed, begins):
    """A frozen base is not copied at every step; its bytes are on the disk, and may have moved on with the retention."""
    weights = {"w": np.zeros(10), "base": np.arange(1 << 18, dtype=np.float32)}
    for memory_every in (None, Every(steps=1)):
        killed(
            tmp_path, 33, weights=weights, every=Every(steps=5), memory_every=memory_every, keep=Keep(best=0, last=3)
        )  # fmt: skip
    in_memory = [path.stat().st_size for path in slots(tmp_path)]
    for step in removed:
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step:08d}")
    begun = []

    weights, said = train(
        tmp_path, weights={name: np.zeros_like(value) for name, value in weights.items()} | {"base": weights["base"]},
        at=lambda checkpointer: begun.append(checkpointer.step),
    )  # fmt: skip

    assert max(in_memory) < 1 << 20
    assert begun[0] == begins
    assert any("shares model.1.safetensors with a checkpoint that is not there any more" in line for line in said) == (
        begins == 0
    )
    assert set(weights["w"]) == {STEPS}
    assert np.array_equal(weights["base"], np.arange(1 << 18, dtype=np.float32))
    assert all(found.ok for found in highcamp.open(tmp_path).verify())


def test_what_is_unchanged_is_not_taken_from_a_checkpoint_that_has_lost_it(tmp_path):
    """One damaged checkpoint must not cost the snapshot, as long as another has the bytes."""
    weights = {"w": np.zeros(10), "base": np.arange(1 << 18, dtype=np.float32)}
    for memory_every in (None, Every(steps=1)):
        killed(tmp_path, 33, weights=weights, every=Every(steps=5), memory_every=memory_every)
    (tmp_path / "checkpoints" / "step-00000030" / "model.1.safetensors").unlink()

    _, said = train(tmp_path, weights=weights)

    assert recovered(said) == "step-00000032"
    assert highcamp.open(tmp_path).checkpoint("step:60").verify().ok


def test_after_an_exception_the_newest_snapshot_is_taken(tmp_path):
    """A bug in the loop is the commonest crash of all, and in a notebook the process goes on."""
    with pytest.raises(KeyError):
        train(tmp_path, at=raise_in(28))
    left = slots(tmp_path)

    weights, said = train(tmp_path)

    assert len(left) == 1
    assert recovered(said) == "step-00000027"
    assert set(weights["w"]) == {STEPS}
    assert slots(tmp_path) == []


def test_two_runs_at_once_do_not_mix(tmp_path):
    """Sweeps of hyper-parameters share one machine."""

    def work():
        open_runs = [Checkpointer(tmp_path / name, memory_every=Every(steps=1)) for name in "ab"]
        for step in range(1, 9):
            for number, checkpointer in enumerate(open_runs):
                checkpointer.save_if_due({"w": np.full(5000, 10 * step + number)}, step=step + number, epoch=0)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == -signal.SIGKILL
    assert len(slots(tmp_path)) == 4

    found = {}
    for name in "ab":
        with Checkpointer(tmp_path / name) as checkpointer:
            found[name] = (set(checkpointer.restore(like={"w": np.zeros(5000, int)})["w"]), checkpointer.step)
            assert len(slots(tmp_path)) == (2 if name == "a" else 0)

    assert found == {"a": ({80}, 8), "b": ({81}, 9)}


# ------------------------------------------------------------------------------------------------- what is not taken


@pytest.mark.parametrize(("count", "begins"), [(1, 26), (2, 20)])
def test_a_damaged_snapshot_is_said_and_passed_over(tmp_path, count, begins):
    """Training on from a flipped bit is worse than six steps again."""
    killed(tmp_path, 28)
    newest_first = sorted(slots(tmp_path), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    newest_first = sorted(newest_first, key=_sequence, reverse=True)
    for path in newest_first[:count]:
        flip(path)
    begun = []

    weights, said = train(tmp_path, at=lambda checkpointer: begun.append(checkpointer.step))

    told = [line for line in said if "differ from their digest" in line]
    assert len(told) == count
    assert all(str(path) in line for path, line in zip(newest_first, told, strict=False))
    assert begun[0] == begins
    assert set(weights["w"]) == {STEPS}
    assert slots(tmp_path) == []


def _sequence(path):
    with path.open("rb") as file:
        file.seek(slot.STATE_START)
        return slot.STATE.unpack(file.read(slot.STATE.size))[0]


def test_a_snapshot_that_is_behind_the_disk_is_ignored_and_removed(tmp_path):
    """What is on the disk is further; going back to what lies in memory would lose steps."""
    kept = {}

    def work(checkpointer):
        if checkpointer.step + 1 == 25:
            kept.update({path: path.read_bytes() for path in slots(tmp_path)})
        if checkpointer.step + 1 == 45:
            for path, data in kept.items():
                path.write_bytes(data)
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(lambda: train(tmp_path, at=work)) == -signal.SIGKILL
    assert len(slots(tmp_path)) == 2

    _, said = train(tmp_path)

    assert recovered(said) is None
    assert said[0].startswith("Resumed from step-00000040")
    assert slots(tmp_path) == []


def test_only_the_attempt_just_before_is_recovered(tmp_path):
    """An older one knows nothing of what was trained since, perhaps on another machine."""
    killed(tmp_path, 28)
    older = {path: path.read_bytes() for path in slots(tmp_path)}
    for path in older:
        path.unlink()
    killed(tmp_path, 23, memory_every=None)
    for path, data in older.items():
        path.write_bytes(data)
        path.chmod(0o600)

    _, said = train(tmp_path)

    assert recovered(said) is None
    assert said[0].startswith("Resumed from step-00000020")
    assert slots(tmp_path) == []


def test_a_damaged_checkpoint_that_is_further_does_not_hide_the_snapshot(tmp_path):
    """After a fall back the run is behind what it could not read, and still must not lose a step."""
    killed(tmp_path, 43, memory_every=None)
    newest = tmp_path / "checkpoints" / "step-00000040" / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    killed(tmp_path, 28)

    weights, said = train(tmp_path)

    assert recovered(said) == "step-00000027"
    assert any(line.startswith("Resumed from step-00000027") for line in said)
    assert set(weights["w"]) == {STEPS}


@pytest.mark.parametrize("count", [0, 3])
def test_after_going_back_what_was_left_behind_is_not_recovered(tmp_path, count):
    """`restore()` in the middle of a run says that what came after is not wanted."""

    def work():
        like = {"w": np.zeros(100)}
        checkpointer = Checkpointer(tmp_path, every=Every(steps=20), memory_every=Every(steps=1))
        for step in range(1, 28):
            checkpointer.save_if_due({"w": np.full(100, float(step))}, step=step)
        state = checkpointer.restore(like=like)
        for step in range(21, 21 + count):
            state = {"w": state["w"] - 1}
            checkpointer.save_if_due(state, step=step)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == -signal.SIGKILL

    with Checkpointer(tmp_path) as checkpointer:
        state = checkpointer.restore(like={"w": np.zeros(100)})

    assert (checkpointer.step, set(state["w"])) == (20 + count, {20.0 - count})


def test_saving_without_restoring_is_refused_if_there_is_a_snapshot(tmp_path):
    """Otherwise the run would begin anew at step 1 behind a checkpoint of step 7."""
    killed(tmp_path, 8)

    with pytest.raises(Refused, match="has checkpoints up to step-00000007, which were not restored"):
        Checkpointer(tmp_path, verbose=0).save({"w": np.zeros(3)}, step=1)

    assert steps(tmp_path) == [7]


# ------------------------------------------------------------------------------------------------------- its ending


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "not closed"])
def test_a_training_that_is_done_leaves_nothing(tmp_path, start, closes):
    """Shared memory is taken from the machine, or the container, until somebody removes the file."""
    code = (
        "import sys, numpy as np\n"
        "from highcamp import Checkpointer, Every\n"
        "checkpointer = Checkpointer(sys.argv[1], memory_every=Every(steps=1))\n"
        "checkpointer.track(model={'w': np.zeros(9)})\n"
        "for _ in checkpointer.epochs(2):\n"
        "    for _ in checkpointer.batches(range(5)): pass\n"
    )

    done = start(code + ("checkpointer.close()\n" if closes else ""), tmp_path)

    assert (done.returncode, steps(tmp_path)) == (0, [5, 10]), done.stderr
    assert ("8 snapshots in shared memory, pause " in done.stderr) == closes
    assert slots(tmp_path) == []


def test_closing_early_leaves_nothing(tmp_path):
    """Who closes says that the checkpoints on the disk are what is to stay."""
    with Checkpointer(tmp_path, every=Every(steps=5), memory_every=Every(steps=1)) as checkpointer:
        for step in range(1, 8):
            checkpointer.save_if_due({"w": np.full(9, step)}, step=step)
        kept = slots(tmp_path)

    assert len(kept) == 2
    assert slots(tmp_path) == []
    assert steps(tmp_path) == [5]


def test_a_program_that_ends_without_closing_leaves_what_is_newer(tmp_path, start):
    """It was not killed, but nobody has said that what it had done is not wanted."""
    code = (
        "import sys, numpy as np\n"
        "from highcamp import Checkpointer, Every\n"
        "checkpointer = Checkpointer(sys.argv[1], every=Every(steps=5), memory_every=Every(steps=1))\n"
        "for step in range(1, 8):\n"
        "    checkpointer.save_if_due({'w': np.full(9, step)}, step=step)\n"
    )

    resume = (
        "import sys, numpy as np\n"
        "from highcamp import Checkpointer\n"
        "with Checkpointer(sys.argv[1]) as checkpointer:\n"
        "    print(*checkpointer.restore(like={'w': np.zeros(9, int)})['w'])\n"
    )

    done = start(code, tmp_path)
    left = slots(tmp_path)
    again = start(resume, tmp_path)  # a process of its own: what has been imported here is part of the random state

    assert done.returncode == 0, done.stderr
    assert len(left) == 1
    assert again.returncode == 0, again.stderr
    assert set(again.stdout.split()) == {"7"}


def test_asked_to_stop_it_saves_to_the_disk_and_leaves_nothing(tmp_path):
    """A preempted machine is given to somebody else; its memory is not what to come back to."""

    def ask(checkpointer):
        if checkpointer.step + 1 == 28:
            os.kill(os.getpid(), signal.SIGTERM)

    assert in_child(lambda: train(tmp_path, at=ask)) == 128 + signal.SIGTERM

    assert slots(tmp_path) == []
    weights, said = train(tmp_path)
    assert recovered(said) is None
    assert said[0].startswith("Resumed from step-00000028")
    assert set(weights["w"]) == {STEPS}


# ------------------------------------------------------------------------------------------ where there is no memory


def goes_on_without(where, said, weights, *, reason):
    """Whether the only thing that was lost is the memory, and that was said once."""
    warnings = [line for line in said if OFF in line]
    assert len(warnings) == 1, said
    assert reason in warnings[0]
    assert steps(where) == [40, 60]
    assert all(found.ok for found in highcamp.open(where).verify())
    assert set(weights["w"]) == {STEPS}


def test_without_shared_memory_training_goes_on(tmp_path, monkeypatch):
    """On macOS there is none of this kind."""
    monkeypatch.delattr(os, "posix_fallocate")

    weights, said = train(tmp_path)

    goes_on_without(tmp_path, said, weights, reason="there is no shared memory at /dev/shm")


@as_root
@pytest.mark.parametrize(
    ("mount", "reason"),
    [
        (("-o", "remount,bind,ro"), "read-only"),
        (("-t", "tmpfs", "-o", "size=16k", "tmpfs"), "a snapshot in memory needs"),
    ],
    ids=["read-only", "tiny"],
)
def test_with_shared_memory_of_no_use_training_goes_on(tmp_path, mount, reason):
    """Containers have 64 MB of it by default, and some none that may be written to."""
    assert with_shared_memory(
        *mount, work=lambda: goes_on_without(tmp_path, *reversed(train(tmp_path)), reason=reason)
    ) == 0  # fmt: skip


@as_root
def test_a_snapshot_that_cannot_be_completed_costs_no_checkpoint(tmp_path):
    """The table of its tensors needs memory too, and comes last, in the thread that is about to write to the disk."""

    def work():
        weights = {"w": np.zeros(10), "many": list(range(100_000))}
        weights, said = train(tmp_path, weights=weights)
        goes_on_without(tmp_path, said, weights, reason="a snapshot in memory needs")

    assert with_shared_memory("-t", "tmpfs", "-o", "size=300k", "tmpfs", work=work) == 0


@as_root
def test_memory_that_runs_out_in_the_middle_tears_no_checkpoint(tmp_path):
    """A save is being written from shared memory when that turns out too small for the next snapshot."""
    go_on, weights = threading.Event(), {"w": np.zeros(100_000)}

    class Slow(LocalStore):
        def create(self, path, chunks):
            if path.endswith("model.safetensors") and highcamp.open(tmp_path).last is None:
                go_on.wait(timeout=60)
            super().create(path, chunks)

    def work():
        said = []

        def say(line):
            said.append(line)
            if OFF in line:
                go_on.set()

        def grow(checkpointer):
            checkpointer.voice.write = say
            if checkpointer.step + 1 == 21:
                weights["more"] = np.zeros(200_000)

        train(Slow(str(tmp_path)), at=grow, weights=weights, keep=Keep(best=0, last=3))
        run = highcamp.open(tmp_path)
        assert [len(entry.load("model")) for entry in run.checkpoints] == [1, 2, 2]
        assert [set(entry.load("model")["w"]) for entry in run.checkpoints] == [{20}, {40}, {60}]
        assert all(found.ok for found in run.verify())
        assert sum(OFF in line for line in said) == 1
        assert list(Path(SHM).iterdir()) == []

    assert with_shared_memory("-t", "tmpfs", "-o", "size=3m", "tmpfs", work=work) == 0


def test_an_error_of_the_disk_is_not_taken_for_one_of_memory(tmp_path):
    """The loop waits for the writer when it needs the slot that is being written; what it hears then is a lost save."""
    go_on = threading.Event()

    class Failing(LocalStore):
        def create(self, path, chunks):
            if path.endswith("model.safetensors"):
                go_on.wait(timeout=60)
                raise StorageError("the disk is gone", path=path)
            super().create(path, chunks)

    def release(checkpointer):
        if checkpointer.step + 1 == 22:
            threading.Timer(0.05, go_on.set).start()

    said = []
    with pytest.raises(StorageError, match="the disk is gone"):
        train(Failing(str(tmp_path)), at=lambda c: (release(c), setattr(c.voice, "write", said.append)))

    assert [line for line in said if OFF in line] == []
    assert steps(tmp_path) == []
    assert recovered(train(tmp_path)[1]) in ("step-00000021", "step-00000022")


def test_of_a_run_that_ends_with_the_process_nothing_is_kept():
    """There would be nothing to go on with, and nobody to remove the files."""
    _, said = train("memory://kept")

    assert len([line for line in said if OFF in line and "memory://kept ends with this process" in line]) == 1
    run_id = highcamp.open("memory://kept").run_id
    assert [path for path in Path(SHM).iterdir() if run_id in path.name] == []


def test_a_forked_worker_that_ends_takes_nothing_with_it(tmp_path):
    """Data-loader workers end all the time, with copies of all our objects."""

    def fork(checkpointer):
        if checkpointer.step + 1 == 25:
            ended.append(in_child(checkpointer.close))

    ended = []
    with pytest.raises(KeyError):
        train(tmp_path, at=lambda checkpointer: (fork(checkpointer), raise_in(28)(checkpointer)))

    _, said = train(tmp_path)
    assert ended == [0]
    assert recovered(said) == "step-00000027"


def test_a_forked_worker_does_not_wait_for_a_snapshot(tmp_path, monkeypatch):
    """The thread that completes it is not there in the child, which would never end."""
    monkeypatch.setattr(memory, "QUICK_BYTES", 0)
    go_on, seal = threading.Event(), slot.Slot.seal
    monkeypatch.setattr(slot.Slot, "seal", lambda *arguments: (go_on.wait(timeout=60), seal(*arguments)))
    ended = []

    def work(kept):
        signal.alarm(30)
        assert kept.drain() is None
        kept.close(keep=False)

    def fork(checkpointer):
        if checkpointer.step + 1 == 24:
            go_on.clear()
        if checkpointer.step + 1 == 25:
            ended.append(in_child(lambda: work(checkpointer._saver._memory)))
            go_on.set()

    go_on.set()
    weights, _ = train(tmp_path, at=fork)

    assert ended == [0]
    assert set(weights["w"]) == {STEPS}


# ---------------------------------------------------------------------------------------------------------- documents


def test_the_format_page_knows_the_slot():
    """Somebody who finds the file in shared memory asks what it is, and whether it may go."""
    page = (Path(highcamp.__file__).parents[1] / "docs/format.md").read_text("utf-8")
    section = page.split("\n## A slot in shared memory\n")[1].split("\n## ")[0]
    structs = (recovery.Facts, recovery.Object, recovery.Linked, found._Row, found._Table, identity.Identity)
    fields = {field.encode_name for struct in structs for field in msgspec.structs.fields(struct)}

    assert {name for name in fields if f"`{name}`" not in section} == set()
    places = [int(row) for row in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)]
    assert places == [0, slot.STATE_START, slot.IDENTITY_START, slot.HEADER_BYTES]
    assert f"(4 bytes: {slot.FORMAT})" in section


# ------------------------------------------------------------------------------------------------------------- costs


def test_memory_for_two_copies_is_taken_and_no_more(tmp_path, start):
    """Whoever plans a machine counts on twice the state beside the state itself."""
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from highcamp import Checkpointer, Every\n"
        "def used():\n"
        "    lines = dict(line.split(':') for line in Path('/proc/self/status').read_text().splitlines())\n"
        "    return sum(int(lines[name].split()[0]) * 1024 for name in ('RssAnon', 'RssShmem'))\n"
        "model = {str(number): np.ones(2_500_000) for number in range(10)}\n"
        "most = []\n"
        "with Checkpointer(sys.argv[1], every=Every(steps=3), memory_every=Every(steps=1), verbose=0) as checkpointer:\n"
        "    before = used()\n"
        "    checkpointer.track(model=model)\n"
        "    for _ in checkpointer.epochs(1):\n"
        "        for _ in checkpointer.batches(range(6)):\n"
        "            most.append(used())\n"
        "print(max(most) - before)\n"
    )

    done = start(code, tmp_path)

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 2.05 * 200e6 + 12e6  # a constant for what is imported on the way


def test_staging_bytes_beside_it_are_refused(tmp_path):
    """A snapshot that goes through a ring is nowhere whole."""
    with pytest.raises(InvalidArgument, match="staging_bytes and memory_every exclude each other"):
        Checkpointer(tmp_path, memory_every=Every(steps=1), staging_bytes=1 << 30)
    with pytest.raises(InvalidArgument, match=r"memory_every is 1, not a Every; for example memory_every=Every"):
        Checkpointer(tmp_path, memory_every=1)
