"""A mutant's life: a copy of the code, one mistake in it, the suites that must notice, and a verdict."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mutant_list import Mutant

COPIED = ("highcamp", "tests", "docs", "pyproject.toml", "Makefile", "CONTRIBUTING.md", "README.md")
LIMIT_SECONDS = 240.0
"""For all suites of one mutant: four times what the slowest takes on a busy machine."""
TEST_SECONDS = 60
"""For one test; a mutant that hangs is told apart from one that is noticed."""


@dataclass(frozen=True)
class Verdict:
    """What the suites said of a copy.

    outcome: "passed"; "caught": a test has failed; "broken": nothing could be tested; "hung". by: the test, in the way pytest
    names it. words: what it said.
    """

    outcome: str
    by: str = ""
    words: str = ""
    seconds: float = 0.0


def copied(root: Path, place: Path) -> Path:
    """A copy of what tests need of the checkout at `root`; what Python has compiled of it comes along."""
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns(".pytest_cache", ".hypothesis"))
        elif source.exists():
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place / name)
    return place


def mutated(mutant: Mutant, source: str) -> str:
    """The source with the mistake in it. Raises LookupError if a text to be changed is not there exactly once."""
    for before, after in mutant.changes:
        count = source.count(before)
        if count != 1 or before == after:
            raise LookupError(
                f"{mutant.name}: highcamp/{mutant.file} has this text {count} times, expected once and another instead of "
                f"it; bring the mutant along:\n{before}"
            )
        source = source.replace(before, after)
    return source


def put(mutant: Mutant, place: Path) -> None:
    """Make the mistake in the copy at `place`."""
    file = place / "highcamp" / mutant.file
    text = mutated(mutant, file.read_text("utf-8"))
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        compiled.unlink()
    file.write_text(text, "utf-8")


def tried(place: Path, suites: Sequence[str], *, limit_seconds: float = LIMIT_SECONDS) -> Verdict:
    """Run suites on the copy at `place`, up to the first failure."""
    report, began = place / "report.xml", time.monotonic()
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "--hypothesis-seed=0",
        f"--basetemp={place / 'tmp'}", "-o", f"timeout={TEST_SECONDS}",
        "-o", "junit_family=xunit1", *suites,  # the later form refuses properties, which some tests note
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=place, env=environment(place), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit_seconds)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):  # the processes that it has started, too
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return Verdict("hung", words=f"no end after {limit_seconds:.0f} s", seconds=time.monotonic() - began)
    tail = output.decode("utf-8", "replace")[-2000:]
    return _judged(process.returncode, report, tail, time.monotonic() - began)


def environment(place: Path) -> dict[str, str]:
    """The environment in which `import highcamp` gives the copy."""
    return {**os.environ, "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "120"}


def is_copy_imported(place: Path) -> bool:
    """Whether it does: else every mutant would pass for the code as it is."""
    script = "import highcamp; print(highcamp.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=place, env=environment(place), capture_output=True, text=True, check=True
    )
    return found.stdout.strip() == str(place / "highcamp" / "__init__.py")


def _judged(code: int, report: Path, tail: str, seconds: float) -> Verdict:
    if code == 0:
        return Verdict("passed", seconds=seconds)
    cases = ET.parse(report).iter("testcase") if code == 1 and report.exists() else ()  # noqa: S314  (pytest's own)
    for case in cases:
        failure = case.find("failure")
        if failure is None:
            continue
        words = failure.get("message", "")
        by = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        if words.startswith("Failed: Timeout"):
            return Verdict("hung", by, words, seconds)
        return Verdict("caught", by, words, seconds)
    return Verdict("broken", words=tail, seconds=seconds)
