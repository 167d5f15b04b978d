"""The pause of a save that copies behind the next forward and backward, barrier included."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.bench import Contestant
from benchmarks.rows.session import Detail, Session
from benchmarks.rows.verdict import Verdict, unmeasured
from benchmarks.rows.words import seconds, size, spread

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.bench import Bench
    from benchmarks.states import Spec

NAME = "overlap"
OURS, COPY = 'highcamp, "overlap"', 'highcamp, "copy"'
MOST_SECONDS = 0.003
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    COPY: ("highcamp", {"options": {"snapshot": "copy"}}),
    "torch.save + fsync": ("torch.save", {}),
    "dcp.async_save": ("dcp.async_save", {}),
    "dcp.async_save, staging awaited before the step": ("dcp.async_save", {"is_staged_behind": True}),
}


def measure(bench: Bench) -> None:
    """The same training step everywhere; highcamp with every size, the peers with the first."""
    first, *_ = specs = bench.scale.overlap
    wanted: dict[str, tuple[str, Mapping[str, Any]]] = {}
    places: dict[str, tuple[str, Spec]] = {}
    chosen: list[tuple[str, str, dict[str, Any], Spec]]
    chosen = [(OURS, "highcamp", {"options": {"snapshot": "overlap"}}, spec) for spec in specs]
    chosen += [(who, saver, options, first) for who, (saver, options) in PEERS.items()]
    for who, saver, options, spec in chosen:
        name = who if spec is first else f"{who}, {spec.size_bytes}"
        places[name] = who, spec
        wanted[name] = ("step", {"directory": bench.place(), "spec": spec.plain(), "saver": saver, "options": options})
    with bench.crew() as crew:
        workers = crew.hire(wanted)
        turns = []
        for name, worker in workers.items():
            who, spec = places[name]
            act = partial(worker.call, name, "save")
            turns.append(Contestant(who, act, spec.total_bytes(), spec.total_tensors()))
        bench.take_turns(NAME, turns)
        files = [workers[name].call(name, "file_digests") for name in (OURS, COPY)]
        if files[0] != files[1]:
            raise ValueError(f'"overlap" and "copy" gave other bytes for the same state: {files}')
        for name, worker in workers.items():
            worker.call(name, "check")


def judge(bench: Bench) -> list[Verdict]:
    """At most so many milliseconds, whatever the size."""
    sizes = sorted(
        {sample.size_bytes for sample in bench.samples.rows if sample.session == NAME and sample.who == OURS}
    )
    tensors = bench.scale.overlap[0].total_tensors()
    what, bound = (
        f'pause of a save, `"overlap"`, barrier included ({tensors} tensors)',
        "≤ 3 ms, flat from 10 MB to 4 GB",
    )
    if not sizes:
        return [unmeasured("pause-overlap", what, bound)]
    medians = {place: bench.samples.median(NAME, OURS, "pause", size_bytes=place) or 0.0 for place in sizes}
    figure = ", ".join(f"{seconds(median)} at {size(place)}" for place, median in medians.items())
    is_met = max(medians.values()) <= MOST_SECONDS
    peers = [bench.samples.median(NAME, who, "pause") for who in PEERS if who != COPY]
    best = min((found for found in peers if found is not None), default=None)
    because = "" if is_met else _because(bench, max(medians, key=lambda place: medians[place]))
    return [Verdict("pause-overlap", what, bound, figure, is_met, f"the best peer: {seconds(best)}", because)]


def _because(bench: Bench, place: int) -> str:
    call, barrier, hidden = (
        bench.samples.median(NAME, OURS, what, size_bytes=place) for what in ("call", "barrier", "hidden")
    )
    return (
        f"at {size(place)} the call took {seconds(call)} and the barrier {seconds(barrier)}, with {seconds(hidden)} of forward "
        "and backward to hide the copy behind"
    )


def detail(bench: Bench) -> list[Detail]:
    """Call and barrier apart."""
    rows = []
    places = dict.fromkeys((sample.who, sample.size_bytes) for sample in bench.samples.rows if sample.session == NAME)
    for who, place in sorted(places, key=lambda pair: (pair[0] != OURS, pair[0] != COPY, pair)):
        figures = {
            what: bench.samples.spread(NAME, who, what, size_bytes=place)
            for what in ("pause", "call", "barrier", "hidden", "durable")
        }
        first = figures["pause"].first if figures["pause"] else None
        rows.append((
            who, size(place), spread(figures["pause"]),
            *(seconds(found.median if found else None) for name, found in figures.items() if name != "pause"),
            seconds(first),
        ))  # fmt: skip
    columns = ("", "state", "pause", "call", "barrier", "forward and backward", "durable", "first pause")
    text = (
        "A real training step with AdamW: pause is the call plus what holds up `optimizer.step()`. The batch has 64 rows, so "
        'there is little forward and backward to hide a copy behind. `"overlap"` and `"copy"` gave the same bytes.'
    )
    return [
        Detail(f"A save within a training step ({bench.scale.overlap[0].total_tensors()} tensors)", text, columns, rows)
    ]


SESSION = Session((NAME,), ("pause-overlap",), measure, judge, detail)
