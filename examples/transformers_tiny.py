"""Train a tiny GPT-2 to add numbers; kill it at any moment, run it again, and it prints the same digests in the end.

    python examples/transformers_tiny.py runs/tiny

Dropout, shuffling, a cosine schedule, two micro-batches per step, an evaluation every 8 steps, early stopping: all that has
a state. A checkpoint is due every 5 steps and at the end of each epoch. No network is needed: the model comes from a
configuration, the data from a generator.
"""

from __future__ import annotations

import hashlib
import json
import sys

import torch
from transformers import EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from highcamp import Every, Keep
from highcamp.transformers import CheckpointCallback

DIGITS, PLUS, EQUALS, VOCABULARY = 10, 10, 11, 12


def sums(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sequences such as 1 7 + 2 5 = 0 4 2; only the sum is learned."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for left, right in torch.randint(0, 100, (count, 2), generator=generator).tolist():
        digits = [left // 10, left % 10, PLUS, right // 10, right % 10, EQUALS]
        total = [(left + right) // 100, (left + right) // 10 % 10, (left + right) % 10]
        labels = [-100] * len(digits) + total
        rows.append({"input_ids": torch.tensor(digits + total), "labels": torch.tensor(labels)})
    return rows


def digest(state: object) -> str:
    """Of a tree of tensors and plain values, to the last bit."""
    found = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                found.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for each in value:
                add(each)
        else:
            found.update(repr(value).encode())

    add(state)
    return found.hexdigest()[:16]


def timeless(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Logs without what the clock decides."""
    clocked = ("_runtime", "_per_second")
    return [{name: value for name, value in row.items() if not name.endswith(clocked)} for row in rows]


def main(directory: str = "runs/tiny") -> None:
    """Train, go back to the best weights, and print what must always be the same."""
    torch.manual_seed(0)
    configuration = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_layer=2, n_head=2, n_embd=32, bos_token_id=EQUALS, eos_token_id=EQUALS
    )
    arguments = TrainingArguments(
        f"{directory}-trainer",
        save_strategy="no",  # highcamp saves
        num_train_epochs=3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        eval_strategy="steps",
        eval_steps=8,
        logging_steps=3,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    checkpoints = CheckpointCallback(directory, every=Every(steps=5, epochs=1), keep=Keep(best=1, last=2))
    trainer = Trainer(
        GPT2LMHeadModel(configuration),
        arguments,
        train_dataset=sums(256, seed=1),
        eval_dataset=sums(64, seed=2),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=50), checkpoints],
    )

    result = trainer.train()

    print("weights  ", digest(trainer.model.state_dict()))
    print("optimizer", digest(trainer.optimizer.state_dict()))
    print("schedule ", digest(trainer.lr_scheduler.state_dict()))
    print("metrics  ", json.dumps(timeless([result.metrics])[0]))
    print("log      ", digest(timeless(trainer.state.log_history)), len(trainer.state.log_history), "rows")
    best = checkpoints.restore("best")
    print(
        "best     ", digest(trainer.model.state_dict()), f"step {best.step}, eval_loss {best.metrics['eval_loss']:.6f}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
