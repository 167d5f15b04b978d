"""The parsers of what comes from disk, each as one function of bytes with one promise.

Whatever the bytes are: either they are refused with Damaged (Unreadable is one), or they are read to a value that comes back
unchanged when it is written and read again. Any other exception is a finding, and so is an assertion here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from highcamp.core import manifest as manifests
from highcamp.core import strict, tensorfile
from highcamp.core.array import HostArray
from highcamp.core.digest import digest
from highcamp.core.manifest import MANIFEST, STATE, File, Manifest, Object
from highcamp.core.tree import flatten, names, unflatten
from highcamp.errors import Damaged, HighcampError, InvalidState
from highcamp.run import commit, history, owner, settings
from highcamp.run.history import HistoryReader
from highcamp.storage.memory import MemoryStore
from highcamp.training import found

if TYPE_CHECKING:
    from collections.abc import Callable

CORPUS = Path(__file__).parent / "corpus"


def read_tensor_file(data: bytes) -> object:
    """A tensor file: header and size, as they are read before any tensor."""
    length = tensorfile.header_bytes(data[:8], len(data), "f")
    layout = tensorfile.parse(data[:length], len(data), "f")
    position = 0
    for entry in layout.entries:
        assert entry.start == position <= entry.end
        assert len(entry.name.encode()) <= tensorfile.MAX_NAME_BYTES
        position = entry.end
    assert len(layout.header) + position == len(data)
    specs = {entry.name: entry.spec for entry in layout.entries}
    assert len(specs) == len(layout.entries)
    again = tensorfile.plan(specs, layout.metadata)
    back = tensorfile.parse(again.header, again.file_size, "f")
    assert {entry.name: entry.spec for entry in back.entries} == specs
    assert (back.metadata, back.size) == (layout.metadata, layout.size)
    return layout


def read_manifest(data: bytes) -> object:
    """A `manifest.json`."""
    value = manifests.decode(data, where="m")
    written = manifests.encode(value)
    assert manifests.decode(written, where="m") == value
    assert manifests.encode(manifests.decode(written, where="m")) == written
    assert all(file.size >= 0 for file in value.files)
    assert not any(math.isnan(number) for number in value.order)
    assert isinstance(value.values, dict)
    return value


def read_signed_manifest(data: bytes) -> object:
    """A `manifest.json` whose digest fits, which a forger can see to: `data` is all that stands before it."""
    return read_manifest(data + f',\n  "digest": "{digest(data)}"\n}}\n'.encode())


def read_state(data: bytes) -> object:
    """A `state.json` whose digest fits, with the trees of the objects `a` and `b`."""
    store = MemoryStore()
    draft = store.draft("checkpoints/step-00000001")
    store.create(f"{draft}/{STATE}", [data])
    facts = Manifest(
        run_id="r", step=1, epoch=1, sequence=1, attempt=1, created_at="", files=(File(STATE, len(data), digest(data)),),
        objects={"a": Object(), "b": Object()},
    )  # fmt: skip
    store.create(f"{draft}/{MANIFEST}", [manifests.encode(facts)])
    store.publish(draft, "checkpoints/step-00000001")
    state = commit.read_state(store, "step-00000001", facts)
    for skeleton in state.objects.values():
        paths = names(skeleton)
        _comes_back(unflatten(skeleton, _tensor), len(paths))
    return state


def _tensor(name: str) -> HostArray:
    return HostArray("U8", (0,), memoryview(b""))


def _comes_back(value: object, count: int) -> None:
    """Written and read again, a tree has a form that does not change any more."""
    try:
        flat = flatten(value, lambda leaf: leaf if isinstance(leaf, HostArray) else None, where="x")
    except InvalidState as error:
        # Files may hold a little more than we write: integers of 4,300 digits, and keys that are equal only as paths.
        assert "4,200 digits" in str(error) or "deeper" in str(error), error  # noqa: PT017
        return
    assert len(flat.arrays) == count
    data = strict.write(flat.skeleton)
    again = flatten(
        unflatten(strict.read(data, where="x", limit=len(data)), _tensor),
        lambda leaf: leaf if isinstance(leaf, HostArray) else None,
        where="x",
    )
    assert _text(again.skeleton) == _text(flat.skeleton)


def _text(skeleton: Any) -> bytes:
    return strict.write(skeleton)


def read_json(data: bytes) -> object:
    """Any JSON of ours."""
    value = strict.read(data, where="j", limit=1 << 24)
    try:
        written = strict.write(value)
    except InvalidState:
        # 1e16 is written with more digits than it was read with: the text may grow past a limit, and nothing else may fail.
        assert len(data) > 1 << 20
        return value
    assert strict.write(strict.read(written, where="j", limit=1 << 26)) == written
    return value


def read_history(data: bytes) -> object:
    """A history file: what is no row of ours is passed over, so that it is never refused."""
    store = MemoryStore()
    store.append("history/attempt-0001.jsonl", b'{"event":"start","at":""}\n', durable=True)
    if data:
        store.append("history/attempt-0002.jsonl", data, durable=True)
    rows = HistoryReader(store).read()
    assert [attempt.number for attempt in rows.attempts][:1] == [1]
    assert len(rows.rows) <= len(rows.all_rows)
    assert len(rows.epochs()) <= len(rows.all_rows)
    assert all(row.at.tzinfo is not None for row in rows.all_rows)
    assert len(rows.metrics) == len(set(rows.metrics))
    assert repr(rows.saves) == repr(HistoryReader(store).read().saves)
    for row in rows.all_rows:
        rows.at_checkpoint("", row.attempt, row.step)
    for save in rows.saves:
        assert save.cost.share is None or math.isfinite(save.cost.share)
    history.total_cost(save.cost for save in rows.saves)
    return rows


def read_owner(data: bytes) -> object:
    """An owner's record: what is none of ours holds nobody."""
    store = MemoryStore()
    store.replace("owner.json", data)
    value = owner._read(store)
    if value is not None:
        owner._write(store, value)
        assert owner._read(store) == value
        assert value.describe()
        owner.current(store)
    return value


def read_settings(data: bytes) -> object:
    """A `run.json`."""
    store = MemoryStore()
    store.replace("run.json", data)
    value = settings.read_settings(store)
    assert value is not None
    value.monitor_value()
    value.keep_value()
    settings.write_settings(store, value)
    assert settings.read_settings(store) == value
    return value


def read_slot(data: bytes, path: Path) -> object:
    """A file of shared memory whose process is gone. path: where it is put, under the name of its run and attempt."""
    path.write_bytes(data)
    path.chmod(0o600)
    with found.opened(str(path)) as descriptor:
        value = found.read(descriptor, str(path)) if found.read_identity(descriptor, str(path)) is not None else None
    if value is not None:
        value.verify()
        assert sum(len(file.data) for file in value.files) >= 0
    return value


PARSERS: dict[str, Callable[[bytes], object]] = {
    "tensorfile": read_tensor_file,
    "manifest": read_manifest,
    "signed": read_signed_manifest,
    "state": read_state,
    "json": read_json,
    "history": read_history,
    "owner": read_owner,
    "run": read_settings,
}


def refusal(parser: Callable[[bytes], object], data: bytes) -> HighcampError | None:
    """How these bytes are refused; None if they are read."""
    try:
        parser(data)
    except Damaged as error:
        assert len(str(error)) < 2000  # noqa: PT017  (most bytes are refused, some are read)
        return error
    return None
