"""The report: raw rows as JSON, and the page that is made from them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import curves, loops, ours, peers
from benchmarks.rows import SESSIONS
from benchmarks.samples import Samples

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from benchmarks.bench import Bench
    from benchmarks.rows.session import Detail
    from benchmarks.rows.verdict import Verdict

PAGE, RAW, PICTURES = "benchmarks.md", "benchmarks.json", "images"
ORDER = (
    "pause-copy", "pause-overlap", "durable", "restore", "memory", "keras", "training", "idle", "frozen", "tensors",
    "checkpoints", "import",
)  # fmt: skip
CAPTIONS = {
    "benchmark-sizes": "Pause and durable time against the size of the state, 1 MB to 4 GB",
    "benchmark-tensors": "Pause and durable time against the number of tensors, the same bytes",
    "benchmark-checkpoints": "Looking into a run against the number of checkpoints in it",
}
SETTINGS = (
    ("highcamp", ours.Ours.settings),
    ("torch.save", peers.TorchSave.settings),
    ("safetensors", peers.Safetensors.settings),
    ("dcp.save", peers.Dcp.settings),
    ("dcp.async_save", peers.DcpAsync.settings),
    ("Orbax async", peers.Orbax.settings),
    ("raw copy, raw write", loops.RawSaver.settings),
)
METHOD = """\
- Every contestant lives in a process of its own and saves in turns with the others, in an order that is shuffled for every
  round; before each turn the disk has nothing left to write. The same bytes (random, float32), the same disk.
- Figures are medians; in brackets the least and the greatest. The first save, which allocates and warms up, is listed apart.
- The limits are measured in the same rounds. If the second half of their figures lies more than 20 % from the first half, the
  session is thrown away and measured again, and it says so above.
- What is timed is loaded again, outside of what is timed, and compared bit for bit: the last save of every contestant, every
  restore, every Keras fit; `"overlap"` and `"copy"` must give the same file digests, and training with saves the same weights
  as without.
- Removing earlier checkpoints is not timed, for anybody; in "Training with saves" highcamp's own pruning is.
- Peak memory is the high-water mark of resident memory of the process and its children, less what the state and the imported
  libraries had taken before the first save. The page cache is not counted.
- Memory that was never touched costs more in virtual machines that give pages back to their host ("copy into memory just
  allocated" among the limits). It slows whoever allocates at every save; that is not the fault of its code.
"""


def write_raw(bench: Bench, out: Path) -> None:
    """Write everything that was measured so far into `out`."""
    document = {
        "format": 1,
        "facts": bench.facts,
        "is_tiny": bench.scale.is_tiny,
        "repeats": bench.repeats,
        "notes": bench.notes,
        "session_seconds": bench.seconds,
        "verdicts": [asdict(verdict) for verdict in verdicts(bench)],
    }
    out.mkdir(parents=True, exist_ok=True)
    head = json.dumps(document, indent=1, ensure_ascii=False).removesuffix("\n}")
    rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in bench.samples.plain())  # a line for each
    (out / RAW).write_text(f'{head},\n "samples": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def read(bench: Bench, path: Path, *, without: Collection[str]) -> None:
    """Take over what an earlier benchmark has measured, but not the sessions `without`. Raises ValueError if it was tiny."""
    document = json.loads(path.read_text("utf-8"))
    if document["is_tiny"] != bench.scale.is_tiny:
        raise ValueError(f"{path} has states of another scale")
    rows = Samples.of_plain(row for row in document["samples"] if row["session"] not in without)
    bench.samples.rows += rows.rows
    bench.notes += [(session, text) for session, text in document["notes"] if session not in without]
    bench.seconds |= {name: value for name, value in document["session_seconds"].items() if name not in without}
    if not without:
        bench.facts = document["facts"]
    elif rows.rows:
        measured = ", ".join(dict.fromkeys(row.session for row in rows.rows))
        bench.notes.append(("", f"measured earlier, on {document['facts']['date']}: {measured}"))


def verdicts(bench: Bench) -> list[Verdict]:
    """Every line of the table, in the order of the table."""
    found = [verdict for session in SESSIONS for verdict in session.judge(bench)]
    return sorted(found, key=lambda verdict: ORDER.index(verdict.key))


def write(bench: Bench, out: Path) -> Path:
    """Write the raw rows, the pictures and the page into `out`, and return the path of the page."""
    write_raw(bench, out)
    pictures = [path.relative_to(out).as_posix() for path in curves.draw(bench.samples, out / PICTURES)]
    (out / PAGE).write_text(page(bench, pictures), encoding="utf-8")
    return out / PAGE


def page(bench: Bench, pictures: Sequence[str]) -> str:
    """The Markdown page. pictures: paths relative to it."""
    found = verdicts(bench)
    met = sum(verdict.is_met is True for verdict in found)
    missed = sum(verdict.is_met is False for verdict in found)
    lines = ["# Benchmarks", ""]
    if bench.scale.is_tiny:
        lines += ["**Tiny states, to see that everything works: these figures mean nothing.**", ""]
    lines += [
        "What highcamp promises about speed, as ratios to the physical limits and to its peers, measured side by side in one",
        f"run. {met} bounds are met, {missed} missed, {len(found) - met - missed} not measured.",
        "",
        *_table(
            ("what", "bound", "measured", "", "beside it"),
            [(entry.what, entry.bound, entry.figure, entry.word, entry.limit) for entry in found],
        ),
        "",
    ]
    explained = [entry for entry in found if entry.is_met is False and entry.because]
    if explained:
        lines += ["What explains a bound that was missed:", ""]
        lines += [f"- **{entry.what}** ({entry.bound}): {entry.because}." for entry in explained]
        lines += [""]
    lines += ["Measured on:", "", *(f"- {name}: {value}" for name, value in bench.facts.items())]
    lines += [f"- note: {session + ': ' if session else ''}{text}" for session, text in bench.notes]
    lines += ["", f"The raw rows are in [{RAW}]({RAW}).", "", "## Curves", ""]
    for path in pictures:
        lines += [f"![{CAPTIONS[Path(path).stem]}]({path})", ""]
    lines += ["## The figures behind the table", ""]
    for session in SESSIONS:
        for detail in session.detail(bench):
            lines += _detail(detail)
    lines += ["## How it is measured", "", METHOD]
    lines += ["Settings of the contestants, the best that were found:", ""]
    lines += [*_table(("", "settings"), [(f"{who}", text) for who, text in SETTINGS]), ""]
    return "\n".join(lines)


def _detail(detail: Detail) -> list[str]:
    if not detail.rows:
        return []
    return [f"### {detail.heading}", "", detail.text, "", *_table(detail.columns, detail.rows), ""]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    found = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return [*found, *(f"| {' | '.join(row)} |" for row in rows)]
