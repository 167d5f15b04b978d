"""Saving and restoring one large state: pause, durable, restore, memory."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.bench import LIMITS, Contestant
from benchmarks.limits import drop_caches
from benchmarks.rows.session import Detail, Session
from benchmarks.rows.verdict import Verdict, unmeasured
from benchmarks.rows.words import ratio, seconds, size, spread, times

if TYPE_CHECKING:
    from benchmarks.bench import Bench

OURS = "highcamp"
PEERS = {
    OURS: "highcamp",
    "torch.save + fsync": "torch.save",
    "safetensors + fsync": "safetensors",
    "dcp.save": "dcp.save",
    "dcp.async_save": "dcp.async_save",
    "Orbax async": "orbax",
}
MEMORY_SAVES = 3
LIMITS_TEXT = "Of the same bytes, on the same disk, in the same rounds."


def measure(bench: Bench) -> None:
    """Everybody saves the same state in turns, then restores it in turns, warm and cold."""
    spec = bench.scale.state
    total, tensors = spec.total_bytes(), spec.total_tensors()
    with bench.crew() as crew:
        wanted: dict[str, Any] = {LIMITS: ("limits", {"directory": bench.place(), "size_bytes": total})}
        wanted |= {who: (kind, {"directory": bench.place(), "state": spec.plain()}) for who, kind in PEERS.items()}
        workers = crew.hire(wanted)

        def turns(method: str, **options: bool) -> list[Contestant]:
            return [
                Contestant(who, partial(worker.call, who, method, **options), total, tensors)
                for who, worker in workers.items()
            ]

        bench.take_turns("save", turns("save"))
        for who in PEERS:
            bench.add("save", who, workers[who].call(who, "facts"), size_bytes=total, tensors=tensors)
            workers[who].call(who, "check")
            workers[who].call(who, "settle")  # restoring wants the memory
        bench.take_turns("restore", turns("restore", is_warm=True))
        if bench.scale.is_tiny or drop_caches():
            before = os.sync if bench.scale.is_tiny else drop_caches  # everybody else on the machine needs his caches
            bench.take_turns("restore", turns("restore", is_warm=False), before=before)
        else:
            bench.note("restore", "cold restores were left out: dropping the page cache is not permitted here")


def measure_memory(bench: Bench) -> None:
    """The two options that change how much memory a save takes, each alone in a process."""
    spec = bench.scale.state
    options = {
        "highcamp, memory_every": {"memory_every": {"steps": 1}},
        "highcamp, staging_bytes": {"staging_bytes": bench.scale.staging_bytes},
    }
    for who, chosen in options.items():
        with bench.crew() as crew:
            place = {"directory": bench.place(), "state": spec.plain(), "options": chosen}
            for worker in crew.hire({who: ("highcamp", place)}).values():
                turn = Contestant(who, partial(worker.call, who, "save"), spec.total_bytes())
                bench.take_turns("memory", [turn], repeats=MEMORY_SAVES - 1)
                bench.add("memory", who, worker.call(who, "facts"), size_bytes=spec.total_bytes())
                worker.call(who, "check")


def judge(bench: Bench) -> list[Verdict]:
    """Pause, durable and restore against the limits of the same run."""
    samples, state = bench.samples, size(bench.scale.state.total_bytes())
    found: list[Verdict] = []

    def compare(
        key: str, what: str, most: float, figure: tuple[str, str], limit: tuple[str, str, str], name: str
    ) -> None:
        ours = samples.spread(figure[0], OURS, figure[1])
        other = samples.spread(*limit)
        bound = f"≤ {most} × {name}"
        if ours is None or other is None:
            found.append(unmeasured(key, what, bound, "cold reads not permitted" if "cold" in what else ""))
            return
        share = ours.median / other.median
        because = ""
        if share > most and limit[1] == LIMITS:
            because = f"{name} itself took from {seconds(other.low)} to {seconds(other.high)}"
        elif share > most:
            least = times(ratio(samples.median("save", LIMITS, "write"), other.median))
            because = f"a raw write of the bytes alone takes {least} {name}"
        text = f"{seconds(ours.median)}, {times(share)}"
        found.append(Verdict(key, what, bound, text, share <= most, f"{name}: {spread(other)}", because))

    saved, restored = ("save", LIMITS), ("restore", LIMITS)
    compare(
        "pause-copy", f'pause of a save, `"copy"` ({state})', 1.25, ("save", "pause"), (*saved, "copy"), "warm memcpy"
    )
    what = f"durable: hash, fsync, rename, fsync ({state})"
    compare("durable", what, 1.25, ("save", "durable"), (*saved, "write"), "raw O_DIRECT write + fsync")
    compare("durable", what, 0.6, ("save", "durable"), ("save", "torch.save + fsync", "durable"), "torch.save + fsync")
    for kind in ("warm", "cold"):
        what = f"restore into live tensors, digests checked, {kind} ({state})"
        compare("restore", what, 1.25, ("restore", f"restore_{kind}"), (*restored, f"restore_{kind}"), "raw read")
    return found


def judge_memory(bench: Bench) -> list[Verdict]:
    """Memory on top of the state, at its peak."""
    total = bench.scale.state.total_bytes()
    allowed = 1.05 * bench.scale.staging_bytes
    rows = [
        ("save", OURS, "memory on top of the state", "≤ 1.05 × the state", 1.05 * total),
        ("memory", "highcamp, memory_every", "the same with `memory_every`", "≤ 2.05 × the state", 2.05 * total),
        ("memory", "highcamp, staging_bytes", "the same with `staging_bytes`", "≤ `staging_bytes` + 5 %", allowed),
    ]
    found = []
    for session, who, what, bound, most in rows:
        grown = bench.samples.median(session, who, "peak_bytes")
        if grown is None:
            found.append(unmeasured("memory", what, bound))
            continue
        limit = f"{size(bench.scale.staging_bytes)} staging" if "staging" in who else f"state: {size(total)}"
        figure = f"{size(grown)}, {times(grown / (allowed / 1.05 if 'staging' in who else total))}"
        found.append(Verdict("memory", what, bound, figure, grown <= most, limit))
    return found


def detail(bench: Bench) -> list[Detail]:
    """Everybody side by side."""
    samples = bench.samples
    copy, write = (samples.median("save", LIMITS, what) for what in ("copy", "write"))
    rows = []
    for who in [OURS, *(peer for peer in PEERS if peer != OURS)]:
        pause, done, durable = (samples.spread("save", who, what) for what in ("pause", "done", "durable"))
        if pause is None or durable is None or done is None:
            continue
        rows.append((
            who, spread(pause), times(ratio(pause.median, copy)), seconds(done.median), spread(durable),
            times(ratio(durable.median, write)), f"{seconds(pause.first)} / {seconds(durable.first)}",
            size(samples.median("save", who, "peak_bytes")), size(samples.median("save", who, "disk_bytes")),
        ))  # fmt: skip
    columns = (
        "", "pause", "÷ memcpy", "done, as it says", "durable", "÷ raw write", "first save: pause / durable",
        "peak memory on top", "on disk",
    )  # fmt: skip
    text = (
        "Pause: until the loop may go on. Done: until the peer calls it done. Durable: every file and directory fsynced. "
        "Whoever writes before it returns pauses for all of it."
    )
    saving = Detail(f"Saving {size(bench.scale.state.total_bytes())}", text, columns, rows)
    restored: list[tuple[str, ...]] = []
    reads = {kind: samples.median("restore", LIMITS, f"restore_{kind}") for kind in ("warm", "cold")}
    for who in [OURS, *(peer for peer in PEERS if peer != OURS)]:
        warm, cold = (samples.spread("restore", who, f"restore_{kind}") for kind in ("warm", "cold"))
        if warm is not None:
            restored.append((
                who, spread(warm), times(ratio(warm.median, reads["warm"])), spread(cold),
                times(ratio(cold.median if cold else None, reads["cold"])),
            ))  # fmt: skip
    text = "The file in the page cache, and not. Only highcamp checks digests. Every restored state was compared, bit for bit."
    return [
        saving,
        Detail("Restoring it", text, ("", "warm", "÷ raw read", "cold", "÷ raw read"), restored),
        Detail("The physical limits", LIMITS_TEXT, ("", "time", "rate"), _limits(bench)),
    ]


def _limits(bench: Bench) -> list[tuple[str, ...]]:
    total = bench.scale.state.total_bytes()
    names = {
        ("save", "copy_one"): "copy into warm memory, one thread",
        ("save", "copy_two"): "copy into warm memory, two threads",
        ("save", "copy_fresh"): "copy into memory just allocated",
        ("save", "write"): "O_DIRECT write into a new file + fsync",
        ("restore", "restore_warm"): "read into warm memory, from the page cache",
        ("restore", "restore_cold"): "read into warm memory, from the disk",
    }
    rows: list[tuple[str, ...]] = []
    for (session, what), name in names.items():
        found = bench.samples.spread(session, LIMITS, what)
        if found is not None:
            rows.append((name, spread(found), f"{total / found.median / 1e9:.2f} GB/s"))
    return rows


SESSION = Session(("save", "restore"), ("pause-copy", "durable", "restore"), measure, judge, detail)
MEMORY = Session(("memory",), ("memory",), measure_memory, judge_memory, lambda _: [])
