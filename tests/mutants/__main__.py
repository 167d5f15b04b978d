"""`make mutants`: every mutant on a copy of its own, and the page that tells which test has noticed it."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import mutant_run
from mutant_list import GROUPS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mutant_list import Mutant
    from mutant_run import Verdict

ROOT = Path(__file__).resolve().parents[2]
HEAD = """# Mutants

Tests that cannot fail prove nothing. Each line is a mistake that was put into a copy of the code, alone; the suite that had to
notice it, and the test in it that did. The code as it is passes all of these suites. The page is written by `make mutants`,
which fails if a mistake goes unnoticed, makes the code no code at all, or lets the tests hang. The mistakes themselves are in
[tests/mutants/mutant_list.py](../tests/mutants/mutant_list.py).
"""


def main() -> int:
    """Run them; 1 if one is not caught."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the page to be written, if all mutants are run and caught")
    parser.add_argument("--only", default="", help="those whose names or files hold this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    chosen = [each for group in GROUPS.values() for each in group if options.only in f"{each.name} {each.file}"]
    began = time.monotonic()
    place = Path(tempfile.mkdtemp(prefix="highcamp-mutants-"))
    try:
        verdicts = _verdicts(chosen, place, options.jobs)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    missed = [each for each in chosen if verdicts[each.name].outcome != "caught"]
    seconds = time.monotonic() - began
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mutants caught in {seconds:.0f} s, {options.jobs} at once")
    if options.out is not None and not options.only and not missed:
        options.out.write_text(page(verdicts), "utf-8")
    return 1 if missed else 0


def _verdicts(chosen: Sequence[Mutant], place: Path, jobs: int) -> dict[str, Verdict]:
    """What becomes of each, by name. Raises SystemExit if the code as it is does not pass."""
    clean = mutant_run.copied(ROOT, place / "clean")
    if not mutant_run.is_copy_imported(clean):
        sys.exit(f"{sys.executable} does not import the copy in {clean}: nothing could be told")
    for each in chosen:
        mutant_run.mutated(each, (clean / "highcamp" / each.file).read_text("utf-8"))

    def run(number: int, suites: Sequence[str], mutant: Mutant | None) -> Verdict:
        copy = mutant_run.copied(clean, place / str(number))
        try:
            if mutant is not None:
                mutant_run.put(mutant, copy)
            found = mutant_run.tried(copy, suites)
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        told = f"{found.by} " if found.by else ""
        print(f"{found.outcome:8}{found.seconds:6.1f} s  {mutant.name if mutant else suites[0]}  {told}", flush=True)
        if found.outcome in ("broken", "hung") or (mutant is None and found.outcome != "passed"):
            print(found.words, flush=True)
        return found

    with ThreadPoolExecutor(jobs) as pool:
        suites = sorted({suite for each in chosen for suite in each.suites})
        as_it_is = list(pool.map(lambda pair: run(pair[0], [pair[1]], None), enumerate(suites)))
        if any(found.outcome != "passed" for found in as_it_is):
            sys.exit("the code as it is does not pass: nothing could be told of its mutants")
        numbered = enumerate(chosen, start=len(suites))
        found = pool.map(lambda pair: run(pair[0], pair[1].suites, pair[1]), numbered)
        return dict(zip((each.name for each in chosen), found, strict=True))


def page(verdicts: dict[str, Verdict]) -> str:
    """The table as Markdown."""
    lines = [HEAD]
    for heading, group in GROUPS.items():
        lines += [f"## {heading}\n", "| mistake | in highcamp/ | suite | noticed by |", "| --- | --- | --- | --- |"]
        for each in group:
            suite, _, test = verdicts[each.name].by.partition("::")
            test = test.partition("[")[0]
            lines.append(f"| {each.name} | {each.file} | {suite.removeprefix('tests/')} | `{test}` |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
