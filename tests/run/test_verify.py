"""Verifying: what is found, in which order, and what is read for it."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import msgspec
import pytest

import highcamp
from highcamp.core import strict
from highcamp.core.digest import digest
from highcamp.core.manifest import MANIFEST, STATE, File, decode, encode
from highcamp.errors import StorageError
from highcamp.run import verify

TENSORS = "model.safetensors"


def flip(file, at=-1):
    """Change one bit."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def resigned(checkpoint, name, data):
    """Put other bytes into a file of a checkpoint, and a manifest beside them that vouches for them."""
    where = Path(checkpoint.path)
    (where / name).write_bytes(data)
    manifest = decode((where / MANIFEST).read_bytes(), where="")
    files = tuple(File(name, len(data), digest(data)) if each.name == name else each for each in manifest.files)
    (where / MANIFEST).write_bytes(encode(msgspec.structs.replace(manifest, files=files)))


class Watched:
    """A store that tells which thread reads what, can hold readers up, and can fail like a disk."""

    def __init__(self, store, *, broken="", before_read=lambda path: None):
        self._store, self._broken, self._before_read = store, broken, before_read
        self.reads = []

    def __getattr__(self, name):
        return getattr(self._store, name)

    def open(self, path):
        outer, reader = self, self._store.open(path)

        class Reader:
            size, close = reader.size, reader.close

            def __enter__(self):
                return self

            def __exit__(self, *_):
                reader.close()

            def read_into(self, offset, buffer):
                outer.reads.append((path, threading.get_ident()))
                outer._before_read(path)
                if outer._broken and outer._broken in path:
                    raise StorageError(f"read of {path} failed: EIO", path=path, errno=errno.EIO)
                reader.read_into(offset, buffer)

        return Reader()


def test_several_at_once_say_what_each_says_alone(run):
    """Threads must not mix up whose damage it is."""
    first, second, third, fourth = run.checkpoints
    flip(Path(first.path) / TENSORS)
    (Path(second.path) / STATE).unlink()
    (Path(third.path) / TENSORS).write_bytes(b"short")
    (Path(fourth.path) / "notes.txt").write_bytes(b"mine")

    together = list(verify.verify_all(run.checkpoints))

    assert together == [each.verify() for each in run.checkpoints]
    assert [each.state for each in together] == ["altered", "missing", "truncated", "foreign"]
    assert together[0].findings[0].tensor == "dense/kernel"


def test_files_are_read_beside_each_other(run, monkeypatch):
    """A machine with several disks, or one that answers late, would be used one file at a time."""
    monkeypatch.setattr(verify, "THREADS", 2)
    both = threading.Barrier(2, timeout=60)
    met = threading.Event()

    def meet(path):
        if path.startswith("checkpoints/") and not met.is_set():
            both.wait()
            met.set()

    store = Watched(run.store, before_read=meet)

    results = list(verify.verify_all(highcamp.open(store).checkpoints))

    assert all(result.ok for result in results)
    assert len({thread for path, thread in store.reads if path.startswith("checkpoints/")}) == 2


def test_every_byte_is_told_once(run):
    """The bar would stop short of its end, or run over it."""
    (Path(run.checkpoints[0].path) / TENSORS).unlink()
    (Path(run.checkpoints[1].path) / TENSORS).write_bytes(b"short")
    told = []

    results = list(verify.verify_all(run.checkpoints, told.append))

    assert sum(told) == run.size_bytes
    assert results[2].bytes_read == run.checkpoints[2].size_bytes
    assert results[0].bytes_read < run.checkpoints[0].size_bytes


def test_who_stops_early_has_not_read_everything(run, monkeypatch):
    """After the first finding, or Ctrl-C, a terabyte more would be read before the prompt is back."""
    monkeypatch.setattr(verify, "THREADS", 1)
    monkeypatch.setattr(verify, "READ_BYTES", 64)
    store = Watched(run.store)

    results = verify.verify_all(highcamp.open(store).checkpoints)
    first = next(results)
    results.close()

    assert first.name == run.checkpoints[0].name
    assert run.checkpoints[3].name not in " ".join(path for path, _ in store.reads)


def test_what_the_disk_cannot_read_is_a_finding_and_the_others_are_verified(run):
    """One bad sector would keep the state of all other checkpoints unknown."""
    bad = run.checkpoints[1].name
    store = Watched(run.store, broken=f"{bad}/{TENSORS}")

    results = {result.name: result for result in verify.verify_all(highcamp.open(store).checkpoints)}

    assert results.pop(bad).findings[0].state == "unreadable"
    assert all(result.ok for result in results.values())


def test_structure_reads_tables_and_no_tensors(run):
    """Looking at a thousand checkpoints of many GB must take seconds."""
    flip(Path(run.last.path) / TENSORS)
    store = Watched(run.store)

    result = verify.verify_structure(highcamp.open(store).last)

    assert result.ok
    assert 0 < result.bytes_read < run.last.size_bytes


@pytest.mark.parametrize("at", [0, 8, 20])
def test_structure_finds_a_table_that_is_none(run, at):
    """Right size, right name, and nobody could read it."""
    flip(Path(run.last.path) / TENSORS, at)

    result = verify.verify_structure(run.last)

    assert [(each.file, each.state) for each in result.findings] == [(TENSORS, "altered")]
    assert "no whole tensor file" in result.findings[0].message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state["objects"].update(model={"$tensor": "gone"}), "names model/gone, which is in no file"),
        (lambda state: state["objects"].update(model={"$class": "os"}), "malformed"),
        (lambda state: state["objects"].pop("model"), "does not hold the objects"),
    ],
)
def test_structure_finds_trees_and_tables_that_do_not_go_together(run, change, words):
    """Every digest fits, and still it could not be restored."""
    state = strict.read((Path(run.last.path) / STATE).read_bytes(), where="", limit=1 << 20)
    change(state)
    resigned(run.last, STATE, strict.write(state))

    result = verify.verify_structure(highcamp.open(run.path).last)

    assert [(each.file, each.state) for each in result.findings] == [(STATE, "altered")]
    assert words in result.findings[0].message


def test_structure_finds_sizes_and_strangers_too(run):
    """It is said to see more than sizes, so it must see them."""
    first, second, third, _ = run.checkpoints
    (Path(first.path) / TENSORS).unlink()
    (Path(second.path) / STATE).write_bytes(b"{}")
    (Path(third.path) / "notes.txt").write_bytes(b"mine")

    results = list(map(verify.verify_structure, run.checkpoints))

    assert [result.state for result in results] == ["missing", "truncated", "foreign", "whole"]
