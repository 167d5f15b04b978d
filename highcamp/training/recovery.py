"""Recovery: what the attempt before has left in shared memory becomes a checkpoint."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from highcamp.core.manifest import Count, join_metrics, split_metrics
from highcamp.errors import Damaged, HighcampError, StorageError
from highcamp.run import commit
from highcamp.run.attempt import local_directory
from highcamp.run.commit import Committed, Part, TensorFile, checkpoint_path
from highcamp.run.tensors import read_layout
from highcamp.training import messages, tier
from highcamp.training.versions import versions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from highcamp.run.attempt import OngoingAttempt
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.training.found import Found
    from highcamp.training.messages import Voice
    from highcamp.training.progress import Progress
    from highcamp.training.snapshot import Shot

PIECE_BYTES = 16 << 20  # written at once


class Linked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor file that lies on the disk already. digest: of the whole file."""

    name: str
    size: Count
    digest: str


class Object(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One object: its skeleton, its tensor files in order, the frameworks of its tensors, which of them are trained."""

    skeleton: Any
    files: tuple[str, ...]
    kinds: dict[str, str]
    weights: bool
    trained: tuple[str, ...] = ()


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a slot says of its snapshot, beside the bytes of its tensor files."""

    step: Count
    epoch: Count
    batch: Count
    metrics: dict[str, float | None]
    nonfinite: dict[str, str]
    objects: dict[str, Object]
    linked: dict[str, Linked]


def facts(progress: Progress, metrics: Mapping[str, float], shot: Shot) -> dict[str, Any]:
    """What is kept of a shot beside its bytes."""
    finite, nonfinite = split_metrics(metrics)
    files = [each for part in shot.parts for each in part.files]
    linked = {each.name: Linked(each.name, each.same.file.size, each.same.file.digest) for each in files if each.same}
    objects = {
        part.name: Object(
            part.skeleton,
            tuple(each.name for each in part.files),
            part.kinds,
            part.weights,
            tuple(sorted(part.trained)),
        )
        for part in shot.parts
    }
    document = Facts(progress.step, progress.epoch, progress.batch, finite, nonfinite, objects, linked)
    plain: dict[str, Any] = msgspec.to_builtins(document)
    return plain


def recover(attempt: OngoingAttempt, voice: Voice) -> None:
    """Commit what the attempt before has left in shared memory, if it is newer than the last checkpoint on disk.

    It becomes an ordinary checkpoint, from which the run then goes on. What cannot be used is said, and left for `sweep`.
    Raises StorageError if it cannot be written; it is still there then.
    """
    before = attempt.number - 1
    checkpoints = attempt.run.checkpoints
    # An earlier attempt may have gone further, and this one have begun behind it because that was found damaged.
    newest = max((each.step for each in checkpoints if each.manifest.attempt >= before), default=-1)
    for found in _left(attempt, voice):
        if found.identity.attempt != before or found.step <= newest:
            continue  # an older stretch of the run, or no news
        with contextlib.ExitStack() as opened:
            try:
                found.verify()
                known = _facts(found)
                parts = _parts(found, known, checkpoints, opened)
            except Damaged as error:
                voice.say(str(error), level=0)
                continue
            manifest = attempt.manifest(
                step=known.step, epoch=known.epoch, batch=known.batch,
                metrics=join_metrics(known.metrics, known.nonfinite), versions=versions(),
            )  # fmt: skip
            # The rows that were logged for this state are those of the attempt before.
            manifest = msgspec.structs.replace(manifest, attempt=before, parent=_parent(attempt, checkpoints))
            try:
                checkpoint, _ = attempt.commit(manifest, parts)
            except Damaged as error:  # a file that it shares with a checkpoint
                voice.say(str(error), level=0)
                continue
        voice.say(messages.recovered(checkpoint.name, max((each.step for each in checkpoints), default=-1)))
        with contextlib.suppress(HighcampError):  # no news any more; `sweep` says what is wrong
            found.remove()
        return


def _left(attempt: OngoingAttempt, voice: Voice) -> list[Found]:
    """What dead processes have left of this run, newest first."""

    def tell(error: HighcampError) -> None:
        voice.say(str(error), level=0)

    try:
        return tier.find(attempt.run_id, place=local_directory(attempt.run.store), tell=tell)
    except HighcampError as error:  # shared memory that cannot be listed keeps nobody from training
        tell(error)
        return []


def _parent(attempt: OngoingAttempt, checkpoints: Sequence[Checkpoint]) -> str | None:
    """The checkpoint that the state in shared memory grew out of: the last one of its attempt, or where that began."""
    own = [each.name for each in checkpoints if each.manifest.attempt == attempt.number - 1]
    return own[-1] if own else attempt.run.resumed_from


def _facts(found: Found) -> Facts:
    try:
        return msgspec.convert(found.facts, Facts)
    except msgspec.ValidationError as error:
        raise Damaged(f"{found.path}: its facts are malformed: {error}", path=found.path) from error


def _parts(found: Found, known: Facts, checkpoints: Sequence[Checkpoint], opened: contextlib.ExitStack) -> list[Part]:
    """The objects of a snapshot, ready to be written. opened: takes what is to be closed afterwards.

    Raises Damaged if some of it is nowhere.
    """
    own = {file.name: file for file in found.files}
    parts = []
    for name, entry in known.objects.items():
        files = []
        for file_name in entry.files:
            if file_name in own:
                data, layout = own[file_name].data, own[file_name].layout
                files.append(TensorFile(file_name, layout, partial(_pieces, data)))
            else:
                files.append(_linked(found, file_name, known.linked.get(file_name), checkpoints, opened))
        trained = frozenset(entry.trained)
        parts.append(Part(name, entry.skeleton, tuple(files), entry.kinds, weights=entry.weights, trained=trained))
    return parts


def _pieces(data: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


def _linked(
    found: Found,
    name: str,
    wanted: Linked | None,
    checkpoints: Sequence[Checkpoint],
    opened: contextlib.ExitStack,
) -> TensorFile:
    """A file that the snapshot shares with a checkpoint, which may be another by now than when it was taken."""
    for checkpoint in reversed(checkpoints):
        for file in checkpoint.files:
            if wanted is None or (file.digest, file.size) != (wanted.digest, wanted.size):
                continue
            path = f"{checkpoint_path(checkpoint.name)}/{file.name}"
            try:
                layout = read_layout(checkpoint, file.name)
                digests = commit.read_state(checkpoint.store, checkpoint.name, checkpoint.manifest).digests[file.name]
                reader = opened.enter_context(checkpoint.store.open(path))
            except (Damaged, StorageError, KeyError):
                continue  # another checkpoint may have it whole
            return TensorFile(name, layout, same=Committed(path, file, tuple(digests), reader))
    raise Damaged(
        f"{found.path} shares {name} with a checkpoint that is not there any more",
        path=found.path,
        hint="the run goes on from the newest checkpoint on disk",
    )
