"""Names of variables: readable, unique, and the same for a model that is built again.

`Variable.path` is neither unique (two layers may have one name) nor stable (Keras counts the names it makes itself across
the whole process), so paths are labels here, and position decides between equal ones.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from keras.src.utils.naming import to_snake_case

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ARCHITECTURE = "architecture"
CLASS = "class"
"""Where a model's tree holds the model as Keras serializes it, as plain JSON; no variable has this name."""

# Keras numbers the names it makes itself across the whole process: the second model's "dense" is "dense_1".
_COUNTER = re.compile(r"_\d+(?=[_/]|$)")


def layer_labels(owner: Any, variables: Sequence[Any]) -> list[str]:
    """Readable, unique names of variables: their paths without the model's own name, in the order of `variables`."""
    own = f"{owner.name}/"
    renamed = _renamed_layers(owner)
    labels = []
    for variable in variables:
        path = variable.path.removeprefix(own)
        labels.append("/".join(renamed.get(part, part) for part in path.split("/")))
    return _unique(labels)


def _renamed_layers(owner: Any) -> dict[str, str]:
    """Names that Keras made itself -> the same names counted within `owner` alone.

    So a model built a second time in one process, as notebooks do, is saved under the names of the first.
    """
    layers = list(owner._flatten_layers()) if hasattr(owner, "_flatten_layers") else []  # noqa: SLF001
    generators = [part for variable in owner.variables for part in variable.path.split("/")[:-1]]
    automatic: dict[str, str] = {}  # name -> what Keras would call the first of its kind
    given: set[str] = set()
    for layer in layers:
        first = to_snake_case(type(layer).__name__)
        if re.fullmatch(rf"{re.escape(first)}(_\d+)?", layer.name):
            automatic[layer.name] = first
        else:
            given.add(layer.name)
    automatic |= {part: "seed_generator" for part in generators if re.fullmatch(r"seed_generator(_\d+)?", part)}
    renamed: dict[str, str] = {}
    counts: dict[str, int] = {}
    for name in sorted(automatic, key=lambda name: (automatic[name], _number(name))):
        first = automatic[name]
        while True:
            count = counts.get(first, 0)
            counts[first] = count + 1
            fresh = f"{first}_{count}" if count else first
            if fresh not in given:
                break
        renamed[name] = fresh
    return renamed


def _number(name: str) -> int:
    found = re.search(r"_(\d+)$", name)
    return int(found[1]) if found else 0


def _unique(labels: Iterable[str]) -> list[str]:
    taken: set[str] = {ARCHITECTURE}
    found = []
    for label in labels:
        name, count = label, 1
        while name in taken:
            count += 1
            name = f"{label}~{count}"
        taken.add(name)
        found.append(name)
    return found


def optimizer_labels(optimizer: Any) -> list[str]:
    """Readable, unique names of `optimizer.variables`: "iteration", "learning_rate", "dense_kernel_momentum", and so on.

    Only the last part of a path: the parts before it depend on whether the optimizer was built by hand or by `fit`.
    """
    return _unique(variable.path.rpartition("/")[2] for variable in optimizer.variables)


def differ_by_counters(saved: Iterable[str], live: Iterable[str]) -> bool:
    """Whether two lists of names are equal, position by position, once the numbers Keras gave are left out."""
    ours, theirs = list(saved), list(live)
    return set(ours) != set(theirs) and [_COUNTER.sub("", name) for name in ours] == [
        _COUNTER.sub("", name) for name in theirs
    ]
