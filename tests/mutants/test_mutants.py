"""The harness of `make mutants`, which is not run here: that it can tell, and that its mutants still fit the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import mutant_run
import pytest
from mutant_list import MUTANTS, Mutant

import highcamp

ROOT = Path(highcamp.__file__).parents[1]
QUICK = ("tests/core/test_digest.py",)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_fits_the_code(mutant):
    """A line was changed and its mutant not brought along: from then on nobody would know whether it is tested."""
    source = (ROOT / "highcamp" / mutant.file).read_text("utf-8")

    changed = mutant_run.mutated(mutant, source)

    assert changed != source
    ast.parse(changed)
    assert all((ROOT / suite).exists() for suite in mutant.suites)


def test_names_tell_mutants_apart():
    """The page lists each by its name."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_the_page_lists_every_mutant():
    """The page is what people see of it."""
    page = (ROOT / "docs/mutants.md").read_text("utf-8")

    listed = re.findall(r"^\| (.+?) \| \S+\.py \| \S+\.py \| `test_\w+` \|$", page, re.MULTILINE)

    assert listed == [mutant.name for mutant in MUTANTS], "run `make mutants`"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the code."""
    return mutant_run.copied(ROOT, tmp_path_factory.mktemp("mutants") / "copy")


def test_the_copy_is_what_is_tested(copy):
    """Else every mutant would pass for the code as it is."""
    assert mutant_run.is_copy_imported(copy)


@pytest.mark.parametrize(
    ("after", "outcome", "by"),
    [
        ('_PREFIX = "xxh3-128:" ', "passed", ""),
        ('_PREFIX = "xxh3:"', "caught", "tests/core/test_digest.py::test_"),
        ('_PREFIX = "xxh3-128:"\n}', "broken", ""),
        ('_PREFIX = "xxh3-128:"\nimport no_such_module', "broken", ""),
        ('_PREFIX = "xxh3-128:"\nimport threading\nthreading.Event().wait()', "hung", ""),
    ],
    ids=["the same", "another value", "no code", "no module", "no end"],
)
def test_only_a_test_that_fails_has_noticed(copy, after, outcome, by):
    """Code that cannot be imported fails everything, and proves nothing of the tests."""
    before = '_PREFIX = "xxh3-128:"'
    file = copy / "highcamp/core/digest.py"
    sound = file.read_text("utf-8")
    assert sound.count(before) == 1
    try:
        mutant_run.put(Mutant("", "core/digest.py", ((before, after),), QUICK), copy)
        found = mutant_run.tried(copy, QUICK, limit_seconds=2 if outcome == "hung" else 120)
    finally:
        file.write_text(sound, "utf-8")

    assert (found.outcome, found.by[: len(by)]) == (outcome, by), found.words


@pytest.mark.parametrize("before", ["no such text", "from", '_PREFIX = "xxh3-128:"'])
def test_a_mutant_that_does_not_fit_is_an_error(before):
    """One that changes nothing, or who knows what, would be called caught or missed by chance."""
    with pytest.raises(LookupError, match="bring the mutant along"):
        mutant_run.mutated(
            Mutant("m", "core/digest.py", ((before, before),), QUICK), '_PREFIX = "xxh3-128:"\nfrom a\nfrom b\n'
        )


def test_the_checkout_itself_is_never_changed(copy):
    """An interrupted run must not leave a mistake behind that is committed next."""
    assert ROOT.resolve() not in copy.resolve().parents
    assert not (copy / "highcamp/core/digest.py").is_symlink()
