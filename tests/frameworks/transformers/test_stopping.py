"""Training that is asked to stop, or that fails: one save where it is, the right exit code or error, nobody waits."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import highcamp
from highcamp import Every
from highcamp.transformers import CheckpointCallback


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class OwnError(Exception):
    """Of the user's program."""


class AtStep(TrainerCallback):
    """Does something when a step begins, or in the evaluation after it."""

    def __init__(self, step, action, *, in_evaluation=False):
        self.step, self.action, self.in_evaluation = step, action, in_evaluation

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step and not self.in_evaluation:
            self.action()

    def on_prediction_step(self, args, state, control, **_):
        if state.global_step == self.step and self.in_evaluation:
            self.in_evaluation = False
            self.step = -1
            self.action()


def ask(signum=signal.SIGTERM):
    """Signal one's own process."""
    os.kill(os.getpid(), signum)


def fail():
    """Fail."""
    raise OwnError("of the user")


@pytest.fixture
def train(tmp_path):
    """Train two epochs of six steps; returns the Trainer, and the exit code."""

    def fit(name, *callbacks, every=Every(epochs=1)):  # noqa: B008  (frozen)
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=32, n_positions=8, n_layer=1, n_head=2, n_embd=16, bos_token_id=0, eos_token_id=0,
            loss_type="ForCausalLM",
        )  # fmt: skip
        arguments = TrainingArguments(
            str(tmp_path / "trainer"), num_train_epochs=2, per_device_train_batch_size=4, save_strategy="no",
            eval_strategy="epoch", logging_steps=2, report_to="none", disable_tqdm=True, use_cpu=True, log_level="error",
        )  # fmt: skip
        ids = torch.randint(0, 32, (24, 8), generator=torch.Generator().manual_seed(1))
        rows = [{"input_ids": row, "labels": row} for row in ids]
        ours = CheckpointCallback(tmp_path / name, "eval_loss", every=every, verbose=0)
        trainer = Trainer(
            GPT2LMHeadModel(config), arguments, train_dataset=rows, eval_dataset=rows[:8], callbacks=[*callbacks, ours]
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        except SystemExit as stop:
            return trainer, stop.code
        return trainer, 0

    return fit


@pytest.mark.parametrize("every", [Every(epochs=1), Every(epochs=5), Every(steps=4)], ids=str)
@pytest.mark.parametrize(
    ("step", "options", "place"),
    [(2, {}, (0, 2)), (0, {}, (0, 1)), (7, {}, (1, 1)), (6, {"in_evaluation": True}, (1, 0))],
    ids=["batch", "very_first", "second_epoch", "evaluation"],
)
def test_a_stop_loses_nothing_and_the_rerun_ends_the_same(tmp_path, train, every, step, options, place):
    """A machine that is taken away says so seconds before, whatever the cadence: by then no epoch may be over."""
    whole, _ = train("whole", every=every)

    _, code = train("stopped", AtStep(step, ask, **options), every=every)

    last = highcamp.open(tmp_path / "stopped").last
    assert (code, (last.epoch, last.batch)) == (143, place)
    resumed, code = train("stopped", every=every)
    assert code == 0
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)
    rows = [[(row.epoch, row.step, row.metrics) for row in highcamp.open(tmp_path / name).history.epochs()]
            for name in ("whole", "stopped")]  # fmt: skip
    assert rows[0] == rows[1]


def test_handler_raises_again(tmp_path, train):
    """Attaching anything stops other engines from raising; here the error is the user's own, and nothing is lost."""
    with pytest.raises(OwnError, match="of the user"):
        train("run", AtStep(9, fail), every=Every(steps=4))

    run = highcamp.open(tmp_path / "run")
    assert [attempt.ended for attempt in run.history.attempts] == ["error"]
    assert run.last.step == 8


def test_no_barrier_on_error(train, monkeypatch):
    """One process fails; were the others met at a barrier, all would wait, and nobody would see the error."""
    waited = []

    class Watching(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            from accelerate import Accelerator

            monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda *_: waited.append("accelerator"))
            monkeypatch.setattr(torch.distributed, "barrier", lambda *_, **__: waited.append("torch"))

    with pytest.raises(OwnError, match="of the user"):
        train("run", Watching(), AtStep(8, fail), every=Every(steps=1))

    assert waited == []
