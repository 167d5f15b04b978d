"""What a checkpoint was written with."""

from __future__ import annotations

import platform
import sys

import highcamp

_PACKAGES = ("numpy", "torch", "jax", "keras", "tensorflow", "lightning", "transformers", "flax", "optax")


def versions() -> dict[str, str]:
    """The versions of highcamp, Python and every supported package that is loaded."""
    loaded = {name: getattr(sys.modules[name], "__version__", None) for name in _PACKAGES if name in sys.modules}
    return {
        "highcamp": highcamp.__version__,
        "python": platform.python_version(),
        **{name: str(version) for name, version in loaded.items() if version is not None},
    }
