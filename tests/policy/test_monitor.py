from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from highcamp.errors import InvalidArgument
from highcamp.policy.candidate import Candidate
from highcamp.policy.monitor import Monitor

NAN, INF = math.nan, math.inf


def candidates(*values, metric="val_loss"):
    """One checkpoint per value, named by its place; None: the metric is missing."""
    return [
        Candidate(str(place), 10 * place, place, place, {} if value is None else {metric: value})
        for place, value in enumerate(values)
    ]


def names(ranked):
    """What the ranked ones are called, best first."""
    return [each.name for each in ranked]


@pytest.mark.parametrize(
    ("mode", "first"), [("min", NAN), ("min", -INF), ("min", INF), ("max", NAN), ("max", INF), ("max", -INF)]
)
def test_nan_first_never_wins(mode, first):
    """A first epoch that diverged would be kept as the best for ever, and every good one removed."""
    best = Monitor("val_loss", mode).best(candidates(first, 0.5, 0.4, 0.3, 0.45))

    assert best.name == {"min": "3", "max": "1"}[mode]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_later_never_wins(mode, value):
    """One diverged epoch late in training would take the place of the best."""
    ranked = Monitor("val_loss", mode).rank(candidates(0.5, 0.3, 0.4, value))

    assert names(ranked) == {"min": ["1", "2", "0"], "max": ["0", "2", "1"]}[mode]


def test_missing_metric_leaves_best():
    """An epoch that was not validated says nothing about which weights are best."""
    ranked = Monitor("val_loss").rank(candidates(0.5, None, 0.4, None))

    assert names(ranked) == ["2", "0"]


@pytest.mark.parametrize("delta", [0.0, 0.05])
@pytest.mark.parametrize(("mode", "first"), [("min", "0"), ("max", "2")])
def test_unhealthy_weights_never_outrank_healthy_ones(mode, first, delta):
    """A metric of one batch in which NaN was left out, or of a copy of the weights, crowns what cannot predict anything."""
    made = candidates(0.5, 0.1, 0.9, 0.7)
    made = [each._replace(is_healthy=health) for each, health in zip(made, [True, False, None, False], strict=True)]

    ranked = names(Monitor("val_loss", mode, delta).rank(made))

    assert ranked[0] == first
    assert set(ranked[:2]) == {"0", "2"}
    assert names(Monitor("val_loss", mode, delta).rank(made[1::2])) == {"min": ["1", "3"], "max": ["3", "1"]}[mode]


def test_without_any_value_there_is_no_best():
    """No number is better than an invented one."""
    assert Monitor("val_loss").best(candidates(NAN, None, INF)) is None
    assert Monitor("val_loss").best([]) is None


@pytest.mark.parametrize("min_delta", [0.0, 1e-9])
def test_ties_keep_the_older(min_delta):
    """Equal values must not make the best jump from checkpoint to checkpoint, whatever the order they are listed in."""
    made = candidates(0.5, 0.3, 0.3, 0.3)

    for listed in itertools.permutations(made):
        assert names(Monitor("val_loss", min_delta=min_delta).rank(listed)) == ["1", "2", "3", "0"]


def test_order_is_not_mtime():
    """The older of two equal ones is told by (step, sequence), the only order that survives a copy."""
    again = Candidate("step-00000010.2", 10, 7, 1, {"val_loss": 0.3})
    first = Candidate("step-00000010", 10, 2, 1, {"val_loss": 0.3})
    later = Candidate("step-00000020", 20, 1, 2, {"val_loss": 0.3})

    assert names(Monitor("val_loss").rank([later, again, first])) == [first.name, again.name, later.name]


def test_min_delta_asks_for_more_than_that():
    """A gain of noise must not replace the best; exactly min_delta is not more than it."""
    monitor = Monitor("val_loss", min_delta=0.25)

    assert names(monitor.rank(candidates(1.0, 0.75, 0.5, 0.5, 0.0))) == ["4", "2", "3", "0", "1"]
    assert monitor.best(candidates(1.0, 0.75)).name == "0"
    assert monitor.best(candidates(1.0, 0.7499)).name == "1"


def test_small_steps_do_add_up():
    """Each gain is below min_delta, together they are not: the chain compares with the best so far, not the last."""
    monitor = Monitor("val_accuracy", min_delta=0.25)

    assert monitor.best(candidates(0.0, 0.2, 0.4, 0.6, metric="val_accuracy")).name == "2"


@pytest.mark.parametrize("min_delta", [0.0, 0.125])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_rank_is_best_of_the_rest_again_and_again(mode, min_delta):
    """`best~1` is what `best` would be if the best had never been saved."""
    random = np.random.default_rng(7)
    for _ in range(50):
        rest = candidates(*(random.integers(0, 12, 9) / 16))
        monitor = Monitor("val_loss", mode, min_delta)
        ranked = monitor.rank(rest)

        for count in range(len(rest) + 2):
            assert monitor.rank(rest, limit=count) == ranked[:count]
        for each in ranked:
            assert monitor.best(rest) == each
            rest.remove(each)


@pytest.mark.parametrize("min_delta", [0.0, 0.01, 0.1, 3.0])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_order_of_many_is_the_one_of_the_definition(mode, min_delta):
    """Thousands are ranked without comparing each with each, and nobody's place may depend on that."""
    random = np.random.default_rng(11)
    monitor = Monitor("val_loss", mode, min_delta)
    for values in (
        random.normal(0, 0.2, 150),
        random.integers(0, 40, 150) / 100,
        np.arange(60) / 50,
        -np.arange(60) / 50,
    ):
        made = candidates(*values.tolist())
        rest, expected = list(made), []
        while rest:
            leader = rest[0]
            for each in rest:
                if monitor.is_better(each.metrics["val_loss"], leader.metrics["val_loss"]):
                    leader = each
            rest.remove(leader)
            expected.append(leader.name)

        assert names(monitor.rank(made)) == expected
        assert names(monitor.ranking(made)) == expected


def test_is_better_is_strict():
    """Equal is not better, and no comparison with NaN blocks what comes after it."""
    low, high = Monitor("val_loss"), Monitor("val_acc", min_delta=0.5)

    assert low.is_better(0.3, 0.4)
    assert not low.is_better(0.4, 0.4)
    assert not low.is_better(0.5, 0.4)
    assert not high.is_better(0.9, 0.4)
    assert high.is_better(1.0, 0.4)
    for bad in (NAN, INF, -INF):
        assert low.is_better(0.3, bad)
        assert not low.is_better(bad, 0.3)
        assert not low.is_better(bad, bad)


def test_values_at_the_limits_of_floats_are_compared():
    """Differences that overflow or vanish must not hide which is less."""
    monitor = Monitor("val_loss")

    assert monitor.is_better(-1.7e308, 1.7e308)
    assert monitor.is_better(0.0, 5e-324)
    assert monitor.value({"val_loss": 10**400}) is None
    assert monitor.value({"val_loss": 3}) == 3.0


LESS = """loss val_loss eval_loss train_loss test_loss val/loss valid_loss validation_loss train_loss_epoch dice_loss
logloss error val_error word_error_rate mean_absolute_error root_mean_squared_error perplexity eval_perplexity val_ppl wer
eval_wer cer mae val_mae mse rmse val_rmse mape sparse_categorical_crossentropy out1_loss output_1_loss accuracy_loss"""
MORE = """accuracy val_accuracy acc val_acc val/acc sparse_categorical_accuracy top_5_accuracy val_top_1_accuracy out1_accuracy
balanced_acc auc val_auc auc_1 val_auc_2 AUC roc_auc f1 eval_f1 f1_score f1_macro macro_f1 precision recall recall@5 r2
r2_score bleu bleu_score sacrebleu_bleu map mAP val_mAP map_50 iou mean_iou mean_iou_3"""
ASKED = """reward score val_score learning_rate lr my_metric improvement top_1 hinge neg_mean_squared_error negative_loss
1-accuracy loss_scale accuracy_drop val_ val 5 brier_score"""


@pytest.mark.parametrize(
    ("metric", "mode"), [(name, "min") for name in LESS.split()] + [(name, "max") for name in MORE.split()]
)
def test_mode_auto_names(metric, mode):
    """Maximizing an error, as others do with wer and perplexity, keeps the worst weights."""
    assert Monitor(metric).mode == mode
    assert Monitor(metric) == Monitor(metric, mode)


@pytest.mark.parametrize("metric", ASKED.split())
def test_mode_asked_in_constructor(metric):
    """A guess would be found out after the training; the question comes before it."""
    with pytest.raises(InvalidArgument, match="less or more") as caught:
        Monitor(metric)

    assert f'Monitor("{metric}", mode="min")' in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert Monitor(metric, "max").mode == "max"


def test_a_mistyped_mode_is_named():
    """Elsewhere `mode="mim"` only warns, and then maximizes."""
    with pytest.raises(InvalidArgument, match=r"mode is 'mim', not auto, min or max; did you mean mode=\"min\"\?"):
        Monitor("val_loss", "mim")
    with pytest.raises(InvalidArgument, match='use mode="min" or mode="max"'):
        Monitor("val_loss", "smaller")
    with pytest.raises(InvalidArgument, match="mode is None"):
        Monitor("val_loss", None)


@pytest.mark.parametrize("metric", ["", " val_loss", "val_loss\n", "a\nb_loss", "x" * 300 + "_loss", None, 3])
def test_a_name_that_is_none_is_refused(metric):
    """A name that no `log` call can ever give would leave every checkpoint unranked."""
    with pytest.raises(InvalidArgument, match="name"):
        Monitor(metric)


@pytest.mark.parametrize("min_delta", [-1e-9, NAN, INF, True, "0.1", None])
def test_a_min_delta_that_cannot_work_is_refused(min_delta):
    """With NaN nothing would ever be better than the first."""
    with pytest.raises(InvalidArgument, match="min_delta"):
        Monitor("val_loss", min_delta=min_delta)


def test_min_delta_takes_the_numbers_people_have():
    """What comes from NumPy is written to run.json as a plain float."""
    monitor = Monitor("val_loss", min_delta=np.float32(0.5))

    assert type(monitor.min_delta) is float
    assert monitor.min_delta == 0.5


def test_of_takes_what_the_argument_takes():
    """`monitor="val_loss"` is short for `Monitor("val_loss")`, here and nowhere else."""
    monitor = Monitor("reward", "max")

    assert Monitor.of(None) is None
    assert Monitor.of(monitor) is monitor
    assert Monitor.of("val_loss") == Monitor("val_loss", "min")
    with pytest.raises(InvalidArgument, match="of type list"):
        Monitor.of(["val_loss"])
