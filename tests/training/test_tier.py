"""Snapshots in shared memory: what a killed process leaves behind is whole, its own, and found again; or it is refused."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import random
import resource
import runpy
import secrets
import signal
import subprocess
import sys
import threading
import time
import traceback
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

import highcamp
from highcamp.core import strict
from highcamp.core.digest import digest
from highcamp.errors import Damaged, InvalidArgument, InvalidState, StorageError, Taken, Unreadable
from highcamp.training import identity, slot
from highcamp.training.slot import Slot, SlotFile
from highcamp.training.tier import SHM, Tier, find, sweep

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="shared memory of this kind is Linux's")
as_root = pytest.mark.skipif(os.geteuid() != 0 and not os.environ.get("CI"), reason="mounts, or becomes another user")

WORKER = Path(__file__).parent / "workers" / "snapshots.py"
ROOT = Path(highcamp.__file__).parent.parent
worker = SimpleNamespace(**runpy.run_path(str(WORKER)))
take, contents, LAYOUTS = worker.take, worker.contents, worker.LAYOUTS
(MODEL, OPTIMIZER) = LAYOUTS
NOBODY = 65534


@pytest.fixture
def run_id():
    """A run that nobody else has; whatever is left of it in shared memory is a failure."""
    name = f"test-{secrets.token_hex(6)}"
    yield name
    left = [path for path in Path(SHM).iterdir() if name in path.name]
    for path in left:
        path.unlink()
    assert left == []


@pytest.fixture
def tier(run_id):
    """A tier of this process, in shared memory."""
    made = Tier(run_id, 1)
    yield made
    made.close()


@pytest.fixture
def left(tmp_path):
    """A snapshot of step 3 (and in the other slot, of step 2) that was left behind; returns the path of the newest."""
    tier = Tier("run", 1, directory=str(tmp_path))
    for step in (1, 2, 3):
        take(tier, step)
    path = Path(tier.newest.path)
    other = next(each for each in tmp_path.iterdir() if each != path)
    tier.close(keep=True)
    assert not other.exists()
    return path


def left_by(run_id, directory, *, step=1, attempt=1, place=None, **changes):
    """A snapshot whose identity differs from this process's by `changes`; returns its path."""
    owner = msgspec.structs.replace(identity.current(run_id, attempt, place), **changes)
    path = Path(directory) / slot.file_name(owner, 0)
    made = Slot(str(path), owner, 4096, count(1, 2))
    _seal(made, step)
    made.release()
    return path


def _seal(made, step):
    made._identity = msgspec.structs.replace(made._identity, pid=os.getpid())  # who may write, not what is written
    made.begin()
    made.seal({"step": step}, [])


def found_in(directory, run_id="run", **options):
    """What is found, and what was told about the rest."""
    told = []
    return find(run_id, directory=str(directory), tell=told.append, **options), [str(each) for each in told]


def check(snapshot):
    """Every byte is that of its step."""
    snapshot.verify()
    assert {file.name: bytes(file.data) for file in snapshot.files} == contents(snapshot.step)
    assert [file.layout.entries for file in snapshot.files] == [layout.entries for layout in LAYOUTS.values()]
    assert snapshot.facts == {"step": snapshot.step, "objects": {"model": {"w": {"$tensor": "weight"}}}}


def in_child(work):
    """Run `work` in a forked child and return how that ended: 0, or minus the signal's number."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001  (told by the exit code)
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextlib.contextmanager
def mounted(where, size):
    """A file system in memory of its own."""
    where.mkdir()
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)], check=True)
    try:
        yield where
    finally:
        subprocess.run(["/bin/umount", "--lazy", str(where)], check=True)


class Nursery:
    """A process whose children take snapshots until they are killed."""

    def __init__(self, directory):
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(directory)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def kill_one(self, run_id, *, after_count, after_seconds=0.0, uid=0):
        """Start a child and kill it after `after_count` snapshots and some time; returns the last it acknowledged."""
        print(run_id, uid, file=self._process.stdin, flush=True)
        child, acknowledged = int(self._process.stdout.readline().split()[1]), (0, 0)
        for _ in range(after_count):
            acknowledged = self._acknowledged()
            assert acknowledged is not None
        time.sleep(after_seconds)  # any moment will do; nothing waits for this one
        os.kill(child, signal.SIGKILL)
        while (later := self._acknowledged()) is not None:
            acknowledged = later
        return acknowledged

    def _acknowledged(self):
        words = self._process.stdout.readline().split()
        return None if words == ["ended"] else (int(words[1]), int(words[2]))

    def close(self):
        self._process.stdin.close()
        assert self._process.wait() == 0
        self._process.stdout.close()


@pytest.fixture
def nursery():
    """One in shared memory."""
    made = Nursery(SHM)
    yield made
    made.close()


# ------------------------------------------------------------------------------------------------------ being killed


def test_killed_at_any_moment(nursery, run_id):
    """A killed process would lose more than the snapshot under way, or half of one would be restored."""
    rng = random.Random(20260419)
    last_slots, whole_counts = set(), set()

    for index in range(100):
        acknowledged, step = nursery.kill_one(
            run_id, after_count=rng.randrange(1, 6), after_seconds=rng.uniform(0, 4e-3)
        )

        told = []
        snapshots = find(run_id, tell=told.append)
        assert told == []
        assert snapshots, index
        newest = snapshots[0]
        assert newest.sequence in {acknowledged, acknowledged + 2}, index  # the next may have been told to nobody
        assert newest.step in {step, step + 1}
        for snapshot in snapshots:
            check(snapshot)
        last_slots.add(newest.path[-1])
        whole_counts.add(len(snapshots))
        sweep(run_id)
        assert find(run_id) == []
    assert (last_slots, whole_counts) == ({"0", "1"}, {1, 2})  # in the middle of a copy, and between two


def test_killed_at_every_line(tmp_path):
    """Between any two lines of making, filling, sealing and growing a slot, what was sealed before is there, and no alarm."""
    rooms = {slot.__file__, Tier.slot.__code__.co_filename}
    diary, lines = tmp_path / "diary", 0

    def work(number):
        passed = count(1)

        def trace(frame, event, _):
            if frame.f_code.co_filename not in rooms:
                return None
            if event == "line" and next(passed) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        tier = Tier("run", 1, directory=str(tmp_path))
        for step in (1, 2):
            take(tier, step)
            diary.write_text(str(step))
        tier.slot(3 << 20)
        take(tier, 3)
        sys.settrace(None)

    for number in count(1):
        diary.write_text("0")
        ended = in_child(lambda number=number: work(number))
        acknowledged, (found, told) = int(diary.read_text()), found_in(tmp_path)

        assert told == []
        for snapshot in found:
            check(snapshot)
        assert max((snapshot.step for snapshot in found), default=0) in {acknowledged, acknowledged + 1}, number
        sweep("run", directory=str(tmp_path))
        assert list(tmp_path.iterdir()) == [diary]
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        lines = number
    assert (acknowledged, found[0].step) == (2, 3)
    assert lines > 300


def test_killed_in_the_middle_of_a_copy_leaves_the_other_slot(tmp_path):
    """The bytes of the slot that is being written belong to no step."""

    def work():
        tier = Tier("run", 1, directory=str(tmp_path))
        take(tier, 1)
        take(tier, 2)
        half = tier.slot(4096)
        half.begin()
        half.view[: len(half.view) // 2] = bytes(len(half.view) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    ended = in_child(work)

    (snapshot,), told = found_in(tmp_path)
    assert (ended, told, len(list(tmp_path.iterdir()))) == (-signal.SIGKILL, [], 2)
    assert snapshot.step == 2
    check(snapshot)


def test_killed_and_not_yet_waited_for_is_dead(tmp_path):
    """A supervisor that restarts at once finds a process that is only an exit code."""
    child = os.fork()
    if child == 0:
        take(Tier("run", 1, directory=str(tmp_path)), 1)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)

    (snapshot,), _ = found_in(tmp_path)

    os.waitpid(child, 0)
    check(snapshot)


def test_a_process_whose_first_thread_has_ended_is_alive(tmp_path):
    """Its number looks dead while another of its threads still writes."""
    ready, wait = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(wait[1])
        tier = Tier("run", 1, directory=str(tmp_path))
        take(tier, 1)
        threading.Thread(target=lambda: (os.read(wait[0], 1), os._exit(0))).start()
        os.write(ready[1], b"!")
        ctypes.CDLL(None).syscall(60 if platform.machine() == "x86_64" else 93, 0)  # exit(2), of this thread alone
    os.read(ready[0], 1)
    while Path(f"/proc/{child}/stat").read_text().rpartition(") ")[2][0] != "Z":
        pass

    found, told = found_in(tmp_path)

    os.close(wait[1])
    os.waitpid(child, 0)
    for descriptor in (*ready, wait[0]):
        os.close(descriptor)
    assert (found, told) == ([], [])
    assert len(found_in(tmp_path)[0]) == 1


def test_a_data_loader_worker_that_outlives_its_parent_hides_nothing(tmp_path):
    """Workers inherit the open file, and may need a while to notice that the process that trains is gone."""
    told_pid, wait = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(wait[1])
        tier = Tier("run", 1, directory=str(tmp_path))
        take(tier, 1)
        if os.fork() == 0:
            os.write(told_pid[1], b"!")
            os.read(wait[0], 1)
            os._exit(0)
        os.read(told_pid[0], 0)
        signal.pause()
    os.read(told_pid[0], 1)  # the worker runs

    while_alive, _ = found_in(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # a supervisor may look before it has waited for it
    (snapshot,), _ = found_in(tmp_path)
    check(snapshot)
    removed = sweep("run", directory=str(tmp_path))
    os.waitpid(child, 0)

    for descriptor in (*told_pid, *wait):
        os.close(descriptor)
    assert while_alive == []
    assert removed == [snapshot.path]


def test_a_program_that_ends_without_closing_leaves_its_snapshot(start, tmp_path):
    """An exception, sys.exit or a signal that Python catches ends a process too."""
    program = (
        "import runpy, sys\n"
        "from highcamp.training.tier import Tier\n"
        "runpy.run_path(sys.argv[1])['take'](Tier('run', 1, directory=sys.argv[2]), 7)\n"
        "raise SystemExit(3)\n"
    )

    ended = start(program, WORKER, tmp_path)

    (snapshot,), _ = found_in(tmp_path)
    assert (ended.returncode, ended.stderr) == (3, "")
    assert snapshot.step == 7
    check(snapshot)


# ------------------------------------------------------------------------------------------------------------ damage


def test_every_flipped_bit_of_header_and_table_is_found(left):
    """A step, a shape or a skeleton that is not what was stored would be restored without a word."""
    whole = left.read_bytes()
    _, _, text_size = slot.FIXED.unpack(whole[: slot.FIXED.size])
    _, _, table_start, table_size, _, _ = _state(whole)
    used = [
        range(slot.FIXED.size + slot.DIGEST_BYTES),
        range(slot.STATE_START, slot.STATE_START + slot.STATE_BYTES),
        range(slot.IDENTITY_START, slot.IDENTITY_START + text_size),
        range(table_start, table_start + table_size),
    ]
    rng = random.Random(1)

    for place in [place for each in used for place in each]:
        bit = 1 << rng.randrange(8)
        with left.open("r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ bit]))
            file.flush()
            found, told = found_in(left.parent)
            file.seek(place)
            file.write(bytes([whole[place]]))

        assert found == [], place
        assert len(told) == 1, place
    check(found_in(left.parent)[0][0])


def test_a_flipped_bit_of_the_data_is_found_and_named(left):
    """Wrong weights look like right ones."""
    size = len(left.read_bytes())
    ends = [LAYOUTS[MODEL].size, LAYOUTS[MODEL].size + LAYOUTS[OPTIMIZER].size]
    assert size > slot.HEADER_BYTES + ends[-1]

    for place, name in [(0, MODEL), (ends[0] - 1, MODEL), (ends[0], OPTIMIZER), (ends[1] - 1, OPTIMIZER)]:
        with left.open("r+b") as file:
            file.seek(slot.HEADER_BYTES + place)
            before = file.read(1)
            file.seek(slot.HEADER_BYTES + place)
            file.write(bytes([before[0] ^ 4]))
            file.flush()
            (snapshot,), _ = found_in(left.parent)
            with pytest.raises(Damaged, match=f"the bytes of {name} differ from their digest; .*newest checkpoint"):
                snapshot.verify()
            file.seek(slot.HEADER_BYTES + place)
            file.write(before)
    check(found_in(left.parent)[0][0])


def test_what_is_written_to_while_it_is_read_is_damaged(tmp_path):
    """A process in another container may live although it cannot be looked up."""
    tier = Tier("run", 1, directory=str(tmp_path))
    take(tier, 1)
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    path = copy / Path(tier.newest.path).name
    path.hardlink_to(tier.newest.path)
    tier.close(keep=True)
    (snapshot,), _ = found_in(copy)
    snapshot.verify()

    with path.open("r+b") as file:
        file.seek(slot.STATE_START)
        file.write(bytes(8))

    with pytest.raises(Damaged, match="was written to while it was read"):
        snapshot.verify()


def test_a_file_cut_short_is_never_offered(left):
    """Mapping bytes that are not there would kill the process that restores."""
    whole = left.read_bytes()
    _, _, start, table_size, _, _ = _state(whole)

    for size in [1, *range(4093, start + table_size, 4093), start, start + table_size - 1]:
        os.truncate(left, size)
        found, told = found_in(left.parent)
        assert found == [], size
        assert len(told) == 1, size
        left.write_bytes(whole)
    check(found_in(left.parent)[0][0])


def _state(whole):
    return slot.STATE.unpack(whole[slot.STATE_START : slot.STATE_START + slot.STATE.size])


def _forge(path, table=None, **changes):
    """Replace the table, or numbers of the state, and put the digests right."""
    whole = bytearray(path.read_bytes())
    names = ("sequence", "data_size", "start", "table_size", "text_size", "digest")
    state = dict(zip(names, _state(whole), strict=True))
    if table is not None:
        whole[state["start"] :] = table
        state |= {"table_size": len(table), "text_size": len(table)}
        state["digest"] = digest(table).encode()
    body = slot.STATE.pack(*(state | changes).values())
    whole[slot.STATE_START : slot.STATE_START + slot.STATE_BYTES] = body + digest(body).encode()
    path.write_bytes(whole)


def _table(path):
    whole = path.read_bytes()
    _, _, start, table_size, text_size, _ = _state(whole)
    return whole[start : start + text_size], whole[start + text_size : start + table_size]


HOSTILE = {
    "no JSON": b"{",
    "not UTF-8": b'{"facts":{"step":1},"files":[],"\xff":1}',
    "NaN": b'{"facts":{"step":1,"loss":NaN},"files":[]}',
    "a key twice": b'{"facts":{"step":1,"step":2},"files":[]}',
    "deep": b'{"facts":{"step":1,"x":' + b"[" * 5000 + b"]" * 5000 + b'},"files":[]}',
    "a list": b"[]",
    "empty": b"",
    "no facts": b'{"files":[]}',
    "no files": b'{"facts":{"step":1}}',
    "another key": b'{"facts":{"step":1},"files":[],"code":"x"}',
    "no step": b'{"facts":{},"files":[]}',
    "a step below zero": b'{"facts":{"step":-1},"files":[]}',
    "a step that is true": b'{"facts":{"step":true},"files":[]}',
    "a step that is a fraction": b'{"facts":{"step":1.5},"files":[]}',
    "too many files": b'{"facts":{"step":1},"files":['
    + b",".join([b'{"name":"a","offset":0,"size":0,"header":0,"digest":""}'] * (slot.MAX_FILES + 1))
    + b"]}",
}  # fmt: skip
HOSTILE_ROWS = {
    "a path as name": {"name": "../../etc/passwd"},
    "a name twice": {"name": OPTIMIZER},
    "an offset below zero": {"offset": -1},
    "an offset outside": {"offset": 1 << 40},
    "an offset beyond 64 bits": {"offset": 1 << 70},
    "a size outside": {"size": 1 << 40},
    "another size": {"size": LAYOUTS[MODEL].size - 4},
    "a header outside": {"header": 1 << 30},
    "another header": {"header": 4096 * 2},
    "a digest that is a number": {"digest": 5},
    "one more key": {"mode": "x"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_table_is_refused(left, name):
    """Everything read back is checked: what can be written there by mistake can be anything."""
    _forge(left, HOSTILE[name])

    found, told = found_in(left.parent)

    assert found == []
    assert len(told) == 1
    assert name != "too many files" or "at most 10000 are read" in told[0]


@pytest.mark.parametrize("name", HOSTILE_ROWS)
def test_a_hostile_file_in_the_table_is_refused(left, name):
    """An offset outside of the map would show, or overwrite, what is not the snapshot's."""
    text, headers = _table(left)
    value = strict.read(text, where="table", limit=1 << 20)
    value["files"][0] |= HOSTILE_ROWS[name]
    text = strict.write(value)
    _forge(left, text + headers, text_size=len(text))

    found, told = found_in(left.parent)

    assert found == []
    assert len(told) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"data_size": 0},
        {"data_size": 1 << 62},
        {"start": 0},
        {"start": 1 << 62},
        {"table_size": 1 << 62},
        {"table_size": 10},
        {"text_size": 1 << 20},
        {"digest": b"md5:00"},
    ],
    ids=str,
)
def test_hostile_sizes_are_refused(left, changes):
    """A size is memory that is asked for, or a place that is read."""
    _forge(left, **changes)

    found, told = found_in(left.parent)

    assert found == []
    assert len(told) == 1


def test_a_table_that_says_more_than_is_accounted_for_is_refused(left):
    """Bytes that nobody reads are the sign of a table that was put together wrongly."""
    text, headers = _table(left)
    _forge(left, text + headers + b"x", text_size=len(text))

    found, told = found_in(left.parent)

    assert found == []
    assert "are accounted for" in told[0]


def test_a_table_beyond_the_limit_is_not_even_read(left):
    """A size of a hundred gigabytes costs nothing in a file with holes, and all memory when it is read."""
    os.truncate(left, 100 << 30)
    with left.open("r+b") as file:
        state = _state(file.read(slot.HEADER_BYTES))
        body = slot.STATE.pack(*state[:3], slot.MAX_TABLE_BYTES + 1, *state[4:])
        file.seek(slot.STATE_START)
        file.write(body + digest(body).encode())

    found, told = found_in(left.parent)

    assert found == []
    assert "sizes that do not fit together" in told[0]


def test_random_tables_are_refused_or_right(left):
    """No damage may end in another error than the one that says that the snapshot is damaged."""
    rng = random.Random(7)
    whole, (text, headers) = left.read_bytes(), _table(left)

    for _ in range(400):
        changed = bytearray(text + headers)
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(text) + 100)
            changed[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        _forge(left, bytes(changed), text_size=len(text))
        found, told = found_in(left.parent)
        assert len(found) + len(told) == 1
        left.write_bytes(whole)


# -------------------------------------------------------------------------------------------------------- whose it is


def test_the_snapshot_of_a_live_process_is_not_offered(tier, run_id, start):
    """Two processes would go on from one state, and one would read what the other writes."""
    take(tier, 1)

    other = start(f"from highcamp.training.tier import find, sweep; print(find({run_id!r}), sweep({run_id!r}))")

    assert other.stdout == "[] []\n"
    assert find(run_id) == []
    assert sweep(run_id) == []
    assert len([path for path in Path(SHM).iterdir() if run_id in path.name]) == 1


def test_another_boot_is_not_offered_and_is_swept(tmp_path):
    """After a restart of the machine process numbers mean nothing, and memory cannot have survived."""
    left_by("run", tmp_path, boot="0e5c0b2c-0000-4000-8000-000000000000")
    path = left_by("other", tmp_path, boot="0e5c0b2c-0000-4000-8000-000000000000")

    found, told = found_in(tmp_path)
    removed = sweep("run", directory=str(tmp_path))

    assert (found, told) == ([], [])
    assert str(path) in removed
    assert list(tmp_path.iterdir()) == []


def test_a_container_that_was_restarted_finds_its_snapshot(tmp_path):
    """Its process numbers are new, and shared memory often survives: nobody has the file open, so nobody lives."""
    path = left_by("run", tmp_path, namespace=1, pid=1, started=5)

    (snapshot,), _ = found_in(tmp_path)

    assert snapshot.path == str(path)


def test_a_process_in_another_container_is_alive_as_long_as_the_file_is_open(tmp_path):
    """It cannot be looked up from here, and its process number may be anybody's."""
    owner = msgspec.structs.replace(identity.current("run", 1, None), namespace=1)
    made = Slot(str(tmp_path / slot.file_name(owner, 0)), owner, 4096, count(1, 2))
    _seal(made, 1)

    found, _ = found_in(tmp_path)
    removed = sweep("run", directory=str(tmp_path))

    made.release()
    assert (found, removed) == ([], [])
    assert len(found_in(tmp_path)[0]) == 1


def test_a_process_number_that_was_used_again_is_not_the_owner(tmp_path):
    """Process 1234 of today is not process 1234 of yesterday."""
    owner = msgspec.structs.replace(identity.current("run", 1, None), started=1)
    made = Slot(str(tmp_path / slot.file_name(owner, 0)), owner, 4096, count(1, 2))
    _seal(made, 1)

    found, _ = found_in(tmp_path)  # the file is still open, as if a data-loader worker were left

    made.release()
    assert len(found) == 1


def test_a_file_named_for_another_run_is_not_offered(left):
    """A file that was renamed by hand still holds the state of the run it was taken from."""
    left.rename(left.with_name(left.name.replace("-run-", "-other-")))

    found, told = found_in(left.parent, "other")

    assert found == []
    assert "attempt 1 of the run 'run'" in told[0]


def test_the_copy_of_a_run_leaves_the_snapshots_of_the_first_alone(tmp_path):
    """A copied directory has the same run id; it would take, and remove, what it never computed."""
    (tmp_path / "first").mkdir()
    (tmp_path / "copy").mkdir()
    left_by("run", tmp_path, place=tmp_path / "first")
    where = {"directory": str(tmp_path)}

    by_the_copy = find("run", place=tmp_path / "copy", **where), sweep("run", place=tmp_path / "copy", **where)
    (tmp_path / "first").rename(tmp_path / "moved")
    by_the_moved = find("run", place=tmp_path / "moved", **where)

    assert by_the_copy == ([], [])
    assert len(by_the_moved) == 1


def test_a_directory_whose_name_is_no_text_is_known_again(tmp_path):
    """Paths are bytes: not every one can be spelled in JSON."""
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff\xfe"))
    place.mkdir()
    left_by("run", tmp_path, place=place)

    assert len(find("run", place=place, directory=str(tmp_path))) == 1
    place.rmdir()


def test_a_planted_link_or_fifo_is_neither_followed_nor_waited_for(tmp_path, left):
    """Anybody may make files in /dev/shm; a link there would let them choose what is overwritten, or read."""
    target = tmp_path / "target"
    target.write_bytes(left.read_bytes())
    owner = identity.current("run", 2, None)
    names = [slot.file_name(owner, index) for index in (0, 1)]
    (tmp_path / names[0]).symlink_to(target)
    os.mkfifo(tmp_path / names[1], 0o600)
    (tmp_path / slot.file_name(identity.current("run", 3, None), 0)).mkdir()

    found, told = found_in(tmp_path)
    with pytest.raises(Taken, match="is there already; it was not touched; .*copy of this run"):
        Tier("run", 2, directory=str(tmp_path)).slot(4096)
    removed = sweep("run", directory=str(tmp_path))

    assert [snapshot.path for snapshot in found] == [str(left)] == removed
    assert sorted(each.split(" is ")[1].split(",")[0] for each in told) == ["a FIFO", "a directory", "a symbolic link"]
    assert (tmp_path / names[0]).is_symlink()
    assert target.read_bytes()[: len(slot.MAGIC)] == slot.MAGIC


def test_a_file_that_others_may_read_or_write_is_not_read(left):
    """What somebody else could have written is not a state to go on from."""
    left.chmod(0o620)

    found, told = found_in(left.parent)

    assert found == []
    assert "with mode 0620, expected user" in told[0]


@as_root
def test_another_user_neither_finds_nor_plants_a_snapshot(tmp_path, nursery, run_id):
    """On a shared machine, weights are read by their user alone, and nobody slips in others."""
    nursery.kill_one(run_id, after_count=2, uid=NOBODY)
    (path, *_) = sorted(each for each in Path(SHM).iterdir() if run_id in each.name)

    def look_as_the_other():
        os.setuid(NOBODY)
        snapshots = find(run_id)
        check(snapshots[0])
        Tier(run_id, 9).close()
        sweep(run_id)

    def look_as_a_third():
        os.setuid(NOBODY - 1)
        with pytest.raises(PermissionError):
            path.read_bytes()
        if find(run_id) or sweep(run_id):
            raise AssertionError

    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (NOBODY, 0o600)
    assert find(run_id) == []
    assert sweep(run_id) == []
    planted = tmp_path / path.name.replace(f"-{NOBODY}-", f"-{os.geteuid()}-")
    planted.write_bytes(path.read_bytes())
    planted.chmod(0o600)
    os.chown(planted, NOBODY, NOBODY)
    found, told = found_in(tmp_path, run_id)
    assert found == []
    assert f"belongs to user {NOBODY} with mode 0600, expected user 0" in told[0]
    assert sweep(run_id, directory=str(tmp_path)) == []
    assert in_child(look_as_a_third) == 0
    assert in_child(look_as_the_other) == 0


# ------------------------------------------------------------------------------------------------------ too little memory


@as_root
def test_memory_that_is_too_small_is_an_error_with_sizes_and_never_a_bus_error(tmp_path):
    """The 64 MB of a container are full at once; a missing page would kill training in the middle of a copy."""
    with mounted(tmp_path / "shm", "1m") as directory:

        def work():
            tier = Tier("run", 1, directory=str(directory))
            with pytest.raises(StorageError, match=r"needs 4\.2 MB more, 1\.0 MB are free; .*--shm-size") as caught:
                tier.slot(2 << 20)
            if caught.value.errno != 28 or list(directory.iterdir()) or tier.size_bytes:
                raise AssertionError(list(directory.iterdir()))
            with pytest.raises(StorageError, match="MB are free"):
                Slot(str(directory / "one"), tier._identity, 2 << 20, count(1, 2))  # as if somebody had been faster
            if list(directory.iterdir()):
                raise AssertionError(list(directory.iterdir()))

        assert in_child(work) == 0


@as_root
def test_memory_that_runs_out_later_leaves_the_snapshot_there_is(tmp_path):
    """The optimizer's state appears after the first step, and a table may outgrow its room: both may fail, and do no harm."""
    with mounted(tmp_path / "shm", "1m") as directory:

        def work():
            tier = Tier("run", 1, directory=str(directory))
            take_small(tier, 1)
            with pytest.raises(StorageError, match="MB are free"):
                tier.slot(600 << 10)  # refused beforehand
            take_small(tier, 2)
            entry = tier.slot(300 << 10)
            before = Path(entry.path).stat().st_size
            with pytest.raises(StorageError, match="MB are free"):
                entry.grow(900 << 10)  # refused by the file system, half-way
            if Path(entry.path).stat().st_size > before:
                raise AssertionError
            entry.begin()
            entry.view[:] = bytes([5]) * len(entry.view)  # every page is there
            with pytest.raises(StorageError, match="MB are free"):
                entry.seal({"step": 3, "text": "x" * (700 << 10)}, [])
            if entry.is_complete or tier.newest is entry:
                raise AssertionError
            os.kill(os.getpid(), signal.SIGKILL)

        def take_small(tier, step):
            entry = tier.slot(300 << 10)
            entry.begin()
            entry.seal({"step": step}, [])

        assert in_child(work) == -signal.SIGKILL
        found, told = found_in(directory)
        assert ([snapshot.step for snapshot in found], told) == ([2], [])


@as_root
def test_growing_in_vain_gives_back_what_was_taken(tmp_path):
    """Large slots are allocated piece by piece; the first pieces of one that does not fit would be missing ever after."""
    with mounted(tmp_path / "shm", "100m") as directory:

        def work():
            tier = Tier("run", 1, directory=str(directory))
            entry = tier.slot(1 << 20)
            before = Path(entry.path).stat().st_blocks
            with pytest.raises(StorageError, match="MB are free"):
                entry.grow(150 << 20)
            if Path(entry.path).stat().st_blocks > before:
                raise AssertionError
            take(tier, 1)
            tier.close()

        assert in_child(work) == 0


@as_root
def test_more_than_the_machine_has_is_refused_beforehand(tmp_path):
    """A file system in memory may promise more than there is; the kernel would kill training to keep the promise."""
    with mounted(tmp_path / "shm", "1t") as directory:

        def work():
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))  # should the check be missing
            with pytest.raises(StorageError, match=r"needs 10995\d\d\.\d MB more"):
                Tier("run", 1, directory=str(directory)).slot((1 << 40) // 2 - (1 << 20))

        assert in_child(work) == 0


def test_a_limit_on_file_sizes_is_named(tmp_path):
    """What `ulimit -f` limits are files in memory too."""

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with pytest.raises(StorageError, match="EFBIG.*ulimit -f"):
            Tier("run", 1, directory=str(tmp_path)).slot(2 << 20)

    assert in_child(work) == 0
    assert list(tmp_path.iterdir()) == []


def test_without_shared_memory_there_is_a_clear_error(tmp_path):
    """On macOS the caller turns the tier off, and has to know why."""
    with pytest.raises(StorageError, match="there is no shared memory at .*nowhere.*; memory_every needs Linux"):
        Tier("run", 1, directory=str(tmp_path / "nowhere"))
    assert find("run", directory=str(tmp_path / "nowhere")) == []
    assert sweep("run", directory=str(tmp_path / "nowhere")) == []


@pytest.mark.parametrize("run_id", ["../run", "a/b", "", ".run", "x" * 101])
def test_a_run_id_that_is_a_path_is_refused(run_id, tmp_path):
    """It comes from a file, and becomes the name of one."""
    for call in (lambda: Tier(run_id, 1), lambda: find(run_id), lambda: sweep(run_id)):
        with pytest.raises(InvalidArgument, match="cannot become a file name"):
            call()


# ---------------------------------------------------------------------------------------------------------------- forks


def test_a_forked_child_neither_breaks_nor_removes_anything(tier, run_id):
    """Data-loader workers end all the time, and take their copies of our objects with them."""
    take(tier, 1)
    before = tier.newest

    def work():
        for call in (before.begin, lambda: before.seal({"step": 1}, [])):
            with pytest.raises(StorageError, match="belongs to process .*, from which this one was forked"):
                call()
        with pytest.raises(StorageError, match="was forked"):
            tier.slot(4096)
        tier.close()
        tier._slots.clear()

    def fresh():
        with pytest.raises(InvalidArgument, match="was forked"):
            empty.slot(4096)

    empty = Tier(run_id, 2)
    ended = in_child(work), in_child(fresh)
    take(tier, 2)
    take(tier, 3)

    assert ended == (0, 0)
    assert find(run_id) == []  # still ours, and still locked
    tier.close(keep=True)
    (snapshot,) = find(run_id)
    check(snapshot)
    snapshot.remove()


def test_a_started_program_does_not_inherit_the_memory(tier, run_id):
    """A program started by training would keep gigabytes that nobody can see."""
    take(tier, 1)
    code = "import os; print([os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if n != '3'])"

    listed = subprocess.check_output([sys.executable, "-c", code], close_fds=False, text=True)

    assert run_id not in listed


# ------------------------------------------------------------------------------------------------------------ taking turns


def test_slots_take_turns_and_are_reused(tier):
    """Fresh memory at every snapshot would cost several times the copy."""
    sequences = [take(tier, step) for step in range(1, 6)]
    sizes = tier.size_bytes
    places = set()
    for step in range(6, 10):
        before = tier.newest
        take(tier, step)
        assert tier.newest is not before
        places.add(np.frombuffer(tier.newest.view, np.uint8).__array_interface__["data"][0])

    assert sequences == [2, 4, 6, 8, 10]
    assert len(places) == 2
    assert all(place % 4096 == 0 for place in places)
    assert tier.size_bytes == sizes


def test_a_slot_grows_with_the_state_and_keeps_its_memory_when_that_shrinks(tier, run_id):
    """An optimizer has no state before its first step; the snapshot of that step must not go with the small slot."""
    take(tier, 1)
    take(tier, 2)
    kept, free = tier.newest, tier.slot(4096)
    old_view = free.view

    grown = tier.slot(3 << 20)
    assert grown is free
    old_view[:3] = b"abc"
    assert (bytes(grown.view[:3]), len(grown.view), grown.is_complete) == (b"abc", 3 << 20, False)
    assert (tier.newest, kept.is_complete) == (kept, True)
    assert len(tier.slot(10).view) == 3 << 20
    take(tier, 3)

    tier.close(keep=True)
    (snapshot,) = find(run_id)
    check(snapshot)
    snapshot.remove()


def test_prepared_slots_are_those_used(tier):
    """What is made ahead, in the background, is memory that no snapshot waits for."""
    tier.prepare(1 << 20)
    tier.prepare(1 << 20)
    before = tier.size_bytes

    take(tier, 1)
    take(tier, 2)

    assert before >= 2 << 20
    assert tier.size_bytes - before < 1 << 17  # the tables


def test_a_table_grows_with_the_facts(tmp_path):
    """Metrics and skeletons are as large as they are."""
    tier = Tier("run", 1, directory=str(tmp_path))
    for step, length in enumerate([10, 100_000, 1_000_000, 20]):
        entry = tier.slot(10)
        entry.begin()
        entry.seal({"step": step, "text": "x" * length}, [])
        path = Path(entry.path)
    tier.close(keep=True)

    (snapshot,), _ = found_in(tmp_path)

    assert (snapshot.path, snapshot.step, len(snapshot.facts["text"])) == (str(path), 3, 20)


def test_newest_first_by_step_then_attempt_then_sequence(tmp_path):
    """The attempt that went back to an older step has not made the newer one older."""
    for attempt, step in [(3, 7), (2, 9), (4, 7)]:
        left_by("run", tmp_path, step=step, attempt=attempt)
    both = Tier("run", 5, directory=str(tmp_path))
    both.close()

    found, _ = found_in(tmp_path)

    assert [(snapshot.step, snapshot.identity.attempt) for snapshot in found] == [(9, 2), (7, 4), (7, 3)]


def test_runs_with_similar_names_are_kept_apart(tmp_path):
    """A run called digits-2 is not attempt 2 of digits."""
    left_by("digits-2", tmp_path)
    left_by("digits", tmp_path)

    assert [snapshot.identity.run_id for snapshot in found_in(tmp_path, "digits")[0]] == ["digits"]
    assert [snapshot.identity.run_id for snapshot in found_in(tmp_path, "digits-2")[0]] == ["digits-2"]


def _file(name="model.safetensors", offset=0, **options):
    return SlotFile(name, LAYOUTS[MODEL], offset, **options)


@pytest.mark.parametrize(
    ("facts", "files", "error", "words"),
    [
        ({}, [], InvalidArgument, "have the step None"),
        ({"step": True}, [], InvalidArgument, "have the step True"),
        ({"step": -1}, [], InvalidArgument, "have the step -1"),
        ({"step": 1, "loss": float("nan")}, [], InvalidState, "cannot be written as JSON"),
        ({"step": 1, "seen": {1, 2}}, [], InvalidState, "cannot be written as JSON"),
        ({"step": 1}, [_file("a/b")], InvalidArgument, "cannot become a file name"),
        ({"step": 1}, [_file(), _file(offset=512 << 10)], InvalidArgument, "twice"),
        ({"step": 1}, [_file(), _file("other", 4096)], InvalidArgument, "overlaps"),
        ({"step": 1}, [_file(offset=-4096)], InvalidArgument, "overlaps"),
        ({"step": 1}, [_file(offset=1 << 20)], InvalidArgument, "ends at byte 1310720, the slot has 1048576"),
        ({"step": 1}, [_file(str(n)) for n in range(slot.MAX_FILES + 1)], InvalidArgument, "at most 10000"),
    ],
)
def test_what_cannot_be_found_again_is_not_sealed(tmp_path, facts, files, error, words):
    """An error after the crash would come too late."""
    tier = Tier("run", 1, directory=str(tmp_path))
    entry = tier.slot(1 << 20)
    entry.begin()

    with pytest.raises(error, match=words):
        entry.seal(facts, files)

    assert not entry.is_complete
    entry.seal({"step": 1}, [_file()])
    assert tier.newest is entry
    tier.close()


def test_sealing_without_beginning_is_refused(tier):
    """Bytes copied over a complete snapshot would belong to it until the process dies."""
    take(tier, 1)

    with pytest.raises(InvalidArgument, match="nothing was written into; call begin"):
        tier.newest.seal({"step": 2}, [])


def test_a_digest_that_is_known_is_not_computed_again(tmp_path):
    """The writer hashes what it writes; the bytes are compared with that digest when they are found."""
    tier = Tier("run", 1, directory=str(tmp_path))
    entry = tier.slot(1 << 20)
    entry.begin()
    entry.seal({"step": 1}, [_file(digest=digest(bytes(LAYOUTS[MODEL].size))), _file("b", 512 << 10, digest="x")])
    tier.close(keep=True)

    (snapshot,), _ = found_in(tmp_path)

    assert snapshot.files[0].digest == digest(snapshot.files[0].data)
    with pytest.raises(Damaged, match="the bytes of b differ"):
        snapshot.verify()


# ----------------------------------------------------------------------------------------------------------- the end


def test_closing_removes_both_files(run_id):
    """Memory that nobody uses would be missing until the machine is restarted."""
    tier = Tier(run_id, 1)
    for step in (1, 2, 3):
        take(tier, step)
    view = tier.newest.view
    paths = [path for path in Path(SHM).iterdir() if run_id in path.name]

    tier.close()
    tier.close()

    assert len(paths) == 2
    assert not any(path.exists() for path in paths)
    assert tier.newest is None
    assert len(view) > 0  # whoever still looks at it may
    with pytest.raises(InvalidArgument, match="closed"):
        tier.slot(10)


def test_a_slot_that_is_closed_is_not_written(tier):
    """The next attempt may be reading it."""
    take(tier, 1)
    entry = tier.newest
    tier.close()

    for call in (entry.begin, lambda: entry.seal({"step": 1}, [])):
        with pytest.raises(InvalidArgument, match="is closed"):
            call()


def test_closing_after_an_error_keeps_the_newest_alone(tmp_path):
    """The next attempt, in this process or another, goes on from it; the older one is only memory."""
    tier = Tier("run", 1, directory=str(tmp_path))
    take(tier, 1)
    take(tier, 2)
    views = tier.newest.view, tier.slot(10).view  # still in use, as a notebook keeps them

    tier.close(keep=True)

    (snapshot,), _ = found_in(tmp_path)
    assert snapshot.step == 2
    assert len(list(tmp_path.iterdir())) == 1
    check(snapshot)
    assert all(len(view) for view in views)


def test_closing_leaves_what_somebody_else_put_there(tmp_path):
    """A file under our name need not be ours any more."""
    tier = Tier("run", 1, directory=str(tmp_path))
    take(tier, 1)
    path = Path(tier.newest.path)
    path.unlink()
    path.write_text("somebody else's")

    tier.close()

    assert path.read_text() == "somebody else's"


def test_a_snapshot_is_valid_after_it_was_removed(left):
    """It is committed to disk, then removed, then restored from."""
    (snapshot,), _ = found_in(left.parent)

    snapshot.remove()
    snapshot.remove()

    assert not left.exists()
    check(snapshot)
    with pytest.raises(TypeError):
        snapshot.files[0].data[0] = 0


def test_sweeping_takes_what_is_dead_and_of_no_use_and_nothing_else(tmp_path):
    """Gigabytes of dead runs must not fill the memory; a run that will be resumed must not lose its snapshot."""
    gone, there = tmp_path / "gone", tmp_path / "there"
    gone.mkdir()
    there.mkdir()
    names = {
        "own": left_by("run", tmp_path, attempt=1),
        "own, damaged": left_by("run", tmp_path, attempt=2),
        "own, newer format": left_by("run", tmp_path, attempt=3),
        "own, empty": tmp_path / f"highcamp-{os.geteuid()}-run-4.0",
        "gone": left_by("gone", tmp_path, place=gone),
        "damaged": left_by("damaged", tmp_path),
        "resumable": left_by("resumable", tmp_path, place=there),
        "remote": left_by("remote", tmp_path),
        "newer format": left_by("newer", tmp_path),
        "in the making": tmp_path / f"highcamp-{os.geteuid()}-new-1.0",
        "not ours": tmp_path / "highcamp-settings.json",
        "nor this": tmp_path / f"highcamp-{os.geteuid()}-run-1.2",
    }
    gone.rmdir()
    for name in ("own, damaged", "damaged"):
        names[name].write_bytes(b"x" * 100_000)
    for name in ("own, newer format", "newer format"):
        with names[name].open("r+b") as file:
            file.write(slot.FIXED.pack(slot.MAGIC, slot.FORMAT + 1, 5))
    for name in ("own, empty", "in the making", "not ours", "nor this"):
        names[name].touch(0o600)
    found, told = found_in(tmp_path)

    sweep("run", directory=str(tmp_path))

    left = {name for name, path in names.items() if path.exists()}
    assert left == {"resumable", "remote", "newer format", "in the making", "not ours", "nor this"}
    assert [snapshot.path for snapshot in found] == [str(names["own"])]
    assert len(told) == 2


def test_a_newer_format_is_told_as_such(left):
    """It is not damaged: another version of highcamp wrote it."""
    with left.open("r+b") as file:
        file.write(slot.FIXED.pack(slot.MAGIC, slot.FORMAT + 1, 5))
    told = []

    assert find("run", directory=str(left.parent), tell=told.append) == []

    assert isinstance(told[0], Unreadable)
    assert "has format version 2, this highcamp reads 1; start again with the version that wrote it" in str(told[0])
