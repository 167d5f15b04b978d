"""`python -m benchmarks`: run the table and write the page."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import click

from benchmarks import machine, report
from benchmarks.bench import Bench
from benchmarks.rows import KEYS, SESSIONS
from benchmarks.scale import FULL, TINY


@click.command()
@click.option(
    "--quick", is_flag=True, help="Every row with tiny states, to see that it works; the figures mean nothing."
)
@click.option("--only", "keys", multiple=True, type=click.Choice(KEYS), help="Only this row; may be repeated.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("build/benchmarks"), show_default=True,
    help="Where benchmarks.md, benchmarks.json and images/ are written.",
)  # fmt: skip
@click.option("--repeats", type=click.IntRange(min=1), help="Rounds after the first one; 5 by default, 2 with --quick.")
@click.option(
    "--scratch", type=click.Path(path_type=Path, file_okay=False), default=Path(),
    help="A directory on the disk that is measured; the current one by default.",
)  # fmt: skip
@click.option(
    "--rest", type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="An earlier benchmarks.json: what is not measured now is taken from it.",
)  # fmt: skip
@click.option("--page", "page_only", is_flag=True, help="Measure nothing; write the page from --rest.")
def main(
    *,
    quick: bool,
    keys: tuple[str, ...],
    out: Path,
    repeats: int | None,
    scratch: Path,
    rest: Path | None,
    page_only: bool,
) -> None:
    """Measure highcamp against its bounds, beside its peers and the physical limits.

    A session that fails is told, and the others go on; the exit code is 1 then.
    """
    scale = TINY if quick else FULL
    wanted = [] if page_only else [session for session in SESSIONS if not keys or set(keys) & set(session.keys)]
    free = machine.available_bytes()
    if wanted and free is not None and free < scale.memory_bytes:
        sys.exit(f"{free / 1e9:.0f} GB of memory are free, {scale.memory_bytes / 1e9:.0f} GB are needed; try --quick")
    scratch.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix=".benchmarks-", dir=scratch)).resolve()
    facts = machine.facts(home)
    if facts["file system"].startswith("tmpfs") and not quick:
        home.rmdir()
        sys.exit("the scratch directory is in memory, where durable means nothing; name one on a disk with --scratch")
    words = ["python -m benchmarks", *(["--quick"] if quick else []), *(f"--only {key}" for key in keys)]
    words += [f"--repeats {repeats}"] if repeats else []
    bench = Bench(scale, repeats or scale.repeats, home)
    bench.facts = facts | {"command": f"`{' '.join(words)}`"}  # without paths: they are nobody's business
    if rest is not None:
        report.read(bench, rest, without=[name for session in wanted for name in session.names])
    failed = False
    try:
        for session in wanted:
            began = time.perf_counter()
            try:
                session.measure(bench)
            except Exception:  # noqa: BLE001  (told; an hour of the others' figures is not lost with it)
                traceback.print_exc()
                bench.note(session.names[0], "FAILED; its rows are not measured")
                failed = True
            bench.seconds[session.names[0]] = time.perf_counter() - began
            report.write_raw(bench, out)
    finally:
        bench.close()
        shutil.rmtree(home)
    page = report.write(bench, out)
    for verdict in report.verdicts(bench):
        print(f"{verdict.word:12}  {verdict.what}: {verdict.figure}  ({verdict.bound})")
    print(page)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
