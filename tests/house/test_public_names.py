"""What `import highcamp` offers."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
from pathlib import Path

import highcamp
from highcamp import errors

SOURCE = Path(highcamp.__file__)


def test_exported_names_are_sorted_and_unique():
    """A list in no order hides a name that is there twice or not at all."""
    assert highcamp.__all__ == sorted(set(highcamp.__all__))


def test_every_exported_name_can_be_imported():
    """A late import that points at a module which was renamed would only fail in a user's program."""
    for name in highcamp.__all__:
        assert getattr(highcamp, name) is not None, name
    assert dir(highcamp) == highcamp.__all__


def test_type_checkers_see_exactly_the_exported_names():
    """The names are written twice, for programs and for type checkers; one list alone would grow."""
    block = next(node for node in ast.parse(SOURCE.read_text("utf-8")).body if isinstance(node, ast.If))

    seen = [alias.asname or alias.name for node in block.body for alias in node.names]

    assert sorted([*seen, "__version__"]) == highcamp.__all__


def test_every_error_is_exported():
    """An error that cannot be named cannot be caught."""
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}

    assert classes <= set(highcamp.__all__)


def test_unknown_name_is_an_attribute_error():
    """`hasattr(highcamp, …)` and copy tools rely on it."""
    assert not hasattr(highcamp, "no_such_name")


def test_version_is_that_of_the_installed_distribution():
    """Manifests record the version; it has to be the one that was installed."""
    assert highcamp.__version__ == importlib.metadata.version("highcamp")
