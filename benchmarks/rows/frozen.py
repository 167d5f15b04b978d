"""Fine-tuning: 95 % of the parameters do not change."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from benchmarks.bench import Contestant
from benchmarks.rows.session import Detail, Session
from benchmarks.rows.verdict import Verdict, unmeasured
from benchmarks.rows.words import size, spread, times

if TYPE_CHECKING:
    from benchmarks.bench import Bench

NAME = "frozen"
SHARE = 0.95
MOST = 1.1
PEERS = {"highcamp": "highcamp partly", "torch.save + fsync": "torch.save"}


def measure(bench: Bench) -> None:
    """Save after save, with a change of everything that is trained before each."""
    spec = bench.scale.frozen
    with bench.crew() as crew:
        workers = crew.hire({
            who: (kind, {"directory": bench.place(), "state": spec.plain(), "frozen": SHARE}) for who, kind in PEERS.items()
        })  # fmt: skip
        bench.take_turns(NAME, [Contestant(who, partial(worker.call, who, "save")) for who, worker in workers.items()])
        for who, worker in workers.items():
            worker.call(who, "check")


def judge(bench: Bench) -> list[Verdict]:
    """What the kernel wrote against what had changed."""
    what, bound = "95 % of the parameters frozen, from the second save on", "≤ 1.1 × the changed bytes written"
    written, changed = (bench.samples.median(NAME, "highcamp", what) for what in ("written_bytes", "changed_bytes"))
    if written is None or not changed:
        return [unmeasured("frozen", what, bound)]
    whole = bench.samples.median(NAME, "torch.save + fsync", "disk_bytes")
    figure = f"{size(written)}, {times(written / changed)}"
    limit = f"changed: {size(changed)}; the whole state: {size(whole)}"
    because = "" if written <= MOST * changed else f"{size(written - changed)} beyond the changed bytes were written"
    return [Verdict("frozen", what, bound, figure, written <= MOST * changed, limit, because)]


def detail(bench: Bench) -> list[Detail]:
    """Bytes and time."""
    rows = []
    for who in PEERS:
        found = bench.samples.spread(NAME, who, "durable")
        if found is not None:
            written = bench.samples.spread(NAME, who, "written_bytes")
            rows.append((
                who, size(written.median) if written else "all", size(written.first) if written else "all",
                size(bench.samples.median(NAME, who, "disk_bytes")), spread(found),
            ))  # fmt: skip
    text = (
        "Written: as the kernel counts what the process gave to the disk. A checkpoint is whole all the same: its files are "
        "linked."
    )
    columns = ("", "written by a save", "by the first", "size of a checkpoint", "durable")
    return [Detail("95 % of the parameters frozen", text, columns, rows)]


SESSION = Session((NAME,), ("frozen",), measure, judge, detail)
