"""The manifest: the small JSON file whose presence makes a checkpoint exist.

The file is pretty-printed JSON whose last entry is the digest of every byte before that entry, so that any language can
check it without agreeing on how numbers are spelled.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated

import msgspec

from highcamp.core import strict
from highcamp.core.digest import digest
from highcamp.core.names import is_file_name
from highcamp.errors import Damaged, Unreadable

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = 1
"""The format version that this code writes and the newest it reads."""
MANIFEST = "manifest.json"
STATE = "state.json"
MAX_MANIFEST_BYTES = 8 << 20  # thousands of files per checkpoint fit; a hostile one is refused in milliseconds
_DIGEST_LINE = re.compile(rb',\n  "digest": "(xxh3-128:[0-9a-f]{32})"\n\}\n\Z')
_DIGEST_LINE_BYTES = len(b',\n  "digest": "xxh3-128:"\n}\n') + 32
_DIGEST = re.compile(r"xxh3-128:[0-9a-f]{32}\Z")

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class File(msgspec.Struct, frozen=True):
    """One file of a checkpoint: its name, its size in bytes, and the digest of all of them."""

    name: str
    size: Count
    digest: str


class Object(msgspec.Struct, frozen=True):
    """One tracked object: the tensor files it lies in, how many tensors, how many bytes they have."""

    files: tuple[str, ...] = ()
    tensors: Count = 0
    bytes: Count = 0


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is known about a checkpoint without reading its tensors.

    step, epoch: optimizer steps and epochs done when the state was captured. batch: batches done in the epoch under way.
    sequence: grows with every commit of the run. attempt: which stretch of the run wrote it. owner: how often the run had
    changed hands. parent: the checkpoint that
    this state grew out of. created_at: RFC 3339, UTC. metrics: those measured at this step; a value that is not finite is
    null there and named in `nonfinite` ("nan", "inf", "-inf").
    """

    format: Count = FORMAT
    run_id: str
    step: Count
    epoch: Count
    batch: Count = 0
    sequence: Count
    attempt: Count
    owner: Count = 0
    parent: str | None = None
    created_at: str
    metrics: dict[str, float | None] = {}
    nonfinite: dict[str, str] = {}
    files: tuple[File, ...] = ()
    objects: dict[str, Object] = {}
    versions: dict[str, str] = {}

    @property
    def values(self) -> dict[str, float]:
        """The metrics as floats, NaN and infinities included."""
        return join_metrics(self.metrics, self.nonfinite)

    @property
    def order(self) -> tuple[int, int]:
        """What checkpoints are ordered by: (step, sequence), never a time."""
        return (self.step, self.sequence)


def split_metrics(values: Mapping[str, float]) -> tuple[dict[str, float | None], dict[str, str]]:
    """Metrics as JSON can hold them: finite values or None, and the names of those that are not finite."""
    metrics = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return metrics, {name: str(values[name]) for name, value in metrics.items() if value is None}


def join_metrics(metrics: Mapping[str, float | None], nonfinite: Mapping[str, str]) -> dict[str, float]:
    """The reverse of `split_metrics`; a null without its name reads as NaN."""
    spelled = {"inf": math.inf, "-inf": -math.inf}
    return {
        name: spelled.get(nonfinite.get(name, "nan"), math.nan) if value is None else float(value)
        for name, value in metrics.items()
    }


def encode(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: UTF-8, indented by two, its own digest last."""
    body = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    head = body[: -len(b"\n}")]
    return head + f',\n  "digest": "{digest(head)}"\n}}\n'.encode()


def decode(data: bytes, *, where: str) -> Manifest:
    """Check and read the bytes of a `manifest.json`; `where` names it in errors.

    Raises Unreadable for a newer format version, Damaged for anything else that `encode` would not have written.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise Damaged(f"{where} is {len(data)} bytes, the limit is {MAX_MANIFEST_BYTES}", path=where)
    trailer = _DIGEST_LINE.search(data, max(0, len(data) - _DIGEST_LINE_BYTES))
    head = data[: trailer.start()] if trailer else b""
    if trailer is None or digest(head) != trailer[1].decode():
        _raise_if_newer(data, where)
        found = "has no digest of itself" if trailer is None else "differs from its own digest"
        raise Damaged(f"{where} {found}", path=where, hint="its checkpoint is treated as if it did not exist")
    body = head + b"\n}"
    _raise_if_newer(body, where)
    try:
        manifest = msgspec.json.decode(body, type=Manifest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Damaged(f"{where} is no manifest: {error}", path=where) from error
    if encode(manifest) != data:  # written by another hand: whatever the fast reader forgives is looked for
        strict.read(body, where=where, limit=MAX_MANIFEST_BYTES)
    _check(manifest, where)
    return manifest


def _raise_if_newer(body: bytes, where: str) -> None:
    """A newer format may differ in everything but its `format` entry, which therefore is looked at first."""
    found = re.match(rb'\{\s*"format"\s*:\s*(\d{1,9})\s*[,}]', body)
    if found and int(found[1]) > FORMAT:
        raise Unreadable(
            f"{where} has format version {int(found[1])}, this highcamp reads up to {FORMAT}",
            path=where,
            hint="install a newer highcamp to read it; it is left untouched",
        )


def _check(manifest: Manifest, where: str) -> None:
    names = [file.name for file in manifest.files]
    problem = None
    if manifest.format != FORMAT:
        problem = f"format version {manifest.format} does not exist"
    elif bad := [name for name in names if not is_file_name(name) or name == MANIFEST]:
        problem = f"file name {bad[0]!r} is not allowed"
    elif len({name.lower() for name in names}) != len(names):
        problem = "a file is listed twice"
    elif bad := [file.digest for file in manifest.files if not _DIGEST.match(file.digest)]:
        problem = f"{bad[0]!r} is no digest"
    elif bad := [name for name in manifest.objects if not is_file_name(name)]:
        problem = f"object name {bad[0]!r} is not allowed"
    elif unknown := [name for entry in manifest.objects.values() for name in entry.files if name not in names]:
        problem = f"object file {unknown[0]!r} is not listed"
    elif bad := [spelled for spelled in manifest.nonfinite.values() if spelled not in ("nan", "inf", "-inf")]:
        problem = f"{bad[0]!r} is no number"
    if problem:
        raise Damaged(f"{where}: {problem}", path=where)
