"""CheckpointCallback in a real Trainer, with tiny models made from configurations."""

from __future__ import annotations

import importlib
import types

import pytest
import torch
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import highcamp
from highcamp import Every, Keep, Monitor
from highcamp.errors import Damaged, InvalidArgument, InvalidState, Mismatch, MissingExtra, Refused, RunLocked
from highcamp.transformers import CheckpointCallback, loop

PER_EPOCH = 6  # steps: 24 rows in batches of 4


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Rows(torch.utils.data.Dataset):
    """Token sequences; counts how often it is read."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(count)
        self.ids = torch.randint(0, 32, (count, 8), generator=generator)
        self.read = 0

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        self.read += 1
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class StopAt(TrainerCallback):
    """Raises when a step begins, as Ctrl-C would."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def gpt(width=16, **settings):
    """A tiny decoder with dropout."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 8, "n_layer": 1, "n_head": 2, "n_embd": width, **settings}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM"))


def made(place, *callbacks, model=None, rows=24, **settings):
    """A Trainer of six steps an epoch, two epochs by default."""
    chosen = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 2,
        "eval_strategy": "epoch", "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "log_level": "error", "lr_scheduler_type": "constant", **settings,
    }  # fmt: skip
    trainer = Trainer(
        model or gpt(),
        TrainingArguments(str(place / "trainer"), **chosen),
        train_dataset=Rows(rows),
        eval_dataset=Rows(8),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def zeroed(module):
    """Weights that no training gives."""
    for parameter in module.parameters(recurse=False):
        torch.nn.init.zeros_(parameter)


def ours(place, monitor="eval_loss", **settings):
    """Our callback, silent."""
    return CheckpointCallback(place / "run", monitor, **{"verbose": 0, **settings})


def weights(model):
    """Every weight, as bytes."""
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def interrupted(place, step, **settings):
    """A run that has stopped after `step` steps."""
    trainer = made(place, ours(place, every=Every(steps=1)), StopAt(step), **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


# ------------------------------------------------------------------------------------------------------- constructor


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("metric_for_best_model", "monitor"),
        ("greater_is_better", 'Monitor(…, mode="max")'),
        ("load_best_model_at_end", 'restore("best")'),
        ("save_strategy", "every=Every(…)"),
        ("save_steps", "Every(steps=…)"),
        ("save_total_limit", "Keep(last=…)"),
        ("resume_from_checkpoint", "the same script"),
        ("moniter", "monitor"),
    ],
)
def test_names_typed_by_habit_are_answered_with_ours(tmp_path, typed, named):
    """Trainer's own names would be taken in silence, and nothing of what was meant would happen."""
    with pytest.raises(TypeError) as raised:
        CheckpointCallback(tmp_path, **{typed: 1})

    assert named in str(raised.value)


def test_wrong_arguments_raise_in_the_constructor(tmp_path):
    """An error after the first epoch has cost an epoch."""
    (tmp_path / "file").touch()

    with pytest.raises(InvalidArgument, match="does not tell whether"):
        CheckpointCallback(tmp_path, "eval_fluency")
    with pytest.raises(InvalidArgument, match="on_error"):
        CheckpointCallback(tmp_path, on_error="ignore")
    with pytest.raises(Refused, match="is a file"):
        CheckpointCallback(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("version", ["4.57.0", "5.22.3", "6.0.0", "unknown"])
def test_other_versions_are_refused_by_name(version):
    """Another version's loop may begin elsewhere, and train on batches twice."""
    room = importlib.import_module("highcamp.transformers")

    with pytest.raises(MissingExtra, match=r"transformers 5.23 and newer, below 6; here is .*pip install"):
        room._check_version(version)
    room._check_version("5.23.0.dev0")
    room._check_version("5.40.1")


# ------------------------------------------------------------------------------------------------------------ the best


def test_monitor_comes_from_the_training_arguments(tmp_path):
    """Said once, as Trainer's users say it, and not a second time here."""
    callback = ours(tmp_path, None)
    made(tmp_path, callback, metric_for_best_model="accuracy")
    unusual = ours(tmp_path, None)
    made(tmp_path, unusual, metric_for_best_model="fluency", greater_is_better=False)

    assert callback._arguments["monitor"] == Monitor("eval_accuracy", "max")
    assert unusual._arguments["monitor"] == Monitor("eval_fluency", "min")


def test_mode_auto_names(tmp_path):
    """Trainer maximises every metric whose name does not end in "loss": the worst word error rate would be the best."""
    with pytest.raises(InvalidArgument, match="of eval_wer less is better; set greater_is_better=False"):
        made(tmp_path, ours(tmp_path, None), metric_for_best_model="wer")

    made(tmp_path, ours(tmp_path, None), metric_for_best_model="wer", greater_is_better=False)


def test_metrics_are_those_of_the_step_they_were_measured_at(tmp_path):
    """A checkpoint ranked by an older evaluation is not the one that was good."""

    class Late(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 4:  # after our save of step 4, which is before this one in the list
                control.measured = trainer.evaluate()["eval_loss"]

    callback = ours(tmp_path, every=Every(steps=2), keep=Keep(best=1, last=20))
    trainer = made(tmp_path, callback, Late(), eval_strategy="steps", eval_steps=3)

    trainer.train()

    logged = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert sorted(logged) == [3, 4, 6, 9, 12]
    measured = {entry.step: entry.metrics.get("eval_loss") for entry in callback.run.checkpoints}
    assert measured == {step: logged.get(step) for step in (2, 4, 6, 8, 10, 12)}
    assert {row.step: row.epoch for row in callback.run.history.rows if "eval_loss" in row.metrics} == {
        3: 0, 4: 0, 6: 1, 9: 1, 12: 2,
    }  # fmt: skip
    assert callback.best.metrics["eval_loss"] == min(value for step, value in logged.items() if step not in (3, 9))
    assert not [
        name for row in callback.run.history.rows for name in row.metrics if "runtime" in name or name == "epoch"
    ]


def test_restore_puts_the_best_weights_into_the_model(tmp_path):
    """The last weights are not the best ones once the model knows its data by heart."""
    callback = ours(tmp_path)
    trainer = made(tmp_path, callback, num_train_epochs=3)
    trainer.train()
    last = weights(trainer.model)

    best = callback.restore("best")

    assert best.name == callback.run.best.name
    assert best.metrics["eval_loss"] < callback.run.last.metrics["eval_loss"]
    assert weights(trainer.model) != last
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best.metrics["eval_loss"], rel=1e-6)


def test_best_weights_of_the_trainer_do_not_become_the_last_checkpoint(tmp_path):
    """load_best_model_at_end swaps the model before callbacks hear of the end; the run would go on from the wrong weights."""
    callback = ours(tmp_path, every=Every(epochs=5))
    settings = {"save_strategy": "epoch", "load_best_model_at_end": True, "save_total_limit": 1, "num_train_epochs": 3}
    trainer = made(tmp_path, callback, metric_for_best_model="loss", **settings)

    trainer.train()

    assert callback.run.last.step == 3 * PER_EPOCH
    assert callback.run.last.metrics["eval_loss"] > trainer.state.best_metric
    swapped = weights(trainer.model)
    callback.restore("last")
    assert weights(trainer.model) != swapped
    assert trainer.evaluate()["eval_loss"] == pytest.approx(callback.run.last.metrics["eval_loss"], rel=1e-6)


def test_moved_run_keeps_best(tmp_path):
    """Trainer drops its best when the directory has moved."""
    made(tmp_path, ours(tmp_path / "old")).train()
    (tmp_path / "old").rename(tmp_path / "new")

    again = ours(tmp_path / "new")
    made(tmp_path, again, num_train_epochs=4).train()

    assert again.run.last.epoch == 4
    assert (again.best.epoch, again.best.attempt) == (1, 1)  # the later ones are worse


# -------------------------------------------------------------------------------------------------------- going on


def test_resumed_in_mid_epoch_equals_uninterrupted(tmp_path):
    """Weights, optimizer and log history, bit for bit, in one process, as when a cell is run again after Ctrl-C."""
    whole = made(tmp_path)
    whole.train()
    interrupted(tmp_path, 9)

    again = made(tmp_path, ours(tmp_path, every=Every(steps=1)))
    result = again.train()

    assert weights(again.model) == weights(whole.model)
    timeless = [
        [{key: value for key, value in row.items() if not key.endswith(("runtime", "second"))} for row in rows]
        for rows in (whole.state.log_history, again.state.log_history)
    ]
    assert timeless[0] == timeless[1]
    assert result.training_loss == whole.state.log_history[-1]["train_loss"]
    # 3 of 12 steps were done here: speeds must not count the others
    assert result.metrics["train_steps_per_second"] == pytest.approx(3 / result.metrics["train_runtime"], rel=0.1)


def test_fast_skip(tmp_path):
    """Hours of reading data only to pass over them."""
    interrupted(tmp_path, 9)
    trainer = made(tmp_path, ours(tmp_path))

    trainer.train()

    assert trainer.train_dataset.read == 3 * 4  # the batches of three steps, and no other


def test_ended_run_can_go_on(tmp_path):
    """The end of a training is not the end of the model."""
    made(tmp_path, ours(tmp_path)).train()
    whole = made(tmp_path, num_train_epochs=3)
    whole.train()

    longer = made(tmp_path, ours(tmp_path), num_train_epochs=3)
    longer.train()

    assert longer.train_dataset.read == 24
    assert weights(longer.model) == weights(whole.model)


@pytest.mark.parametrize("settings", [{}, {"max_steps": 8, "logging_steps": 5}])
def test_complete_run_trains_nothing(tmp_path, capfd, settings):
    """Trainer does one step too many when it goes on from the last one within an epoch."""
    first = made(tmp_path, ours(tmp_path), **settings)
    first.train()
    again = made(tmp_path, ours(tmp_path, verbose=1), model=gpt().apply(zeroed), **settings)

    result = again.train()

    assert again.train_dataset.read == 0
    assert result.global_step == first.state.global_step
    assert result.training_loss == first.state.log_history[-1]["train_loss"]
    assert weights(again.model) == weights(first.model)
    assert (
        f"Run is complete (step {result.global_step} of {result.global_step}); nothing to train"
        in capfd.readouterr().err
    )


def test_stopped_early_stays_stopped(tmp_path):
    """Another patience of epochs would be trained at each start of the script."""
    settings = {"num_train_epochs": 20, "learning_rate": 1.0, "metric_for_best_model": "loss"}
    first = made(tmp_path, EarlyStoppingCallback(2), ours(tmp_path), **settings)
    first.train()
    assert first.state.global_step < 20 * PER_EPOCH

    again = made(tmp_path, EarlyStoppingCallback(2), ours(tmp_path), **settings)
    again.train()
    longer = made(tmp_path, EarlyStoppingCallback(2), ours(tmp_path), **{**settings, "num_train_epochs": 21})
    longer.train()

    assert again.state.global_step == first.state.global_step
    assert longer.state.global_step > first.state.global_step


def test_callback_state_restored(tmp_path):
    """Patience that begins anew with each restart is endless; patience itself is the user's to change."""
    stopping = EarlyStoppingCallback(9)
    stopping.early_stopping_patience_counter = 5
    first = made(tmp_path, stopping, ours(tmp_path, every=Every(steps=1)), StopAt(4), metric_for_best_model="loss")
    with pytest.raises(KeyboardInterrupt):
        first.train()
    seen = {}

    class See(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            seen.setdefault(state.global_step, changed.early_stopping_patience_counter)

    changed = EarlyStoppingCallback(7)
    made(tmp_path, changed, ours(tmp_path), See(), metric_for_best_model="loss").train()

    assert seen[5] == 5
    assert changed.early_stopping_patience == 7


def test_damaged_newest_is_passed_over(tmp_path, capfd):
    """Where the loop begins is fixed before the damage is found; it must begin once more, at the older one."""
    whole = made(tmp_path)
    whole.train()
    interrupted(tmp_path, 9)
    run = highcamp.open(tmp_path / "run")
    newest, older = (run.checkpoint(reference) for reference in ("last", "last~1"))
    path = tmp_path / "run" / "checkpoints" / newest.name / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x40
    path.write_bytes(content)

    again = made(tmp_path, ours(tmp_path))
    again.train()

    assert run.history.attempts[-1].resumed_from == older.name
    assert f"resumed from {older.name} instead" in capfd.readouterr().err
    assert again.train_dataset.read == (2 * PER_EPOCH - older.step) * 4
    assert weights(again.model) == weights(whole.model)


def test_a_malformed_loop_is_damage():
    """What a file says is checked before a Trainer is told; damage is passed over, a TypeError in mid-restore is not."""
    rest = {"facts": {}, "log_history": [], "running": {}, "callbacks": {}, "ended_at": None, "order": {}}
    counted = {"epoch": 1.0, "global_step": "9", "num_input_tokens_seen": 0, "total_flos": 0.0}
    best = {"best_metric": None, "best_global_step": None, "best_model_checkpoint": None}

    for malformed in ([], {}, {**rest, "began": None, "ahead": None, "state": {**counted, **best}}):
        with pytest.raises(Damaged, match="its trainer is malformed"):
            loop.check(malformed, "runs/x")


def test_checkpoint_of_the_trainer_is_a_beginning(tmp_path):
    """Who comes with checkpoints of Trainer's own need not begin anew; afterwards the run is what counts."""
    first = made(tmp_path, StopAt(9), save_strategy="steps", save_steps=8)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    theirs = str(tmp_path / "trainer" / "checkpoint-8")
    whole = made(tmp_path)
    whole.train()

    second = made(tmp_path, ours(tmp_path, every=Every(steps=1)), StopAt(10))
    with pytest.raises(KeyboardInterrupt):
        second.train(resume_from_checkpoint=theirs)
    with pytest.raises(InvalidArgument, match="goes on from step-00000010"):
        made(tmp_path, ours(tmp_path)).train(resume_from_checkpoint=theirs)
    third = made(tmp_path, ours(tmp_path))
    third.train()

    last = highcamp.open(tmp_path / "run").last
    assert (last.step, last.epoch, last.batch) == (12, 2, 0)
    assert weights(third.model) == weights(whole.model)


def test_one_write_for_both(tmp_path):
    """Best and last are one checkpoint for two reasons, and Trainer writes none beside it."""
    callback = ours(tmp_path)

    made(tmp_path, callback).train()

    assert [entry.step for entry in callback.run.checkpoints] == [PER_EPOCH, 2 * PER_EPOCH]
    assert list((tmp_path / "trainer").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- refused


def test_changed_model_lists_every_difference_and_changes_nothing(tmp_path):
    """Half a model restored is worse than none."""
    interrupted(tmp_path, 3)
    model = gpt(width=8)
    before = weights(model)

    with pytest.raises(Mismatch, match="nothing was changed") as raised:
        made(tmp_path, ours(tmp_path), model=model).train()

    assert weights(model) == before
    assert [name for name in model.state_dict() if f"model/{name}: " not in str(raised.value)] == []


def test_changed_data_and_settings_are_listed_together(tmp_path):
    """With other data "the next batch" is another one, and the same state means something else."""
    interrupted(tmp_path, 3)
    trainer = made(tmp_path, ours(tmp_path), rows=32, optim="sgd", seed=1, gradient_accumulation_steps=2)
    before = weights(trainer.model)

    with pytest.raises(Mismatch) as raised:
        trainer.train()

    for line in (
        "optimizer: AdamW in the checkpoint, SGD here",
        "training examples: 24 in the checkpoint, 32 here",
        "batches in an epoch: 6 in the checkpoint, 8 here",
        "gradient_accumulation_steps: 1 in the checkpoint, 2 here",
        "seed: 42 in the checkpoint, 1 here",
        "5 differences, nothing was changed",
    ):
        assert line in str(raised.value)
    assert weights(trainer.model) == before


def test_optimizer_really_restored(tmp_path):
    """Trainer goes on without a word where its optimizer.pt is missing; here an object more or less is an error."""
    interrupted(tmp_path, 3)
    trainer = made(tmp_path, ours(tmp_path))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")

    with pytest.raises(Refused, match="tracked but not saved: scaler"):
        trainer.train()


def test_two_callbacks_on_one_trainer_are_refused(tmp_path):
    """A training can go on from one run only."""
    with pytest.raises(InvalidArgument, match="2 CheckpointCallbacks on one Trainer"):
        made(tmp_path, ours(tmp_path / "one"), ours(tmp_path / "two"))


def test_two_trainers_on_one_run_are_refused(tmp_path):
    """Two trainings in one run could never be told apart again."""
    failed = []

    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                with pytest.raises(RunLocked, match="being written") as raised:
                    made(tmp_path, ours(tmp_path)).train()
                failed.append(raised.value)

    made(tmp_path, ours(tmp_path), Second()).train()

    assert len(failed) == 1


def test_added_later_it_has_to_be_attached(tmp_path):
    """Where training begins is fixed before a callback is asked: silence would mean a restart from the beginning."""
    interrupted(tmp_path, 3)
    late, attached = made(tmp_path), made(tmp_path)
    late.add_callback(ours(tmp_path))
    callback = ours(tmp_path)
    attached.add_callback(callback)

    with pytest.raises(InvalidState, match=r"callback\.attach\(trainer\)"):
        late.train()
    callback.attach(attached)
    attached.train()

    assert attached.train_dataset.read == 9 * 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"world_size": 4}, "this one has 4 processes"),
        ({"ignore_data_skip": True}, "train on the first batches of an epoch twice"),
    ],
)
def test_settings_that_cannot_be_exact_are_refused(tmp_path, settings, words):
    """Refused when the Trainer is made, not when a restart goes wrong."""
    trainer = made(tmp_path)
    arguments = types.SimpleNamespace(**{"world_size": 1, "ignore_data_skip": False, **settings})
    trainer.args = arguments

    with pytest.raises((Refused, InvalidArgument), match=words):
        ours(tmp_path).attach(trainer)


def test_a_search_is_no_run(tmp_path):
    """Many models in one run: each would go on from the one before."""
    trainer = made(tmp_path, ours(tmp_path))

    with pytest.raises(Refused, match="a search over hyper-parameters"):
        trainer.train(trial=object())


def test_what_is_no_number_is_said_once(tmp_path):
    """A table with words in it cannot be drawn; a word dropped in silence is looked for in vain."""

    class Talkative(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            trainer.log({"mood": "fine", "speed": 2.5})

    callback = ours(tmp_path)
    trainer = made(tmp_path, callback, Talkative())

    with pytest.warns(UserWarning, match="mood is a str, not a number") as said:
        trainer.train()

    assert len(said) == 1
    assert {row.metrics["speed"] for row in callback.run.history.rows if "speed" in row.metrics} == {2.5}


# ------------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_adapters_are_written_and_the_frozen_weights_are_not(tmp_path):
    """Fine-tuning a large model with small adapters must not fill the disk with copies of what never changes."""
    from peft import LoraConfig, get_peft_model

    frozen = gpt(width=64, vocab_size=8192)
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    model = get_peft_model(frozen, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    callback = ours(tmp_path, every=Every(steps=2), keep=Keep(last=20))
    made(tmp_path, callback, model=model, logging_steps=50).train()

    run = callback.run
    places = {}
    for entry in run.checkpoints:
        for path in (tmp_path / "run" / "checkpoints" / entry.name).iterdir():
            places[path.stat().st_ino] = path.stat().st_size
    frozen_bytes = sum(
        value.numel() * value.element_size() for name, value in before.items() if name != "lm_head.weight"
    )
    assert len(run.checkpoints) == 6
    assert frozen_bytes > 2_000_000
    assert sum(places.values()) < 1.3 * frozen_bytes  # once, and six times what has changed
    saved = run.last.load("model")
    assert (
        saved["base_model.model.transformer.wte.weight"].tobytes() == before["transformer.wte.weight"].numpy().tobytes()
    )
    assert "base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight" in saved
