"""Loading a checkpoint never runs code: by the syntax trees of every module that reads one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import highcamp

PACKAGE = Path(highcamp.__file__).parent
ROOMS = [
    "core", "distributed", "jax", "keras", "lightning", "policy", "run", "storage", "torch", "training", "transformers",
]  # fmt: skip
MODULES = {
    "_pickle", "cloudpickle", "code", "codeop", "copyreg", "dill", "importlib", "joblib", "marshal", "multiprocessing",
    "pickle", "pkgutil", "pty", "runpy", "shelve", "subprocess",
}  # fmt: skip
BUILTINS = {"__import__", "breakpoint", "compile", "eval", "exec"}
# Functions that unpickle, build objects from names in a file, or start a program; by the module they come from.
FUNCTIONS = {
    "jax": {"load"},
    "jax.numpy": {"load"},
    "keras.models": {"load_model", "model_from_json"},
    "keras.saving": {"deserialize_keras_object", "load_model"},
    "os": {"execl", "execv", "execve", "popen", "posix_spawn", "spawnl", "spawnv", "startfile", "system"},
    "torch": {"load"},
    "torch.hub": {"load", "load_state_dict_from_url"},
    "torch.jit": {"load"},
    "torch.serialization": {"load"},
}


def _problems(source: str) -> list[str]:
    """Each construct of `source` that could run code from a file."""
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = node.module or "" if isinstance(node, ast.ImportFrom) and not node.level else ""
            for alias in node.names:
                full = f"{origin}.{alias.name}" if origin else alias.name
                if alias.asname or origin:
                    aliases[alias.asname or alias.name] = full
                if full.partition(".")[0] in MODULES:
                    found.append(f"{node.lineno}: import {full}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            full = _dotted(node, aliases)
            module, _, function = full.rpartition(".")
            if full in BUILTINS or full.removeprefix("builtins.") in BUILTINS or function in FUNCTIONS.get(module, ()):
                found.append(f"{node.lineno}: {full}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and not _is(node.value, constant=False):
            found.append(f"{node.lineno}: allow_pickle")
        elif isinstance(node, ast.keyword) and node.arg == "weights_only" and not _is(node.value, constant=True):
            found.append(f"{node.lineno}: weights_only")
    return found


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    """`t.load` as "torch.load" after `import torch as t`; "" for what is no chain of names."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value, aliases)
        return f"{before}.{node.attr}" if before else ""
    return ""


def _is(node: ast.expr, *, constant: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is constant


def _sources() -> list[Path]:
    return sorted(
        path for room in ROOMS for path in [*(PACKAGE / room).rglob("*.py"), PACKAGE / f"{room}.py"] if path.is_file()
    )


def test_no_pickle_nor_other_code_on_a_load_path():
    """A checkpoint from somebody else would own the machine that opens it."""
    problems = [
        f"{path.relative_to(PACKAGE)}:{problem}"
        for path in _sources()
        for problem in _problems(path.read_text("utf-8"))
    ]

    assert problems == []


def test_the_rooms_are_there():
    """A renamed room would be guarded no longer."""
    assert {"core", "storage", "run", "policy"} <= {path.parent.name for path in _sources()}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import importlib.util as u",
        "def f():\n    import subprocess",
        "eval('1')",
        "import builtins; builtins.exec('')",
        "__import__('os')",
        "import torch; torch.load('x')",
        "import torch as t; t.load('x')",
        "from torch import load; load('x')",
        "load = torch.load",
        "from torch.serialization import load as restore; restore('x')",
        "np.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=flag)",
        "import os; os.system('ls')",
        "import keras; keras.models.load_model('x')",
    ],
)
def test_the_guard_sees(source):
    """A guard that cannot fail guards nothing."""
    assert _problems(source)


@pytest.mark.parametrize(
    "source", ["re.compile('x')", "np.load('x', allow_pickle=False)", "model.eval()", "checkpoint.load('model')"]
)
def test_the_guard_lets_pass(source):
    """Methods that only share a name are no mistake."""
    assert _problems(source) == []
