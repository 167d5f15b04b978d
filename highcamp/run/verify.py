"""Verify: re-hash what is on disk, and classify what is not as it was committed."""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from highcamp.core import tensorfile, tree
from highcamp.core.digest import Hasher
from highcamp.core.manifest import MANIFEST, STATE
from highcamp.errors import Damaged, StorageError, Unreadable
from highcamp.run import commit
from highcamp.run.tensors import READ_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from concurrent.futures import Future

    from highcamp.core.manifest import File
    from highcamp.core.tensorfile import Entry, Layout
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.storage.store import Reader, Store

    Advance = Callable[[int], object]
    """Is told how many bytes have been read since it was told last; called by several threads."""

THREADS = min(4, os.cpu_count() or 1)
"""Files that are read at the same time; more make no disk faster, and leave less for a training beside."""
STATES = ("whole", "foreign", "unreadable", "altered", "truncated", "missing")
"""What a file or a checkpoint can be, from good to bad; a checkpoint is as bad as the worst of its files."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was committed. state: see STATES. tensor: which one, where that can be told."""

    file: str
    state: str
    message: str
    tensor: str | None = None


@dataclass(frozen=True)
class Verification:
    """The result of verifying one checkpoint. bytes_read: how much was compared."""

    name: str
    bytes_read: int = 0
    findings: tuple[Finding, ...] = ()

    @property
    def state(self) -> str:
        """The worst state found, or "whole"."""
        return max((finding.state for finding in self.findings), key=STATES.index, default="whole")

    @property
    def ok(self) -> bool:
        """Whether nothing at all was found."""
        return not self.findings

    @property
    def is_whole(self) -> bool:
        """Whether it can be restored: files that do not belong to it do no harm."""
        return self.state in ("whole", "foreign")


def verify_checkpoint(checkpoint: Checkpoint, *, quick: bool = False) -> Verification:
    """Compare each file with the manifest: its size, and, unless `quick`, every byte with its digest."""
    checked = [
        _Checked(file, _check_size(checkpoint, file)) if quick else _check(checkpoint, file)
        for file in checkpoint.files
    ]
    return _gathered(checkpoint, checked)


def verify_all(checkpoints: Sequence[Checkpoint], advance: Advance = lambda _: None) -> Generator[Verification]:
    """Verify every byte of several checkpoints, files beside each other; one result each, in the order given.

    advance: is called as bytes are read; what is not read counts too, so that the sum is that of all sizes. Closing the
    generator ends all reading.
    """
    stop = threading.Event()
    waiting: deque[tuple[Checkpoint, list[Future[_Checked]]]] = deque()
    with ThreadPoolExecutor(THREADS, "highcamp-verify") as pool:
        try:
            for checkpoint in checkpoints:
                checked = [pool.submit(_check, checkpoint, file, advance, stop) for file in checkpoint.files]
                waiting.append((checkpoint, checked))
                # No further ahead than it takes to keep all threads busy: who stops early has not read for nothing.
                while sum(not each.done() for _, found in waiting for each in found) > 2 * THREADS:
                    yield _awaited(*waiting.popleft())
            while waiting:
                yield _awaited(*waiting.popleft())
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def verify_structure(checkpoint: Checkpoint) -> Verification:
    """Compare sizes, and read the tables of the tensor files and the trees that name their tensors, but no tensor."""
    checked = [_Checked(file, _check_size(checkpoint, file)) for file in checkpoint.files]
    tables: dict[str, Layout] = {}
    tensor_files = {name for entry in checkpoint.manifest.objects.values() for name in entry.files}
    for place, each in enumerate(checked):
        if each.finding is None and each.file.name in tensor_files:
            checked[place], layout = _check_table(checkpoint, each.file)
            if layout is not None:
                tables[each.file.name] = layout
    for place, each in enumerate(checked):
        if each.finding is None and each.file.name == STATE:
            checked[place] = _Checked(each.file, _check_trees(checkpoint, tables), each.file.size)
    return _gathered(checkpoint, checked)


@dataclass(frozen=True)
class _Checked:
    """What came of one file."""

    file: File
    finding: Finding | None
    bytes_read: int = 0


def _awaited(checkpoint: Checkpoint, checked: Sequence[Future[_Checked]]) -> Verification:
    return _gathered(checkpoint, [each.result() for each in checked])


def _gathered(checkpoint: Checkpoint, checked: Sequence[_Checked]) -> Verification:
    """The result for one checkpoint, with what lies in its directory and is none of its files."""
    findings = [each.finding for each in checked if each.finding is not None]
    listed = {file.name for file in checkpoint.files} | {MANIFEST}
    findings += [
        Finding(name, "foreign", f"{name} does not belong to this checkpoint")
        for name in checkpoint.store.list(commit.checkpoint_path(checkpoint.name))
        if name not in listed
    ]
    return Verification(checkpoint.name, sum(each.bytes_read for each in checked), tuple(findings))


def is_full_size(checkpoint: Checkpoint) -> bool:
    """Whether all its files are there in their full size; what `is_whole` says after a quick verification, in fewer looks."""
    store, directory = checkpoint.store, commit.checkpoint_path(checkpoint.name)
    return all(store.size(f"{directory}/{file.name}") == file.size for file in checkpoint.files)


def verify_unlisted(store: Store, known: Sequence[str]) -> Iterator[Verification]:
    """One result for each directory that is no readable checkpoint though it lies where they lie."""
    for name in commit.checkpoint_names(store):
        if name in known:
            continue
        try:
            manifest = commit.read_manifest(store, name)
        except Unreadable as error:
            yield Verification(name, findings=(Finding(MANIFEST, "unreadable", str(error)),))
        except Damaged as error:
            yield Verification(name, findings=(Finding(MANIFEST, "altered", str(error)),))
        else:
            problem = (
                ("missing", f"{MANIFEST} is missing") if manifest is None else ("foreign", "belongs to another run")
            )
            yield Verification(name, findings=(Finding(MANIFEST, *problem),))


def _check_size(checkpoint: Checkpoint, file: File) -> Finding | None:
    size = checkpoint.store.size(_path(checkpoint, file))
    if size is None:
        return Finding(file.name, "missing", f"{file.name} is missing or no regular file")
    if size != file.size:
        state = "truncated" if size < file.size else "altered"
        return Finding(file.name, state, f"{file.name} is {size} bytes, its manifest says {file.size}")
    return None


def _check(
    checkpoint: Checkpoint, file: File, advance: Advance = lambda _: None, stop: threading.Event | None = None
) -> _Checked:
    """Compare one file with the manifest: its size, and every byte with its digest."""
    read = 0

    def note(count: int) -> None:
        nonlocal read
        read += count
        advance(count)

    finding = _check_size(checkpoint, file)
    if finding is None:
        finding = _check_bytes(checkpoint, file, note, stop)
    advance(file.size - read)
    return _Checked(file, finding, read)


def _check_bytes(checkpoint: Checkpoint, file: File, note: Advance, stop: threading.Event | None) -> Finding | None:
    try:
        with checkpoint.store.open(_path(checkpoint, file)) as reader:
            found = _digest_of(reader, 0, min(reader.size, file.size), note, stop)
            if found == file.digest:
                return None
            tensor = _altered_tensor(checkpoint, file, reader)
    except (Damaged, StorageError) as error:
        return _unread(file, error)
    place = f" in tensor {tensor}" if tensor else ""
    return Finding(
        file.name, "altered", f"{file.name} differs from its digest{place}: {found}, not {file.digest}", tensor
    )


def _unread(file: File, error: Damaged | StorageError) -> Finding:
    """What it means that a file of the right size could not be read to its end."""
    if isinstance(error, FileNotFoundError):
        return Finding(file.name, "missing", f"{file.name} is missing")
    state = "truncated" if isinstance(error, Damaged) else "unreadable"
    return Finding(file.name, state, f"{file.name} could not be read: {error.message}")


def _check_table(checkpoint: Checkpoint, file: File) -> tuple[_Checked, Layout | None]:
    """Whether a tensor file has a table that accounts for each of its bytes."""
    try:
        with checkpoint.store.open(_path(checkpoint, file)) as reader:
            layout = _layout(reader, file)
    except StorageError as error:
        return _Checked(file, _unread(file, error)), None
    except Damaged as error:
        return _Checked(file, Finding(file.name, "altered", error.message)), None
    return _Checked(file, None, len(layout.header)), layout


def _check_trees(checkpoint: Checkpoint, tables: dict[str, Layout]) -> Finding | None:
    """Whether `state.json` is what was committed, and every tensor that its trees name is in a file of its object."""
    try:
        state = commit.read_state(checkpoint.store, checkpoint.name, checkpoint.manifest)
        for name, entry in checkpoint.manifest.objects.items():
            if any(file not in tables for file in entry.files):
                continue  # which has been told
            held = {each.name for file in entry.files for each in tables[file].entries}
            for tensor in tree.names(state.objects[name]).values():
                if tensor not in held:
                    return Finding(STATE, "altered", f"{STATE} names {name}/{tensor}, which is in no file", tensor)
    except (Damaged, StorageError) as error:
        return Finding(STATE, "altered" if isinstance(error, Damaged) else "unreadable", error.message)
    return None


def _altered_tensor(checkpoint: Checkpoint, file: File, reader: Reader) -> str | None:
    """The first tensor of an altered file that differs from its own digest; None if the header or the table is hit."""
    try:
        state = commit.read_state(checkpoint.store, checkpoint.name, checkpoint.manifest)
        layout = _layout(reader, file)
    except Damaged:
        return None
    for entry, expected in zip(layout.entries, state.digests.get(file.name, []), strict=False):
        if _digest_of_tensor(reader, layout.data_start, entry) != expected:
            return entry.name
    return None


def _layout(reader: Reader, file: File) -> Layout:
    first = bytearray(min(8, file.size))
    reader.read_into(0, memoryview(first))
    header = bytearray(tensorfile.header_bytes(bytes(first), file.size, file.name))
    reader.read_into(0, memoryview(header))
    return tensorfile.parse(bytes(header), file.size, file.name)


def _digest_of_tensor(reader: Reader, data_start: int, entry: Entry) -> str:
    return _digest_of(reader, data_start + entry.start, data_start + entry.end)


def _digest_of(
    reader: Reader, start: int, end: int, note: Advance = lambda _: None, stop: threading.Event | None = None
) -> str:
    """The digest of the bytes from `start` to `end`. stop: once it is set, nobody wants to know any more."""
    hasher = Hasher()
    buffer = memoryview(bytearray(min(READ_BYTES, end - start)))
    for at in range(start, end, READ_BYTES):
        if stop is not None and stop.is_set():
            break
        piece = buffer[: end - at]
        reader.read_into(at, piece)
        hasher.update(piece)
        note(len(piece))
    return hasher.text()


def _path(checkpoint: Checkpoint, file: File) -> str:
    return f"{commit.checkpoint_path(checkpoint.name)}/{file.name}"
