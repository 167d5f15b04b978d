"""Which checkpoint is best: a metric, its mode, and the rule for NaN.

Best is a query over what is committed. Nothing is remembered between calls, so a restart, a failed save or a second
process cannot disagree about it.
"""

from __future__ import annotations

import difflib
import itertools
import math
import numbers
import re
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Literal

from highcamp.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from highcamp.policy.candidate import Candidate

Mode = Literal["auto", "min", "max"]

MAX_METRIC_NAME = 200  # characters; the longest names frameworks make (output, metric and split joined) stay below 100

_MODES = ("auto", "min", "max")
_SPLITS = frozenset({"val", "valid", "validation", "eval", "train", "test"})
# Words that say how a metric was averaged or counted, and nothing about its direction: f1_macro, bleu_score, auc_1.
_NEUTRAL = frozenset({"score", "rate", "mean", "avg", "average", "macro", "micro", "weighted", "epoch", "step"})
# A name that holds one of these may mean the opposite of its last word: scikit-learn's neg_mean_squared_error.
_REVERSING = frozenset({"neg", "negative", "minus", "inverse", "inv"})
_MIN_ENDINGS = ("loss", "error")
_MIN_WORDS = frozenset({"perplexity", "ppl", "wer", "cer", "mae", "mse", "rmse", "mape", "msle", "nll", "crossentropy"})
_MAX_ENDINGS = ("acc", "accuracy")
_MAX_WORDS = frozenset({"auc", "auroc", "f1", "precision", "recall", "r2", "bleu", "map", "iou", "miou"})


@dataclass(frozen=True, slots=True)
class Monitor:
    """The metric watched, whether less or more of it is better, and by how much a later value must be better.

    mode: "min" or "max"; "auto" knows the usual names (…loss, …error, perplexity, wer: min; …acc, accuracy, auc, f1,
    precision, recall, r2, bleu, map, iou: max), asks for `mode` on any other, and is replaced by the answer, so that
    `Monitor("val_loss") == Monitor("val_loss", "min")`. min_delta: in units of the metric.
    Raises InvalidArgument in the constructor, never later.
    """

    metric: str
    mode: Mode = "auto"
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        """Check every field and put the resolved mode in place of "auto"."""
        _check_metric(self.metric)
        if self.mode not in _MODES:
            near = difflib.get_close_matches(str(self.mode).lower(), _MODES, n=1)
            hint = f'did you mean mode="{near[0]}"?' if near else 'use mode="min" or mode="max"'
            raise InvalidArgument(f'monitor "{self.metric}": mode is {self.mode!r}, not auto, min or max', hint=hint)
        object.__setattr__(self, "min_delta", _checked_delta(self.metric, self.min_delta))
        if self.mode == "auto":
            object.__setattr__(self, "mode", _mode_of(self.metric))

    @classmethod
    def of(cls, monitor: Monitor | str | None) -> Monitor | None:
        """The Monitor meant by an argument: a name is short for `Monitor(name)`, None stays None."""
        if monitor is None or isinstance(monitor, Monitor):
            return monitor
        if isinstance(monitor, str):
            return cls(monitor)
        raise InvalidArgument(
            f"monitor is {monitor!r} of type {type(monitor).__name__}, not the name of a metric or a Monitor",
            hint='for example monitor="val_loss"',
        )

    def value(self, metrics: Mapping[str, float]) -> float | None:
        """The monitored value, or None when it is missing, NaN or infinite: such a checkpoint is unranked."""
        found = metrics.get(self.metric)
        if found is None:
            return None
        try:
            number = float(found)
        except OverflowError:  # an int beyond the range of float64 counts as infinite
            return None
        return number if math.isfinite(number) else None

    def is_better(self, new: float, old: float) -> bool:
        """Whether `new` beats `old` by more than min_delta; equal is not better, NaN and infinities never are."""
        if not math.isfinite(new):
            return False
        if not math.isfinite(old):
            return True
        gain = old - new if self.mode == "min" else new - old
        return gain > self.min_delta

    def rank(self, candidates: Iterable[Candidate], limit: int | None = None) -> list[Candidate]:
        """Those with a finite value, best first, unhealthy ones last; at most `limit` of them. O(n log n)."""
        return list(itertools.islice(self.ranking(candidates), limit))

    def ranking(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """The same one by one, for those who need the first few.

        The best is found by going from the oldest to the newest: a later one must beat the best so far by more than
        min_delta, so ties keep the older. The second is the best of the rest, and so on. Whatever its value says, an
        unhealthy one comes behind all others: no prediction of such weights can be trusted.
        """
        made = list(candidates)
        unhealthy = [each for each in made if each.is_unhealthy]
        yield from self._ranking([each for each in made if not each.is_unhealthy] if unhealthy else made)
        yield from self._ranking(unhealthy)

    def _ranking(self, candidates: Sequence[Candidate]) -> Iterator[Candidate]:
        sign = 1.0 if self.mode == "min" else -1.0
        rows = [(sign * value, each) for each in candidates if (value := self.value(each.metrics)) is not None]
        if self.min_delta == 0.0:
            rows.sort(key=itemgetter(0))
            for _, equal in itertools.groupby(rows, key=itemgetter(0)):
                yield from sorted((each for _, each in equal), key=lambda each: each.order)
            return
        rows.sort(key=lambda row: row[1].order)
        rest = _Minima([value for value, _ in rows])
        leaders: list[int] = []  # each beats the one before it; what comes after the last one beats none by min_delta
        while True:
            newer = rest.first_below(leaders[-1], self.min_delta) if leaders else rest.first()
            if newer is not None:
                leaders.append(newer)
            elif leaders:
                rest.remove(leaders[-1])
                yield rows[leaders.pop()][1]  # the one before it leads again, over what came after
            else:
                return

    def best(self, candidates: Iterable[Candidate]) -> Candidate | None:
        """The best-ranked candidate, or None when none has a finite value."""
        ranked = self.rank(candidates, limit=1)
        return ranked[0] if ranked else None


class _Minima:
    """A row of numbers that finds the next lower one in O(log n): a tree of the minima of 2, 4, 8, … neighbors."""

    def __init__(self, values: Sequence[float]) -> None:
        """values: finite."""
        self._width = 1 << max(len(values) - 1, 0).bit_length()  # of the lowest level, which stands last
        empty = [math.inf] * (self._width - len(values))
        self._tree = [math.inf] * self._width + [*values, *empty]
        for node in range(self._width - 1, 0, -1):
            self._tree[node] = min(self._tree[2 * node], self._tree[2 * node + 1])

    def remove(self, place: int) -> None:
        """Leave a number out from now on; the others keep their places."""
        node = place + self._width
        self._tree[node] = math.inf
        while node > 1:
            node //= 2
            self._tree[node] = min(self._tree[2 * node], self._tree[2 * node + 1])

    def first(self) -> int | None:
        """The place of the first number that is left."""
        return self._down(1, lambda least: least < math.inf)

    def first_below(self, place: int, delta: float) -> int | None:
        """The place of the first number behind `place` that is lower than the one there by more than `delta`."""
        node = place + self._width
        value = self._tree[node]
        while node > 1:  # up to where something to the right of the path is low enough
            if node % 2 == 0 and value - self._tree[node + 1] > delta:
                return self._down(node + 1, lambda least: value - least > delta)
            node //= 2
        return None

    def _down(self, node: int, fits: Callable[[float], bool]) -> int | None:
        if not fits(self._tree[node]):
            return None
        while node < self._width:
            node = 2 * node if fits(self._tree[2 * node]) else 2 * node + 1
        return node - self._width


def _check_metric(metric: object) -> None:
    if not isinstance(metric, str) or not metric or metric != metric.strip():
        raise InvalidArgument(
            f"monitor: the metric's name is {metric!r}, not a name", hint='for example Monitor("val_loss")'
        )
    if len(metric) > MAX_METRIC_NAME or not metric.isprintable():
        raise InvalidArgument(
            f"monitor: the metric's name {metric[:MAX_METRIC_NAME]!r} has {len(metric)} characters or unprintable ones",
            hint=f"use at most {MAX_METRIC_NAME} printable characters",
        )


def _checked_delta(metric: str, min_delta: object) -> float:
    if isinstance(min_delta, numbers.Real) and not isinstance(min_delta, bool):
        number = float(min_delta)
        if math.isfinite(number) and number >= 0:
            return number
    raise InvalidArgument(
        f'monitor "{metric}": min_delta is {min_delta!r}, not a finite number of at least 0',
        hint="leave it out, or give the smallest change that counts, such as min_delta=1e-4",
    )


def _mode_of(metric: str) -> Literal["min", "max"]:
    """The direction a name stands for; the last word that is not neutral decides (dice_loss: loss)."""
    words = [word for word in re.split(r"[^a-z0-9]+", metric.lower()) if word]
    if words and words[0] in _SPLITS:
        words = words[1:]
    while len(words) > 1 and (words[-1] in _NEUTRAL or words[-1] in _SPLITS or words[-1].isdigit()):
        words = words[:-1]
    if words and words[0] != "1" and not _REVERSING.intersection(words):  # "1-accuracy" is an error
        if words[-1] in _MIN_WORDS or words[-1].endswith(_MIN_ENDINGS):
            return "min"
        if words[-1] in _MAX_WORDS or words[-1].endswith(_MAX_ENDINGS):
            return "max"
    raise InvalidArgument(
        f'monitor "{metric}": the name does not tell whether less or more of it is better',
        hint=f'say Monitor("{metric}", mode="min") or Monitor("{metric}", mode="max")',
    )
