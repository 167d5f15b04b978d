"""The pictures: cost against size, against tensors, against checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.bench import LIMITS
from benchmarks.rows import many, overlap, runs, sizes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from benchmarks.samples import Samples

WIDTH, HEIGHT = 7.2, 3.4  # inches: the width of a page's text
DPI = 150
# Okabe and Ito's colors, which color-blind people tell apart.
OURS, OVERLAP, PEER, OTHER, LIMIT = "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#59636e"
GRID, TEXT = "#e4e8ec", "#1b1f24"


@dataclass(frozen=True)
class Line:
    """One curve: medians, with the least and the greatest figure as whiskers. place: what the x axis shows."""

    label: str
    color: str
    session: str
    who: str
    what: str
    place: str
    is_limit: bool = False

    def points(self, samples: Samples) -> list[tuple[float, float, float, float]]:
        """x, median, least, greatest."""
        places = sorted({
            getattr(sample, self.place)
            for sample in samples.rows
            if (sample.session, sample.who, sample.what) == (self.session, self.who, self.what)
        })  # fmt: skip
        found = [(place, samples.spread(self.session, self.who, self.what, **{self.place: place})) for place in places]
        return [(place, spread.median, spread.low, spread.high) for place, spread in found if spread is not None]


def _saving(session: str, what: str, place: str, peers: Sequence[tuple[str, str]]) -> list[Line]:
    colors = dict(zip((who for who, _ in peers), (OURS, PEER, OTHER), strict=False))
    return [Line(label, colors[who], session, who, what, place) for who, label in peers]


SIZE = "size of the state"
TWO = [("highcamp", "highcamp"), ("torch.save + fsync", "torch.save")]
THREE = [*TWO, ("safetensors + fsync", "safetensors")]
PICTURES: dict[str, tuple[str, list[tuple[str, list[Line]]]]] = {
    "benchmark-sizes": (
        SIZE,
        [
            (
                "pause: the loop is held up",
                [
                    *_saving(sizes.NAME, "pause", "size_bytes", TWO),
                    Line('highcamp, "overlap"', OVERLAP, overlap.NAME, overlap.OURS, "pause", "size_bytes"),
                    Line("memcpy", LIMIT, sizes.NAME, LIMITS, "copy", "size_bytes", is_limit=True),
                ],
            ),
            (
                "durable: until it cannot be lost",
                [
                    *_saving(sizes.NAME, "durable", "size_bytes", TWO),
                    Line("raw write", LIMIT, sizes.NAME, LIMITS, "write", "size_bytes", is_limit=True),
                ],
            ),
        ],
    ),
    "benchmark-tensors": (
        "tensors",
        [
            ("pause: the loop is held up", _saving(many.NAME, "pause", "tensors", THREE)),
            ("durable: until it cannot be lost", _saving(many.NAME, "durable", "tensors", THREE)),
        ],
    ),
    "benchmark-checkpoints": (
        "checkpoints in the run",
        [
            ("open, list and best", [Line("highcamp", OURS, runs.NAME, "highcamp", "open", "tensors")]),
            ("highcamp ls, whole command", [Line("highcamp", OURS, runs.NAME, "highcamp", "ls", "tensors")]),
        ],
    ),
}


def draw(samples: Samples, directory: Path) -> list[Path]:
    """Draw every picture for which there are points into `directory`, and return the paths."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found = []
    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans", "font.size": 9, "text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT,
        "ytick.color": TEXT, "axes.edgecolor": LIMIT, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    for name, (across, panels) in PICTURES.items():
        if not any(line.points(samples) for _, lines in panels for line in lines):
            continue
        with rc_context(style):
            figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="white", layout="constrained")
            axes: Any = figure.subplots(1, len(panels), sharey=True)
            for place, (axis, (title, lines)) in enumerate(zip(axes, panels, strict=True)):
                _compose(axis, title, lines, samples, across)
                if place == 0:
                    axis.set_ylabel("time")
            directory.mkdir(parents=True, exist_ok=True)
            target = directory / f"{name}.png"
            figure.savefig(target, dpi=DPI, metadata={"Software": None})
            found.append(target)
    return found


def _compose(axis: Axes, title: str, lines: Sequence[Line], samples: Samples, across: str) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    ends: list[tuple[float, float, Line]] = []
    for line in lines:
        points = line.points(samples)
        if not points:
            continue
        xs, medians, lows, highs = (list(column) for column in zip(*points, strict=True))
        errors = [
            [median - low for median, low in zip(medians, lows, strict=True)],
            [high - median for median, high in zip(medians, highs, strict=True)],
        ]
        axis.errorbar(
            xs, medians, yerr=errors, color=line.color, label=line.label, linewidth=1.6, elinewidth=0.8, markersize=4,
            marker="none" if line.is_limit else "o", linestyle=(0, (4, 2)) if line.is_limit else "-", zorder=2,
        )  # fmt: skip
        ends.append((xs[-1], medians[-1], line))
    axis.set_title(title, fontsize=9.5, loc="left")
    axis.set_xlabel(across)
    axis.xaxis.set_major_formatter(_bytes if across == SIZE else _count)
    axis.yaxis.set_major_formatter(_seconds)
    axis.minorticks_off()
    axis.grid(visible=True, color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    if len(ends) > 1:
        axis.legend(frameon=False, fontsize=8, loc="upper left", handlelength=1.8, borderaxespad=0.2)


def _seconds(value: float, _: object) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms" if value >= 1e-3 else f"{value * 1e6:g} µs"


def _bytes(value: float, _: object) -> str:
    return f"{value / 1e9:g} GB" if value >= 1e9 else f"{value / 1e6:g} MB" if value >= 1e6 else f"{value / 1e3:g} kB"


def _count(value: float, _: object) -> str:
    return f"{value:,.0f}"
