"""A snapshot that is copied while the Trainer goes on: the same bytes, and nothing waits before there is need to."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments

import highcamp
from highcamp import Every, Keep
from highcamp.errors import InvalidArgument
from highcamp.training.overlap import Overlap
from highcamp.transformers import CheckpointCallback


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Noting(Trainer):
    """Notes when forward and backward are done."""

    events = ()

    def training_step(self, *args, **keywords):
        loss = super().training_step(*args, **keywords)
        self.events.append("backward")
        return loss


@pytest.fixture
def train(tmp_path):
    """Train an epoch of eight batches, saved at every step; returns the run."""

    def fit(name, *, events=None, settings=None, every=Every(steps=1), **options):  # noqa: B008  (frozen)
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=32, n_positions=8, n_layer=1, n_head=2, n_embd=128, bos_token_id=0, eos_token_id=0,
            loss_type="ForCausalLM",
        )  # fmt: skip
        ids = torch.randint(0, 32, (32, 8), generator=torch.Generator().manual_seed(1))
        arguments = TrainingArguments(
            str(tmp_path / "trainer"), num_train_epochs=1, per_device_train_batch_size=4, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True, log_level="error", **(settings or {}),
        )  # fmt: skip
        trainer = Noting(
            GPT2LMHeadModel(config),
            arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            callbacks=[
                CheckpointCallback(tmp_path / name, every=every, keep=Keep(last=99), **{"verbose": 0, **options})
            ],
        )
        trainer.events = [] if events is None else events
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return highcamp.open(tmp_path / name)

    return fit


def arrays(run):
    """Every array of every checkpoint, as bytes."""
    return [
        {(name, key): value.tobytes() for name in checkpoint.objects for key, value in checkpoint.load(name).items()}
        for checkpoint in run.checkpoints
    ]


SETTINGS = [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"optim": "adafactor"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "accumulating", "bf16", "adafactor"])
def test_overlapped_checkpoints_are_those_that_were_copied(train, settings):
    """A checkpoint with weights of the next step in it is none."""
    copied = train("copied", settings=settings)

    overlapped = train("overlapped", settings=settings, snapshot="overlap")

    assert [each.step for each in copied.checkpoints] == [each.step for each in overlapped.checkpoints]
    assert len(copied.checkpoints) >= 4
    assert arrays(copied) == arrays(overlapped)


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=["plain", "accumulating"])
def test_nothing_waits_for_the_copy_before_the_weights_change(train, monkeypatch, settings):
    """The barrier is in front of the step of the optimizer that accelerate has wrapped, after forward and backward."""
    events = []
    waits, arms = Overlap.wait, Overlap.arm

    def wait(self):
        if self._armed is not None:
            events.append("wait")
        waits(self)

    def arm(self, *arguments):
        found = arms(self, *arguments)
        events.extend(["copy"] if found is not None else [])
        return found

    monkeypatch.setattr(Overlap, "wait", wait)
    monkeypatch.setattr(Overlap, "arm", arm)

    train("overlapped", events=events, settings=settings, snapshot="overlap")

    between = [part.partition("wait")[0].split() for part in " ".join(events).split("copy")[1:]]
    assert len(between) >= 3
    assert all("backward" in done for done in between[:-1]), events  # behind the last copy training ends


def test_memory_is_kept_between_checkpoints(train, capsys):
    """`memory_every` reaches the steps within an epoch, though checkpoints are for epochs only."""
    run = train("a", every=Every(epochs=1), memory_every=Every(steps=1), verbose=1)

    assert [each.step for each in run.checkpoints] == [8]
    assert "7 snapshots in shared memory" in capsys.readouterr().err


def test_a_cadence_that_finds_itself(train):
    """`Every.auto` weighs what a save costs against the time of training; the end is saved in any case."""
    assert train("a", every=Every.auto(overhead=0.5)).last.step == 8


def test_staging_bytes_are_the_most_memory(train):
    """A state larger than its staging memory passes through it in pieces, with the same bytes."""
    whole = train("whole")

    pieces = train("pieces", staging_bytes=1 << 20)

    assert arrays(whole) == arrays(pieces)


@pytest.mark.parametrize(
    "wrong",
    [{"snapshot": "overlay"}, {"memory_every": 3}, {"staging_bytes": 7}, {"on_error": "ignore"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_arguments_raise_in_the_constructor(tmp_path, wrong):
    """Not at the first save."""
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        CheckpointCallback(tmp_path, **wrong)
