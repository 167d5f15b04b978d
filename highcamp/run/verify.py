"""Verify: re-hash what is on disk, and classify what is not as it was committed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from highcamp.core import tensorfile
from highcamp.core.digest import Hasher
from highcamp.core.manifest import MANIFEST
from highcamp.errors import Damaged, Unreadable
from highcamp.run import commit
from highcamp.run.tensors import READ_BYTES, read_digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from highcamp.core.manifest import File
    from highcamp.core.tensorfile import Entry
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.storage.store import Reader, Store

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
    store, directory = checkpoint.store, commit.checkpoint_path(checkpoint.name)
    findings: list[Finding] = []
    bytes_read = 0
    for file in checkpoint.files:
        finding = _check_size(store, directory, file)
        if finding is None and not quick:
            finding = _check_bytes(checkpoint, directory, file)
            bytes_read += file.size
        if finding:
            findings.append(finding)
    listed = {file.name for file in checkpoint.files} | {MANIFEST}
    findings += [
        Finding(name, "foreign", f"{name} does not belong to this checkpoint")
        for name in store.list(directory)
        if name not in listed
    ]
    return Verification(checkpoint.name, bytes_read, tuple(findings))


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


def _check_size(store: Store, directory: str, file: File) -> Finding | None:
    size = store.size(f"{directory}/{file.name}")
    if size is None:
        return Finding(file.name, "missing", f"{file.name} is missing or no regular file")
    if size != file.size:
        state = "truncated" if size < file.size else "altered"
        return Finding(file.name, state, f"{file.name} is {size} bytes, its manifest says {file.size}")
    return None


def _check_bytes(checkpoint: Checkpoint, directory: str, file: File) -> Finding | None:
    try:
        with checkpoint.store.open(f"{directory}/{file.name}") as reader:
            found = read_digest(reader)
            if found == file.digest:
                return None
            tensor = _altered_tensor(checkpoint, file, reader)
    except FileNotFoundError:
        return Finding(file.name, "missing", f"{file.name} is missing")
    except Damaged as error:
        return Finding(file.name, "truncated", str(error))
    place = f" in tensor {tensor}" if tensor else ""
    return Finding(
        file.name, "altered", f"{file.name} differs from its digest{place}: {found}, not {file.digest}", tensor
    )


def _altered_tensor(checkpoint: Checkpoint, file: File, reader: Reader) -> str | None:
    """The first tensor of an altered file that differs from its own digest; None if the header or the table is hit."""
    try:
        state = commit.read_state(checkpoint.store, checkpoint.name, checkpoint.manifest)
        first = bytearray(8)
        reader.read_into(0, memoryview(first))
        length = tensorfile.header_bytes(bytes(first), file.size, file.name)
        header = bytearray(length)
        reader.read_into(0, memoryview(header))
        layout = tensorfile.parse(bytes(header), file.size, file.name)
    except Damaged:
        return None
    for entry, expected in zip(layout.entries, state.digests.get(file.name, []), strict=False):
        if _digest_of(reader, layout.data_start, entry) != expected:
            return entry.name
    return None


def _digest_of(reader: Reader, data_start: int, entry: Entry) -> str:
    hasher = Hasher()
    for start in range(entry.start, entry.end, READ_BYTES):
        piece = memoryview(bytearray(min(READ_BYTES, entry.end - start)))
        reader.read_into(data_start + start, piece)
        hasher.update(piece)
    return hasher.text()
