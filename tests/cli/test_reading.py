"""ls, show, best, log and the bare program: what they print in pipes, as JSON and on terminals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Keep
from highcamp.run.history import SaveCost, append_events, save_event
from highcamp.run.settings import PaceFacts, read_settings, write_settings
from highcamp.storage.local import LocalStore
from highcamp.testing import FaultyStore

BEST, SECOND, RESUMED, BEFORE_LAST, LAST = (f"step-{step:08d}" for step in (5, 6, 7, 11, 12))


def test_ls_prints_tab_separated_rows_best_first(call, run):
    """`cut -f1 | head -1` is how a script finds the best."""
    done = call("ls", run.path)

    assert done.code == 0
    assert [row[0] for row in done.rows] == [BEST, SECOND, RESUMED, BEFORE_LAST, LAST]
    assert done.rows[0][1:4] == ["5", "5", "0.3"]
    assert [row[-2] for row in done.rows] == [
        "best 1 of 2",
        "best 2 of 2",
        "resumed from",
        "last 2 of 2",
        "last 1 of 2",
    ]
    assert {row[-1] for row in done.rows} == {"committed"}
    assert done.err == ""


def test_ls_header_names_the_columns(call, run):
    """Columns are found by name, not by counting."""
    header = call("ls", run.path, "--header").rows[0]

    assert header[:4] == ["CHECKPOINT", "EPOCH", "STEP", "val_loss"]
    assert header[-4:] == ["SIZE", "SAVED", "KEPT BECAUSE", "STATE"]


def test_ls_json_has_everything(call, run):
    """The page, other tools and tests read this; its fields only ever grow."""
    told = json.loads(call("ls", run.path, "--json").out)

    assert told["schema"] == "highcamp.ls/1"
    assert told["run"] == run.path
    assert told["monitor"] == {"metric": "val_loss", "mode": "min", "min_delta": 0.0}
    assert told["state"] == "finished"
    best = told["items"][0]
    assert (best["name"], best["epoch"], best["metrics"]["val_loss"], best["is_best"]) == (BEST, 5, 0.3, True)
    assert best["kept_because"] == ["best 1 of 2"]
    assert isinstance(best["size_bytes"], int)
    assert best["created_at"].endswith("Z")


def test_ls_sorts_limits_and_filters(call, run):
    """Questions that otherwise end in a script."""
    assert call("ls", run.path, "--sort", "step", "--reverse").rows[0][0] == LAST
    assert [row[0] for row in call("ls", run.path, "-n", "1").rows] == [BEST]
    assert [row[0] for row in call("ls", run.path, "--where", "val_loss<0.32", "--where", "epoch>=6").rows] == [SECOND]


@pytest.mark.parametrize(
    "arguments", [["--sort", "val_lss"], ["--where", "val_loss"], ["--where", "x<1"], ["--metric", "x"]]
)
def test_ls_refuses_what_it_does_not_know_and_says_what_there_is(call, run, arguments):
    """An empty answer to a typing mistake looks like an answer."""
    done = call("ls", run.path, *arguments)

    assert done.code == 2
    assert "val_loss" in done.err


def test_ls_lists_runs_of_a_directory(call, run, tmp_path):
    """It answers which of my runs was the good one."""
    shutil.copytree(run.path, tmp_path / "runs/again")

    done = call("ls", "runs", "--header")

    assert done.code == 0
    assert done.rows[0] == ["RUN", "STATE", "EPOCH", "BEST", "VALUE", "MONITOR", "LAST", "CHECKPOINTS", "SIZE"]
    assert [row[:5] for row in done.rows[1:]] == [
        [f"runs/{name}", "finished", "12", "5", "0.3"] for name in ("again", "digits")
    ]
    told = json.loads(call("ls", "runs", "--json").out)
    assert [each["best"]["value"] for each in told["runs"]] == [0.3, 0.3]


def test_ls_on_a_terminal_has_headline_signs_and_legend(terminal, run):
    """The signs must have words, and the words must say what a newcomer asks."""
    done = terminal("ls", run.path)

    lines = done.out.splitlines()
    assert lines[0].startswith("run digits   monitor val_loss (min)   12 epochs in 2 attempts   5 checkpoints, ")
    assert lines[0].endswith("finished")
    assert lines[2].startswith(f" *  {BEST}      5     5    0.3000")
    assert "no better val_loss for 7 epochs" in done.out
    assert "next: highcamp export runs/digits@best -o model.safetensors" in done.out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_ls_fits_the_terminal_and_never_drops_name_step_or_monitor(terminal, run, width):
    """A table that wraps cannot be read."""
    lines = terminal("ls", run.path, width=width, env={"COLUMNS": str(width)}).out.splitlines()

    assert max(map(len, lines)) <= width
    title = next(line for line in lines if "CHECKPOINT" in line)
    assert all(name in title for name in ("STEP", "val_loss"))


def test_ls_colors_only_where_asked(terminal, run):
    """NO_COLOR is honored, and a terminal without it gets color."""
    assert "\x1b[" not in terminal("ls", run.path).out
    assert "\x1b[" in terminal("ls", run.path, env={"NO_COLOR": ""}).out
    assert "\x1b[" not in terminal("ls", run.path, env={"NO_COLOR": "", "TERM": "dumb"}).out


def test_ls_shows_damage_in_words(call, run, terminal):
    """A damaged checkpoint must not look like a good one, nor be the best."""
    (Path(run.best.path) / "model.safetensors").write_bytes(b"short")

    rows = call("ls", run.path).rows

    states = {row[0]: row[-1] for row in rows}
    assert states[BEST] == "truncated"
    assert next(row[-2] for row in rows if row[0] == BEST) == "damaged: not touched"
    assert json.loads(call("ls", run.path, "--json").out)["items"][0]["is_best"] is False
    assert f"{BEST} is damaged: model.safetensors is 5 bytes" in terminal("ls", run.path, width=60).out


def test_hostile_metric_names_cannot_reach_the_terminal(call, terminal, tmp_path, monkeypatch):
    """A name from a training script must not move the cursor, add a column or a line, or turn text around."""
    monkeypatch.chdir(tmp_path)
    name = "<img src=x onerror=1>\x1b[31m\t\u202e../x"
    with highcamp.Checkpointer("hostile", verbose=0) as checkpointer:
        checkpointer.save({"w": [1]}, step=1, metrics={"loss": 1.0}).wait()
    history = Path("hostile/history/attempt-0001.jsonl")
    with history.open("a", encoding="utf-8") as file:
        file.write(
            json.dumps({"event": "log", "at": "2026-01-01T00:00:00Z", "step": 1, "epoch": 0, "metrics": {name: 1.0}})
            + "\n"
        )

    for done in (call("ls", "hostile", "--header"), call("log", "hostile", "--header"), terminal("log", "hostile")):
        assert done.code == 0
        assert "\x1b[31m" not in done.out
        assert "\u202e" not in done.out
        assert "\\x1b[31m\\t\\u202e../x" in done.out
    assert "\x1b" not in call("ls", "hostile", "--json").out


def test_best_prints_the_path_alone(call, run):
    """`cp $(highcamp best)/model.safetensors .` must work."""
    done = call("best", run.path)

    assert done.out == f"{run.best.path}\n"
    assert done.err == "epoch 5: val_loss 0.3000, the lowest of 5 checkpoints kept\n"
    assert call("best", run.path, "--quiet").err == ""
    assert call("show", run.best.path).code == 0


def test_best_by_another_metric(call, run):
    """The monitored metric was the wrong one, and nothing has to be trained again."""
    assert call("best", run.path, "--metric", "loss").out.strip().endswith(LAST)
    assert call("best", run.path, "--metric", "loss", "--mode", "max").out.strip().endswith(BEST)
    assert json.loads(call("best", run.path, "--metric", "loss", "--json").out)["name"] == LAST


def test_best_without_a_finite_value_says_what_there_is(call, run):
    """An empty path would make the script that uses it do harm."""
    done = call("best", run.path, "--metric", "val_f1")

    assert done.code == 12
    assert done.out == ""
    assert "metrics there are: loss, val_loss, val_accuracy" in done.err


def test_log_prints_one_row_per_epoch_across_restarts(call, run):
    """One history, not one per process."""
    done = call("log", run.path, "--header")

    assert done.rows[0] == ["EPOCH", "STEP", "val_loss", "loss", "val_accuracy", "TIME", "ATTEMPT", "NOTE"]
    assert [row[0] for row in done.rows[1:]] == [str(epoch) for epoch in range(1, 13)]
    assert [row[6] for row in done.rows[1:]] == ["1"] * 7 + ["2"] * 5
    assert done.rows[3][2] == "nan"
    assert [row[7] for row in done.rows[1:] if row[7] != "-"] == ["best", "kept", "kept", "kept", "last"]


def test_log_json_names_what_is_not_finite(call, run):
    """NaN is no JSON; null alone would not say what it was."""
    told = json.loads(call("log", run.path, "--json").out)

    assert told["schema"] == "highcamp.log/1"
    third = told["items"][2]
    assert third["metrics"]["val_loss"] is None
    assert third["nonfinite"] == {"val_loss": "nan"}
    assert [each["epoch"] for each in told["items"] if each["is_best"]] == [5]
    assert [each["resumed_from"] for each in told["attempts"]] == [None, RESUMED]


def test_log_on_a_terminal_marks_the_best_row_and_the_restart(terminal, run):
    """Where did it stop, and which epoch was best: seen at a glance."""
    lines = terminal("log", run.path).out.splitlines()

    assert [line for line in lines if line.startswith(" * ")] == [next(line for line in lines if line.endswith("best"))]
    restart = lines.index(f"    --- killed; attempt 2 resumed from {RESUMED}, epoch 7 ---")
    assert lines[restart - 1].split()[0] == "7"
    assert lines[restart + 1].split()[0] == "8"


def test_log_limits(call, run):
    """A run of a thousand epochs does not fit a screen."""
    assert [row[0] for row in call("log", run.path, "-n", "2").rows] == ["11", "12"]


def test_show_tells_the_facts_of_a_run(call, run):
    """What was asked for, what happened, where it stands."""
    facts = dict(row[:2] for row in call("show", run.path).rows)

    assert facts["monitor"] == "val_loss (min)"
    assert facts["keeps"] == "best 2, last 2"
    assert facts["saves"] == "every epoch"
    assert facts["epochs"] == "12 of 12"
    assert facts["best"] == f"{BEST}, epoch 5, val_loss 0.3000"
    assert facts["attempt"].startswith("2 ")
    told = json.loads(call("show", run.path, "--json").out)
    assert told["schema"] == "highcamp.show/1"
    assert told["best"]["name"] == BEST
    assert told["keep"] == {
        "best": 2, "last": 2, "every_steps": None, "every_epochs": None, "best_weights_only": False,
    }  # fmt: skip


def test_show_tells_the_facts_of_a_checkpoint(call, run):
    """Every file with size and digest, so that another tool can check it."""
    told = json.loads(call("show", f"{run.path}@best", "--json").out)

    assert told["name"] == BEST
    assert {file["name"] for file in told["files"]} >= {"model.safetensors", "state.json"}
    assert all(file["digest"].startswith("xxh3-128:") for file in told["files"])
    assert "model.safetensors" in call("show", f"{run.path}@epoch:5").out


COST = SaveCost(
    pause_seconds=0.003, wait_seconds=0.001, durable_seconds=0.6, write_seconds=0.5, interval_seconds=2.0,
    new_bytes=600_000_000, linked_bytes=1_000_000,
)  # fmt: skip
PACE = PaceFacts(
    overhead=0.01, steps=200, seconds=20.0, because="wear", step_seconds=0.1, cost_seconds=0.02, durable_seconds=0.6,
    new_bytes=10**9, share=0.001, expected_loss_seconds=10.6, optimal_seconds=58.8, failure_seconds=86400.0,
)  # fmt: skip


@pytest.fixture
def costly(run):
    """The run, as if two of its saves were all that are known of: that of its best in attempt 1, that of its last in 2."""
    for path in Path(run.path, "history").iterdir():
        lines = path.read_text("utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["event"] != "save"), "utf-8")
    for attempt, entry in ((1, run.best), (2, run.last)):
        event = save_event(entry.name, entry.step, entry.epoch, COST, entry.created_at)
        append_events(run.store, attempt, 1, [event], durable=True)
    return highcamp.open(run.path)


def _set(run, **fields):
    write_settings(run.store, msgspec.structs.replace(read_settings(run.store), **fields))


def test_show_tells_what_the_saves_have_cost(call, costly):
    """It answers whether saving slows the training, and how fast this disk is."""
    facts = dict(row[:2] for row in call("show", costly.path).rows)
    told = json.loads(call("show", costly.path, "--json").out)

    assert facts["cost of saving"] == "2 saves, pause 3.0 ms each, 1.2 GB/s, 0.2 % of training time"
    assert told["saving"]["count"] == 2
    assert told["saving"]["new_bytes"] == 1_200_000_000
    assert told["saving"]["share"] == pytest.approx(0.002)
    assert told["saving"]["bytes_per_second"] == 1.2e9


def test_show_tells_what_one_save_has_cost(call, costly):
    """Each save reports itself; one that was never noted shows nothing rather than zeros."""
    facts = dict(row[:2] for row in call("show", f"{costly.path}@best").rows)
    told = json.loads(call("show", f"{costly.path}@best", "--json").out)

    assert facts["cost of saving"] == (
        "pause 3.0 ms, wait 1.0 ms, 0.2 % of the time since the save before; "
        "durable after 600 ms, 600 MB written, 1.0 MB linked, 1.2 GB/s"
    )
    assert told["save"]["pause_seconds"] == 0.003
    assert told["save"]["linked_bytes"] == 1_000_000
    assert told["save"]["share"] == pytest.approx(0.002)
    assert json.loads(call("show", f"{costly.path}@{SECOND}", "--json").out)["save"] is None
    assert "cost of saving" not in call("show", f"{costly.path}@{SECOND}").out


@pytest.mark.parametrize(
    ("because", "words"),
    [
        ("cost", "a save costs the loop 20 ms, and 1 % is allowed"),
        ("pipe", "a save is durable after 600 ms, and the next one waits for it"),
        ("wear", "a save writes 1.0 GB, and 50 MB/s on average spare the drive"),
        ("step", "even that costs no more than 1 %"),
        ("share", "saving more often has cost more than 1 %"),
        ("moonlight", "moonlight"),  # a reason of a newer version
    ],
)
def test_show_tells_what_auto_has_chosen_and_why(call, costly, because, words):
    """A cadence that nobody has set needs a reason."""
    _set(
        costly,
        every="as often as 1 % of the time allows",
        pace=msgspec.structs.replace(PACE, because=because),
    )

    facts = dict(row[:2] for row in call("show", costly.path).rows)
    told = json.loads(call("show", costly.path, "--json").out)

    assert facts["saves"] == "as often as 1 % of the time allows"
    assert facts["pace"] == f"every 200 steps (20 s): {words}; a crash costs 11 s of work on average"
    assert told["pace"] == {**msgspec.to_builtins(PACE), "because": because}


def test_show_of_another_cadence_has_no_pace(call, costly):
    """What Every.auto chose in an earlier attempt is not what happens now."""
    _set(costly, pace=None)

    assert "pace" not in dict(row[:2] for row in call("show", costly.path).rows)
    assert json.loads(call("show", costly.path, "--json").out)["pace"] is None


def test_a_run_of_an_older_version_shows_no_costs(call, run):
    """Its history has no saves, its run.json no pace; all the rest is there."""
    for path in [*Path(run.path, "history").iterdir()]:
        lines = path.read_text("utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if '"save"' not in line), "utf-8")
    settings = Path(run.path, "run.json")
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "pace"}))

    facts = dict(row[:2] for row in call("show", run.path).rows)
    told = json.loads(call("show", run.path, "--json").out)

    assert facts["saves"] == "every epoch"
    assert not {"pace", "cost of saving"} & set(facts)
    assert (told["pace"], told["saving"]) == (None, None)


def test_show_layers_lists_the_tensors(call, run):
    """Which layers are in it, before anything is loaded."""
    done = call("show", f"{run.path}@best", "--layers")

    assert ["model/dense/kernel", "float32", "(64, 10)", "2560"] in done.rows


def test_references_mean_the_same_everywhere(call, run, monkeypatch):
    """@best alone is the nearest run's."""
    monkeypatch.chdir(Path(run.path) / "checkpoints")

    for reference, name in {"best": BEST, "best~1": SECOND, "last": LAST, "last~1": BEFORE_LAST, "step:7": RESUMED,
                            "epoch:11": BEFORE_LAST, SECOND: SECOND}.items():  # fmt: skip
        assert json.loads(call("show", f"@{reference}", "--json").out)["name"] == name


def test_a_mistyped_run_gets_the_nearest_name(call, run):
    """As for commands."""
    done = call("ls", "runs/digit")

    assert done.code == 10
    assert "did you mean runs/digits?" in done.err


def test_the_run_of_the_environment_is_used(call, run, monkeypatch):
    """One run for a whole session."""
    monkeypatch.setenv("HIGHCAMP_RUN", run.path)

    assert call("best").out.strip() == run.best.path


def test_bare_highcamp_tells_the_status_and_what_is_next(call, run, monkeypatch):
    """Whoever types the name alone wants to know how it is going."""
    monkeypatch.chdir(run.path)

    done = call()

    assert done.code == 0
    assert "run digits" in done.out
    assert f"best  epoch 5, val_loss 0.3000, {BEST}" in done.out
    assert done.out.split("next:\n")[1].count("  highcamp ") == 3


def test_bare_highcamp_without_a_run_tells_how_to_begin(call, tmp_path, monkeypatch):
    """The very first thing that a newcomer types."""
    monkeypatch.chdir(tmp_path)

    done = call()

    assert done.code == 0
    assert "highcamp demo" in done.out
    assert "CheckpointCallback" in done.out


def test_bare_highcamp_finds_runs_below(call, run):
    """In the project's directory the runs are one level down."""
    assert "highcamp ls runs/digits" in call().out


def test_prune_settings_do_not_leak_into_ls(call, run):
    """What ls says is kept is what the next save keeps."""
    run.prune(Keep(best=1, last=1), dry_run=True)

    assert len(call("ls", run.path).rows) == 5


def test_show_tells_of_saves_that_failed_while_training_went_on(call, tmp_path):
    """The warning scrolled by at night; the run must still say that an epoch is missing, and why."""
    store = FaultyStore(LocalStore(tmp_path / "run"), fail_at=0)
    with Checkpointer(store, on_error="warn", verbose=0, keep=Keep(last=9)) as checkpointer:
        for step in (1, 2, 3):
            if step == 2:
                checkpointer._saver.raise_failed(wait=True)
                store._fail_at = len(store.operations) + 2
            checkpointer.save({"w": np.zeros(3)}, step=step)

    facts = {row[0]: row[1] for row in call("show", tmp_path / "run").rows}
    told = json.loads(call("show", tmp_path / "run", "--json").out)

    assert facts["failed saves"].startswith("1, the last at step 2: ")
    assert [(each["step"], bool(each["reason"])) for each in told["failed_saves"]] == [(2, True)]
