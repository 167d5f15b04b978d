"""The protocol every store fulfills, and `open_store`.

A path is a relative string of parts joined by "/", below the store's root, the same on every store. The contract in
words is here, as tests it is `highcamp.testing.contract.StoreContract`.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Protocol, Self

from highcamp.errors import Damaged, InvalidArgument, StorageError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping
    from types import TracebackType

    Buffer = bytes | bytearray | memoryview

MAX_PART_BYTES = 255  # of one part of a path, as UTF-8; the limit of common file systems, kept on all stores

_NOT_YET = ("s3", "gs", "az")
# What nearly every path looks like: short names of plain characters, of which no rule below could refuse one.
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}(?:/[A-Za-z0-9_-][A-Za-z0-9._-]{0,99})*\Z")


class NotThere(StorageError, FileNotFoundError):
    """Nothing exists under this path."""


class Reader(Protocol):
    """An open file that no longer changes; a context manager."""

    @property
    def size(self) -> int:
        """Bytes in the file when it was opened."""
        ...

    @property
    def identity(self) -> Hashable:
        """Equal for readers of one file, under any of its names, opened while nobody has replaced or written to it."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole of `buffer` (writable, C-contiguous) from `offset`; Damaged when the file ends before."""
        ...

    def map(self) -> memoryview:
        """The whole file, read-only; stays valid after `close`. Only for files that nobody truncates: SIGBUS."""
        ...

    def close(self) -> None:
        """Give the file back; a second call does nothing."""
        ...

    def __enter__(self) -> Self:
        """Return the reader itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        ...


class Store(Protocol):
    """A place for files: committed ones never change, and a directory of them appears under its name at once.

    Every failure of the disk or the service is a StorageError with call, path and errno; a path that leaves the store
    is an InvalidArgument. After an error nothing is retried on the same file: write it again under a new name.
    """

    @property
    def url(self) -> str:
        """What `open_store` takes to open this store again."""
        ...

    def list(self, directory: str) -> list[str]:
        """Names directly below `directory` ("" is the root), files and directories, sorted; [] if it is absent."""
        ...

    def size(self, path: str) -> int | None:
        """Bytes of a regular file; None when there is none at `path` (a link is not followed and counts as none)."""
        ...

    def read(self, path: str, limit: int) -> bytes:
        """The whole of a small file. NotThere if absent; Damaged if above `limit` bytes or no regular file."""
        ...

    def read_each(
        self, directory: str, names: Iterable[str], file: str, limit: int, known: Mapping[str, bytes]
    ) -> Iterator[tuple[str, bytes | Damaged | None]]:
        """What `read` gives for the file called `file` in each of `names` below `directory`, with its name, in that order.

        None where it is absent, and the Damaged that `read` would raise; other errors are raised. known: by name, what was
        read before: where that is what is there now, it is given itself, not a copy. A local disk looks a directory up
        once for thousands of manifests, and a service can be asked for many at the same time.
        """
        ...

    def open(self, path: str) -> Reader:
        """A reader of a file of any size. NotThere if absent; Damaged if it is no regular file."""
        ...

    def create(self, path: str, chunks: Iterable[Buffer]) -> None:
        """Write a new file, complete and durable on return. Taken if the name is in use; parents are not made.

        chunks: C-contiguous buffers, each read before the next is asked for. After a failure nothing is left at `path`
        where that is possible. Inside a draft the name becomes durable with `publish`.
        """
        ...

    def link(self, source: str, path: str) -> None:
        """Let the file `source` be `path` too, without writing its bytes again; removing one leaves the other.

        For files that never change, into a draft; durable as what `create` has written. NotThere if `source` is absent,
        Taken if `path` is in use, StorageError where files cannot be linked: the caller then writes the bytes.
        """
        ...

    def draft(self, target: str) -> str:
        """Make a new, empty directory in which to build `target`, unseen by those who go by manifests; its path.

        Parents of `target` are made, durably. Taken if the store already knows that `target` is in use.
        """
        ...

    def publish(self, draft: str, target: str) -> None:
        """Make the directory `draft` visible as `target`, at once and durably. Taken if in use, the draft untouched."""
        ...

    def withdraw(self, path: str, to: str) -> None:
        """The same the other way: `path` is gone and `to`, in the same directory, holds it, at once and durably."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file, or a directory and all below; links are unlinked, never followed; absent is no error."""
        ...

    def replace(self, path: str, data: bytes) -> None:
        """Put a small file in place of what was there, at once and durably; parents are made."""
        ...

    def append(self, path: str, data: bytes, *, durable: bool) -> None:
        """Add `data` in one write to a file that only this process appends to, made when absent; parents are made.

        durable: on return it survives a power cut, and everything appended before with it.
        """
        ...

    def free_bytes(self) -> int | None:
        """Bytes that can still be written, or None where the store has no such limit or does not tell."""
        ...


def parts(path: str, *, root: bool = False) -> tuple[str, ...]:
    """The checked parts of a path; InvalidArgument for one that is empty, absolute, leaves the store or fits no store.

    root: whether "" is allowed, the root itself.
    """
    if root and path == "":
        return ()
    found = tuple(path.split("/"))
    for part in found:
        if part in {"", ".", ".."} or "\0" in part or "\\" in part:
            raise InvalidArgument(
                f"path {path!r} in a store: the part {part!r} is not a name",
                path=path,
                hint='join names by single "/", without "..", "\\\\" or a leading "/"',
            )
        if len(os.fsencode(part)) > MAX_PART_BYTES:
            raise InvalidArgument(
                f"path {path[:300]!r} in a store: a part has more than {MAX_PART_BYTES} bytes",
                path=path,
                hint="shorten it",
            )
    return found


def is_plain(path: str) -> bool:
    """Whether `parts` would take `path` as it is; quick, and not all that it would take is plain."""
    return _PLAIN.match(path) is not None


def join(*names: str) -> str:
    """One path of several, empty ones left out."""
    return "/".join(name for name in names if name)


def parent(path: str) -> str:
    """The directory a path lies in; "" for the root."""
    return path.rpartition("/")[0]


def flat(chunk: Buffer) -> memoryview:
    """The bytes of a C-contiguous buffer, one after the other."""
    view = memoryview(chunk)
    return view.cast("B") if view.nbytes else memoryview(b"")  # cast refuses a shape with a zero in it


def open_store(url: str | os.PathLike[str] | Store) -> Store:
    """The store at a path or URL; a store is returned as it is.

    Creates nothing. Raises InvalidArgument for a place this version cannot write to.
    """
    if not isinstance(url, (str, bytes, os.PathLike)) and hasattr(url, "publish"):
        return url
    text = os.fspath(url)  # type: ignore[arg-type]  # fspath tells what is neither
    if not isinstance(text, str) or not text or "\0" in text:
        raise InvalidArgument(f"{url!r} is not a path or URL", hint='for example "runs/digits"')
    # One slash is enough: pathlib.Path("s3://bucket") has swallowed the other, and would make a local directory "s3:".
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(//?)", text)
    if match is None:
        from highcamp.storage.local import LocalStore  # stores know this module, not the reverse

        return LocalStore(text)
    scheme, rest = match[1].lower(), text[match.end() :]
    if scheme == "memory" and match[2] == "//":
        from highcamp.storage.memory import MemoryStore

        return MemoryStore.named(rest)
    if scheme in _NOT_YET:
        raise InvalidArgument(
            f"{text}: {scheme}:// is not available in this version of highcamp",
            path=text,
            hint="save to a local path, and copy the run when training has ended",
        )
    raise InvalidArgument(f'{text}: "{match[0]}" is no store', path=text, hint="give a path, or memory://name")
