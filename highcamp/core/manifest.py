"""The manifest: the small JSON file whose presence makes a checkpoint exist.

The file is pretty-printed JSON whose last entry is the digest of every byte before that entry, so that any language can
check it without agreeing on how numbers are spelled.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from typing import TYPE_CHECKING, Annotated, Any, cast

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
MAX_NAMED_TENSORS = 20  # of those that are not finite: once one is, soon all are, and a person reads the first few
MAX_MANIFEST_BYTES = 8 << 20  # thousands of files per checkpoint fit; a hostile one is refused in milliseconds
_DIGEST_LINE = re.compile(rb',\n  "digest": "xxh3-128:[0-9a-f]{32}"\n\}\n\Z')
_DIGEST_LINE_BYTES = len(b',\n  "digest": "xxh3-128:"\n}\n') + 32
_DIGEST = re.compile(r"xxh3-128:[0-9a-f]{32}\Z")
_NONFINITE = frozenset({"nan", "inf", "-inf"})
_BEGINNING = f'{{\n  "format": {FORMAT},\n'.encode()

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


# gc=False: none of these can be part of a cycle, and a run has tens of thousands of them, which the collector would visit.
class File(msgspec.Struct, frozen=True, gc=False):
    """One file of a checkpoint: its name, its size in bytes, and the digest of all of them."""

    name: str
    size: Count
    digest: str


class Object(msgspec.Struct, frozen=True, gc=False):
    """One tracked object: the tensor files it lies in, how many tensors, how many bytes they have.

    weights: whether it is a model, or weights by another name; unset in manifests of before that was recorded.
    """

    files: tuple[str, ...] = ()
    tensors: Count = 0
    bytes: Count = 0
    weights: bool | msgspec.UnsetType = msgspec.UNSET


class Health(msgspec.Struct, frozen=True, gc=False):
    """What is wrong with the weights: how many tensors are not finite, and the first few of them.

    tensors: "nan" or "inf" by "object/tensor", see `highcamp.core.health`.
    """

    nonfinite: Count = 0
    tensors: dict[str, str] = {}

    @classmethod
    def of(cls, found: Mapping[str, str]) -> Health:
        """The record of what was found, by "object/tensor"."""
        return cls(len(found), dict(itertools.islice(found.items(), MAX_NAMED_TENSORS)))


class Manifest(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Everything that is known about a checkpoint without reading its tensors.

    step, epoch: optimizer steps and epochs done when the state was captured. batch: batches done in the epoch under way.
    sequence: grows with every commit of the run. attempt: which stretch of the run wrote it. owner: how often the run had
    changed hands. parent: the checkpoint that
    this state grew out of. created_at: RFC 3339, UTC. metrics: those measured at this step; a value that is not finite is
    null there and named in `nonfinite` ("nan", "inf", "-inf"). weights_of: of a checkpoint that holds nothing but the weights
    of an earlier one, which it has replaced, the sequence of that one; unset for every other. health: of its weights; unset
    where it was not looked at, and where nothing is known to be weights.
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
    weights_of: Count | msgspec.UnsetType = msgspec.UNSET
    health: Health | msgspec.UnsetType = msgspec.UNSET

    @property
    def values(self) -> dict[str, float]:
        """The metrics as floats, NaN and infinities included."""
        return join_metrics(self.metrics, self.nonfinite)

    @property
    def order(self) -> tuple[int, int, int]:
        """What checkpoints are ordered by: (step, sequence), never a time.

        Weights alone stand where the checkpoint stood that they were taken from: right behind it, while both are there.
        """
        return (self.step, self.sequence if self.weights_of is msgspec.UNSET else self.weights_of, self.sequence)

    @property
    def is_weights_only(self) -> bool:
        """Whether it has given back its resume state, so that training cannot go on from it."""
        return self.weights_of is not msgspec.UNSET

    @property
    def is_divisible(self) -> bool:
        """Whether some of its objects are weights and some are not; not so where that was not recorded."""
        return {each.weights for each in self.objects.values()} == {True, False}

    @property
    def is_healthy(self) -> bool | None:
        """Whether no weight is NaN or infinite; None where that is not known."""
        return None if self.health is msgspec.UNSET else self.health.nonfinite == 0

    def nonfinite_tensors(self, name: str) -> dict[str, str] | None:
        """Of the object called `name`, what is wrong with its tensors, by name; None if not all of it is known."""
        health = self.health
        if health is msgspec.UNSET or health.nonfinite != len(health.tensors) or self.objects[name].weights is not True:
            return None
        start = f"{name}/"
        return {key.removeprefix(start): word for key, word in health.tensors.items() if key.startswith(start)}


_DECODER, _ENCODER = msgspec.json.Decoder(Manifest), msgspec.json.Encoder()


def split_metrics(values: Mapping[str, float]) -> tuple[dict[str, float | None], dict[str, str]]:
    """Metrics as JSON can hold them: finite values or None, and the names of those that are not finite."""
    metrics = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return metrics, {name: str(values[name]) for name, value in metrics.items() if value is None}


def join_metrics(metrics: Mapping[str, float | None], nonfinite: Mapping[str, str]) -> dict[str, float]:
    """The reverse of `split_metrics`; a null without its name reads as NaN."""
    return {**view_metrics(metrics, nonfinite)}


def view_metrics(metrics: Mapping[str, float | None], nonfinite: Mapping[str, str]) -> Mapping[str, float]:
    """The same to look at, not to be changed: where all are finite it is `metrics` itself."""
    if not nonfinite and None not in metrics.values():
        return cast("Mapping[str, float]", metrics)
    spelled = {"inf": math.inf, "-inf": -math.inf}
    return {
        name: spelled.get(nonfinite.get(name, "nan"), math.nan) if value is None else float(value)
        for name, value in metrics.items()
    }


def encode(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: UTF-8, indented by two, its own digest last."""
    head = _spelled(manifest)[: -len(b"\n}")]
    return head + _digest_line(head)


def _digest_line(head: bytes) -> bytes:
    """The end of a `manifest.json` that begins with `head`."""
    return f',\n  "digest": "{digest(head)}"\n}}\n'.encode()


def _spelled(manifest: Manifest) -> bytes:
    """All of `manifest.json` but the digest, as we spell it."""
    return msgspec.json.format(_ENCODER.encode(manifest), indent=2)


def decode(data: bytes, *, where: str) -> Manifest:
    """Check and read the bytes of a `manifest.json`; `where` names it in errors.

    Raises Unreadable for a newer format version, Damaged for anything else that `encode` would not have written.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise Damaged(f"{where} is {len(data)} bytes, the limit is {MAX_MANIFEST_BYTES}", path=where)
    head = data[:-_DIGEST_LINE_BYTES]
    if not data.endswith(_digest_line(head)):
        _raise_if_newer(data, where)
        has_digest = _DIGEST_LINE.match(data[-_DIGEST_LINE_BYTES:])
        found = "differs from its own digest" if has_digest else "has no digest of itself"
        raise Damaged(f"{where} {found}", path=where, hint="its checkpoint is treated as if it did not exist")
    body = head + b"\n}"
    if not body.startswith(_BEGINNING):
        _raise_if_newer(body, where)
    manifest = _read_halves(body)
    if manifest is None:  # written by another hand: whatever the fast reader forgives is looked for
        try:
            manifest = _DECODER.decode(body)
        except _NO_MANIFEST as error:
            raise Damaged(f"{where} is no manifest: {error}", path=where) from error
        strict.read(body, where=where, limit=MAX_MANIFEST_BYTES)
    _check(manifest, where)
    return manifest


def _read_halves(body: bytes) -> Manifest | None:
    """What `body` says if it is spelled as we spell it, else None.

    The second half, objects and versions, is the same in nearly all manifests of a run, and so is read once. Each half is
    completed to a manifest in our spelling, so neither says anything twice, and the two have no entry in common.
    """
    at = body.rfind(_SECOND)
    if at < 0:
        return None
    first = body[:at] + _EMPTY_SECOND
    try:
        second = _read_second_half(body[at:])
        manifest = _DECODER.decode(first)
    except _NO_MANIFEST:
        return None
    if second is None or not _is_as_written(manifest, first):
        return None
    return msgspec.structs.replace(manifest, **second)


@functools.lru_cache(maxsize=4)  # few, for a hostile manifest may have 8 MB of names
def _read_second_half(end: bytes) -> dict[str, Any] | None:
    body = _EMPTY_FIRST + end
    manifest = _DECODER.decode(body)
    return {name: getattr(manifest, name) for name in _SECOND_NAMES} if _is_as_written(manifest, body) else None


_NO_MANIFEST = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
_SECOND = b',\n  "objects": {'
_SECOND_NAMES = Manifest.__struct_fields__[Manifest.__struct_fields__.index("objects") :]
_EMPTY = _spelled(Manifest(run_id="", step=0, epoch=0, sequence=0, attempt=0, created_at=""))
_EMPTY_FIRST, _EMPTY_SECOND = _EMPTY[: _EMPTY.index(_SECOND)], _EMPTY[_EMPTY.index(_SECOND) :]


def _is_as_written(manifest: Manifest, body: bytes) -> bool:
    """Whether `body`, which was read as `manifest`, is spelled as we spell it, and so says nothing twice or otherwise.

    Compared without blanks, because writing them again would take longer than all the rest of the reading. A blank inside
    a string makes the two differ; then they are compared as they are.
    """
    return body.translate(None, b" \n") == _ENCODER.encode(manifest) or body == _spelled(manifest)


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
    files = manifest.files
    problem = None
    if manifest.format != FORMAT:
        problem = f"format version {manifest.format} does not exist"
    elif bad := [file.digest for file in files if not _DIGEST.match(file.digest)]:
        problem = f"{bad[0]!r} is no digest"
    elif manifest.nonfinite and (bad := [text for text in manifest.nonfinite.values() if text not in _NONFINITE]):
        problem = f"{bad[0]!r} is no number"
    else:
        names = tuple([file.name for file in files])
        problem = _problem_of_names(names, tuple([(name, each.files) for name, each in manifest.objects.items()]))
    if problem:
        raise Damaged(f"{where}: {problem}", path=where)


# The names of a run are the same in each of its manifests. Few are remembered, for a hostile manifest may have 8 MB of them.
@functools.lru_cache(maxsize=4)
def _problem_of_names(files: tuple[str, ...], objects: tuple[tuple[str, tuple[str, ...]], ...]) -> str | None:
    if bad := [name for name in files if not is_file_name(name) or name == MANIFEST]:
        return f"file name {bad[0]!r} is not allowed"
    if len({name.lower() for name in files}) != len(files):
        return "a file is listed twice"
    if bad := [name for name, _ in objects if not is_file_name(name)]:
        return f"object name {bad[0]!r} is not allowed"
    known = frozenset(files)
    if unknown := [name for _, names in objects for name in names if name not in known]:
        return f"object file {unknown[0]!r} is not listed"
    return None
