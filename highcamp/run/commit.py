"""Write order, read order, remove order: the only module that writes or removes a manifest.

Writing: data files, then `state.json`, then the manifest, then all of it is published under its name. A reader looks
for the manifest first and believes nothing without it, so a crash before the last step leaves nothing that is seen, and
a crash after it leaves a whole checkpoint. Removing goes the other way: un-publish first, remove data later.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from highcamp.core import strict
from highcamp.core.digest import Hasher, digest
from highcamp.core.manifest import MANIFEST, MAX_MANIFEST_BYTES, STATE, File, Manifest, Object, decode, encode
from highcamp.errors import Damaged, Taken

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from highcamp.core.tensorfile import Layout
    from highcamp.storage.store import Store

CHECKPOINTS = "checkpoints"
PENDING = ".pending-"
TRASH = ".trash-"
MAX_STATE_BYTES = 256 << 20  # the names and digests of 1,000,000 tensors fit
CHUNK_BYTES = 16 << 20  # large enough for the disk's full rate, small enough to be hashed while it is in the cache
_TRASH_NAME = re.compile(r"\.trash-(?P<name>.+)-[0-9a-f]{8}(?P<doomed>-doomed)?\Z")


@dataclass(frozen=True)
class Part:
    """One object of the training state, ready to be written.

    skeleton: its tree, tensors named. layout: the table of its tensor file, None if it has no tensors. data: the bytes of
    the data section in the order of the layout, at least until `commit` has returned. kinds: the framework whose array a
    tensor was, by tensor name; NumPy's are left out.
    """

    name: str
    skeleton: Any
    layout: Layout | None = None
    data: memoryview = field(default=memoryview(b""), repr=False)
    kinds: dict[str, str] = field(default_factory=dict, repr=False)


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


def commit(store: Store, manifest: Manifest, parts: Sequence[Part]) -> tuple[str, Manifest]:
    """Write `parts` as a new checkpoint; durable when this returns its name and its manifest, files filled in.

    manifest: the facts; `files` and `objects` are filled in here. A name that is in use is never touched: the second
    checkpoint of step 450 is called step-00000450.2. On any error nothing is published and what was written is removed.
    Raises StorageError.
    """
    for name in _candidate_names(manifest.step):
        if store.size(f"{checkpoint_path(name)}/{MANIFEST}") is not None:
            continue
        try:
            draft = store.draft(checkpoint_path(name))
        except Taken:
            continue
        break
    published = False
    try:
        files, digests = [], {}
        for part in parts:
            if part.layout is not None:
                file, digests[f"{part.name}.safetensors"] = _write_tensors(store, draft, part, part.layout)
                files.append(file)
        files.append(_write_state(store, draft, parts, digests))
        objects = {part.name: _describe(part) for part in parts}
        manifest = msgspec.structs.replace(manifest, files=tuple(files), objects=objects)
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
    return name, manifest


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


def _write_tensors(store: Store, draft: str, part: Part, layout: Layout) -> tuple[File, list[str]]:
    name = f"{part.name}.safetensors"
    hasher = Hasher()

    def chunks() -> Iterator[memoryview]:
        pieces = (part.data[at : at + CHUNK_BYTES] for at in range(0, len(part.data), CHUNK_BYTES))
        for piece in itertools.chain([memoryview(layout.header)], pieces):
            hasher.update(piece)
            yield piece

    store.create(f"{draft}/{name}", chunks())
    digests = [digest(part.data[entry.start : entry.end]) for entry in layout.entries]
    return File(name, layout.file_size, hasher.text()), digests


def _write_state(store: Store, draft: str, parts: Sequence[Part], digests: dict[str, list[str]]) -> File:
    objects = {part.name: part.skeleton for part in parts}
    kinds = {part.name: part.kinds for part in parts if part.kinds}
    data = strict.write({"format": 1, "objects": objects, "digests": digests, "kinds": kinds})
    store.create(f"{draft}/{STATE}", [data])
    return File(STATE, len(data), digest(data))


def _describe(part: Part) -> Object:
    if part.layout is None:
        return Object()
    return Object((f"{part.name}.safetensors",), len(part.layout.entries), len(part.data))


def checkpoint_names(store: Store) -> list[str]:
    """The names under which checkpoints are published; whether one exists is for its manifest to say."""
    return [name for name in store.list(CHECKPOINTS) if not name.startswith(".")]


def read_manifest(store: Store, name: str) -> Manifest | None:
    """The manifest of the checkpoint called `name`; None if there is none, so that no checkpoint exists there.

    Raises Damaged, or Unreadable for a newer format.
    """
    found = read_manifest_bytes(store, name)
    return None if found is None else found[1]


def read_manifest_bytes(
    store: Store, name: str, known: tuple[bytes, Manifest] | None = None
) -> tuple[bytes, Manifest] | None:
    """The same with its bytes. known: bytes read before and what they said, so that they are decoded once."""
    path = f"{checkpoint_path(name)}/{MANIFEST}"
    try:
        data = store.read(path, MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        return None
    return known if known is not None and known[0] == data else (data, decode(data, where=path))


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
