"""Numbers as Keras hands them out: Python's, NumPy's, or single values of the backend."""

from __future__ import annotations

import numbers
from typing import Any


def as_number(value: Any) -> float | None:
    """A single number as a float; None for arrays with dimensions, text, truth values and everything else."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        value = value.item()
    elif getattr(value, "shape", None) == () and callable(getattr(value, "numpy", None)):
        value = value.numpy().item()  # TensorFlow's have no `item`
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    return None
