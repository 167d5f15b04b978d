"""The reference store: a dictionary, with the manners of an object store.

Nothing can be renamed at once there, so a draft is seen under its final name from the beginning and `publish` only
confirms it. A reader that trusts anything but the manifest, or a writer that does not write it last, fails on this
store first.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, ClassVar, Self

from highcamp.errors import Damaged, InvalidArgument, StorageError, Taken
from highcamp.storage.store import NotThere, flat, join, parts

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping
    from types import TracebackType

    from highcamp.storage.store import Buffer

MANIFEST = "manifest.json"


class MemoryStore:
    """Files in the memory of this process, gone with it; safe to use from several threads."""

    _named: ClassVar[dict[str, MemoryStore]] = {}
    _naming: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, name: str = "unnamed") -> None:
        """A new, empty store; `named` gives the one that `memory://name` stands for."""
        self._name = name
        self._files: dict[str, bytes] = {}
        self._drafts: set[str] = set()
        self._lock = threading.RLock()

    @classmethod
    def named(cls, name: str) -> MemoryStore:
        """The store of `memory://name`, one per name in a process."""
        if not name:
            raise InvalidArgument("memory:// has no name", hint='for example "memory://digits"')
        parts(name)
        with cls._naming:
            return cls._named.setdefault(name, cls(name))

    @property
    def url(self) -> str:
        """The URL, `memory://name`."""
        return f"memory://{self._name}"

    def list(self, directory: str) -> list[str]:
        """See `Store.list`."""
        above = parts(directory, root=True)
        with self._lock:
            if directory in self._files:
                where = self._where(directory)
                raise StorageError(f"listing of {where} failed: it is a file", path=where)
            known = [tuple(path.split("/")) for path in (*self._files, *self._drafts)]
        depth = len(above)
        return sorted({names[depth] for names in known if len(names) > depth and names[:depth] == above})

    def size(self, path: str) -> int | None:
        """See `Store.size`."""
        parts(path)
        with self._lock:
            data = self._files.get(path)
        return None if data is None else len(data)

    def read(self, path: str, limit: int) -> bytes:
        """See `Store.read`."""
        with self.open(path) as reader:
            if reader.size > limit:
                raise Damaged(
                    f"{self._where(path)} is {reader.size} bytes, expected at most {limit}", path=self._where(path)
                )
            return bytes(reader.map())

    def read_each(
        self, directory: str, names: Iterable[str], file: str, limit: int, known: Mapping[str, bytes]
    ) -> Iterator[tuple[str, bytes | Damaged | None]]:
        """See `Store.read_each`."""
        for name in names:
            found: bytes | Damaged | None
            try:
                found = self.read(join(directory, name, file), limit)
            except NotThere:
                found = None
            except Damaged as error:
                found = error
            yield name, known[name] if found is not None and known.get(name) == found else found

    def open(self, path: str) -> MemoryReader:
        """See `Store.open`."""
        parts(path)
        with self._lock:
            data = self._files.get(path)
            if data is None and self._is_directory(path):
                raise Damaged(f"{self._where(path)} is a directory, expected a regular file", path=self._where(path))
        if data is None:
            raise NotThere(f"{self._where(path)} does not exist", path=self._where(path))
        return MemoryReader(data, self._where(path))

    def create(self, path: str, chunks: Iterable[Buffer]) -> None:
        """See `Store.create`; as on an object store there are no parents that could be missing."""
        parts(path)
        data = bytearray()
        for chunk in chunks:  # copied at once: the next one may come in the same buffer
            data += flat(chunk)
        with self._lock:
            if path in self._files or self._is_directory(path):
                raise self._taken("create", path)
            self._files[path] = bytes(data)

    def link(self, source: str, path: str) -> None:
        """See `Store.link`: the bytes are shared, as by a copy that the server makes."""
        parts(source), parts(path)
        with self._lock:
            if source not in self._files:
                raise NotThere(f"{self._where(source)} does not exist", path=self._where(source))
            if path in self._files or self._is_directory(path):
                raise self._taken("link", path)
            self._files[path] = self._files[source]

    def draft(self, target: str) -> str:
        """See `Store.draft`: the target itself, listed from now on."""
        parts(target)
        with self._lock:
            if target in self._files or self._is_directory(target):
                raise self._taken("draft", target)
            self._drafts.add(target)
        return target

    def publish(self, draft: str, target: str) -> None:
        """See `Store.publish`: nothing to do, unless under another name than planned; then the manifest goes last."""
        with self._lock:
            self._require_directory("publish", draft)
            if draft != target:
                self._move(draft, target, manifest_first=False)
            self._drafts.discard(draft)

    def withdraw(self, path: str, to: str) -> None:
        """See `Store.withdraw`: the manifest goes first, so that nobody sees half a checkpoint."""
        with self._lock:
            self._require_directory("withdraw", path)
            self._move(path, to, manifest_first=True)
            self._drafts.discard(path)

    def remove(self, path: str) -> None:
        """See `Store.remove`."""
        parts(path)
        with self._lock:
            for name in self._below(path):
                del self._files[name]
            self._files.pop(path, None)
            self._drafts = {name for name in self._drafts if name != path and not name.startswith(f"{path}/")}

    def replace(self, path: str, data: bytes) -> None:
        """See `Store.replace`."""
        with self._lock:
            self._require_no_directory("replace", path)
            self._files[path] = bytes(data)

    def append(self, path: str, data: bytes, *, durable: bool) -> None:  # noqa: ARG002  # memory is as durable as it gets
        """See `Store.append`."""
        with self._lock:
            self._require_no_directory("append", path)
            self._files[path] = self._files.get(path, b"") + data

    def free_bytes(self) -> int | None:
        """See `Store.free_bytes`: not known."""
        return None

    def _below(self, directory: str) -> tuple[str, ...]:
        return tuple(name for name in self._files if name.startswith(f"{directory}/"))

    def _is_directory(self, path: str) -> bool:
        return path in self._drafts or bool(self._below(path))

    def _move(self, source: str, target: str, *, manifest_first: bool) -> None:
        parts(target)
        if target in self._files or self._is_directory(target):
            raise self._taken("rename", target)
        manifest = join(source, MANIFEST)
        for name in sorted(self._below(source), key=lambda each: (each == manifest) != manifest_first):
            self._files[target + name.removeprefix(source)] = self._files[name]
            del self._files[name]

    def _where(self, path: str) -> str:
        return join(self.url, path)

    def _taken(self, call: str, path: str) -> Taken:
        where = self._where(path)
        return Taken(f"{call}: {where} is in use already", path=where, hint="take another name")

    def _require_directory(self, call: str, path: str) -> None:
        parts(path)
        if path in self._files:
            raise Damaged(f"{call}: {self._where(path)} is a file, expected a directory", path=self._where(path))
        if not self._is_directory(path):
            raise NotThere(f"{call}: {self._where(path)} does not exist", path=self._where(path))

    def _require_no_directory(self, call: str, path: str) -> None:
        parts(path)
        if self._is_directory(path):
            raise StorageError(f"{call} of {self._where(path)} failed: it is a directory", path=self._where(path))


class MemoryReader:
    """The bytes of one file of a MemoryStore as they were when it was opened; see `Reader`."""

    def __init__(self, data: bytes, where: str) -> None:
        """where: the URL of the file, for messages."""
        self._data = data
        self._where = where

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return len(self._data)

    @property
    def identity(self) -> Hashable:
        """See `Reader.identity`: a link shares the bytes, a new file has its own."""
        return id(self._data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Reader.read_into`."""
        into = flat(buffer)
        if offset < 0:
            raise InvalidArgument(f"{self._where}: read at offset {offset}", path=self._where)
        missing = offset + len(into) - len(self._data)
        if into and missing > 0:
            raise Damaged(
                f"{self._where} ends at byte {len(self._data)}, expected {missing} bytes more",
                path=self._where,
                hint="it was truncated, or its manifest belongs to another file",
            )
        if into:
            into[:] = self._data[offset : offset + len(into)]

    def map(self) -> memoryview:
        """See `Reader.map`."""
        return memoryview(self._data)

    def close(self) -> None:
        """See `Reader.close`."""

    def __enter__(self) -> Self:
        """Return the reader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
