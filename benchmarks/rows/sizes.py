"""Cost against size: the points of the first picture."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.bench import LIMITS, Contestant
from benchmarks.rows.session import Detail, Session
from benchmarks.rows.words import size, spread
from benchmarks.states import Spec

if TYPE_CHECKING:
    from benchmarks.bench import Bench

NAME = "sizes"
TENSORS = 600
REPEATS = 3  # points of a curve, not rows of the table
PEERS = {"highcamp": "highcamp", "torch.save + fsync": "torch.save"}


def measure(bench: Bench) -> None:
    """One size after the other, for the largest fills the memory."""
    for total in bench.scale.sizes:
        spec = Spec("even", TENSORS if not bench.scale.is_tiny else 40, total)
        with bench.crew() as crew:
            wanted: dict[str, Any] = {
                LIMITS: ("limits", {"directory": bench.place(), "size_bytes": spec.total_bytes()})
            }
            wanted |= {who: (kind, {"directory": bench.place(), "state": spec.plain()}) for who, kind in PEERS.items()}
            workers = crew.hire(wanted)
            turns = [
                Contestant(who, partial(worker.call, who, "save"), spec.total_bytes())
                for who, worker in workers.items()
            ]
            bench.take_turns(NAME, turns, repeats=min(REPEATS, bench.repeats))
            for who in PEERS:
                workers[who].call(who, "check")


def detail(bench: Bench) -> list[Detail]:
    """Every size."""
    rows = []
    for place in sorted({sample.size_bytes for sample in bench.samples.rows if sample.session == NAME}):
        for who in PEERS:
            pause, durable = (bench.samples.spread(NAME, who, what, size_bytes=place) for what in ("pause", "durable"))
            rows.append((size(place), who, spread(pause), spread(durable)))
        copy, write = (bench.samples.spread(NAME, LIMITS, what, size_bytes=place) for what in ("copy", "write"))
        rows.append((size(place), "memcpy, raw write", spread(copy), spread(write)))
    text = f"Medians of {min(REPEATS, bench.repeats)}; for the limits, pause is a memcpy and durable a raw write."
    return [Detail("Sizes", text, ("state", "", "pause", "durable"), rows)]


SESSION = Session((NAME,), ("sizes",), measure, lambda _: [], detail)
