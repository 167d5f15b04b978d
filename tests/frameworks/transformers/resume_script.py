"""Train once without a stop, once killed again and again, and compare: `resume_script.py DIRECTORY CASE:SEED…`.

Every training is a process of its own, forked after the imports, which are slow. It kills itself by SIGKILL at the N-th
event: an event is a step, or a change of the store, in whose middle it may die. N is drawn from SEED. Some steps end with
SIGTERM instead, at which it saves and stops. Prints one line of JSON for each: how often that was and where, and what differs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import highcamp
from highcamp import Every, Keep
from highcamp.transformers import CheckpointCallback

sys.path.append(str(Path(__file__).parents[2]))
from deadly import Deadly

DIRECTORY = Path(sys.argv[1])
ASKED = 128 + signal.SIGTERM  # the exit code of one that was asked to stop, and saved
MAX_KILLS = 6  # the run after that is let through

torch.set_num_threads(1)  # a pool of threads would not survive the fork
torch.use_deterministic_algorithms(mode=True)
transformers.logging.set_verbosity_error()
logging.getLogger("accelerate").setLevel(logging.ERROR)


class Mortal(TrainerCallback):
    """Dies at steps; counts in hooks of every kind, which is a state of its own."""

    def __init__(self, store: Deadly) -> None:
        self.store, self.counts = store, {"epoch": 0, "step": 0, "evaluation": 0}

    def state_dict(self) -> dict[str, int]:
        return dict(self.counts)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.counts = dict(state)

    def on_epoch_begin(self, args, state, control, **_: Any) -> None:
        self.counts["epoch"] += 1

    def on_step_begin(self, args, state, control, **_: Any) -> None:
        self.counts["step"] += 1
        self.store.event("step")

    def on_evaluate(self, args, state, control, **_: Any) -> None:
        self.counts["evaluation"] += 1
        self.store.event("evaluation")


def rows(count: int, seed: int, width: int = 10) -> list[dict[str, torch.Tensor]]:
    """Token sequences that can be learned: each is an arithmetic series."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 30, (count, 2), generator=generator)
    return [{"input_ids": (start + torch.arange(width) * (1 + by % 3)) % 30} for start, by in starts]


def labelled(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch whose labels are its inputs."""
    ids = torch.stack([each["input_ids"] for each in batch])
    return {"input_ids": ids, "labels": ids.clone()}


def masked(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch with tokens masked at random, by three generators, as collators and augmentations do."""
    ids = torch.stack([each["input_ids"] for each in batch])
    hidden = torch.rand(ids.shape) < 0.2 + 0.1 * random.random() + 0.1 * np.random.random()
    return {"input_ids": ids.masked_fill(hidden, 31), "labels": ids.masked_fill(~hidden, -100)}


class Stream(torch.utils.data.IterableDataset):
    """Sequences one after the other, with noise that is drawn when they are read, from the generator of the dropout."""

    def __iter__(self) -> Any:
        for row in rows(70, seed=5):
            yield {"input_ids": (row["input_ids"] + torch.randint(3, ())) % 30}


def gpt() -> GPT2LMHeadModel:
    """A tiny decoder with dropout and tied embeddings."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=16, n_layer=1, n_head=2, n_embd=16, bos_token_id=0, eos_token_id=0)
    )


def bert() -> BertForMaskedLM:
    """A tiny encoder with dropout."""
    return BertForMaskedLM(
        BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=16, pad_token_id=0,
        )
    )  # fmt: skip


def lora() -> Any:
    """A decoder whose weights are frozen, with adapters."""
    from peft import LoraConfig, get_peft_model

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=16, n_layer=2, n_head=2, n_embd=32, bos_token_id=0, eos_token_id=0)
    )
    return get_peft_model(model, LoraConfig(r=2, lora_dropout=0.2, target_modules=["c_attn"], fan_in_fan_out=True))


# What differs from case to case: the model, its data, the settings, the cadence.
CASES: dict[str, dict[str, Any]] = {
    "accumulating": {
        "arguments": {
            "gradient_accumulation_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 3,
            "lr_scheduler_type": "cosine", "warmup_steps": 3, "eval_on_start": True, "label_smoothing_factor": 0.1,
        },
        "every": Every(steps=2, epochs=1),
        "patience": 50,
    },
    "masked": {
        "model": bert,
        "collator": masked,
        "arguments": {
            "eval_strategy": "epoch", "max_steps": 22, "logging_steps": 4,
            "accelerator_config": {"use_seedable_sampler": False}, "optim": "adamw_torch",
        },
        "every": Every(steps=3, epochs=1),
    },
    "streamed": {
        "data": Stream(),
        "arguments": {"max_steps": 20, "logging_steps": 3, "gradient_accumulation_steps": 2},
        "every": Every(steps=3),
        "metric": None,
    },
    "lora": {
        "model": lora,
        "arguments": {"eval_strategy": "epoch", "logging_strategy": "epoch", "lr_scheduler_type": "reduce_lr_on_plateau"},
        "every": Every(steps=4, epochs=1),
    },
    "stopped": {
        "arguments": {"eval_strategy": "steps", "eval_steps": 3, "learning_rate": 3.0, "num_train_epochs": 30},
        "every": Every(steps=1),
        "patience": 2,
    },
    "kept": {
        "arguments": {"eval_strategy": "epoch"},
        "every": Every(epochs=1),
        "memory_every": Every(steps=1),
    },
    "scaled": {
        "arguments": {"eval_strategy": "epoch", "train_sampling_strategy": "group_by_length", "optim": "sgd"},
        "every": Every(steps=3, epochs=1),
        "scaler": True,
    },
}  # fmt: skip


def train(store: Deadly, name: str, seed: int) -> dict[str, Any]:
    """Train one case; returns everything that must be the same."""
    case = CASES[name]
    torch.manual_seed(seed)
    settings = {
        "num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 5, "seed": seed,
        "metric_for_best_model": case.get("metric", "loss"), "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False, "log_level": "error",
        **case["arguments"],
    }  # fmt: skip
    callback = CheckpointCallback(
        store, every=case["every"], keep=Keep(best=1, last=2), memory_every=case.get("memory_every"), verbose=0
    )
    siblings = [EarlyStoppingCallback(case["patience"])] if "patience" in case else []
    mortal = Mortal(store)
    trainer = Trainer(
        case.get("model", gpt)(),
        TrainingArguments(str(DIRECTORY / "unused"), **settings),
        data_collator=case.get("collator", labelled),
        train_dataset=case.get("data") or rows(37, seed=1),
        eval_dataset=rows(8, seed=2),
        callbacks=[*siblings, callback, mortal],
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    if "scaler" in case:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**11, growth_interval=5)
    result = trainer.train()
    state = trainer.state
    counted = {
        name: getattr(state, name) for name in ("global_step", "epoch", "total_flos", "best_metric", "max_steps")
    }
    final = fingerprint(
        {
            "model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict(), "counted": counted,
            "scheduler": trainer.lr_scheduler.state_dict(), "log": timeless(state.log_history),
            "metrics": timeless([result.metrics]), "loss": result.training_loss,
            "siblings": [sorted(vars(each).items()) for each in siblings], "counts": mortal.counts,
            "scaler": trainer.accelerator.scaler.state_dict() if "scaler" in case else None,
        }
    )  # fmt: skip
    if "metric" not in case:
        callback.restore("best")
        final["best"] = fingerprint(trainer.model.state_dict())
    return final


def timeless(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Logs without what the clock decides."""
    return [
        {key: value for key, value in row.items() if not key.endswith(("_runtime", "_per_second"))} for row in found
    ]


def fingerprint(value: Any) -> Any:
    """Every bit of a nested state, as JSON."""
    if isinstance(value, dict):
        return {str(name): fingerprint(child) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [fingerprint(child) for child in value]
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    return repr(value)


def attempt(directory: Path, name: str, seed: int, fuse: int) -> int | None:
    """Train in a process of its own; the number of its events, or None if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            store = Deadly(directory, fuse, deaths=DIRECTORY / "deaths", asking=("step", "evaluation"))
            result = train(store, name, seed)
            (directory / "result.json").write_text(json.dumps(result))
            (directory / "events").write_text(str(store.count))
        except BaseException as error:  # noqa: BLE001  (a forked child must not go on as its parent)
            if isinstance(error, SystemExit) and error.code == ASKED:
                os._exit(ASKED)
            traceback.print_exc()
            os._exit(70)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) in (-signal.SIGKILL, -signal.SIGTERM, ASKED):
        return None
    if status != 0:
        raise SystemExit(f"the training ended with {status}")
    return int((directory / "events").read_text())


def tensors(checkpoint: highcamp.Checkpoint, name: str) -> Any:
    """Those of one object; accelerate makes the generator of a sampler when it is first used, which is no difference."""
    return fingerprint(
        {key: value for key, value in checkpoint.load(name).items() if not key.startswith("began/order/")}
    )


def facts(directory: Path) -> dict[str, Any]:
    """What must be the same."""
    run = highcamp.open(directory)
    best = None if run.best is None else [run.best.step, fingerprint(run.best.metrics)]
    return {
        "result": json.loads((directory / "result.json").read_text()),
        # An evaluation before the first step is logged by every attempt that begins anew.
        "rows": [[row.step, row.epoch, row.batch, fingerprint(row.metrics)] for row in run.history.rows if row.step],
        "best": best,
        "last": [run.last.step, run.last.epoch, run.last.batch, fingerprint(run.last.metrics)],
        "tensors": {name: tensors(run.last, name) for name in run.last.objects},
        "verified": all(found.ok for found in run.verify()),
        "complete": run.is_complete,
    }


def compare(name: str, seed: int) -> dict[str, Any]:
    """Both trainings of a case with one seed."""
    whole, killed = DIRECTORY / f"whole-{name}-{seed}", DIRECTORY / f"killed-{name}-{seed}"
    deaths = DIRECTORY / "deaths"
    deaths.write_text("")
    events = attempt(whole, name, seed, 0)
    dice = random.Random(seed)
    kills = 0
    while attempt(killed, name, seed, dice.randrange(1, events // 3) if kills < MAX_KILLS else 0) is None:
        kills += 1
    expected, found = facts(whole), facts(killed)
    return {
        "case": f"{name}:{seed}",
        "kills": kills,
        "attempts": len(highcamp.open(killed).history.attempts),
        "deaths": deaths.read_text().splitlines(),
        "batches": sorted({start.batch for start in highcamp.open(killed).history.attempts}),
        "different": {key: [expected[key], found[key]] for key in expected if expected[key] != found[key]},
    }


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks for it
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for each in sys.argv[2:]:
        print(json.dumps(compare(each.split(":")[0], int(each.split(":")[1]))), flush=True)
