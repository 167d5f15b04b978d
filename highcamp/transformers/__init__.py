"""Hugging Face Transformers: the whole of highcamp inside `Trainer.train`.

    from highcamp.transformers import CheckpointCallback

    trainer = Trainer(model, args, train_dataset=data, callbacks=[CheckpointCallback("runs/x", monitor="eval_loss")])
    trainer.train()

Works with transformers 5.23 and newer, below 6. Importing it with another version raises MissingExtra.
"""

from __future__ import annotations

import re

import transformers

from highcamp.errors import MissingExtra

OLDEST = (5, 23)
NEWEST_MAJOR = 5  # the Trainer's loop was written anew in 5, and may be again in 6


def _check_version(version: str) -> None:
    """Whether the Trainer of this version is known. Raises MissingExtra naming the versions that are."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    found = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if found < OLDEST or found[0] > NEWEST_MAJOR:
        oldest = ".".join(map(str, OLDEST))
        raise MissingExtra(
            f"highcamp.transformers knows the Trainer of transformers {oldest} and newer, below {NEWEST_MAJOR + 1}; "
            f"here is {version}",
            hint=f"pip install 'transformers>={oldest},<{NEWEST_MAJOR + 1}'",
        )


_check_version(transformers.__version__)

from highcamp.transformers.callback import CheckpointCallback  # noqa: E402  (what it imports is asked for its version first)

__all__ = ["CheckpointCallback"]
