"""What is shipped, and how large its rooms are."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import highcamp

PACKAGE = Path(highcamp.__file__).parent
ROOT = PACKAGE.parent
MAX_LINES = 450  # a reader keeps a room of this size in mind; a larger one is split by noun


def test_no_room_is_too_large():
    """A file that has grown past what one reader can hold in mind is two nouns."""
    lines = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}

    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}


def test_every_directory_of_code_is_a_package():
    """A directory without __init__.py works here and is not shipped."""
    missing = {path.parent for path in PACKAGE.rglob("*.py") if not (path.parent / "__init__.py").is_file()}

    assert missing == set()


def test_everything_is_shipped(tmp_path):
    """py.typed, a page or a picture that is missing from the wheel would be missed only by users."""
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(PACKAGE, tmp_path / "highcamp", ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"

    subprocess.run([sys.executable, "-c", build, "dist"], cwd=tmp_path, check=True, capture_output=True)

    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        shipped = set(wheel.namelist())
    ours = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "highcamp").rglob("*") if path.is_file()}
    assert "highcamp/py.typed" in ours
    assert ours <= shipped
    assert {name for name in shipped if not name.startswith(("highcamp/", "highcamp-"))} == set()
    assert any(name.endswith("licenses/LICENSE") for name in shipped)
