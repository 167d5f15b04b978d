"""What of JAX and Flax is supported: their versions."""

from __future__ import annotations

import functools
import sys

import jax

from highcamp.errors import MissingExtra

OLDEST = {"jax": (0, 10, 1), "flax": (0, 12)}
"""Each package's oldest version that is known to work; from this Flax on, a module is a pytree and `nnx.Optimizer` no model."""


@functools.cache
def require(package: str = "jax") -> None:
    """Raise MissingExtra unless the loaded version of "jax" or "flax" is one that is known.

    Asked when a state of theirs is first seen: a program that has merely imported an old one may do as it likes.
    """
    found: str = jax.__version__ if package == "jax" else sys.modules["flax"].__version__
    if not is_supported(package, found):
        wanted = ".".join(map(str, OLDEST[package]))
        raise MissingExtra(
            f"a state of {package} is saved and restored with {package} >= {wanted}; {found} is installed",
            hint="pip install -U 'highcamp[jax]'" if package == "jax" else f"pip install -U 'flax>={wanted}'",
        )


def is_supported(package: str, version: str) -> bool:
    """Whether a version, such as "0.10.2.dev20260101", is not older than the oldest that is known to work."""
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    return numbers >= OLDEST[package]
