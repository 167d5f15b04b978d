"""Export: a checkpoint's weights in a format that other tools read."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from highcamp.core import tensorfile
from highcamp.core.tree import names
from highcamp.errors import InvalidArgument, MissingExtra, Refused, StorageError
from highcamp.run import live
from highcamp.run.tensors import load_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from highcamp.core.array import HostArray
    from highcamp.run.checkpoint import Checkpoint

SUFFIXES = (".safetensors", ".npz", ".pt", ".weights.h5", ".keras")


def export(checkpoint: Checkpoint, path: str | os.PathLike[str], *, object_name: str, force: bool) -> Path:
    """Verify, then write the tensors of one object to `path`; the file appears whole or not at all.

    Raises InvalidArgument for a suffix not in SUFFIXES, Refused if `path` exists, MissingExtra, Damaged, StorageError.
    """
    target = Path(path)
    suffix = next((suffix for suffix in SUFFIXES if target.name.endswith(suffix)), None)
    if suffix is None:
        raise InvalidArgument(
            f"{target} has no suffix that export knows", path=str(target), hint=f"use one of {', '.join(SUFFIXES)}"
        )
    if target.exists() and not force:
        raise Refused(f"{target} exists", path=str(target), hint="name another file, or use force=True (--force)")
    skeleton = checkpoint.skeleton(object_name)
    tensors = load_tensors(checkpoint, object_name, mapped=False)
    arrays = {path: tensors[name] for path, name in names(skeleton).items()}
    pending = target.with_name(f".{secrets.token_hex(4)}-{target.name}")  # the suffix stays: writers look at it
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(pending, suffix, arrays, checkpoint.state(object_name))
        with pending.open("rb+") as written:
            os.fsync(written.fileno())
        pending.replace(target)
    except OSError as error:
        if isinstance(error, MissingExtra):
            raise
        raise StorageError(f"{target} could not be written: {error}", path=str(target), errno=error.errno) from error
    finally:
        pending.unlink(missing_ok=True)
    return target


def _write(path: Path, suffix: str, arrays: Mapping[str, HostArray], state: Any) -> None:
    if suffix == ".safetensors":
        _write_safetensors(path, arrays)
    elif suffix == ".npz":
        _write_npz(path, arrays)
    elif suffix == ".pt":
        live.framework("torch").export(arrays, path)
    else:
        live.framework("keras").export(state, path)


def _write_safetensors(path: Path, arrays: Mapping[str, HostArray]) -> None:
    layout = tensorfile.plan({name: array.spec for name, array in arrays.items()}, {"format": "pt"})
    with path.open("xb") as file:
        file.write(layout.header)
        for entry in layout.entries:
            file.write(arrays[entry.name].data)


def _write_npz(path: Path, arrays: Mapping[str, HostArray]) -> None:
    """NumPy's own archive; what it has no type for (bfloat16, float8) is refused rather than written as raw bytes."""
    import numpy as np

    plain = {name: array.numpy() for name, array in arrays.items()}
    foreign = [name for name, array in plain.items() if array.dtype.isbuiltin != 1]
    if foreign:
        raise InvalidArgument(
            f"{foreign[0]} is {plain[foreign[0]].dtype}, which .npz files cannot hold", hint="export to .safetensors"
        )
    with path.open("xb") as file:
        np.savez(file, allow_pickle=False, **plain)
