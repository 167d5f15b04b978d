"""What of Keras is supported: its versions, whose inner order of hooks and state is read."""

from __future__ import annotations

from highcamp.errors import MissingExtra

OLDEST, NEXT = (3, 15), (4, 0)


def check_version() -> None:
    """Raise MissingExtra unless a supported version of the package `keras` is installed."""
    hint = "pip install 'highcamp[keras]'"
    wanted = f"keras >= {_dotted(OLDEST)}, < {_dotted(NEXT)}"
    try:
        import keras
    except ModuleNotFoundError as error:
        raise MissingExtra(f"highcamp.keras needs {wanted}, which is not installed", hint=hint) from error
    if not is_supported(keras.__version__):
        raise MissingExtra(
            f"highcamp.keras reads the inner state of `fit`, which it knows of {wanted}; {keras.__version__} is installed",
            hint=hint,
        )


def is_supported(version: str) -> bool:
    """Whether a version of Keras is one whose `fit` is known."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    return OLDEST <= numbers < NEXT


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
