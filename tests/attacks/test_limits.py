"""Every limit on what is read: at the limit it is read, one past it is refused, and refusing takes little memory.

The limits of JSON are in tests/core/test_strict.py, those that hold when writing beside what is written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import attack_parsers as parsers
import msgspec
import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Damaged, Every, Keep
from highcamp.core import manifest as manifests
from highcamp.core import names, plain, strict, tensorfile
from highcamp.core.digest import digest
from highcamp.core.manifest import Manifest
from highcamp.core.tree import unflatten
from highcamp.errors import InvalidArgument, InvalidState
from highcamp.run import commit, history, owner, run, settings
from highcamp.run.history import Event, HistoryReader
from highcamp.run.owner import Owner
from highcamp.run.settings import Settings
from highcamp.storage.memory import MemoryStore
from highcamp.training import slot

ROOT = Path(highcamp.__file__).parents[1]


def tensor_file(*entries, metadata=""):
    """Empty tensors of these names and shapes."""
    table = ",".join(
        f'"{name}":{{"dtype":"U8","shape":[{",".join(map(str, shape))}],"data_offsets":[0,0]}}'
        for name, shape in entries
    )
    text = f"{{{metadata}{table}}}".encode()
    return len(text).to_bytes(8, "little") + text


def manifest_of(size):
    """A manifest of this many bytes."""
    made = Manifest(run_id="", step=1, epoch=1, sequence=1, attempt=1, created_at="")
    return manifests.encode(msgspec.structs.replace(made, run_id="r" * (size - len(manifests.encode(made)))))


def padded(value, size):
    """JSON of this many bytes."""
    return msgspec.json.encode(value).ljust(size)


def row(size):
    """A history file with one row of this many bytes, its end not counted, behind the first one."""
    first = msgspec.json.encode(Event(event="start", at=""))
    event = Event(event="log", at="", metrics={"": 1.0})
    empty = len(msgspec.json.encode(event))
    return first + b"\n" + msgspec.json.encode(Event(event="log", at="", metrics={"m" * (size - empty): 1.0})) + b"\n"


def tree_of(depth):
    """Lists inside each other."""
    value = []
    for _ in range(depth):
        value = [value]
    return unflatten(value, lambda _: None)


def pins(data):
    """What a run makes of one pin."""
    store = MemoryStore()
    store.replace("pins/paper.json", data)
    return run.Run(store).pins or None


def rows(data):
    """The rows that are read; None if there are none."""
    store = MemoryStore()
    store.append("history/attempt-0001.jsonl", data, durable=True)
    return HistoryReader(store).read().rows or None


def metadata_of(count):
    """So many pairs beside the tensors."""
    return f'"__metadata__":{{{",".join(f"{json.dumps(str(place))}:{json.dumps(str())}" for place in range(count))}}},'


OWNER = Owner(host="h", boot="b", namespace="n", pid=1, started="2", since="s")
READS = {
    "bytes of a header": (
        lambda size: tensorfile.header_bytes((size - 8).to_bytes(8, "little"), 1 << 40, "f"), tensorfile.MAX_HEADER_BYTES,
    ),
    "bytes of a tensor's name": (
        lambda size: parsers.read_tensor_file(tensor_file(("n" * size, (0,)))), tensorfile.MAX_NAME_BYTES,
    ),
    "axes of a tensor": (
        lambda count: parsers.read_tensor_file(tensor_file(("n", (0,) * count))), tensorfile.MAX_DIMENSIONS,
    ),
    "metadata beside tensors": (
        lambda count: parsers.read_tensor_file(tensor_file(("n", (0,)), metadata=metadata_of(count))),
        tensorfile.MAX_METADATA_PAIRS,
    ),
    "bytes of a manifest": (lambda size: manifests.decode(manifest_of(size), where="m"), manifests.MAX_MANIFEST_BYTES),
    "containers in a state": (tree_of, plain.MAX_DEPTH),
    "depth of state.json": (
        lambda depth: strict.read(b"[" * depth + b"]" * depth, where="s", limit=4096, max_depth=commit.MAX_STATE_DEPTH),
        commit.MAX_STATE_DEPTH,
    ),
    "depth of any other JSON": (
        lambda depth: strict.read(b"[" * depth + b"]" * depth, where="s", limit=4096), strict.MAX_DEPTH,
    ),
    "bytes of run.json": (
        lambda size: parsers.read_settings(padded(Settings(run_id="r", created_at=""), size)), settings.MAX_RUN_BYTES,
    ),
    "bytes of owner.json": (lambda size: parsers.read_owner(padded(OWNER, size)), owner.MAX_OWNER_BYTES),
    "bytes of a pin": (lambda size: pins(padded({"checkpoint": "step-00000001"}, size)), run.MAX_PIN_BYTES),
    "bytes of a row of the history": (lambda size: rows(row(size)), history.MAX_LINE_BYTES),
    "characters of a file's name": (lambda size: names.check_name("n" * size, "name"), names.MAX_NAME_CHARACTERS),
}  # fmt: skip


@pytest.mark.parametrize("what", READS)
def test_at_the_limit_it_is_read_and_one_past_it_is_not(what):
    """A limit that is off by one refuses what we have written, and one that is not looked at is none."""
    read, limit = READS[what]

    assert read(limit) is not None
    try:
        found = read(limit + 1)
    except (Damaged, InvalidArgument):
        found = None
    assert found is None


@pytest.mark.parametrize(
    ("room", "name", "file"),
    [
        (commit, "MAX_STATE_BYTES", "checkpoints/step-00000001/state.json"),
        (history, "MAX_HISTORY_BYTES", "history/attempt-0001.jsonl"),
    ],
)
def test_limits_too_large_to_be_tried_in_earnest(tmp_path, monkeypatch, room, name, file):
    """The same, for files of hundreds of MB; the limit is brought down to the file instead."""
    with Checkpointer(tmp_path, every=Every(steps=1), verbose=0) as checkpointer:
        checkpointer.save({"model": {"w": np.zeros(3)}}, step=1)
    size = (tmp_path / file).stat().st_size

    def read():
        found = highcamp.open(tmp_path)
        return found.history, found.checkpoints[0].state("model")

    monkeypatch.setattr(room, name, size)
    assert read()
    monkeypatch.setattr(room, name, size - 1)
    with pytest.raises(Damaged):
        read()


def test_a_million_tensors_and_one_are_refused_before_any_text_is_made():
    """No header could hold them, and finding that out entry by entry would take a minute."""
    with pytest.raises(InvalidState, match="1000001 tensors in one file, at most 1000000"):
        tensorfile.plan(dict.fromkeys(range(tensorfile.MAX_TENSORS + 1)), {})


@pytest.mark.parametrize(("limit", "value"), [("MAX_TABLE_BYTES", 3), ("MAX_FILES", 0), ("MAX_IDENTITY_BYTES", 2)])
def test_limits_of_a_slot(tmp_path, monkeypatch, limit, value):
    """Shared memory is read before anything is known of who wrote it."""
    from highcamp.training import identity

    known = identity.current("run", 1, None)
    made = slot.Slot(str(tmp_path / slot.file_name(known, 0)), known, 4096, iter([1]))
    made.begin()
    made.seal({"step": 3}, [slot.SlotFile("a.safetensors", tensorfile.plan({"w": ("U8", (8,))}, {}), 0)])
    path = Path(made.path)
    made.release()
    data = path.read_bytes()

    assert parsers.read_slot(data, path).step == 3
    monkeypatch.setattr(slot, limit, value)
    with pytest.raises(Damaged):
        parsers.read_slot(data, path)


MEASURED = """
import resource, sys
import numpy, highcamp
from highcamp import Damaged
from highcamp.run import verify
run = highcamp.open(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refused = 0
for call in ("load", "state", "verify", "structure", "restore", "history"):
    try:
        checkpoint = run.checkpoints[0]
        if call == "structure":
            verify.verify_structure(checkpoint)
        elif call == "restore":
            checkpoint.restore(model={"w": numpy.zeros(3)})
        elif call == "history":
            run.history.rows
        else:
            getattr(checkpoint, call)(*([] if call == "verify" else ["model"]))
    except Damaged:
        refused += 1
print(refused, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def hostile_header():
    """70 MB of a header that names 900,000 tensors: other libraries take ten seconds and 2 GB for it."""
    entry = '"layers.%06d.weight":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(entry % place for place in range(900_000)) + "}").encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("file", "make", "least"),
    [
        ("model.safetensors", hostile_header, 3),
        ("state.json", lambda: b'{"format":1,"objects":{"model":' + b"[" * 20_000_000, 3),
        ("manifest.json", lambda: b"[" * (70 << 20), 0),
        ("../../history/attempt-0001.jsonl", lambda: b"\n" * (70 << 20), 0),
        ("../../history/attempt-0001.jsonl", lambda: b"x" * (70 << 20), 0),
        ("../../run.json", lambda: b'{"a":' * (14 << 20), 0),
    ],
    ids=["tensor file", "state", "manifest", "ends of lines", "no end of line", "run"],
)
def test_hostile_files_of_70_mb_take_little_memory(tmp_path, file, make, least):
    """A small download would take the machine down, and with it whatever else runs there."""
    with Checkpointer(tmp_path, every=Every(steps=1), keep=Keep(last=9), verbose=0) as checkpointer:
        for step in (1, 2):
            checkpointer.save({"model": {"w": np.zeros(3)}}, step=step)
    where = tmp_path / "checkpoints/step-00000001"
    data = make()
    (where / file).resolve().write_bytes(data)
    if least:
        sound = manifests.decode((where / "manifest.json").read_bytes(), where="")
        files = tuple(
            manifests.File(each.name, len(data), digest(data)) if each.name == file else each for each in sound.files
        )
        (where / "manifest.json").write_bytes(manifests.encode(msgspec.structs.replace(sound, files=files)))

    done = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-2000:]
    refused, megabytes = map(int, done.stdout.split())
    assert refused >= least
    assert megabytes < 200
