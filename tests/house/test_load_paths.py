"""Loading a checkpoint never runs code: by the syntax trees of the whole package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import highcamp

PACKAGE = Path(highcamp.__file__).parent
MODULES = {
    "_pickle", "cffi", "cloudpickle", "code", "codeop", "copyreg", "ctypes", "dill", "importlib", "joblib", "jsonpickle",
    "marshal", "multiprocessing", "pickle", "pkgutil", "pty", "runpy", "shelve", "subprocess", "yaml", "zipimport",
}  # fmt: skip
BUILTINS = {"__import__", "breakpoint", "compile", "eval", "exec"}
# Functions that unpickle, build objects from names in a file, or start a program; by the module they come from.
FUNCTIONS = {
    "builtins": BUILTINS,
    "jax": {"load"},
    "jax.numpy": {"load"},
    "keras.config": {"enable_unsafe_deserialization"},
    "keras.models": {"load_model", "model_from_json"},
    "keras.saving": {"deserialize_keras_object", "load_model"},
    "keras.utils": {"get_file"},
    "numpy": {"load", "loadtxt", "fromregex"},
    "os": {
        "execl", "execle", "execlp", "execlpe", "execv", "execve", "execvp", "execvpe", "fork", "forkpty", "popen",
        "posix_spawn", "posix_spawnp", "spawnl", "spawnle", "spawnlp", "spawnv", "spawnve", "spawnvp", "startfile", "system",
    },
    "pydoc": {"locate"},
    "shutil": {"unpack_archive"},
    "torch": {"load"},
    "torch.hub": {"load", "load_state_dict_from_url"},
    "torch.jit": {"load"},
    "torch.serialization": {"load"},
}  # fmt: skip
# Methods that do the same, whatever they are called on.
METHODS = {
    "compile_from_config", "build_from_config", "extract", "extractall", "find_class", "from_config", "load_weights",
    "run_module",
}  # fmt: skip

IMPORTS_OWN = "imports what a table in this very file names, all of it highcamp's own"
LOOKS_UP = "asks whether a module is installed, and imports nothing"
STARTS = "starts the program that the user has typed, or the demo's own script"
CALLS_C = "the C library, for a call that Python does not offer; no name comes from a file"
REBUILDS = (
    "export to Keras's own files, asked for by name: only Keras's own and registered classes, and only after a check"
)
ALLOWED = {
    ("__init__.py", "import importlib"): IMPORTS_OWN,
    ("cli/program.py", "import importlib"): IMPORTS_OWN,
    ("cli/export.py", "import importlib.util"): LOOKS_UP,
    ("cli/demo/command.py", "import importlib.util"): LOOKS_UP,
    ("cli/demo/command.py", "import subprocess"): STARTS,
    ("cli/run.py", "import subprocess"): STARTS,
    ("cli/child.py", "os.posix_spawnp"): STARTS,
    ("storage/system.py", "import ctypes"): CALLS_C,
    ("torch/restoring.py", "import ctypes"): CALLS_C,
    ("keras/export.py", ".from_config"): REBUILDS,
    ("keras/export.py", ".build_from_config"): REBUILDS,
    ("keras/export.py", ".compile_from_config"): REBUILDS,
}
"""(file, construct) -> why it may stand there. What is not there any more is taken out of the list."""


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
                if full.partition(".")[0] in MODULES or alias.name in FUNCTIONS.get(origin, ()):
                    found.append(f"{node.lineno}: import {full}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            full = _dotted(node, aliases)
            module, _, function = full.rpartition(".")
            if full in BUILTINS or function in FUNCTIONS.get(module, ()):
                found.append(f"{node.lineno}: {full}")
            elif isinstance(node, ast.Attribute) and node.attr in METHODS:
                found.append(f"{node.lineno}: .{node.attr}")
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


def _found() -> list[tuple[str, str, str]]:
    """(file, line, construct) of everything in the package that could run code from a file."""
    sources = sorted(PACKAGE.rglob("*.py"))
    assert {"core", "storage", "run", "policy", "training"} <= {path.parent.name for path in sources}
    found = [
        (path.relative_to(PACKAGE).as_posix(), each) for path in sources for each in _problems(path.read_text("utf-8"))
    ]
    return [(file, *problem.split(": ", 1)) for file, problem in found]


def test_no_pickle_nor_other_code_from_a_file():
    """A checkpoint from somebody else would own the machine that opens it."""
    assert [each for each in _found() if (each[0], each[2]) not in ALLOWED] == []


def test_every_exception_is_still_needed():
    """A list that only grows lets through, one day, what it was never meant for."""
    assert set(ALLOWED) - {(file, construct) for file, _, construct in _found()} == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import importlib.util as u",
        "def f():\n    import subprocess",
        "eval('1')",
        "import builtins; builtins.exec('')",
        "import builtins as b; b.eval('1')",
        "from builtins import eval as e; e('1')",
        "from os import system",
        "from os import system as s; s('ls')",
        "import numpy as np; np.load('x')",
        "import yaml; yaml.load('x')",
        "import ctypes.util",
        "archive.extractall('x')",
        "kind.from_config({})",
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
