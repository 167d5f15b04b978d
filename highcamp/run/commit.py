"""Write order, read order, remove order: the only module that writes or removes a manifest.

Writing: data files, then `state.json`, then the manifest, then all of it is published under its name. A reader looks
for the manifest first and believes nothing without it, so a crash before the last step leaves nothing that is seen, and
a crash after it leaves a whole checkpoint. Removing goes the other way: un-publish first, remove data later.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from highcamp.core import strict
from highcamp.core.digest import Hasher, digest
from highcamp.core.health import Checkup
from highcamp.core.manifest import MANIFEST, MAX_MANIFEST_BYTES, STATE, File, Health, Manifest, Object, decode, encode
from highcamp.errors import Damaged, StorageError, Taken

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from highcamp.core.tensorfile import Layout
    from highcamp.storage.store import Reader, Store

CHECKPOINTS = "checkpoints"
PENDING = ".pending-"
TRASH = ".trash-"
MAX_STATE_BYTES = 256 << 20  # the names and digests of 1,000,000 tensors fit
COPY_BYTES = 16 << 20  # at once, of a file that could not be linked
_DISK_FAILED = frozenset({errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS})  # no refusal of links
_TRASH_NAME = re.compile(r"\.trash-(?P<name>.+)-[0-9a-f]{8}(?P<doomed>-doomed)?\Z")


@dataclass
class Committed:
    """A tensor file of a committed checkpoint.

    path: where it lies in the store. file: its name, size and digest. digests: of its tensors, in file order. reader: it,
    held open, so that its bytes are there even if the checkpoint is removed. was_copied: set where it could not be linked,
    so that its bytes were written once more. nonfinite: what is wrong with its tensors, see `core.health`; None if nobody
    knows.
    """

    path: str
    file: File
    digests: tuple[str, ...] = field(repr=False)
    reader: Reader = field(repr=False)
    was_copied: bool = False
    nonfinite: Mapping[str, str] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class TensorFile:
    """One tensor file, ready to be written.

    layout: its table. pieces: the bytes of its data section in the order of the layout, each piece to be used before the
    next is asked for. same: a committed file that holds these very bytes; then there are no pieces, and it is linked.
    """

    name: str
    layout: Layout = field(repr=False)
    pieces: Callable[[], Iterable[memoryview]] = field(default=tuple, repr=False)
    same: Committed | None = field(default=None, repr=False)

    @property
    def new_bytes(self) -> int:
        """What writing it adds to the disk."""
        return 0 if self.same is not None and not self.same.was_copied else self.layout.file_size


@dataclass(frozen=True)
class Part:
    """One object of the training state, ready to be written.

    skeleton: its tree, tensors named. files: its tensor files, none if it has no tensors. kinds: the framework whose array
    a tensor was, by tensor name; NumPy's are left out. weights: whether it is a model, or weights by another name. trained:
    those of its tensors that are known to be trained, for weights alone.
    """

    name: str
    skeleton: Any = field(repr=False)
    files: tuple[TensorFile, ...] = ()
    kinds: dict[str, str] = field(default_factory=dict, repr=False)
    weights: bool = False
    trained: Collection[str] = field(default=frozenset(), repr=False)


@dataclass(frozen=True)
class State:
    """What `state.json` holds.

    objects: the skeleton of each object. digests: of the tensors of each file, in file order. kinds: for each object, the
    framework whose array a tensor was.
    """

    objects: dict[str, Any]
    digests: dict[str, list[str]]
    kinds: dict[str, dict[str, str]]


def checkpoint_path(name: str) -> str:
    """Where the checkpoint called `name` lies in the store."""
    return f"{CHECKPOINTS}/{name}"


def commit(
    store: Store, manifest: Manifest, parts: Sequence[Part], *, confirm: Callable[[], None] | None = None
) -> tuple[str, Manifest, dict[str, list[str]]]:
    """Write `parts` as a new checkpoint; durable when this returns.

    Returns its name, its manifest with the files filled in, and the digests of the tensors of each file, in file order.

    manifest: the facts; `files`, `objects` and `health` are filled in here, but weights alone are as healthy as what they
    were taken from. confirm: called when everything has been read and before
    the checkpoint begins to exist; raises if what was read cannot be trusted. A name that is in use is never touched: the
    second checkpoint of step 450 is called step-00000450.2. On any error nothing is published and what was written is
    removed. Raises StorageError, Damaged if a file to be linked is not what it was.
    """
    for name in _candidate_names(manifest.step):
        if store.size(f"{checkpoint_path(name)}/{MANIFEST}") is not None:
            continue
        try:
            draft = store.draft(checkpoint_path(name))
        except Taken:
            continue
        break
    digests: dict[str, list[str]] = {}
    nonfinite: dict[str, str] = {}
    published = False
    try:
        files = []
        for part in parts:
            is_checked = part.weights and not manifest.is_weights_only
            for each in part.files:
                checkup = Checkup(each.layout.entries, part.trained) if is_checked else None
                file, digests[each.name] = _write_tensors(store, draft, each, checkup)
                files.append(file)
                if checkup is not None:
                    nonfinite |= {f"{part.name}/{name}": word for name, word in checkup.found.items()}
        files.append(_write_state(store, draft, parts, digests))
        objects = {part.name: _describe(part) for part in parts}
        manifest = msgspec.structs.replace(manifest, files=tuple(files), objects=objects)
        if not manifest.is_weights_only and any(part.weights for part in parts):
            manifest = msgspec.structs.replace(manifest, health=Health.of(nonfinite))
        if confirm is not None:
            confirm()
        # Last of all files: on every store its presence is the commit, so everything it lists must be durable before it.
        store.create(f"{draft}/{MANIFEST}", [encode(manifest)])
        name = _publish(store, draft, name, manifest)
        published = True
    finally:
        if not published:  # also on KeyboardInterrupt and other BaseExceptions
            with contextlib.suppress(
                OSError
            ):  # the failure under way is the news; a leftover is swept at the next start
                store.remove(draft)
    return name, manifest, digests


def _candidate_names(step: int) -> Iterator[str]:
    first = f"step-{step:08d}"
    return itertools.chain([first], (f"{first}.{count}" for count in itertools.count(2)))


def _publish(store: Store, draft: str, name: str, manifest: Manifest) -> str:
    """Publish as `name`, or under the next free name of its step: somebody may have taken it since it was looked up."""
    for free in itertools.chain([name], _candidate_names(manifest.step)):
        try:
            store.publish(draft, checkpoint_path(free))
        except Taken:
            continue
        return free
    raise AssertionError("names never run out")  # pragma: no cover


def _write_tensors(store: Store, draft: str, each: TensorFile, checkup: Checkup | None) -> tuple[File, list[str]]:
    path = f"{draft}/{each.name}"
    if each.same is not None:
        if checkup is not None:
            _check_linked(each.same, each.layout, checkup)
        return File(each.name, each.same.file.size, each.same.file.digest), _link(store, path, each.same)
    hasher, hashing = Hasher(), TensorHasher(each.layout)

    def chunks() -> Iterator[memoryview]:
        header = memoryview(each.layout.header)
        hasher.update(header)
        yield header
        for piece in each.pieces():
            hasher.update(piece)
            hashing.update(piece)  # while the piece is in the processor's cache
            if checkup is not None:
                checkup.update(piece)
            yield piece

    store.create(path, chunks())
    return File(each.name, each.layout.file_size, hasher.text()), hashing.digests


def _link(store: Store, path: str, same: Committed) -> list[str]:
    """Let `path` be a committed file too; where the store cannot link, copy it. Returns the digests of its tensors."""
    try:
        store.link(same.path, path)
    except StorageError as error:
        if error.errno in _DISK_FAILED:
            raise  # writing would be trying again
        # Another file system, no links on this one, too many of them, or the file has been removed.
        same.was_copied = True
        _copy(store, path, same)
    else:
        with store.open(path) as linked:
            if linked.identity != same.reader.identity:
                raise Damaged(f"{same.path} was replaced or changed, so it was not linked", path=same.path)
    return list(same.digests)


def _check_linked(same: Committed, layout: Layout, checkup: Checkup) -> None:
    """Look at the tensors of a committed file; it is read only if nobody knows of them, so once."""
    if same.nonfinite is not None:
        checkup.found |= {
            entry.name: same.nonfinite[entry.name] for entry in layout.entries if entry.name in same.nonfinite
        }
        return
    buffer = memoryview(bytearray(min(COPY_BYTES, layout.size)))
    for start in range(0, layout.size, max(len(buffer), 1)):
        piece = buffer[: layout.size - start]
        same.reader.read_into(layout.data_start + start, piece)
        checkup.update(piece)


def _copy(store: Store, path: str, same: Committed) -> None:
    hasher = Hasher()
    buffer = memoryview(bytearray(min(COPY_BYTES, same.file.size)))

    def chunks() -> Iterator[memoryview]:
        for start in range(0, same.file.size, len(buffer)):
            piece = buffer[: same.file.size - start]
            same.reader.read_into(start, piece)
            hasher.update(piece)
            yield piece

    store.create(path, chunks())
    if hasher.text() != same.file.digest:
        raise Damaged(f"{same.path} differs from its digest, so it was not copied", path=same.path)


class TensorHasher:
    """The digests of the tensors of a file, computed piece by piece in file order."""

    def __init__(self, layout: Layout) -> None:
        """layout: the table of the file. `digests` is whole when its data section has gone through `update`."""
        self.digests: list[str] = []
        self._entries = layout.entries
        self._at = 0
        self._begun: Hasher | None = None
        self._take_empty()

    def update(self, piece: memoryview) -> None:
        """Go on with the next bytes of the data section."""
        start, stop = self._at, self._at + len(piece)
        while self._at < stop:
            entry = self._entries[len(self.digests)]
            end = min(entry.end, stop)
            part = piece[self._at - start : end - start]
            if self._begun is None and end == entry.end:
                self.digests.append(digest(part))
            else:
                self._begun = self._begun or Hasher()
                self._begun.update(part)
                if end == entry.end:
                    self.digests.append(self._begun.text())
                    self._begun = None
            self._at = end
            self._take_empty()

    def _take_empty(self) -> None:
        """Tensors without elements have no bytes to wait for."""
        while len(self.digests) < len(self._entries) and self._begun is None:
            entry = self._entries[len(self.digests)]
            if entry.start != entry.end:
                return
            self.digests.append(digest(b""))


def _write_state(store: Store, draft: str, parts: Sequence[Part], digests: dict[str, list[str]]) -> File:
    objects = {part.name: part.skeleton for part in parts}
    kinds = {part.name: part.kinds for part in parts if part.kinds}
    data = strict.write({"format": 1, "objects": objects, "digests": digests, "kinds": kinds})
    store.create(f"{draft}/{STATE}", [data])
    return File(STATE, len(data), digest(data))


def _describe(part: Part) -> Object:
    layouts = [each.layout for each in part.files]
    return Object(
        tuple(each.name for each in part.files),
        sum(len(layout.entries) for layout in layouts),
        sum(layout.size for layout in layouts),
        part.weights,
    )


def checkpoint_names(store: Store) -> list[str]:
    """The names under which checkpoints are published; whether one exists is for its manifest to say."""
    # A name with a backslash is somebody else's, and no path in a store.
    return [name for name in store.list(CHECKPOINTS) if not name.startswith(".") and "\\" not in name]


def read_manifest(store: Store, name: str) -> Manifest | None:
    """The manifest of the checkpoint called `name`; None if there is none, so that no checkpoint exists there.

    Raises Damaged, or Unreadable for a newer format.
    """
    path = f"{checkpoint_path(name)}/{MANIFEST}"
    try:
        data = store.read(path, MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        return None
    return decode(data, where=path)


def read_manifests(
    store: Store, known: Mapping[str, tuple[bytes, Manifest]]
) -> tuple[dict[str, tuple[bytes, Manifest]], list[tuple[str, str]]]:
    """By name the manifests of all that is published, with their bytes, and (name, why) of what has none that can be read.

    known: the first of these, as it was before. All bytes are read every time, for the name of a checkpoint that was
    removed may be given to another one; what has not changed is not decoded again.
    """
    found: dict[str, tuple[bytes, Manifest]] = {}
    unreadable: list[tuple[str, str]] = []
    before = {name: data for name, (data, _) in known.items()}
    for name, data in store.read_each(CHECKPOINTS, checkpoint_names(store), MANIFEST, MAX_MANIFEST_BYTES, before):
        if data is None:
            unreadable.append((name, "it has no manifest, so it is no checkpoint"))
        elif data is before.get(name):
            found[name] = known[name]
        elif isinstance(data, Damaged):
            unreadable.append((name, str(data)))
        else:
            try:
                found[name] = (data, decode(data, where=f"{checkpoint_path(name)}/{MANIFEST}"))
            except Damaged as error:
                unreadable.append((name, str(error)))
    return found, unreadable


def read_state(store: Store, name: str, manifest: Manifest) -> State:
    """The checked `state.json` of the checkpoint called `name`. Raises Damaged."""
    path = f"{checkpoint_path(name)}/{STATE}"
    listed = next((file for file in manifest.files if file.name == STATE), None)
    if listed is None:
        raise Damaged(f"{path} is not listed in the manifest", path=path)
    try:
        data = store.read(path, MAX_STATE_BYTES)
    except FileNotFoundError as error:
        raise Damaged(f"{path} is missing", path=path) from error
    if len(data) != listed.size:
        raise Damaged(f"{path} is {len(data)} bytes, its manifest says {listed.size}", path=path)
    if digest(data) != listed.digest:
        raise Damaged(f"{path} differs from its digest", path=path)
    document = strict.read(data, where=path, limit=MAX_STATE_BYTES, max_depth=MAX_STATE_DEPTH)
    if not isinstance(document, dict):
        raise Damaged(f"{path} is no object", path=path)
    objects, digests, kinds = document.get("objects"), document.get("digests"), document.get("kinds", {})
    if not isinstance(objects, dict) or not isinstance(digests, dict) or set(objects) != set(manifest.objects):
        raise Damaged(f"{path} does not hold the objects that its manifest lists", path=path)
    if not all(isinstance(row, list) and all(isinstance(text, str) for text in row) for row in digests.values()):
        raise Damaged(f"{path}: its table of digests is malformed", path=path)
    if not isinstance(kinds, dict) or not all(isinstance(names, dict) for names in kinds.values()):
        raise Damaged(f"{path}: its table of kinds is malformed", path=path)
    return State(objects, digests, kinds)


MAX_STATE_DEPTH = 500  # a tree of depth 100 (the limit when saving) needs at most four brackets a level, and some


def withdraw(store: Store, name: str, *, doomed: bool = False) -> str | None:
    """Un-publish the checkpoint called `name`, durably, and return the name of its trash; None if it is gone already.

    doomed: its data will be removed at once, and by the next sweep if this process dies in between.
    """
    if store.size(f"{checkpoint_path(name)}/{MANIFEST}") is None:
        return None
    trash = f"{TRASH}{name}-{secrets.token_hex(4)}{'-doomed' if doomed else ''}"
    try:
        store.withdraw(checkpoint_path(name), checkpoint_path(trash))
    except FileNotFoundError:
        return None  # another process removed it between our look and our move: what was wanted is done
    return trash


def trashed(store: Store) -> dict[str, str]:
    """What can be brought back: trash name -> the name the checkpoint had."""
    found = ((name, _TRASH_NAME.match(name)) for name in store.list(CHECKPOINTS))
    return {name: match["name"] for name, match in found if match and not match["doomed"]}


def restore_trash(store: Store, trash: str) -> str:
    """Publish a checkpoint from the trash again and return its name, `.2` added if that has been given away."""
    match = _TRASH_NAME.match(trash)
    manifest = read_manifest(store, trash) if match else None
    if match is None or manifest is None:
        raise Damaged(f"{checkpoint_path(trash)} has no manifest, so it never was a whole checkpoint", path=trash)
    return _publish(store, checkpoint_path(trash), match["name"], manifest)


def sweep(store: Store) -> list[str]:
    """Remove what saves and removals that died have left behind, and return its names.

    Only for the owner of the run: it knows that no save is under way. Nothing but our own pattern is touched.
    """
    left = [checkpoint_path(name) for name in store.list(CHECKPOINTS) if _is_left_over(name)]
    left += [name for name in store.list("") if name.startswith(PENDING)]  # of `run.json` and of the owner's record
    left += [f"pins/{name}" for name in store.list("pins") if name.startswith(PENDING)]
    for path in left:
        store.remove(path)
    return [path.rpartition("/")[2] for path in left]


def _is_left_over(name: str) -> bool:
    trash = _TRASH_NAME.match(name)
    return name.startswith(PENDING) or (trash is not None and trash["doomed"] is not None)
