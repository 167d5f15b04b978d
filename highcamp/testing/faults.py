"""A store that fails at a chosen operation.

The loop that uses it: fail operation 1, 2, 3, … of some work until a run goes through untouched, once clean and once
torn, and look after each failure whether everything that was acknowledged is still whole.

    for n in itertools.count(1):
        store = FaultyStore(real, fail_at=n, torn=torn)
        with contextlib.suppress(StorageError):
            work(store)
        look_at(real)
        if not store.failed:
            break
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, TypeVar

from highcamp.errors import Damaged, StorageError
from highcamp.storage.store import flat, join

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from highcamp.storage.store import Buffer, Reader, Store

Result = TypeVar("Result")


class FaultyStore:
    """Passes everything to another store, and fails the N-th operation that changes something.

    fail_at: 1 is the first; 0 never fails. torn: the failing operation half happens: `create` leaves half of the bytes,
    `remove` leaves some of the files, the others are done but reported as failed. Otherwise nothing happens.
    forever: every later operation fails as well, reading too, as for a process that is dead. error: what is raised, a
    StorageError with EIO by default; a BaseException such as KeyboardInterrupt works.
    """

    def __init__(
        self,
        store: Store,
        *,
        fail_at: int,
        torn: bool = False,
        forever: bool = False,
        error: BaseException | None = None,
    ) -> None:
        self._store = store
        self._fail_at = fail_at
        self._torn = torn
        self._forever = forever
        self._error = error
        self.operations: list[str] = []
        """Each operation that changes something, as "create checkpoints/…", the failed one included."""
        self.failed = False
        """Whether the fault has struck."""

    @property
    def url(self) -> str:
        """That of the store inside."""
        return self._store.url

    def list(self, directory: str) -> list[str]:
        """Pass on."""
        self._require_alive(f"list {directory}")
        return self._store.list(directory)

    def size(self, path: str) -> int | None:
        """Pass on."""
        self._require_alive(f"size {path}")
        return self._store.size(path)

    def read(self, path: str, limit: int) -> bytes:
        """Pass on."""
        self._require_alive(f"read {path}")
        return self._store.read(path, limit)

    def read_each(
        self, directory: str, names: Iterable[str], file: str, limit: int, known: Mapping[str, bytes]
    ) -> Iterator[tuple[str, bytes | Damaged | None]]:
        """Pass on."""
        self._require_alive(f"read {directory}")
        return self._store.read_each(directory, names, file, limit, known)

    def open(self, path: str) -> Reader:
        """Pass on."""
        self._require_alive(f"open {path}")
        return self._store.open(path)

    def create(self, path: str, chunks: Iterable[Buffer]) -> None:
        """Count; torn: half of the bytes are there."""

        def tear() -> None:
            data = b"".join(bytes(flat(chunk)) for chunk in chunks)
            self._store.create(path, [data[: len(data) // 2]])

        self._run(f"create {path}", lambda: self._store.create(path, chunks), tear)

    def link(self, source: str, path: str) -> None:
        """Count; torn: done, but reported as failed."""
        self._run(f"link {source} {path}", lambda: self._store.link(source, path))

    def draft(self, target: str) -> str:
        """Count; torn: the draft is there, and nobody was told its name."""
        return self._run(f"draft {target}", lambda: self._store.draft(target))

    def publish(self, draft: str, target: str) -> None:
        """Count; torn: done, but reported as failed."""
        self._run(f"publish {draft} {target}", lambda: self._store.publish(draft, target))

    def withdraw(self, path: str, to: str) -> None:
        """Count; torn: done, but reported as failed."""
        self._run(f"withdraw {path} {to}", lambda: self._store.withdraw(path, to))

    def remove(self, path: str) -> None:
        """Count; torn: some of the files are gone, every other one from the first."""

        def tear() -> None:
            for file in self._files(path)[::2]:
                self._store.remove(file)

        self._run(f"remove {path}", lambda: self._store.remove(path), tear)

    def replace(self, path: str, data: bytes) -> None:
        """Count; torn: done, but reported as failed."""
        self._run(f"replace {path}", lambda: self._store.replace(path, data))

    def append(self, path: str, data: bytes, *, durable: bool) -> None:
        """Count; torn: done, but reported as failed."""
        self._run(f"append {path}", lambda: self._store.append(path, data, durable=durable))

    def free_bytes(self) -> int | None:
        """Pass on."""
        return self._store.free_bytes()

    def _run(self, operation: str, work: Callable[[], Result], tear: Callable[[], None] | None = None) -> Result:
        self.operations.append(operation)
        self._require_alive(operation)
        if len(self.operations) != self._fail_at:
            return work()
        if self._torn:
            (tear or work)()
        self.failed = True
        raise self._failure(operation)

    def _require_alive(self, operation: str) -> None:
        if self.failed and self._forever:
            raise self._failure(operation)

    def _failure(self, operation: str) -> BaseException:
        if self._error is not None:
            return self._error
        return StorageError(f"injected: {operation}", path=operation.partition(" ")[2], errno=errno.EIO)

    def _files(self, path: str) -> tuple[str, ...]:
        """Every file at or below a path, sorted."""
        if self._store.size(path) is not None:
            return (path,)
        return tuple(file for name in self._store.list(path) for file in self._files(join(path, name)))
