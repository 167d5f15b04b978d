"""Handwritten digits with JAX and Optax: kill it whenever you like, run it again, and it ends as if nothing had happened.

    python examples/jax_digits.py --directory runs/digits
    python examples/jax_digits.py --directory runs/digits      # after a crash: goes on; after the end: says so

The whole state of the training is one dict: parameters, the optimizer's state, the random key that dropout draws from, and
the loss so far. The step is compiled and donates it, so a step needs no memory for a second state. The last lines are
digests of the final weights, of the optimizer's state, of the metrics and of the history. They are the same for every run of
this script on one machine, however often it was killed.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xxhash
from sklearn.datasets import load_digits

from highcamp import Checkpointer, Every

if TYPE_CHECKING:
    from highcamp.storage.store import Store

BATCH, TRAIN = 50, 1000  # images; the other 797 are for validation
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 2e-2, warmup_steps=20, decay_steps=160)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE))


def begin(seed: int) -> dict[str, Any]:
    """The state before the first step."""
    key, first, second = jax.random.split(jax.random.key(seed), 3)
    params = {
        "hidden": {"weight": jax.random.normal(first, (64, 32)) / 8, "bias": jnp.zeros(32)},
        "scores": {"weight": jax.random.normal(second, (32, 10)) / 6, "bias": jnp.zeros(10)},
    }
    return {"params": params, "optimizer": OPTIMIZER.init(params), "key": key, "loss": jnp.zeros(())}


def scores(params: dict[str, Any], images: jax.Array, dropout: jax.Array | None = None) -> jax.Array:
    """One number for each image and digit. dropout: a random key, while training."""
    hidden = jax.nn.relu(images @ params["hidden"]["weight"] + params["hidden"]["bias"])
    if dropout is not None:
        hidden = jnp.where(jax.random.bernoulli(dropout, 0.7, hidden.shape), hidden / 0.7, 0.0)
    return hidden @ params["scores"]["weight"] + params["scores"]["bias"]


def loss(params: dict[str, Any], images: jax.Array, labels: jax.Array, dropout: jax.Array | None = None) -> jax.Array:
    """The mean over a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(scores(params, images, dropout), labels).mean()


@partial(jax.jit, donate_argnums=0)
def step(state: dict[str, Any], images: jax.Array, labels: jax.Array) -> dict[str, Any]:
    """The state after one batch; the one before is deleted."""
    key, dropout = jax.random.split(state["key"])
    value, gradients = jax.value_and_grad(loss)(state["params"], images, labels, dropout)
    updates, optimizer = OPTIMIZER.update(gradients, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "optimizer": optimizer, "key": key, "loss": state["loss"] + value}


@jax.jit
def validate(params: dict[str, Any], images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Loss and accuracy."""
    right = scores(params, images).argmax(axis=1) == labels
    return {"val_loss": loss(params, images, labels), "val_accuracy": right.mean()}


def digest(state: Any) -> str:
    """A short digest of a state, to the last bit."""
    hasher = xxhash.xxh3_128()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        hasher.update(jax.tree_util.keystr(path).encode())
        hasher.update(np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes())
    return hasher.hexdigest()


def train(directory: str | Store, epochs: int, steps: int | None = None, verbose: int = 1) -> dict[str, Any]:
    """Train, or go on with training; what must be the same in the end, by name."""
    images, labels = load_digits(return_X_y=True)
    images, labels = np.float32(images / 16), np.int32(labels)
    state = begin(seed=7)
    every = Every(epochs=1, steps=steps)
    with Checkpointer(directory, monitor="val_loss", every=every, verbose=verbose) as checkpointer:
        checkpointer.track(state=state)
        for epoch in checkpointer.epochs(epochs):
            order = np.random.default_rng((7, epoch)).permutation(TRAIN).reshape(-1, BATCH)
            for rows in checkpointer.batches(order):
                state.update(step(state, images[rows], labels[rows]))
            mean, state["loss"] = state["loss"] / len(order), jnp.zeros(())
            metrics = validate(state["params"], images[TRAIN:], labels[TRAIN:])
            checkpointer.log(metrics, train_loss=mean)
        run = checkpointer.run
        history = [(row.epoch, row.step, dict(row.metrics)) for row in run.history.epochs()]
        return {"state": state, "history": history, "best": run.best}


def main() -> None:
    """Train, or go on with training, and print the digests."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--directory", default="runs/jax-digits", help="the run")
    parser.add_argument("--epochs", type=int, default=8, help="how many to train in all")
    parser.add_argument("--steps", type=int, help="save every so many steps, beside every epoch")
    arguments = parser.parse_args()
    found = train(arguments.directory, arguments.epochs, arguments.steps)

    state, history, best = found["state"], found["history"], found["best"]
    print(f"best: epoch {best.epoch}, val_loss {best.metrics['val_loss']:.6f}")
    print("weights  ", digest(state["params"]))
    print("optimizer", digest(state["optimizer"]))
    print("key      ", digest(state["key"]))
    print("metrics  ", json.dumps(history[-1][2]))
    print("history  ", xxhash.xxh3_128_hexdigest(repr(history).encode()), f"{len(history)} epochs")


if __name__ == "__main__":
    main()
