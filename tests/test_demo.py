"""The demo: the main job on real data, on each backend, with a real SIGKILL."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import highcamp
from highcamp.cli.demo import story
from highcamp.cli.program import main

ROOT = Path(highcamp.__file__).parents[1]


def _demo(directory, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "highcamp.cli", "demo", "--out", str(directory), *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def _need(*modules):
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


@pytest.mark.parametrize("backend", ["torch", "jax", "tensorflow"])
def test_the_demo_trains_is_killed_goes_on_and_shows_the_best(tmp_path, backend):
    """The first thing that a newcomer runs."""
    _need("keras", "sklearn", "matplotlib", backend)
    directory = tmp_path / "digits"

    done = _demo(directory, "--backend", backend, "--epochs", "8", NO_COLOR="1", COLUMNS="100")

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    run = highcamp.open(directory)
    first, second = run.history.attempts
    assert (first.ended, second.ended) == (None, "complete")
    assert second.resumed_from in {f"step-{step * 25:08d}" for step in range(3, 8)}
    assert [row.epoch for row in run.history.epochs()] == list(range(1, 9))
    assert all(set(row.metrics) >= {"loss", "accuracy", "val_loss", "val_accuracy"} for row in run.history.epochs())
    assert run.last.metrics["val_accuracy"] > 0.8
    assert (directory / "curve.png").read_bytes().startswith(b"\x89PNG")
    said = done.stdout
    for words in (
        *story.TITLES.values(), "1,797 images", "by SIGKILL", "It goes on by itself from step-", "--- killed; attempt 2",
        "History", "Test images", "Kept, and why", "best 1 of 1", "The curve is in", "highcamp export",
    ):  # fmt: skip
        assert words in said
    assert [line for line in said.splitlines() if line.startswith(" *  ")]
    assert "Traceback" not in said + (directory / "training.log").read_text("utf-8")


def test_the_demo_without_a_crash_tells_json(tmp_path):
    """The result for programs; the story goes to stderr, or nowhere."""
    _need("keras", "sklearn", "matplotlib", "jax")

    done = _demo(tmp_path / "d", "--epochs", "2", "--no-crash", "--json", "--quiet", KERAS_BACKEND="jax")

    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["schema"] == "highcamp.demo/1"
    assert (told["backend"], told["epochs"], told["killed_in_epoch"], len(told["attempts"])) == ("jax", 2, None, 1)
    assert 0 < told["best"]["test"]["accuracy"] <= 1
    assert told["best"]["kept_because"]
    assert Path(told["curve"]).exists()


def test_a_killed_demo_ends_as_one_that_was_not(tmp_path):
    """Nothing is faked: going on is exact."""
    _need("keras", "sklearn", "matplotlib", "jax")

    for name, arguments in (("killed", []), ("whole", ["--no-crash"])):
        done = _demo(tmp_path / name, "--backend", "jax", "--epochs", "4", "--quiet", *arguments)
        assert done.returncode == 0, done.stderr

    killed, whole = (highcamp.open(tmp_path / name).last.load("model") for name in ("killed", "whole"))
    assert {name: array.tobytes() for name, array in killed.items()} == {
        name: array.tobytes() for name, array in whole.items()
    }


def test_a_training_that_fails_is_told_with_its_last_words(tmp_path):
    """A demo that hangs or shrugs is worse than none."""
    _need("keras", "sklearn", "matplotlib", "jax")

    done = _demo(tmp_path / "d", "--backend", "jax", "--epochs", "4", JAX_PLATFORMS="nonsense")

    assert done.returncode == 3
    assert "the training of the demo ended with code 1" in done.stderr
    assert "training.log" in done.stderr
    assert "nonsense" in done.stderr


def test_a_directory_in_use_is_refused(tmp_path, capsys):
    """Somebody's run must not become part of a demo."""
    _need("keras", "sklearn", "matplotlib", "jax")
    (tmp_path / "file").write_text("mine")

    assert main(["demo", "--backend", "jax", "--out", str(tmp_path)]) == 13
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("missing", "hint"), [("sklearn", "highcamp[demo]"), ("keras", "highcamp[demo]")])
def test_missing_packages_are_named_with_the_pip_command(tmp_path, missing, hint):
    """Before anything is written."""
    code = (
        "import importlib.util, sys; found = importlib.util.find_spec;"
        f"importlib.util.find_spec = lambda name, *rest: None if name == '{missing}' else found(name, *rest);"
        "from highcamp.cli.program import main; sys.exit(main(['demo', '--out', sys.argv[1]]))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "d"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert f"pip install '{hint}'" in done.stderr
    assert not (tmp_path / "d").exists()


def test_an_unknown_backend_of_the_environment_is_refused(tmp_path, monkeypatch, capsys):
    """Rather than passed over in silence."""
    _need("keras", "sklearn", "matplotlib")
    monkeypatch.setenv("KERAS_BACKEND", "theano")

    assert main(["demo", "--out", str(tmp_path / "d")]) == 2
    assert "KERAS_BACKEND is 'theano'" in capsys.readouterr().err


def _test(right, loss):
    return {"right": right, "of": 500, "accuracy": right / 500, "loss": loss}


@pytest.mark.parametrize(
    ("last", "best", "words"),
    [
        (_test(470, 0.3), _test(485, 0.1), "15 images more correctly than the last, and their loss is lower"),
        (_test(485, 0.3), _test(485, 0.1), "as many images correctly as the last, but their loss is lower"),
        (
            _test(486, 0.3),
            _test(485, 0.1),
            "1 image fewer correctly than the last (of 500; that is within chance), but",
        ),
        (_test(490, 0.1), _test(470, 0.2), "20 images fewer correctly than the last; their loss is higher"),
    ],
)
def test_the_demo_is_honest_about_the_test_images(last, best, words):
    """Best by val_loss need not be best by accuracy on other images, and then it says so."""
    assert words in story.on_the_test_set(last, best, is_same=False)
