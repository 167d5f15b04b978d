"""Training with saves against the same training without."""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.bench import Contestant
from benchmarks.rows.session import Detail, Session
from benchmarks.rows.verdict import Verdict, unmeasured
from benchmarks.rows.words import seconds, size

if TYPE_CHECKING:
    from benchmarks.bench import Bench

NAME = "training"
NONE, RAW = "no saves", "raw copy, raw write"
COPY, OVERLAP = 'highcamp, "copy"', 'highcamp, "overlap"'
KEEP = {"best": 1, "last": 2}
SAVERS: dict[str, tuple[str | None, dict[str, Any]]] = {
    NONE: (None, {}),
    RAW: ("raw", {}),
    COPY: ("highcamp", {"options": {"keep": KEEP}}),
    OVERLAP: ("highcamp", {"options": {"keep": KEEP, "snapshot": "overlap"}}),
    "torch.save + fsync": ("torch.save", {}),
    "dcp.async_save": ("dcp.async_save", {"is_staged_behind": True}),
}
MOST = 0.02


def measure(bench: Bench) -> None:
    """Stretches of the same training in turns; in the end everybody must have the same weights."""
    scale = bench.scale
    shape = {"width": scale.width, "blocks": scale.blocks, "tokens": scale.tokens}
    steps = {"steps": scale.segment_steps, "every": scale.save_every}
    wanted = {
        who: ("training", {"directory": bench.place(), "shape": shape, "saver": saver, "options": options})
        for who, (saver, options) in SAVERS.items()
    }
    with bench.crew() as crew:
        workers = crew.hire(wanted)
        turns = [Contestant(who, partial(worker.call, who, "segment", **steps)) for who, worker in workers.items()]
        bench.take_turns(NAME, turns, repeats=scale.segments)
        weights = {who: worker.call(who, "weights") for who, worker in workers.items()}
        wrong = [who for who, found in weights.items() if found != weights[NONE]]
        if wrong:
            raise ValueError(f"training with saves by {', '.join(wrong)} gave other weights than training without")
        bench.add(NAME, NONE, workers[NONE].call(NONE, "size"))


def overheads(bench: Bench, who: str) -> list[float]:
    """By which share each stretch with saves took longer than the one without in the same round."""
    without = {sample.round: sample.value for sample in bench.samples.of(NAME, NONE, "segment")}
    found = bench.samples.of(NAME, who, "segment")
    return [sample.value / without[sample.round] - 1 for sample in found if sample.round > 0]


def judge(bench: Bench) -> list[Verdict]:
    """Both ways of copying against the same bound."""
    found = []
    raw = overheads(bench, RAW)
    for who in (COPY, OVERLAP):
        what = f"training with a save every {bench.scale.save_every} steps, {who.removeprefix('highcamp, ').join('``')}"
        bound, ours = "≤ 2 % slower than without", overheads(bench, who)
        if not ours:
            found.append(unmeasured("training", what, bound))
            continue
        share = statistics.median(ours)
        limit = f"a bare copy and direct write: {_percent(raw)}" if raw else ""
        because = ""
        if share > MOST:
            because = f"no digest, no commit, only the bytes: {_percent(raw)}; {_state(bench)} each time"
        found.append(Verdict("training", what, bound, _percent(ours), share <= MOST, limit, because))
    return found


def _percent(shares: list[float]) -> str:
    low, *_, high = statistics.quantiles(shares, n=4, method="inclusive") if len(shares) > 1 else (shares[0], shares[0])
    return f"{100 * statistics.median(shares):+.1f} % (quartiles {100 * low:+.1f} … {100 * high:+.1f})"


def _state(bench: Bench) -> str:
    return size(bench.samples.median(NAME, NONE, "state_bytes"))


def detail(bench: Bench) -> list[Detail]:
    """Each stretch beside the one without of the same round."""
    scale, rows = bench.scale, []
    for who in bench.samples.who(NAME):
        found = bench.samples.spread(NAME, who, "segment")
        if found is not None and (shares := overheads(bench, who)):
            share = "–" if who == NONE else _percent(shares)
            rows.append((who, seconds(found.median / scale.segment_steps), share, str(len(shares))))
    order = list(SAVERS)
    rows.sort(key=lambda row: order.index(row[0]))
    text = (
        f"A transformer with AdamW, {_state(bench)} of state; stretches of {scale.segment_steps} steps with a save every "
        f"{scale.save_every}, the last of them awaited until it is durable, beside stretches without, in shuffled order. Same "
        "seeds: in the end the weights were the same, bit for bit."
    )
    return [Detail("Training with saves", text, ("", "a step", "slower by", "pairs"), rows)]


SESSION = Session((NAME,), ("training",), measure, judge, detail)
