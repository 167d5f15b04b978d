"""What of Lightning is supported: its versions, and the ways to train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from highcamp.errors import MissingExtra, Refused

if TYPE_CHECKING:
    from collections.abc import Iterable

OLDEST, NEXT = (2, 6), (3, 0)
_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")  # the state of all others lies in several processes, or is cut up


def check_version() -> None:
    """Raise MissingExtra unless a supported version of the package `lightning` is installed."""
    hint = "pip install 'highcamp[lightning]'"
    wanted = f"lightning >= {_dotted(OLDEST)}, < {_dotted(NEXT)}"
    try:
        import lightning
    except ModuleNotFoundError as error:
        raise MissingExtra(f"highcamp.lightning needs {wanted}, which is not installed", hint=hint) from error
    if not is_supported(lightning.__version__):
        raise MissingExtra(
            f"highcamp.lightning reads the inner state of a Trainer, which it knows of {wanted}; "
            f"{lightning.__version__} is installed",
            hint=hint,
        )


def is_supported(version: str) -> bool:
    """Whether a version of Lightning is one whose Trainer is known."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    return OLDEST <= numbers < NEXT


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def check_trainer(trainer: Any, others: Iterable[object]) -> None:
    """Raise Refused for a Trainer whose state cannot be saved or restored as a whole. others: callbacks like ours."""
    if any(others):
        raise Refused(
            "a Trainer has two CheckpointCallbacks of highcamp, and could be restored from only one of their runs",
            hint="leave one out; keep=Keep(best=…, last=…) keeps several checkpoints for several reasons",
        )
    strategy = type(trainer.strategy).__name__
    if trainer.world_size > 1:
        raise Refused(
            f"training in {trainer.world_size} processes is not supported yet: a checkpoint would hold the random state "
            "and the place in the data of one of them",
            hint="use Trainer(devices=1), or Lightning's ModelCheckpoint with highcamp.lightning.DurableIO",
        )
    if strategy not in _STRATEGIES:
        raise Refused(
            f"the strategy {strategy} is not supported yet: its state may be cut up or lie elsewhere",
            hint='use Trainer(strategy="auto"), or Lightning\'s ModelCheckpoint',
        )
    if trainer.barebones:
        raise Refused(
            "Trainer(barebones=True) turns off logging, so there is nothing to monitor and no loop to measure",
            hint="train without barebones, or without CheckpointCallback",
        )
