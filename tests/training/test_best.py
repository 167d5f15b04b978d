"""The best checkpoint, as a loop of one's own sees it: a query over what is committed, never a variable."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Every, InvalidArgument, InvalidMetric, Keep, Monitor, StorageError
from highcamp.storage.local import LocalStore
from highcamp.testing import FaultyStore

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("first", [NAN, INF, -INF])
@pytest.mark.parametrize(("monitor", "rest"), [("val_loss", [0.5, 0.4, 0.3]), ("accuracy", [0.3, 0.4, 0.5])])
def test_nan_first_never_wins(train, monitor, rest, first):
    """One unlucky first epoch, and no later weights would ever be kept as the best."""
    run = train([{monitor: value} for value in (first, *rest)], monitor=monitor).run

    assert run.best.epoch == 4
    assert run.best.metrics == {monitor: rest[-1]}


@pytest.mark.parametrize("last", [NAN, INF, -INF])
def test_nan_later_never_wins(train, last):
    """A diverged epoch would take the place of the best weights there are."""
    run = train([0.5, 0.3, last, last]).run

    assert (run.best.epoch, run.last.epoch) == (2, 4)
    assert math.isnan(run.last.metrics["val_loss"]) == math.isnan(last)


def test_nan_is_in_the_history(train):
    """That training diverged, and when, is what somebody looks for afterwards."""
    run = train([0.5, NAN, -INF]).run

    values = [row.metrics["val_loss"] for row in run.history.rows]

    assert values[0] == 0.5
    assert math.isnan(values[1])
    assert values[2] == -INF
    for line in (run.store.local_path("history") / "attempt-0001.jsonl").read_text("utf-8").splitlines():
        json.loads(line, parse_constant=pytest.fail)  # plain JSON: any tool reads it


def test_missing_metric_leaves_best(train):
    """The best weights would be written over by those of an epoch nobody has validated."""
    run = train([0.5, {"loss": 0.1}, None]).run

    assert run.best.epoch == 1
    assert [entry.name for entry in run.rank()] == ["step-00000001"]


def test_missing_metric_still_saves(train, capsys):
    """A typo in `monitor` would cost the whole run, not only its ranking."""
    run = train([{"loss": 0.3, "val_loss": 0.4}] * 3, monitor="val_acc").run

    assert [entry.epoch for entry in run.checkpoints] == [2, 3]
    assert run.best is None
    assert capsys.readouterr().err.splitlines() == [
        'Epoch 1: no "val_acc" among loss, val_loss; checkpoints are saved unranked'
    ]


def test_validation_freq_keeps_best(train, capsys):
    """Validating every second epoch, the best would be written over by the epochs in between."""
    values = [{"loss": 1.0}, {"loss": 1.0, "val_loss": 0.2}, {"loss": 1.0}, {"loss": 1.0, "val_loss": 0.9}, {"loss": 1}]

    run = train(values).run

    assert run.best.epoch == 2
    assert run.last.epoch == 5
    assert capsys.readouterr().err.count('no "val_loss"') == 1


@pytest.mark.parametrize("torn", [False, True])
def test_best_survives_failed_save(where, torn):
    """The best is raised before it is written, the write fails, and the file that was the best is no longer known."""
    weights = {"w": np.zeros(3)}
    plain = LocalStore(where)
    with Checkpointer(plain, monitor="val_loss", verbose=0) as checkpointer:
        checkpointer.track(model=weights)
        for _ in checkpointer.epochs(1):
            checkpointer.log(val_loss=0.5)

    class Failing(FaultyStore):
        def create(self, path, chunks):
            if path.endswith("manifest.json"):
                self._fail_at = len(self.operations) + 1
            super().create(path, chunks)

    failing = Failing(plain, fail_at=0, torn=torn)
    with pytest.raises(StorageError, match="injected"), Checkpointer(failing, monitor="val_loss", verbose=0) as again:
        again.track(model=weights)
        for _ in again.epochs(2):
            again.log(val_loss=0.1)

    run = highcamp.open(where)
    assert (run.best.epoch, run.best.metrics["val_loss"]) == (1, 0.5)
    assert run.best.verify().ok


def test_best_survives_restart(train, capsys):
    """After a restart the first, worse value would take the place of the best."""
    train([0.5, 0.1])
    train([0.5, 0.1, 0.9, 0.8, 0.7], verbose=1)

    run = highcamp.open(train([0.1] * 5, count=5).run.path)
    assert (run.best.epoch, run.best.metrics["val_loss"]) == (2, 0.1)
    assert run.best.load("model")["w"][0] == 2
    assert "Epoch 3: val_loss did not improve from 0.10000 (epoch 2)" in capsys.readouterr().err


def test_mode_asked_in_constructor(where):
    """The question would come after the first epoch, hours later, before anything is saved."""
    with pytest.raises(InvalidArgument, match="does not tell whether less or more") as error:
        Checkpointer(where, monitor="quality")

    assert 'Monitor("quality", mode="min")' in str(error.value)
    assert not where.exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "metric val_loss is None, a NoneType, not a number"),
        ("0.3", "metric val_loss is '0.3', a str, not a number"),
        (np.array([0.3, 0.4]), "ndarray of shape (2,), not a number"),
        (np.array([0.3]), "ndarray of shape (1,), not a number"),
        ([0.3], "metric val_loss is [0.3], a list, not a number"),
        (True, "metric val_loss is True, a bool, not a number"),
        (np.True_, "not a number"),
        (1j, "a complex, not a number"),
        (np.complex64(1), "a complex64, not a number"),
        ({"a": 1}, "a dict, not a number"),
        (10**400, "a int, not a number"),
    ],
)
def test_metric_must_be_a_number(where, value, words):
    """A string would be stored as the best, an array would save at every epoch."""
    with Checkpointer(where, monitor="val_loss", verbose=0) as checkpointer:
        checkpointer.track(model={"w": np.zeros(3)})
        for _ in checkpointer.epochs(1):
            with pytest.raises(InvalidMetric) as error:
                checkpointer.log(val_loss=value, loss=0.1)
            checkpointer.log(val_loss=0.5)

    assert words in str(error.value)
    assert "leave out a metric" in str(error.value)
    assert checkpointer.run.history.metrics == ["val_loss"]


def test_metric_may_be_any_number_there_is(where):
    """What frameworks return are arrays of no dimension; a cast by hand is forgotten once and ends a run."""
    values = {
        "int": 3, "float32": np.float32(0.5), "int64": np.int64(4), "array": np.array(0.25), "half": np.array(2, np.float16),
    }  # fmt: skip
    with Checkpointer(where, verbose=0) as checkpointer:
        checkpointer.track(model={"w": np.zeros(3)})
        for _ in checkpointer.epochs(1):
            checkpointer.log(values)

    metrics = checkpointer.run.last.metrics
    assert metrics == {"int": 3.0, "float32": 0.5, "int64": 4.0, "array": 0.25, "half": 2.0}
    assert {type(value) for value in metrics.values()} == {float}


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 300, "nul\0", 3])
def test_a_metric_name_that_is_none_is_refused(where, name):
    """A name that breaks every table and every line of the history cannot be taken back."""
    checkpointer = Checkpointer(where, verbose=0)
    checkpointer.track(model={"w": np.zeros(3)})

    with pytest.raises(InvalidMetric, match="no metric name"):
        checkpointer.log({name: 0.5})

    assert not where.exists()


def test_a_metric_name_is_not_a_path(train, tmp_path):
    """A metric called `../../x` names a value, and nothing on the disk."""
    name = "../../loss"

    run = train([{name: 0.5}], monitor=name).run

    assert run.best.metrics == {name: 0.5}
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs"]


def test_step_cadence_with_best(where):
    """Saving by steps with a monitored metric: the peer ends with a TypeError in its first epoch."""
    weights = {"w": np.zeros(3)}
    with Checkpointer(
        where, monitor="val_loss", every=Every(steps=3), keep=Keep(best=1, last=1), verbose=0
    ) as checkpointer:
        checkpointer.track(model=weights)
        for epoch in checkpointer.epochs(4):
            for _ in checkpointer.batches(range(6)):
                weights["w"] += 1
            checkpointer.log(val_loss=[0.4, 0.2, 0.3, 0.5][epoch])

    assert [(entry.step, entry.batch) for entry in checkpointer.run.checkpoints] == [(12, 0), (24, 0)]
    assert checkpointer.run.best.step == 12


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"steps": True}, {"epochs": False}, {"seconds": -1}, {}])
def test_cadence_values_checked(arguments):
    """`save_freq=0` and `True` are taken by the peer and save at every batch."""
    with pytest.raises(InvalidArgument):
        Every(**arguments)


@pytest.mark.parametrize("every", [1, "epoch", None])
def test_a_cadence_that_is_none_is_refused(where, every):
    """`every=1`, as other libraries spell it, would be found wrong at the first epoch's end."""
    with pytest.raises(InvalidArgument, match=r"for example every=Every\(epochs=1\)"):
        Checkpointer(where, every=every)


def test_no_borrowed_metric(where):
    """Weights saved in mid-epoch would be ranked by the validation of an earlier epoch, and be the best by mistake."""
    weights = {"w": np.zeros(3)}
    with Checkpointer(where, monitor="val_loss", every=Every(steps=1), keep=Keep(last=20), verbose=0) as checkpointer:
        checkpointer.track(model=weights)
        for epoch in checkpointer.epochs(3):
            for _ in checkpointer.batches(range(3)):
                weights["w"] += 1
            checkpointer.log(val_loss=[0.1, 0.3, 0.2][epoch])

    ranked = [(entry.step, entry.metrics) for entry in checkpointer.run.rank()]
    assert ranked == [(3, {"val_loss": 0.1}), (9, {"val_loss": 0.2}), (6, {"val_loss": 0.3})]
    assert [entry.step for entry in checkpointer.run.checkpoints if not entry.metrics] == [1, 2, 4, 5, 7, 8]


def test_a_metric_may_come_after_the_commit(where):
    """Validation that runs beside training ends when its weights have long been saved; they would stay unranked."""
    with Checkpointer(where, monitor="val_loss", keep=Keep(best=1, last=5), verbose=0) as checkpointer:
        for step in range(1, 5):
            checkpointer.save({"model": {"w": np.full(3, step)}}, step=step).wait()
        assert checkpointer.best is None

        for step, value in ((2, 0.4), (1, 0.3), (3, NAN), (4, 0.5)):
            checkpointer.log(step=step, val_loss=value)

        assert checkpointer.best.step == 1

    assert [entry.step for entry in highcamp.open(where).rank()] == [1, 2, 4]
    assert highcamp.open(where).checkpoint("best~1").metrics == {"val_loss": 0.4}


def test_a_metric_that_comes_late_still_protects(where):
    """The weights that turn out to be the best when validation ends would have been removed by the next save."""
    with Checkpointer(where, monitor="val_loss", keep=Keep(best=1, last=2), verbose=0) as checkpointer:
        checkpointer.save({"model": {"w": np.full(3, 1)}}, step=1).wait()
        checkpointer.log(step=1, val_loss=0.1)
        for step in range(2, 6):
            checkpointer.save({"model": {"w": np.full(3, step)}}, step=step, metrics={"val_loss": 0.5}).wait()

    assert [entry.step for entry in checkpointer.run.checkpoints] == [1, 4, 5]


def test_the_later_value_of_a_step_counts(train):
    """A second validation of the same weights is there to correct the first."""
    run = train([0.5, 0.4, 0.6], each=lambda checkpointer, epoch: epoch == 1 and checkpointer.log(val_loss=0.9)).run

    assert run.best.epoch == 1
    assert run.checkpoint("epoch:2").metrics == {"val_loss": 0.9}


@pytest.mark.parametrize("ending", ["end", "break", "error", "interrupt"])
def test_best_however_it_ends(where, ending):
    """Best weights that live in memory are gone with an exception, and restored only if training ends as planned."""
    weights = {"w": np.zeros(3)}

    def script():
        with Checkpointer(where, monitor="val_loss", verbose=0) as checkpointer:
            checkpointer.track(model=weights)
            try:
                for epoch in checkpointer.epochs(4):
                    weights["w"] += 1
                    checkpointer.log(val_loss=[0.5, 0.2, 0.4, 0.3][epoch])
                    if epoch == 2 and ending == "break":
                        break
                    if epoch == 2 and ending != "end":
                        raise {"error": ZeroDivisionError, "interrupt": KeyboardInterrupt}[ending]
            finally:
                checkpointer.restore("best")

    if ending in ("end", "break"):
        script()
    else:
        with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
            script()

    assert weights["w"].tolist() == [2, 2, 2]
    assert highcamp.open(where).best.epoch == 2
    assert highcamp.open(where).last.epoch == (4 if ending == "end" else 3)


def test_restoring_the_best_leaves_the_counters(where):
    """With the best weights back in the model, the run must still know that it is done."""
    weights = {"w": np.zeros(3)}
    with Checkpointer(where, monitor="val_loss", verbose=0) as checkpointer:
        checkpointer.track(model=weights)
        for epoch in checkpointer.epochs(3):
            weights["w"] += 1
            checkpointer.log(val_loss=[0.1, 0.2, 0.3][epoch])
        restored = checkpointer.restore("best")

    assert restored.epoch == 1
    assert (checkpointer.epoch, checkpointer.step) == (3, 3)
    assert highcamp.open(where).last.load("model")["w"][0] == 3


def test_restore_best_without_one(where):
    """The last weights would be taken for the best ones."""
    with Checkpointer(where, monitor="val_loss", verbose=0) as checkpointer:
        checkpointer.track(model={"w": np.zeros(3)})
        for _ in checkpointer.epochs(1):
            checkpointer.log(val_loss=NAN)
        with pytest.raises(highcamp.CheckpointNotFound, match="no checkpoint has a finite val_loss"):
            checkpointer.restore("best")


def test_metrics_always_kept(train):
    """Metrics that never reach the disk rank nothing after a restart."""
    run = train([{"loss": 1.5, "val_loss": 0.5}, {"loss": 1.25, "val_loss": 0.75}], monitor=None).run

    assert [entry.metrics for entry in run.checkpoints] == [
        {"loss": 1.5, "val_loss": 0.5},
        {"loss": 1.25, "val_loss": 0.75},
    ]
    manifest = json.loads((run.store.local_path("checkpoints/step-00000001") / "manifest.json").read_text("utf-8"))
    assert manifest["metrics"] == {"loss": 1.5, "val_loss": 0.5}
    assert [entry.epoch for entry in run.rank(Monitor("val_loss"))] == [1, 2]


def test_best_is_not_last(train):
    """One name for two questions answers one of them wrongly."""
    run = train([0.9, 0.1, 0.2]).run

    assert (run.best.epoch, run.last.epoch) == (2, 3)


def test_ties_keep_the_older(train, capsys):
    """Equal values would replace the best by chance."""
    run = train([0.5, 0.5, 0.5], verbose=1).run

    assert run.best.epoch == 1
    assert "Epoch 2: val_loss did not improve from 0.50000 (epoch 1)" in capsys.readouterr().err


def test_min_delta_is_asked_of_every_improvement(train, capsys):
    """With changes too small to count, the weights kept as the best would go on changing, and patience never end."""
    checkpointer = train([0.5, 0.45, 0.41, 0.3], monitor=Monitor("val_loss", min_delta=0.1), verbose=1)

    assert checkpointer.run.best.epoch == 4
    assert [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()[:4]] == [
        "Epoch 1: val_loss improved to 0.50000",
        "Epoch 2: val_loss did not improve from 0.50000 (epoch 1)",
        "Epoch 3: val_loss did not improve from 0.50000 (epoch 1)",
        "Epoch 4: val_loss improved from 0.50000 to 0.30000",
    ]


def test_missing_is_not_zero(train):
    """A save without a value would look like a perfect one."""
    run = train([0.5, None]).run

    assert run.last.metrics == {}
    assert run.last.name == "step-00000002"


def test_best_is_asked_of_the_disk(train, where):
    """A second process, or a person with `rm -r`, must not leave the loop with a best that is gone."""
    checkpointer = train([0.1, 0.4, 0.3])
    assert checkpointer.best.epoch == 1

    (where / "checkpoints/step-00000001").rename(where / "elsewhere")

    assert checkpointer.best.epoch == 3
