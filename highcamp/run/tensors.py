"""Reading the tensor files of a checkpoint, every byte against its digest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from highcamp.core import tensorfile
from highcamp.core.array import HostArray
from highcamp.core.digest import Hasher
from highcamp.errors import Damaged
from highcamp.run.commit import checkpoint_path

if TYPE_CHECKING:
    from highcamp.core.manifest import File
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.storage.store import Reader

READ_BYTES = 1 << 20  # hashed while it is still in the processor's cache


def load_tensors(checkpoint: Checkpoint, object_name: str, *, mapped: bool) -> dict[str, HostArray]:
    """The tensors of one object by their names in its files.

    mapped: read-only views of the files; otherwise writable memory of their own. Either way every byte is read and
    compared with its digest first. Raises Damaged.
    """
    tensors: dict[str, HostArray] = {}
    listed = {file.name: file for file in checkpoint.manifest.files}
    for name in checkpoint.manifest.objects[object_name].files:
        path = f"{checkpoint_path(checkpoint.name)}/{name}"
        tensors |= _load_file(checkpoint, listed[name], path, mapped=mapped)
    return tensors


def _load_file(checkpoint: Checkpoint, file: File, path: str, *, mapped: bool) -> dict[str, HostArray]:
    where = f"{checkpoint.store.url}/{path}"
    try:
        reader = checkpoint.store.open(path)
    except FileNotFoundError as error:
        raise damaged(checkpoint, f"{file.name} is missing") from error
    with reader:
        if reader.size != file.size:
            raise damaged(checkpoint, f"{file.name} is {reader.size} bytes, its manifest says {file.size}")
        if mapped:
            found = read_digest(reader)
            data = reader.map()
        else:
            data = memoryview(bytearray(file.size))
            found = read_digest(reader, into=data)
    if found != file.digest:
        raise damaged(checkpoint, f"{file.name} differs from its digest")
    length = tensorfile.header_bytes(bytes(data[:8]), file.size, where)
    layout = tensorfile.parse(bytes(data[:length]), file.size, where)
    return {
        entry.name: HostArray(
            entry.dtype, entry.shape, data[layout.data_start + entry.start : layout.data_start + entry.end]
        )
        for entry in layout.entries
    }


def read_digest(reader: Reader, into: memoryview | None = None) -> str:
    """Read a whole file piece by piece and return the digest of what was read; `into` keeps the bytes (its size)."""
    hasher = Hasher()
    buffer = memoryview(bytearray(min(READ_BYTES, reader.size))) if into is None else into
    for start in range(0, reader.size, READ_BYTES):
        length = min(READ_BYTES, reader.size - start)
        piece = buffer[:length] if into is None else buffer[start : start + length]
        reader.read_into(start, piece)
        hasher.update(piece)
    return hasher.text()


def damaged(checkpoint: Checkpoint, problem: str) -> Damaged:
    """The error for a checkpoint whose bytes are not what was committed."""
    return Damaged(
        f"{checkpoint.name}: {problem}",
        path=checkpoint.path,
        hint=f'"highcamp verify {checkpoint.store.url}" shows what is left',
    )
