"""Weights that become NaN: training goes on from the newest healthy checkpoint, says so, and never loses it meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import highcamp
from highcamp import Checkpointer, Every, Keep
from highcamp.errors import Damaged
from highcamp.training.supervisor import stretch_since
from highcamp.training.tier import SHM

ROOT = Path(highcamp.__file__).parent.parent
KEEP = Keep(last=2)


def fresh():
    """A passed state before the first step."""
    return {"params": {"w": np.zeros(4)}, "opt_state": {"m": np.zeros(4)}}


def train(where, until, *, poisoned=(), keep=KEEP, **options):
    """Train with state that is passed, saving each step; `w` is the sum of the steps, NaN from a poisoned one on.

    Returns the state and what was said.
    """
    said = []
    with Checkpointer(where, every=Every(steps=1), keep=keep, **options) as checkpointer:
        checkpointer.voice.write = said.append
        state = checkpointer.restore(like=fresh()) or fresh()
        for step in range(checkpointer.step + 1, until + 1):
            gained = np.nan if step in poisoned else step
            state = {"params": {"w": state["params"]["w"] + gained}, "opt_state": {"m": state["opt_state"]["m"] + 1}}
            checkpointer.save(state, step=step, metrics={"loss": 1 / step})
    return state, said


def health(where):
    """Whether each checkpoint is healthy, by step."""
    return {each.step: each.is_healthy for each in highcamp.open(where).checkpoints}


def about(said):
    """What was said of health; the line that ends with the path of the run says nothing of it."""
    return [line for line in said if "healthy" in line and "highcamp ls" not in line]


# Going on


def test_resume_prefers_the_newest_healthy_one_and_says_so(where):
    """A run that goes on from NaN computes NaN, for as long as nobody looks."""
    train(where, 8, poisoned={5})

    state, said = train(where, 8)

    assert state["params"]["w"].tolist() == [36.0] * 4
    assert state["opt_state"]["m"].tolist() == [8.0] * 4
    (line,) = about(said)
    assert line == (
        "step-00000008 is not healthy (NaN in params/w), so training goes on from step-00000004, the newest that is; it "
        "stays as it is"
    )
    assert "Resumed from step-00000004 (attempt 2)" in said
    run = highcamp.open(where)
    assert run.resumed_from == "step-00000004"
    assert run.last.is_healthy
    assert run.last.name == "step-00000008.2"


def test_of_many_unhealthy_ones_the_first_is_named(where):
    """The step at which it began is where somebody looks for the reason."""
    train(where, 8, poisoned={5}, keep=Keep(last=100))

    _, said = train(where, 8)

    assert about(said)[0].startswith(
        "step-00000005 and 3 newer checkpoints are not healthy (NaN in params/w), so training goes on from step-00000004"
    )


def test_unhealthy_ones_that_are_left_behind_are_no_news(where):
    """What was said when it mattered would be said at every start for the rest of the run."""
    train(where, 8, poisoned={5}, keep=Keep(last=100))
    train(where, 10, keep=Keep(last=100))

    _, said = train(where, 11, keep=Keep(last=100))

    assert False in [each.is_healthy for each in highcamp.open(where).checkpoints]
    assert about(said) == []


def test_where_none_is_healthy_the_newest_goes_on_with_a_warning(where):
    """Beginning anew over what is saved is for a person to decide."""
    train(where, 3, poisoned={1})
    assert set(health(where).values()) == {False}

    state, said = train(where, 5, verbose=0)

    assert state["opt_state"]["m"].tolist() == [5.0] * 4
    assert said[0].startswith(
        "No whole checkpoint is healthy, so training goes on from step-00000003, which has NaN in params/w: "
    )


def test_a_damaged_healthy_one_is_passed_over_for_the_next_healthy_one(where):
    """Two last healthy ones are kept so that a damaged one has a neighbor, which is no help if that is NaN."""
    train(where, 8, poisoned={5})
    assert list(health(where)) == [3, 4, 8]
    file = where / "checkpoints/step-00000004/params.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")

    state, said = train(where, 4)

    assert state["params"]["w"].tolist() == [10.0] * 4
    assert any("step-00000004: params.safetensors differs from its digest" in line for line in said)
    assert "Resumed from step-00000003 (attempt 2)" in said


def test_where_every_healthy_one_is_damaged_the_unhealthy_one_is_left(where):
    """It is what there is: an error would say that nothing is whole."""
    train(where, 6, poisoned={5}, keep=Keep(last=1))
    assert list(health(where)) == [4, 6]
    (where / "checkpoints/step-00000004/params.safetensors").unlink()

    _, said = train(where, 7, poisoned={5})

    assert any(
        line.startswith("No whole checkpoint is healthy, so training goes on from step-00000006") for line in said
    )


def test_where_nothing_is_whole_health_is_not_the_news(where):
    """The error must be about the damage."""
    train(where, 2, poisoned={2})
    for path in where.glob("checkpoints/step-*/params.safetensors"):
        path.unlink()

    with pytest.raises(Damaged, match="has checkpoints, but none is whole"):
        train(where, 3)


def test_last_stays_the_newest_and_best_is_healthy(where):
    """A reference means what it says: only going on by itself prefers healthy ones."""
    train(where, 8, poisoned={5}, monitor="loss")

    run = highcamp.open(where)
    assert run.last.name == run.checkpoint("last").name == "step-00000008"
    assert run.best.name == "step-00000004"
    with Checkpointer(where, monitor="loss", verbose=0) as checkpointer:
        assert np.isnan(checkpointer.restore("last", like=fresh())["params"]["w"]).all()
        assert checkpointer.restore("best", like=fresh())["params"]["w"].tolist() == [10.0] * 4


def test_restore_in_the_middle_goes_back_to_a_healthy_one(where):
    """The loop that sees NaN itself and wants to try on with a lower rate."""
    with Checkpointer(where, keep=Keep(last=2), verbose=-1) as checkpointer:
        checkpointer.restore(like=fresh())
        for step, value in enumerate([1.0, 2.0, np.nan, np.nan], start=1):
            state = fresh()
            state["params"]["w"] += value
            checkpointer.save(state, step=step)
        state = checkpointer.restore(like=fresh())

        assert (checkpointer.step, state["params"]["w"].tolist()) == (2, [2.0] * 4)
        checkpointer.save(state, step=3)

    assert highcamp.open(where).checkpoint("step:3").parent == "step-00000002"


def test_rows_of_the_stretch_that_is_left_are_abandoned(where):
    """The curve would hold the losses of two different trainings of the same steps."""
    train(where, 8, poisoned={5}, monitor="loss")
    train(where, 6, monitor="loss")

    history = highcamp.open(where).history
    assert [(row.attempt, row.step) for row in history.rows] == [*((1, step) for step in range(1, 5)), (2, 5), (2, 6)]


def test_a_finished_run_that_has_ended_in_nan_goes_on_from_where_it_was_healthy(where):
    """Run again it would say that all is done, and hand out NaN; a healthy end is an end."""

    def script(poisoned):
        torch.manual_seed(1)
        model, said = torch.nn.Linear(2, 2), []
        with Checkpointer(where, monitor="loss") as checkpointer:
            checkpointer.voice.write = said.append
            checkpointer.track(model=model)
            for epoch in checkpointer.epochs(4):
                with torch.no_grad():
                    model.weight += torch.nan if epoch in poisoned else 1
                checkpointer.log(loss=1 / (1 + epoch))
        return model, said

    script({2})
    model, said = script(())

    assert "Resumed from step-00000002 (epoch 2, attempt 2); 2 epochs to go" in said
    assert torch.isfinite(model.weight).all()
    _, said = script({2})
    assert [line for line in said if "complete" in line] == [
        "Run is complete (4 of 4 epochs); nothing to train. epochs(14) would go on"
    ]


# Keeping


def test_the_last_healthy_ones_outlive_any_number_of_others(where):
    """Two last ones are kept, and after two epochs of NaN there would be nothing to go back to."""
    train(where, 30, poisoned={5})

    assert health(where) == {3: True, 4: True, 30: False}


def test_the_last_healthy_ones_outlive_attempts_that_meet_nan_again(where):
    """Each restart does the same steps and comes to the same end."""
    for _ in range(3):
        train(where, 9, poisoned={5})

        assert health(where)[4] is True
    state, _ = train(where, 12)
    assert state["params"]["w"].tolist() == [78.0] * 4
    assert [step for step, is_healthy in health(where).items() if is_healthy] == [4, 11, 12]


# Saying


def test_it_is_said_once_when_it_begins(where):
    """At every save it would bury everything else, and never, it would be found out in the morning."""
    _, said = train(where, 9, poisoned={5}, verbose=0)

    (line,) = said
    assert line == (
        "step-00000005 is saved but not healthy: NaN in params/w at step 5. A restart goes on from the newest healthy "
        "checkpoint, and restore() does so now; against the cause help a lower learning rate, clipped gradients or another "
        "precision"
    )


def test_only_a_few_tensors_are_named_in_a_line(where):
    """A network has hundreds of them, and NaN goes through all."""
    said = []
    with Checkpointer(where, verbose=0) as checkpointer:
        checkpointer.voice.write = said.append
        checkpointer.save({"params": {f"l{place:02}": np.full(1, np.inf) for place in range(30)}}, step=1)

    assert (
        "infinity in params/l00, infinity in params/l01, infinity in params/l02 and 27 more tensors at step 1"
        in said[0]
    )


def test_healthy_training_hears_nothing_of_it(where):
    """A word about health where nothing is wrong is noise."""
    _, said = train(where, 3)
    _, again = train(where, 5)

    assert about([*said, *again]) == []


# A process that is killed


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory of this kind is Linux's")
def test_what_is_left_in_shared_memory_does_not_win_over_a_healthy_checkpoint(where, start):
    """The newest of all is a snapshot in memory, and it is NaN."""
    program = """
import os, signal, sys
import numpy as np
from highcamp import Checkpointer, Every, Keep

state = {"params": {"w": np.zeros(4)}, "opt_state": {"m": np.zeros(4)}}
with Checkpointer(sys.argv[1], every=Every(steps=5), memory_every=Every(steps=1), keep=Keep(last=2)) as checkpointer:
    state = checkpointer.restore(like=state) or state
    print("weights", state["params"]["w"][0], "at", checkpointer.step, flush=True)
    for step in range(checkpointer.step + 1, 13):
        state["params"]["w"] = state["params"]["w"] + (np.nan if step == 12 and sys.argv[2] == "nan" else step)
        pending = checkpointer.save_if_due(state, step=step)
        if pending is not None:
            pending.wait()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    try:
        first = start(program, where, "nan")
        second = start(program, where, "fine")
        third = start(program, where, "fine")
    finally:
        run_id = highcamp.open(where).run_id
        for path in Path(SHM).glob(f"highcamp-*-{run_id}-*"):
            path.unlink()

    assert [each.returncode for each in (first, second, third)] == [-signal.SIGKILL] * 3
    assert second.stdout == "weights 55.0 at 10\n"
    assert "Recovered step-00000012 from shared memory (newer than step 10 on disk)" in second.stderr
    assert "step-00000012 is not healthy (NaN in params/w), so training goes on from step-00000010" in second.stderr
    assert third.stdout == "weights 78.0 at 12\n"
    assert "Recovered step-00000012.2 from shared memory" in third.stderr


def test_recovery_knows_what_is_trained(where, start):
    """An infinite parameter found in shared memory would pass for a mask, and a mask for an infinite parameter."""
    program = """
import os, signal, sys
import torch
from highcamp import Checkpointer, Every

model = torch.nn.Linear(2, 2)
model.register_buffer("mask", torch.full((2,), -torch.inf))
with Checkpointer(sys.argv[1], every=Every(steps=5), memory_every=Every(steps=1)) as checkpointer:
    checkpointer.track(model=model)
    for _ in checkpointer.epochs(2):
        for _ in checkpointer.batches(range(8)):
            if checkpointer.step == 7:
                checkpointer._saver.raise_failed(wait=True)
                os.kill(os.getpid(), signal.SIGKILL)
            with torch.no_grad():
                model.weight += torch.inf if checkpointer.step + 1 == int(sys.argv[2]) else 1
"""
    found = []
    for poisoned in ("7", "0"):
        place = where / poisoned
        assert start(program, place, poisoned).returncode == -signal.SIGKILL
        with Checkpointer(place, verbose=-1) as checkpointer:
            model = torch.nn.Linear(2, 2)
            model.register_buffer("mask", torch.zeros(2))
            checkpointer.track(model=model)
            resumed = checkpointer.start()
        found.append(({each.step: each.is_healthy for each in checkpointer.run.checkpoints}, resumed.step))

    assert found == [({5: True, 7: False}, 5), ({5: True, 7: True}, 7)]


def test_a_poisoned_training_that_is_killed_ends_as_if_nothing_had_been(where, start):
    """Torch, dropout and momentum: going back to the healthy checkpoint must give back all of the state, not the weights."""
    program = """
import os, signal, sys
import torch
from highcamp import Checkpointer, Every, Keep

torch.manual_seed(3)
data = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.randn(32, 2))
loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
with Checkpointer(sys.argv[1], monitor="loss", every=Every(steps=3), keep=Keep(last=2)) as checkpointer:
    checkpointer.track(model=model, optimizer=optimizer, loader=loader)
    for epoch in checkpointer.epochs(4):
        for inputs, targets in checkpointer.batches(loader):
            if checkpointer.step == 13 and sys.argv[2] == "poisoned":
                inputs = inputs * torch.nan
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if checkpointer.step == 27 and sys.argv[2] == "poisoned":
                checkpointer._saver.raise_failed(wait=True)
                os.kill(os.getpid(), signal.SIGKILL)
        checkpointer.log(loss=loss.detach())
"""
    assert start(program, where / "whole", "clean").returncode == 0
    assert start(program, where / "killed", "poisoned").returncode == -signal.SIGKILL
    went_on = start(program, where / "killed", "clean")

    assert went_on.returncode == 0, went_on.stderr
    assert "so training goes on from step-00000012" in went_on.stderr
    one, other = (highcamp.open(where / name) for name in ("whole", "killed"))
    for name in ("model", "optimizer"):
        arrays, again = one.last.load(name), other.last.load(name)
        assert {key: array.tobytes() for key, array in arrays.items()} == {
            key: array.tobytes() for key, array in again.items()
        }
    assert [(row.step, row.metrics) for row in one.history.rows] == [
        (row.step, row.metrics) for row in other.history.rows
    ]


# Starting again and again


def test_attempts_that_meet_nan_again_have_gained_nothing(where):
    """Each saves a few steps, all of them lost: a supervisor that counts them never gives up."""
    run = None
    gained = []
    for _ in range(3):
        train(where, 9, poisoned={5})
        run = highcamp.open(where)
        stretch = stretch_since(run, 0)
        gained.append((stretch.has_gained, stretch.reached, stretch.last))
    train(where, 7)

    assert gained == [(True, 4, "step-00000004"), (False, 4, "step-00000004"), (False, 4, "step-00000004")]
    assert stretch_since(run, 0).has_gained


def test_where_no_checkpoint_is_healthy_steps_are_a_gain(where):
    """A tensor that is NaN on purpose must not keep a script from being started again."""
    train(where, 3, poisoned={1})
    train(where, 5)

    stretch = stretch_since(highcamp.open(where), 0)
    assert (stretch.has_gained, stretch.reached, stretch.last) == (True, 5, "step-00000005")


def test_a_script_that_meets_nan_at_every_start_is_given_up(tmp_path):
    """Restarted all night, it would do the same steps each time."""
    (tmp_path / "train.py").write_text("""
import sys
import numpy as np
from highcamp import Checkpointer, Every

state = {"params": {"w": np.zeros(4)}}
with Checkpointer("run", every=Every(steps=1)) as checkpointer:
    state = checkpointer.restore(like=state) or state
    for step in range(checkpointer.step + 1, 10):
        if np.isnan(state["params"]["w"]).all() and step == 8:
            sys.exit("the loss is NaN")
        state["params"]["w"] = state["params"]["w"] + (np.nan if step == 5 else 1)
        checkpointer.save(state, step=step)
""")
    command = [sys.executable, "-m", "highcamp.cli", "run", "--delay", "0s", "--", sys.executable, "train.py"]

    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        timeout=100,
    )  # fmt: skip

    assert done.returncode == 1
    assert "giving up: 2 attempts in a row have not gained a step" in done.stderr
    assert "starting again in 0 s from step-00000004 (restart 1 of at most 10)" in done.stderr
    assert len(highcamp.open(tmp_path / "run").history.attempts) == 3
