"""Many tensors: what each of them costs beyond its bytes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from benchmarks.bench import Contestant
from benchmarks.rows.session import Detail, Session
from benchmarks.rows.verdict import Verdict, unmeasured
from benchmarks.rows.words import seconds, size, spread
from benchmarks.states import Spec

if TYPE_CHECKING:
    from benchmarks.bench import Bench

NAME = "tensors"
PEERS = {"highcamp": "highcamp", "torch.save + fsync": "torch.save", "safetensors + fsync": "safetensors"}
MOST_SECONDS = 10e-6


def measure(bench: Bench) -> None:
    """The same bytes in ever more tensors."""
    specs = [Spec("even", count, bench.scale.tensor_bytes) for count in bench.scale.tensor_counts]
    with bench.crew() as crew:
        turns = []
        workers = {who: crew.worker() for who in PEERS}
        for who, kind in PEERS.items():
            for spec in specs:
                name, worker = f"{who} {spec.tensors}", workers[who]
                worker.make(name, kind, directory=bench.place(), state=spec.plain())
                turns.append(
                    Contestant(who, partial(worker.call, name, "save"), spec.total_bytes(), spec.total_tensors())
                )
        bench.take_turns(NAME, turns)
        for who in PEERS:
            for spec in specs:
                workers[who].call(f"{who} {spec.tensors}", "check")


def each(bench: Bench, who: str, what: str) -> float | None:
    """Seconds that a tensor costs: the most tensors against the fewest, which have the same bytes."""
    counts = sorted({sample.tensors for sample in bench.samples.rows if sample.session == NAME})
    if len(counts) < 2:
        return None
    few, many = (bench.samples.median(NAME, who, what, tensors=count) for count in (counts[0], counts[-1]))
    return None if few is None or many is None else (many - few) / (counts[-1] - counts[0])


def judge(bench: Bench) -> list[Verdict]:
    """The whole save, until it is durable."""
    count = bench.scale.tensor_counts[-1]
    what, bound = f"{count:,} tensors", "≤ 10 µs each on top of the bytes"
    durable, pause = (each(bench, "highcamp", what) for what in ("durable", "pause"))
    if durable is None:
        return [unmeasured("tensors", what, bound)]
    peers = ", ".join(f"{who} {seconds(each(bench, who, 'durable'))}" for who in PEERS if who != "highcamp")
    figure = f"{seconds(durable)} each until durable, {seconds(pause)} of it in the pause"
    because = "" if durable <= MOST_SECONDS else f"the names alone make a header, parsed and hashed; beside it: {peers}"
    return [Verdict("tensors", what, bound, figure, durable <= MOST_SECONDS, peers, because)]


def detail(bench: Bench) -> list[Detail]:
    """Every count."""
    rows = []
    for who in PEERS:
        for count in sorted({sample.tensors for sample in bench.samples.rows if sample.session == NAME}):
            pause, durable = (bench.samples.spread(NAME, who, what, tensors=count) for what in ("pause", "durable"))
            rows.append((who, f"{count:,}", spread(pause), spread(durable)))
    text = f"{size(bench.scale.tensor_bytes)} in all cases, as a model with AdamW; a quarter of the tensors are single numbers."
    return [Detail("Many tensors", text, ("", "tensors", "pause", "durable"), rows)]


SESSION = Session((NAME,), ("tensors",), measure, judge, detail)
