"""Train one epoch with one framework, and say what the weights are then: `write_script.py FRAMEWORK DIRECTORY`.

The run is DIRECTORY/FRAMEWORK; what the framework itself says of its weights goes to DIRECTORY/FRAMEWORK.json as
{name: [dtype, shape, bytes in hexadecimal]}.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from highcamp import Checkpointer

FRAMEWORK, DIRECTORY = sys.argv[1], Path(sys.argv[2])
RUN = DIRECTORY / FRAMEWORK


def write_torch() -> dict[str, Any]:
    """A loop of one's own; float32 and bfloat16. Only the model is saved: another framework has no use for the rest."""
    import torch

    torch.manual_seed(1)
    model = torch.nn.ModuleDict(
        {"dense": torch.nn.Linear(4, 3), "brief": torch.nn.Linear(3, 2, bias=False, dtype=torch.bfloat16)}
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with Checkpointer(RUN, monitor="loss", verbose=0) as checkpointer:
        checkpointer.track(model=model)
        for _ in checkpointer.epochs(1):
            for batch in checkpointer.batches(torch.randn(3, 5, 4)):
                loss = model["brief"](model["dense"](batch).bfloat16()).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            checkpointer.log(loss=loss.detach())
    return _of_torch(model)


def _of_torch(model: Any) -> dict[str, Any]:
    import torch

    return {
        name: [
            str(value.dtype)[6:],
            list(value.shape),
            value.contiguous().flatten().view(torch.uint8).numpy().tobytes().hex(),
        ]
        for name, value in model.state_dict().items()
    }


def write_lightning() -> dict[str, Any]:
    """A Trainer with our callback."""
    import lightning.pytorch as pl
    import torch

    from highcamp.lightning import CheckpointCallback

    warnings.filterwarnings("ignore", module="lightning|torch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        """One layer."""

        def __init__(self) -> None:
            super().__init__()
            self.dense = torch.nn.Linear(4, 3)

        def training_step(self, batch: Any, _: int) -> Any:
            """Its loss."""
            loss = self.dense(batch).square().mean()
            self.log("train_loss", loss, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            """One."""
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    torch.manual_seed(1)
    module = Module()
    pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[CheckpointCallback(RUN, monitor="train_loss", verbose=0)],
    ).fit(module, torch.utils.data.DataLoader(torch.randn(12, 4), batch_size=4))  # fmt: skip
    return _of_torch(module)


def write_transformers() -> dict[str, Any]:
    """A Trainer with our callback, and a model with tied weights."""
    import torch
    import transformers

    from highcamp.transformers import CheckpointCallback

    transformers.logging.set_verbosity_error()
    torch.manual_seed(1)
    shape = {"vocab_size": 11, "n_positions": 8, "n_layer": 1, "n_head": 1, "n_embd": 4}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    rows = [{"input_ids": torch.arange(5) + shift, "labels": torch.arange(5) + shift} for shift in range(6)]
    arguments = transformers.TrainingArguments(
        DIRECTORY / "trainer", save_strategy="no", num_train_epochs=1, per_device_train_batch_size=2, disable_tqdm=True,
        eval_strategy="epoch", metric_for_best_model="eval_loss", report_to="none", use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[CheckpointCallback(RUN, verbose=0)]
    ).train()
    return _of_torch(model)


def write_keras() -> dict[str, Any]:
    """Model.fit with our callback."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    from highcamp.keras import CheckpointCallback

    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name="dense"), keras.layers.BatchNormalization()]
    )
    model.compile("adam", "mse")
    x = np.random.default_rng(1).random((8, 4), np.float32)
    model.fit(
        x, x[:, :3], epochs=1, verbose=0, callbacks=[CheckpointCallback(RUN, monitor="loss", verbose=0)], batch_size=4
    )
    return {
        variable.path.removeprefix("sequential/"): _of_numpy(keras.ops.convert_to_numpy(variable))
        for variable in model.variables
    }


def _of_numpy(array: Any) -> list[Any]:
    array = np.asarray(array)
    return [str(array.dtype), list(array.shape), array.tobytes().hex()]


def write_jax() -> dict[str, Any]:
    """State that is passed; float32 and bfloat16."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(1))
    model = {"dense": {"kernel": jax.random.normal(keys[0], (4, 3)), "bias": jnp.zeros(3)},
             "brief": {"kernel": jax.random.normal(keys[1], (3, 2), jnp.bfloat16)}}  # fmt: skip
    with Checkpointer(RUN, monitor="loss", verbose=0) as checkpointer:
        assert checkpointer.restore(like={"model": model}) is None
        model = jax.tree.map(lambda leaf: leaf * 0.5, model)
        checkpointer.save({"model": model}, step=1, epoch=1, metrics={"loss": 0.5})
    return {f"{layer}/{name}": _of_numpy(leaf) for layer, leaves in model.items() for name, leaf in leaves.items()}


if __name__ == "__main__":
    found = globals()[f"write_{FRAMEWORK}"]()
    (DIRECTORY / f"{FRAMEWORK}.json").write_text(json.dumps(found))
