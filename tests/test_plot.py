"""The picture: what it shows, that it is the same every time, and what it does with bad input."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, InvalidArgument, Keep, MissingExtra, Monitor, StorageError, plot

pytest.importorskip("matplotlib")
ROOT = Path(highcamp.__file__).parents[1]


class Crash(Exception):
    """Ends an attempt."""


def _train(path, values, *, crash_after=None, metrics=None, monitor="val_loss", **options):
    """Log `values` of val_loss, one per epoch; the attempt ends with an exception after so many epochs."""
    weights = {"w": np.zeros(2, np.float32)}
    with pytest.raises(Crash) if crash_after else warnings.catch_warnings():  # noqa: SIM117
        with Checkpointer(path, monitor=monitor, verbose=0, **options) as checkpointer:
            checkpointer.track(model=weights)
            for epoch in checkpointer.epochs(len(values)):
                if epoch == crash_after:
                    raise Crash
                more = {name: series[epoch] for name, series in (metrics or {}).items()}
                checkpointer.log(loss=1 / (epoch + 1), val_loss=values[epoch], **more)
    return highcamp.open(path)


VALUES = [0.9, 0.6, math.nan, 0.4, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55]


@pytest.fixture
def run(tmp_path):
    """Ten epochs in two attempts: the best is the fifth, the third is NaN."""
    _train(tmp_path / "digits", VALUES, crash_after=6)
    return _train(tmp_path / "digits", VALUES)


def test_a_picture_says_which_epoch_was_best_and_where_it_was_resumed(run, tmp_path):
    """The words are text in the SVG: found by a search, read by a screen reader."""
    text = run.plot(tmp_path / "c.svg").read_text("utf-8")

    said = re.findall(r"<text[^>]*>([^<]*)</text>|<tspan[^>]*>([^<]*)</tspan>", text)
    words = " | ".join(first or second for first, second in said)
    for expected in ("run digits   monitor val_loss (min)", "best 5: 0.3", "resumed at 6 (attempt 2)", "NaN val_loss",
                     "validation val_loss", "training loss", f"highcamp {highcamp.__version__}"):  # fmt: skip
        assert expected in words
    assert plot.VALIDATION.lower() in text.lower()
    assert plot.TRAINING.lower() in text.lower()


def test_what_a_picture_shows_is_what_was_measured(run):
    """A gap stays a gap, the best is the best, a restart is where it was."""
    picture = plot.Picture.of(run)

    assert (picture.metric, picture.axis) == ("val_loss", "epoch")
    assert picture.best == plot.Mark(5, 0.3, is_saved=True)
    assert picture.restarts == [(6.0, 2)]
    assert [x for x, _ in picture.validation.points] == list(range(1, 11))
    assert math.isnan(picture.validation.points[2][1])
    assert len(picture.validation.finite) == 9


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_same_history_gives_the_same_bytes(run, tmp_path, suffix):
    """A picture in a repository changes only when the run does."""
    first = run.plot(tmp_path / f"a{suffix}").read_bytes()
    code = "import sys, highcamp; highcamp.open(sys.argv[1]).plot(sys.argv[2])"
    second = tmp_path / f"b{suffix}"
    subprocess.run([sys.executable, "-c", code, run.path, second], cwd=ROOT, check=True)

    assert first == second.read_bytes()
    assert first.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])


def test_a_png_has_the_size_that_fits_a_page(run, tmp_path):
    """7.2 x 3.2 inches at 200 dpi."""
    data = run.plot(tmp_path / "c.png").read_bytes()

    assert struct.unpack(">II", data[16:24]) == (1440, 640)


def test_a_users_style_file_changes_nothing(run, tmp_path):
    """Colors and signs have a meaning here; and the user's own settings stay as they were."""
    import matplotlib as mpl

    before = run.plot(tmp_path / "a.png").read_bytes()
    with mpl.rc_context({"lines.linewidth": 9, "font.size": 30, "axes.facecolor": "black"}):
        after = run.plot(tmp_path / "b.png").read_bytes()
        assert mpl.rcParams["font.size"] == 30

    assert after == before


def test_an_epoch_that_was_best_but_not_saved_is_told(tmp_path):
    """A filled dot would promise weights that nobody has."""
    run = _train(tmp_path / "r", [0.9, 0.3, 0.5, 0.4], every=highcamp.Every(epochs=2), keep=Keep(best=1, last=1))
    unsaved = _train(tmp_path / "s", [0.9, 0.8, 0.3, 0.5], every=highcamp.Every(epochs=2), keep=Keep(best=1, last=1))

    assert plot.Picture.of(run).best.is_saved
    picture = plot.Picture.of(unsaved)
    assert (picture.best.x, picture.best.is_saved, picture.best_saved.x) == (3, False, 4)
    assert "best 3: 0.3, not saved" in unsaved.plot(tmp_path / "s.svg").read_text("utf-8")


def test_a_steep_beginning_is_cut_and_told(tmp_path):
    """The minimum that everybody looks for would be a flat line at the bottom."""
    values = [50.0, *(0.3 + 0.001 * abs(20 - epoch) for epoch in range(39))]
    run = _train(tmp_path / "r", values)
    text = run.plot(tmp_path / "c.svg").read_text("utf-8")

    _, high = plot._heights([plot.Picture.of(run).validation])

    assert high < 1
    assert "above what is shown: loss 1 (at 1) and val_loss 50 (at 1)" in text


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([0.5], 1),
        ([0.5, 0.5, 0.5], 1),
        ([math.nan, math.nan], None),
        ([math.inf, 0.1], 2),
        ([0.0, 0.0], 1),
        ([1e300, -1e300], 2),
    ],
)
def test_odd_histories_are_drawn(tmp_path, values, best):
    """One epoch, no change, nothing finite, huge numbers: a picture in every case, and no warning."""
    picture = plot.Picture.of(run := _train(tmp_path / "r", values))

    assert (picture.best.x if picture.best else None) == best
    assert run.plot(tmp_path / "c.png").stat().st_size > 5000


def test_steps_are_drawn_where_there_are_no_epochs(tmp_path):
    """A loop of its own counts steps only."""
    with Checkpointer(tmp_path / "r", monitor="loss", verbose=0) as checkpointer:
        for step in (10, 20, 30):
            checkpointer.save({"w": np.zeros(2)}, step=step, metrics={"loss": abs(step - 20) + 1.0}).wait()

    picture = plot.Picture.of(highcamp.open(tmp_path / "r"))

    assert (picture.axis, picture.best.x, picture.training.name) == ("step", 20, "loss")


def test_another_metric_can_be_drawn(run, tmp_path):
    """With its counterpart, and its best where its name tells the direction."""
    picture = plot.Picture.of(run, "loss")

    assert (picture.training.name, picture.validation.name, picture.best.x) == ("loss", "val_loss", 10)
    assert run.plot(tmp_path / "c.png", metric="loss").exists()


def test_a_metric_without_direction_has_no_best(tmp_path):
    """Guessing would mark the worst as the best."""
    run = _train(tmp_path / "r", [0.3, 0.2], metrics={"reward": [1.0, 2.0]}, monitor=Monitor("reward", "max"))

    assert plot.Picture.of(run).best.x == 2
    assert plot.Picture.of(run, "loss").best.x == 2
    assert plot.Picture.of(_train(tmp_path / "s", [0.3], metrics={"odd": [1.0]}), "odd").best is None


def test_hostile_names_are_drawn_as_text(tmp_path):
    """No formula, no markup, no control codes, no warning about missing letters."""
    name = "$x^2$<script>\x1b\u202e数"
    path = tmp_path / "<img onerror=1>&数"
    run = _train(path, [0.3, 0.2], metrics={"plain": [1.0, 2.0]})
    history = next((path / "history").iterdir())
    history.write_text(history.read_text("utf-8").replace('"plain"', '"$x^2$<script>\\u001b\\u202e数"'), "utf-8")

    for suffix in (".svg", ".png", ".pdf"):
        assert run.plot(tmp_path / f"c{suffix}", metric=name).exists()
    text = (tmp_path / "c.svg").read_text("utf-8")
    assert "<script" not in text
    assert "\u202e" not in text
    assert "&lt;img onerror=1&gt;&amp;数" in text


def test_many_restarts_do_not_hide_the_curve(tmp_path):
    """Twenty crashes are one number, not twenty labels."""
    for after in range(2, 12):
        _train(tmp_path / "r", [1 / (epoch + 1) for epoch in range(12)], crash_after=after)

    text = highcamp.open(tmp_path / "r").plot(tmp_path / "c.svg").read_text("utf-8")

    assert "9 restarts" in text
    assert "attempt 2" not in text


@pytest.mark.parametrize("name", ["c.gif", "c", "c.jpeg"])
def test_other_suffixes_are_refused(run, tmp_path, name):
    """Rather than written as something else."""
    with pytest.raises(InvalidArgument, match=r"use one of \.png, \.svg, \.pdf"):
        run.plot(tmp_path / name)


def test_an_unknown_metric_is_answered_with_the_names(run, tmp_path):
    """A typing mistake must not draw another curve."""
    with pytest.raises(InvalidArgument, match="there are loss, val_loss"):
        run.plot(tmp_path / "c.png", metric="val_lss")


def test_an_empty_history_is_said(tmp_path):
    """An empty picture looks like a broken one."""
    with Checkpointer(tmp_path / "r", verbose=0) as checkpointer:
        checkpointer.save({"w": np.zeros(2)}, step=1).wait()

    with pytest.raises(InvalidArgument, match="has no metrics to draw"):
        highcamp.open(tmp_path / "r").plot(tmp_path / "c.png")


def test_a_place_that_cannot_be_written_is_named(run, tmp_path):
    """And nothing is left behind."""
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageError, match="could not be written"):
        run.plot(tmp_path / "file/c.png")


def test_a_failed_picture_leaves_the_old_one(run, tmp_path, monkeypatch):
    """The curve of yesterday is better than half of today's."""
    from matplotlib.figure import Figure

    old = run.plot(tmp_path / "c.png").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)

    with pytest.raises(StorageError, match="No space left"):
        run.plot(tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir() if "pending" in path.name] == []


def test_without_matplotlib_the_pip_command_is_told(run, tmp_path, monkeypatch):
    """One line, and training never fails for a picture."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(MissingExtra, match=r"pip install 'highcamp\[plot\]'"):
        run.plot(tmp_path / "c.png")
