"""Every error highcamp raises.

Each one is a `HighcampError` and the builtin a caller would expect, and carries the exit code of the command line:

    HighcampError
    ├── InvalidArgument(ValueError)          2   an argument that cannot work, raised before anything runs
    ├── InvalidState(TypeError)              2   a value in the training state that files cannot hold
    ├── InvalidMetric(TypeError)             2   a metric that is no number
    ├── MissingExtra(ImportError)            2   an optional dependency that is not installed
    ├── StorageError(OSError)                3   the disk or the store failed; what was committed before is untouched
    │   └── Taken(FileExistsError)           3   a name that is in use already
    ├── RunNotFound(FileNotFoundError)      10   no run at this place
    ├── RunLocked(BlockingIOError)          11   another live process writes to this run
    ├── CheckpointNotFound(LookupError)     12   no such checkpoint, or more than one
    ├── Refused(PermissionError)            13   the request would destroy or mix up something
    ├── Mismatch(ValueError)                13   a checkpoint does not fit the live objects
    ├── Torn(RuntimeError)                   3   the state changed while an overlapped snapshot was copied
    └── Damaged(ValueError)                  1   bytes on disk are not what was committed
        └── Unreadable                       1   written by a newer format than this version reads
"""

from __future__ import annotations

from typing import ClassVar


class HighcampError(Exception):
    """Something failed; the message says what, where, what was expected and found, and what to do."""

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, path: str | None = None, hint: str | None = None) -> None:
        """message: what failed, where, expected and found. path: the file or state path. hint: what to do."""
        super().__init__(message)
        self.message = message
        self.path = path
        self.hint = hint

    def __str__(self) -> str:
        """The message, followed by what to do."""
        between = "" if self.message.endswith("\n") else "; "
        return f"{self.message}{between}{self.hint}" if self.hint else self.message


class InvalidArgument(HighcampError, ValueError):
    """An argument cannot work; raised by constructors and calls before anything runs."""

    exit_code = 2


class InvalidState(HighcampError, TypeError):
    """A value in the training state is neither a tensor nor plain data; `path` names it."""

    exit_code = 2


class InvalidMetric(HighcampError, TypeError):
    """A metric is not a number; the message names it and its type."""

    exit_code = 2


class MissingExtra(HighcampError, ImportError):
    """An optional dependency is not installed; the message has the pip command."""

    exit_code = 2


class StorageError(HighcampError, OSError):
    """The disk or the store failed; everything committed before is untouched."""

    def __init__(
        self, message: str, *, path: str | None = None, hint: str | None = None, errno: int | None = None
    ) -> None:
        """errno: the operating system's code, where there was one."""
        super().__init__(message, path=path, hint=hint)
        self.errno = errno


class Taken(StorageError, FileExistsError):
    """The name is in use already; nothing was overwritten."""


class RunNotFound(HighcampError, FileNotFoundError):
    """There is no run at this place."""

    exit_code = 10


class RunLocked(HighcampError, BlockingIOError):
    """Another live process writes to this run; the message names it."""

    exit_code = 11


class CheckpointNotFound(HighcampError, LookupError):
    """No checkpoint fits the reference, or more than one does."""

    exit_code = 12


class Refused(HighcampError, PermissionError):
    """The request would destroy something protected, or mix two experiments."""

    exit_code = 13


class Mismatch(HighcampError, ValueError):
    """A checkpoint does not fit the live objects; every difference is listed and nothing was changed."""

    exit_code = 13


class Torn(HighcampError, RuntimeError):
    """The state changed while an overlapped snapshot of it was copied; nothing was saved."""


class Damaged(HighcampError, ValueError):
    """Bytes on disk are not what was committed; the message names the file."""

    exit_code = 1


class Unreadable(Damaged):
    """Written by a newer format than this version reads; it is listed, and never touched."""
