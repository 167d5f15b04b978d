"""A small Keras model, saved after each epoch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from benchmarks.bench import Contestant
from benchmarks.rows.session import Detail, Session
from benchmarks.rows.verdict import Verdict, unmeasured
from benchmarks.rows.words import seconds, size, spread

if TYPE_CHECKING:
    from benchmarks.bench import Bench

NAME = "keras"
OURS, PEER, WEIGHTS = "CheckpointCallback", "keras.callbacks.ModelCheckpoint", "ModelCheckpoint, weights only"
CALLBACKS = {OURS: "highcamp", PEER: "keras", WEIGHTS: "keras weights"}
MOST_SECONDS, MOST_SHARE = 0.002, 0.1


def measure(bench: Bench) -> None:
    """The same fit with one callback each, in turns."""
    with bench.crew() as crew:
        # Importing Keras takes seconds, so where the figures mean nothing one process does.
        workers = dict.fromkeys(CALLBACKS, crew.worker())
        if not bench.scale.is_tiny:
            workers |= {who: crew.worker() for who in CALLBACKS if who != OURS}
        for who, callback in CALLBACKS.items():
            workers[who].make(
                who,
                "epochs",
                directory=bench.place(),
                callback=callback,
                epochs=bench.scale.epochs,
                rows=bench.scale.rows,
            )
        turns = [Contestant(who, partial(worker.call, who, "fit")) for who, worker in workers.items()]
        bench.take_turns(NAME, turns, repeats=1 if bench.scale.is_tiny else None)


def judge(bench: Bench) -> list[Verdict]:
    """Milliseconds, and a share of what Keras's own callback takes."""
    samples = bench.samples
    ours, peer = (samples.spread(NAME, who, "pause") for who in (OURS, PEER))
    state = size(samples.median(NAME, OURS, "state_bytes"))
    what, bound = f"small model (Keras, {state}), each epoch", "pause ≤ 2 ms, and ≤ 1/10 of ModelCheckpoint"
    if ours is None or peer is None:
        return [unmeasured("keras", what, bound)]
    is_met = ours.median <= MOST_SECONDS and ours.median <= MOST_SHARE * peer.median
    figure = f"{seconds(ours.median)}, 1/{peer.median / ours.median:.0f}"
    least = samples.median(NAME, OURS, "write_small")
    because = "" if is_met else f"the pause ranged from {seconds(ours.low)} to {seconds(ours.high)}"
    limit = f"ModelCheckpoint: {spread(peer)}; a bare write + fsync of the bytes: {seconds(least)}"
    return [Verdict("keras", what, bound, figure, is_met, limit, because)]


def detail(bench: Bench) -> list[Detail]:
    """All three callbacks."""
    rows = []
    for who in CALLBACKS:
        found = bench.samples.spread(NAME, who, "pause")
        if found is not None:
            rows.append((who, spread(found), seconds(bench.samples.median(NAME, who, "first_epoch"))))
    text = (
        f"`model.fit` of {bench.scale.epochs} epochs on the JAX backend; the pause is the callback's `on_epoch_end`. "
        "ModelCheckpoint writes `.keras` (what can be resumed from) or `.weights.h5`; neither is fsynced. The last checkpoint of "
        "every fit was loaded and compared."
    )
    return [Detail("Keras, each epoch", text, ("", "pause", "first epoch"), rows)]


SESSION = Session((NAME,), ("keras",), measure, judge, detail)
