"""What a step takes longer while nothing is due."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from benchmarks.bench import Contestant
from benchmarks.rows.session import Detail, Session
from benchmarks.rows.verdict import Verdict, unmeasured
from benchmarks.rows.words import seconds, spread

if TYPE_CHECKING:
    from benchmarks.bench import Bench

NAME = "idle"
FRAMEWORKS = {
    "torch": "`checkpointer.batches` (PyTorch)",
    "jax": "`save_if_due` (JAX)",
    "keras": "Keras callback",
    "lightning": "Lightning callback",
    "transformers": "Transformers callback",
}
CADENCES = {"epochs": "`Every(epochs=1)`", "steps": "`Every(steps=…, seconds=…)`"}
MOST_SECONDS = 20e-6


def who(framework: str, cadence: str) -> str:
    """The name of a contestant."""
    return f"{framework}, {cadence}"


def measure(bench: Bench) -> None:
    """Every framework in a process of its own, with a cadence that may sleep and with one that must look."""
    with bench.crew() as crew:
        # Importing takes seconds, so where the figures mean nothing one process does.
        shared = crew.worker() if bench.scale.is_tiny else None
        turns = []
        for framework in FRAMEWORKS:
            worker = shared or crew.worker()
            for cadence in CADENCES:
                name = who(framework, cadence)
                options = {"framework": framework, "cadence": cadence, "steps": bench.scale.idle_steps}
                worker.make(name, "idle", directory=bench.place(), **options)
                turns.append(Contestant(name, partial(worker.call, name, "turn")))
        bench.take_turns(NAME, turns, repeats=1 if bench.scale.is_tiny else None)


def judge(bench: Bench) -> list[Verdict]:
    """One line for each framework, with the dearer of the two cadences."""
    samples, found = bench.samples, []
    for framework, words in FRAMEWORKS.items():
        what, bound = f"an idle step: {words}", "≤ 20 µs on top"
        costs = {each: samples.spread(NAME, who(framework, each), "cost") for each in CADENCES}
        measured = {each: cost for each, cost in costs.items() if cost is not None}
        if not measured:
            found.append(unmeasured("idle", what, bound))
            continue
        worst = max(measured, key=lambda each: measured[each].median)
        cost, floor = measured[worst], samples.spread(NAME, who(framework, worst), "floor")
        limit = "" if floor is None else f"a callback that does nothing: {seconds(max(0.0, floor.median))}"
        because = f"it ranged from {seconds(cost.low)} to {seconds(cost.high)}; {limit}" if limit else ""
        figure = f"{seconds(max(0.0, cost.median))}, {CADENCES[worst]}"
        found.append(Verdict("idle", what, bound, figure, cost.median <= MOST_SECONDS, limit, because))
    return found


def detail(bench: Bench) -> list[Detail]:
    """Every framework with both cadences."""
    rows = []
    for framework in FRAMEWORKS:
        for cadence, words in CADENCES.items():
            found = [bench.samples.spread(NAME, who(framework, cadence), what) for what in ("without", "floor", "cost")]
            if found[0] is not None:
                floor = "–" if found[1] is None else _signed(found[1].median)
                cost = (
                    "–"
                    if found[2] is None
                    else f"{_signed(found[2].median)} ({_signed(found[2].low)} … {_signed(found[2].high)})"
                )
                rows.append((f"{framework}, {words}", spread(found[0]), floor, cost))
    text = (
        f"Fits of {bench.scale.idle_steps:,} steps of a model with eight weights, nothing due in them, with and without highcamp "
        "and with a callback of the framework that does nothing, by turns; a figure is the median step of a fit. Less than "
        "nothing is possible: Keras on JAX calls callbacks in a thread of their own unless one looks at each step."
    )
    return [Detail("An idle step", text, ("", "a step without", "an empty callback", "highcamp"), rows)]


def _signed(value: float) -> str:
    return f"{1e6 * value:+.1f} µs"


SESSION = Session((NAME,), ("idle",), measure, judge, detail)
