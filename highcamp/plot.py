"""The picture: training and validation curves, the best epoch marked by line, dot and words, restarts by words.

matplotlib is imported when a picture is drawn, through `Figure` and never pyplot: no window, no global state. The same
history gives the same bytes.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from highcamp.errors import InvalidArgument, MissingExtra, StorageError
from highcamp.policy.candidate import Candidate
from highcamp.policy.monitor import Monitor

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from highcamp.run.history import Row
    from highcamp.run.run import Run

SIZE_INCHES = (7.2, 3.2)  # the width of a page's text
PNG_DPI = 200
SUFFIXES = (".png", ".svg", ".pdf")

# Okabe and Ito's colors, which color-blind people tell apart; each at least 3:1 on white.
TRAINING, VALIDATION = "#0072B2", "#D55E00"
TEXT, QUIET, GRID, BAD = "#1b1f24", "#59636e", "#e4e8ec", "#cf222e"

SPLITS = ("val_", "valid_", "validation_", "eval_", "test_")
MAX_LABELED_RESTARTS = 6  # more words than that hide the curves; the lines stay
MIN_POINTS_TO_CUT = 20  # of a shorter history every point counts
BEGINNING = 10  # the first tenth is where losses fall steeply
MIN_CUT = 4  # how many times less high the rest must be, before the beginning is cut
_LABEL_GAP = 0.15  # of the axes' height: less, and two labels of two lines touch

_STYLE: Mapping[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a picture is the same on every machine
    "font.size": 8.5,
    "svg.hashsalt": "highcamp",
    "svg.fonttype": "none",  # text stays text: found by a search, read by a screen reader
    "pdf.fonttype": 42,
    "path.simplify": False,
    "axes.unicode_minus": False,
    "text.parse_math": False,  # a metric called "$x$" is a name, not a formula
}


@dataclass(frozen=True)
class Series:
    """One curve. points: (x, y) in the order of x; y is NaN where the value was, or was missing."""

    name: str
    label: str
    color: str
    points: Sequence[tuple[float, float]]
    is_dashed: bool = False

    @property
    def finite(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        return [(x, y) for x, y in self.points if math.isfinite(y)]


@dataclass(frozen=True)
class Mark:
    """The best epoch, or step. is_saved: whether a checkpoint holds it."""

    x: int
    y: float
    is_saved: bool


def draw(run: Run, path: str | os.PathLike[str], metric: str | None = None) -> Path:
    """Draw the history of `run` into `path`, PNG, SVG or PDF by suffix, and return the path.

    metric: the one to draw, with its counterpart in training; the monitored one, or the first logged, by default. The file
    appears whole or not at all. Raises MissingExtra without matplotlib, InvalidArgument for another suffix, for a metric
    that was never logged or for an empty history, StorageError.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidArgument(
            f"{target}: a picture cannot be written as {suffix or 'a file without suffix'}",
            path=str(target),
            hint=f"use one of {', '.join(SUFFIXES)}",
        )
    picture = Picture.of(run, metric)
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra(
            f"drawing needs matplotlib, which is not installed ({error})", hint="pip install 'highcamp[plot]'"
        ) from error
    pending = target.with_name(f".{target.name}.pending{suffix}")
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a name in another script shows boxes
        mpl.rcdefaults()  # a user's style file must not change what a best epoch looks like
        settings: dict[Any, Any] = mpl.rcParams
        settings.update(_STYLE)
        figure = Figure(figsize=SIZE_INCHES, facecolor="white")
        _compose(figure, picture)
        dates = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(pending, dpi=PNG_DPI, metadata=dates[suffix])
            pending.replace(target)
        except OSError as error:
            raise StorageError(
                f"{target} could not be written: {error.strerror or error}",
                path=str(target),
                hint="name another file with -o, or as the argument of plot()",
                errno=error.errno,
            ) from error
        finally:
            with contextlib.suppress(OSError):  # the failure under way is the news
                pending.unlink(missing_ok=True)
    return target


@dataclass(frozen=True)
class Picture:
    """What a picture shows, in plain values. axis: "epoch" or "step". restarts: (x, attempt)."""

    title: str
    metric: str
    axis: str
    training: Series | None
    validation: Series | None
    best: Mark | None
    best_saved: Mark | None
    restarts: Sequence[tuple[float, int]]
    caption: str

    @classmethod
    def of(cls, run: Run, metric: str | None = None) -> Picture:
        """What the picture of `run` shows. Raises InvalidArgument."""
        import highcamp

        history, monitor = run.history, run.monitor
        logged = history.metrics
        if not logged:
            raise InvalidArgument(
                f"{run.path} has no metrics to draw", path=run.path, hint="they come with the first epoch"
            )
        if metric is not None and metric not in logged:
            raise InvalidArgument(
                f"{run.path} has no metric {metric!r}", path=run.path, hint=f"there are {', '.join(logged)}"
            )
        watched = metric or (monitor.metric if monitor and monitor.metric in logged else logged[0])
        if metric is not None and (monitor is None or monitor.metric != metric):
            monitor = _monitor_of(metric)
        epochs = history.epochs()
        by_epoch = len(epochs) > 1
        rows = epochs if by_epoch else history.rows
        names = _pair(watched, logged)
        training = _series(rows, names[0], is_training=True, by_epoch=by_epoch)
        validation = _series(rows, names[1], is_training=False, by_epoch=by_epoch)
        best = _best(monitor, rows, run, by_epoch=by_epoch) if monitor and monitor.metric == watched else None
        saved = _best_saved(monitor, run, by_epoch=by_epoch) if best and not best.is_saved and monitor else None
        words = f"monitor {monitor.metric} ({monitor.mode})" if monitor and monitor.metric == watched else watched
        length = rows[-1].epoch if by_epoch else rows[-1].step
        return cls(
            title=f"run {_short(run.path.rstrip('/').rpartition('/')[2])}   {_short(words)}",
            metric=watched,
            axis="epoch" if by_epoch else "step",
            training=training,
            validation=validation,
            best=best,
            best_saved=saved,
            restarts=[
                (float(each.epoch if by_epoch else each.step), each.number)
                for each in history.attempts
                if each.number > 1
            ],
            caption=f"{_best_words(best, 'epoch' if by_epoch else 'step', length)}highcamp {highcamp.__version__}",
        )


def _pair(metric: str, logged: Sequence[str]) -> tuple[str | None, str | None]:
    """(training, validation) names of a metric, such as (loss, val_loss); None for one that was not logged."""
    split = next((prefix for prefix in SPLITS if metric.startswith(prefix)), None)
    if split:
        stem = metric.removeprefix(split)
        return next((name for name in (stem, f"train_{stem}", f"training_{stem}") if name in logged), None), metric
    stem = metric.removeprefix("training_").removeprefix("train_")
    return metric, next((f"{prefix}{stem}" for prefix in SPLITS if f"{prefix}{stem}" in logged), None)


def _series(rows: Sequence[Row], name: str | None, *, is_training: bool, by_epoch: bool) -> Series | None:
    if name is None:
        return None
    points = [(float(row.epoch if by_epoch else row.step), row.metrics[name]) for row in rows if name in row.metrics]
    kind = "training" if is_training else "validation"
    return Series(
        name, f"{kind} {_short(name)}", TRAINING if is_training else VALIDATION, points, is_dashed=is_training
    )


def _monitor_of(metric: str) -> Monitor | None:
    """The direction that a metric's name stands for, None if it stands for none."""
    try:
        return Monitor(metric)
    except InvalidArgument:
        return None


def _best(monitor: Monitor, rows: Sequence[Row], run: Run, *, by_epoch: bool) -> Mark | None:
    """The best row of the history."""
    candidates = [Candidate(str(n), row.step, n, row.epoch, row.metrics) for n, row in enumerate(rows)]
    found = monitor.best(candidates)
    if found is None:
        return None
    saved = any(each.step == found.step and each.epoch == found.epoch for each in run.checkpoints)
    return Mark(found.epoch if by_epoch else found.step, found.metrics[monitor.metric], saved)


def _best_saved(monitor: Monitor, run: Run, *, by_epoch: bool) -> Mark | None:
    """The best checkpoint, for when the best row of the history was not saved."""
    ranked = run.rank(monitor)
    if not ranked:
        return None
    return Mark(ranked[0].epoch if by_epoch else ranked[0].step, ranked[0].metrics[monitor.metric], is_saved=True)


def _best_words(best: Mark | None, axis: str, length: int) -> str:
    return f"best: {axis} {best.x} of {length}   " if best else ""


def _short(text: str, limit: int = 60) -> str:
    """A foreign name as it can stand in a picture: printable, and no longer than the picture is wide."""
    printable = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"


def _compose(figure: Figure, picture: Picture) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_axes((0.085, 0.20, 0.72, 0.655))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=QUIET, labelcolor=TEXT, length=3)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    shown = [series for series in (picture.training, picture.validation) if series is not None]
    for series in shown:
        _draw_series(axes, series)
    _limit(figure, axes, shown)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True))
    axes.set_xlabel(picture.axis, color=TEXT, labelpad=1)
    _mark_restarts(axes, picture)
    _mark_nan(axes, shown)
    if picture.best:
        _mark_best(axes, picture, picture.best)
    _label_ends(axes, shown)
    figure.text(0.085, 0.925, picture.title, color=TEXT, fontsize=10, fontweight="bold", va="center")
    figure.text(0.99, 0.025, picture.caption, color=QUIET, fontsize=7, ha="right", va="bottom")


def _draw_series(axes: Axes, series: Series) -> None:
    xs, ys = [x for x, _ in series.points], [y if math.isfinite(y) else math.nan for _, y in series.points]
    line = (0, (4, 1.6)) if series.is_dashed else "solid"
    axes.plot(xs, ys, color=series.color, linewidth=1.3 if series.is_dashed else 2.0, linestyle=line, zorder=3)
    finite = [math.isfinite(y) for y in ys]
    # Points that no line reaches: alone between gaps, or the only one.
    alone = [
        n
        for n, is_there in enumerate(finite)
        if is_there and not any(finite[max(0, n - 1) : n] + finite[n + 1 : n + 2])
    ]
    axes.plot([xs[n] for n in alone], [ys[n] for n in alone], ".", color=series.color, markersize=4, zorder=3)


def _limit(figure: Figure, axes: Axes, shown: Sequence[Series]) -> None:
    """Room above and below the curves for words; the whole range of x, gaps at its ends included."""
    xs = [x for series in shown for x, _ in series.points]
    ys = [y for series in shown for _, y in series.finite]
    first, last = (min(xs), max(xs)) if xs else (0.0, 1.0)
    side = max(0.5, (last - first) * 0.02)
    axes.set_xlim(first - side, last + side)
    if not ys:
        axes.set_ylim(0, 1)
        axes.set_yticks([])
        return
    low, high = _heights(shown)
    height = (high - low) or abs(high) or 1.0
    axes.set_ylim(low - 0.10 * height, high + 0.10 * height)
    beyond = {series.name: [point for point in series.finite if not low <= point[1] <= high] for series in shown}
    farthest = {name: max(points, key=lambda point: abs(point[1] - low)) for name, points in beyond.items() if points}
    if farthest:
        is_above = any(y > high for _, y in farthest.values())
        values = " and ".join(f"{_short(name, 24)} {y:.4g} (at {x:g})" for name, (x, y) in farthest.items())
        words = f"{'above' if is_above else 'below'} what is shown: {values}"
        figure.text(0.085, 0.025, words, color=QUIET, fontsize=7, va="bottom")


def _heights(shown: Sequence[Series]) -> tuple[float, float]:
    """(lowest, highest) value to show. A steep beginning that would flatten all the rest is cut, and said in words."""
    ys = [y for series in shown for _, y in series.finite]
    longest = max(len(series.points) for series in shown)
    later = [y for series in shown for _, y in series.finite[longest // BEGINNING :]]
    if longest < MIN_POINTS_TO_CUT or not later:
        return min(ys), max(ys)
    low, high = min(later), max(later)
    if max(ys) - min(ys) <= MIN_CUT * (high - low):
        return min(ys), max(ys)
    return low, high


def _mark_restarts(axes: Axes, picture: Picture) -> None:
    for x, _ in picture.restarts:
        axes.axvline(x, color=QUIET, linewidth=0.9, linestyle=(0, (1, 2)), zorder=2)
    if len(picture.restarts) > MAX_LABELED_RESTARTS:
        x, _ = picture.restarts[0]
        _words(axes, x, 1.0, f"{len(picture.restarts)} restarts", QUIET, va="bottom")
        return
    start, stop = axes.get_xlim()
    taken: float | None = None
    for x, number in picture.restarts:
        if taken is not None and (x - taken) / (stop - start) < 0.2:
            continue
        taken = x
        is_right = (x - start) / (stop - start) > 0.7
        words = f"resumed at {x:g} (attempt {number})"
        _words(axes, x, 1.0, words, QUIET, va="bottom", ha="right" if is_right else "left")


def _mark_nan(axes: Axes, shown: Sequence[Series]) -> None:
    """A cross at the lower edge where a value is NaN or infinite; the word once per curve and stretch."""
    for series in shown:
        places = [x for x, y in series.points if not math.isfinite(y)]
        low = [0.03] * len(places)
        edge = axes.get_xaxis_transform()
        axes.plot(places, low, "x", color=BAD, markersize=4.5, markeredgewidth=1.4, transform=edge, zorder=4)
        if places:
            _words(axes, places[-1], 0.03, f"  NaN {_short(series.name, 24)}", BAD)


def _mark_best(axes: Axes, picture: Picture, best: Mark) -> None:
    is_training = picture.training is not None and picture.training.name == picture.metric
    color = TRAINING if is_training else VALIDATION
    axes.axvline(best.x, color=color, linewidth=1.0, alpha=0.55, zorder=2)
    fill = color if best.is_saved else "white"
    axes.plot([best.x], [best.y], "o", color=color, markerfacecolor=fill, markersize=7, markeredgewidth=1.6, zorder=5)
    note = "" if best.is_saved else ", not saved"
    words = f"best {best.x}: {best.y:.4g}{note}"
    bottom, top = axes.get_ylim()
    height = (best.y - bottom) / (top - bottom)
    # Above a low curve there is room for words; below a high one.
    is_low = height < 0.5
    start, stop = axes.get_xlim()
    is_left = (best.x - start) / (stop - start) < 0.6
    axes.annotate(
        words,
        (best.x, best.y),
        xytext=(9 if is_left else -9, _room(axes, picture, best, is_left=is_left, is_low=is_low)),
        textcoords="offset points",
        ha="left" if is_left else "right",
        va="center",
        color=TEXT,
        fontweight="bold",
        zorder=6,
        bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
    )
    if picture.best_saved:
        saved = picture.best_saved
        axes.plot([saved.x], [saved.y], "o", color=color, markersize=5, zorder=5)


def _room(axes: Axes, picture: Picture, best: Mark, *, is_left: bool, is_low: bool) -> float:
    """How far above (below: negative) the best point its words stand, in points, so that no curve runs through them."""
    start, stop = axes.get_xlim()
    bottom, top = axes.get_ylim()
    width = (stop - start) * 0.24
    reach = (best.x, best.x + width) if is_left else (best.x - width, best.x)
    points_high = SIZE_INCHES[1] * 72 * 0.655
    heights = sorted(
        (y - best.y) / (top - bottom) * points_high
        for series in (picture.training, picture.validation)
        if series
        for x, y in series.finite
        if reach[0] <= x <= reach[1]
    )
    at, step = (18.0, 4.0) if is_low else (-18.0, -4.0)
    limit = (
        (top - best.y) / (top - bottom) * points_high - 8
        if is_low
        else (bottom - best.y) / (top - bottom) * points_high + 8
    )
    while abs(at) < abs(limit):
        if all(abs(height - at) > 9 for height in heights):
            return at
        at += step
    return 18.0 if is_low else -18.0


def _label_ends(axes: Axes, shown: Sequence[Series]) -> None:
    """Names at the ends of the lines, moved apart where they would touch."""
    bottom, top = axes.get_ylim()
    ends = [((series.finite[-1][1] - bottom) / (top - bottom), series) for series in shown if series.finite]
    ends.sort(key=lambda end: end[0])
    heights: list[float] = []
    for height, _ in ends:
        heights.append(max(height, heights[-1] + _LABEL_GAP) if heights else height)
    excess = max(0.0, heights[-1] - 1.0) if heights else 0.0
    heights = [height - excess for height in heights]
    for (_, series), height in zip(ends, heights, strict=True):
        last = series.finite[-1][1]
        _words(axes, 1.015, height, f"{series.label}\n{last:.4g}", series.color, transform=axes.transAxes)


def _words(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    color: str,
    *,
    va: Literal["center", "bottom"] = "center",
    ha: Literal["left", "right"] = "left",
    transform: Any = None,
) -> None:
    """Text at data x and a share y of the height, or where `transform` says."""
    place = transform or axes.get_xaxis_transform()
    axes.text(x, y, text, color=color, fontsize=7.5, va=va, ha=ha, transform=place, zorder=6)
