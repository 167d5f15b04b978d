"""One word per idea: some words are not used."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import highcamp

PACKAGE = Path(highcamp.__file__).parent
ROOT = PACKAGE.parent
WORDS = {
    "artifact", "artifacts", "base", "common", "dump", "dumps", "helper", "helpers", "manager", "maybe", "misc",
    "registry", "repository", "util", "utils",
}  # fmt: skip
# As a verb in front; `process_count` would be another matter, but "process" is what runs, and has a better name.
PREFIXES = ("do_", "handle_", "process_")
PAIRS = ("top_k", "topk")
# Names that a framework calls or reads, so that they are not ours to choose: name -> whose.
FOREIGN: dict[str, str] = {}
HELP = re.compile(r"\b(artifacts?|dumps?|helpers?|manager|misc|registry|repository|top-k|utils?)\b", re.IGNORECASE)


def _problem(name: str) -> str | None:
    """The unused word that `name` contains."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower().strip("_")
    if name in FOREIGN:
        return None
    found = WORDS.intersection(re.split(r"[^a-z0-9]+|_", snake))
    found |= {prefix for prefix in PREFIXES if snake.startswith(prefix)} | {pair for pair in PAIRS if pair in snake}
    return min(found, default=None)


def _names(tree: ast.AST) -> set[str]:
    """Every name that a module gives to something: variables, attributes, arguments, functions, classes, imports."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                found.add(name)
            case ast.alias(asname=str(name)) | ast.MatchAs(name=str(name)):
                found.add(name)
            case ast.ExceptHandler(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
                found.add(name)
    return found


def test_no_identifier_uses_an_unused_word():
    """Two words for one idea, and a reader looks for the difference."""
    problems = [
        f"{path.relative_to(ROOT)}: {name} ({problem})"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in sorted(_names(ast.parse(path.read_text("utf-8"))))
        if (problem := _problem(name))
    ]

    assert problems == []


def test_no_file_name_uses_an_unused_word():
    """A room called utils fills up with everything."""
    paths = [
        path
        for top in ("highcamp", "tests", "docs")
        for path in (ROOT / top).rglob("*")
        if "__pycache__" not in path.parts
    ]

    assert [str(path.relative_to(ROOT)) for path in paths if _problem(path.stem.removeprefix("test_"))] == []


def test_no_help_text_uses_an_unused_word():
    """Commands speak the same words as the code."""
    problems = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {found[0]}"
        for path in sorted((PACKAGE / "cli").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (found := HELP.search(node.value))
    ]

    assert problems == []


@pytest.mark.parametrize(
    "source",
    [
        "def dump_state(): pass",
        "class RunManager: pass",
        "class HTTPRegistry: pass",
        "keep_top_k = 3",
        "def f(maybe_step): pass",
        "self.base = 1",
        "import json as utils",
        "def _do_save(): pass",
        "for process_rank in x: pass",
    ],
)
def test_the_guard_sees(source):
    """A guard that cannot fail guards nothing."""
    assert [name for name in _names(ast.parse(source)) if _problem(name)]


@pytest.mark.parametrize(
    "source", ["database_url = 1", "def document(): pass", "json.dumps(x)", "handler = basement = 1"]
)
def test_the_guard_lets_pass(source):
    """Foreign names and words that only look alike are no mistake."""
    assert not [name for name in _names(ast.parse(source)) if _problem(name)]
