"""Who imports whom, and what an import costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import highcamp

PACKAGE = Path(highcamp.__file__).parent
ROOT = PACKAGE.parent
FRAMEWORKS = ["flax", "jax", "jaxlib", "keras", "lightning", "optax", "orbax", "tensorflow", "torch", "transformers"]
LATE = [*FRAMEWORKS, "matplotlib", "numpy", "ml_dtypes", "sklearn"]
DEVELOPMENT = ["hypothesis", "pytest", "safetensors"]

# Imports the modules named on standard input one after the other, and tells which of the unwanted ones came with each.
PROBE = """
import importlib, json, sys
asked = json.load(sys.stdin)
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in asked["absent"]:
            raise ModuleNotFoundError(f"No module named {name!r} (as for a user without extras)", name=name)
sys.meta_path.insert(0, Absent())
found = {}
for module in asked["modules"]:
    before = set(sys.modules)
    importlib.import_module(module)
    if new := sorted((set(sys.modules) - before) & set(asked["unwanted"])):
        found[module] = new
print(json.dumps(found))
"""


def _modules(*rooms: str) -> list[str]:
    """Every module of these rooms, by its dotted name."""
    paths = [path for room in rooms for path in sorted((PACKAGE / room).rglob("*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return ["highcamp", "highcamp.errors", *(name.removesuffix(".__init__") for name in names)]


def _probe(modules: list[str], unwanted: list[str], absent: list[str]) -> dict[str, list[str]]:
    asked = json.dumps({"modules": modules, "unwanted": unwanted, "absent": absent})
    done = subprocess.run(
        [sys.executable, "-c", PROBE], input=asked, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_imports_go_down_only():
    """A layer that reaches upwards cannot be tested, replaced or understood alone."""
    program = Path(sys.executable).with_name("lint-imports")

    done = subprocess.run([program, "--no-cache"], capture_output=True, text=True, cwd=ROOT, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_highcamp_loads_nothing_heavy():
    """A script that asks for the best checkpoint would wait for frameworks it never uses."""
    modules = _modules("core", "policy", "storage", "run", "training")

    assert _probe(modules, [*LATE, "click", "rich"], []) == {}


def test_the_command_line_loads_no_framework():
    """`highcamp ls` has to answer at once, also on a machine with four frameworks."""
    assert _probe(_modules("cli"), LATE, []) == {}


def test_the_package_works_without_any_extra():
    """What the tests need must not become what users need."""
    modules = _modules("core", "policy", "storage", "run", "training", "cli")

    assert _probe(modules, [], [*FRAMEWORKS, *DEVELOPMENT, "matplotlib", "sklearn"]) == {}


def test_the_probe_sees_what_is_imported():
    """A probe that sees nothing would pass for ever."""
    assert _probe(["numpy"], ["numpy"], []) == {"numpy": ["numpy"]}
    with pytest.raises(AssertionError, match="without extras"):
        _probe(["numpy"], [], ["numpy"])


def test_importing_highcamp_takes_at_most_half_of_numpy():
    """The import time is promised; the best of five runs is compared, so a busy machine does not matter."""

    def seconds(statement: str) -> float:
        code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
        runs = [subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT) for _ in range(5)]
        return min(map(float, runs))

    assert seconds("import highcamp") <= seconds("import numpy") / 2
