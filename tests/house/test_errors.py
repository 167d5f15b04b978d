"""The tree of errors is as drawn."""

from __future__ import annotations

import inspect
import re

import pytest

from highcamp import errors
from highcamp.errors import HighcampError

CLASSES = sorted(
    (value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, HighcampError)),
    key=lambda value: value.__name__,
)
LINE = re.compile(r"^(?P<indent>[ │├└─]*)(?P<name>[A-Z]\w+)(\((?P<builtin>\w+)\))?( +(?P<code>\d+) +(?P<text>\S.*))?$")


def _drawn() -> dict[str, tuple[str, str | None, int | None]]:
    """The drawing in the module's docstring: class -> (its parent, its builtin, its exit code)."""
    found: dict[str, tuple[str, str | None, int | None]] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = LINE.match(line)
        if not match or not line.startswith("    "):
            continue
        depth = len(match["indent"])
        above = [(level, name) for level, name in above if level < depth]
        found[match["name"]] = (
            above[-1][1] if above else "Exception",
            match["builtin"],
            match["code"] and int(match["code"]),
        )
        above.append((depth, match["name"]))
    return found


def test_the_drawing_has_every_error():
    """The drawing is where a reader looks first."""
    assert sorted(_drawn()) == [error.__name__ for error in CLASSES]


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_an_error_is_as_drawn(error):
    """Scripts rely on exit codes, programs on the builtin they catch."""
    parent, builtin, code = _drawn()[error.__name__]

    assert [base.__name__ for base in error.__bases__] == [parent, *([builtin] if builtin else [])]
    assert code is None or error.exit_code == code
    assert error.exit_code in {1, 2, 3, 10, 11, 12, 13}
    assert error.__doc__
    assert error.__doc__ != error.__base__.__doc__


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_an_error_says_what_to_do(error):
    """The builtin beside it must not swallow message, path or hint, as OSError and KeyError do."""
    raised = error("runs/digits holds no run", path="runs/digits", hint="train first")

    assert str(raised) == "runs/digits holds no run; train first"
    assert (raised.message, raised.path, raised.hint) == ("runs/digits holds no run", "runs/digits", "train first")
