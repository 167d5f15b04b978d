"""What the demo says, in whole sentences: each made from what was measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from highcamp.cli.text import count, number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from highcamp.cli.look import Look

FEW_EPOCHS = 5  # val_loss goes up and down by itself from one epoch to the next

TITLES = {1: "Load", 2: "Preprocess", 3: "Split", 4: "Define", 5: "Compile", 6: "Train", 7: "Evaluate"}


def step_sentence(facts: Mapping[str, Any], epochs: int) -> str:
    """What one of the seven steps does. facts: as the training script told them."""
    sentences = {
        1: "{images:,} images of handwritten digits, 8 x 8 pixels each; they come with scikit-learn.",
        2: "Brightness from 0 to 16 becomes numbers from 0 to 1.",
        3: "{training} images to learn from, {validation} to watch progress on (val_), {test} kept for the end.",
        4: "A small convolutional network with {weights:,} weights.",
        5: "Adam changes the weights so that the loss, the measure of its mistakes, falls.",
        6: f"{count(epochs, 'epoch')}, a checkpoint after each; the one with the lowest val_loss is the best.",
        7: "The last and the best weights read the test images, which the network has never seen.",
    }
    return sentences[int(facts["step"])].format(**facts)


def best_and_last(seen: Look) -> str:
    """Where the best and the last epoch fall."""
    best, last = seen.best, seen.last
    if best is None or last is None:
        return "No checkpoint has a finite val_loss, so there is no best."
    low, now = best.metrics["val_loss"], last.metrics.get("val_loss")
    if best.name == last.name:
        return (
            f"The last epoch, {last.epoch}, is also the best: val_loss {number(low)}. The network was still getting better;"
            " more epochs may find a better one."
        )
    if now is None or low <= 0:
        return f"The best epoch is {best.epoch}, with val_loss {number(low)}; the last is {last.epoch}."
    sentence = (
        f"val_loss was lowest in epoch {best.epoch}: {number(low)}. In the last epoch, {last.epoch}, it is {number(now)},"
        f" {100 * (now / low - 1):.0f} % worse"
    )
    if last.epoch - best.epoch < FEW_EPOCHS:
        return f"{sentence}; so shortly after, that may be chance."
    training, training_now = best.metrics.get("loss"), last.metrics.get("loss")
    if training is not None and training_now is not None and training_now < training:
        return f"{sentence}, although the training loss kept falling: the network was learning its images by heart."
    return f"{sentence}."


def on_the_test_set(last: Mapping[str, Any], best: Mapping[str, Any], *, is_same: bool) -> str:
    """What the test images say about the best and the last weights, whichever is ahead."""
    if is_same:
        return "They are the same weights."
    difference = best["right"] - last["right"]
    # The standard error of counting so many right answers: less than that says nothing about the weights.
    chance = math.sqrt(last["right"] * (1 - last["right"] / last["of"]))
    doubt = f" (of {last['of']}; that is within chance)" if 0 < abs(difference) <= chance else ""
    by_loss = "lower" if best["loss"] < last["loss"] else "higher" if best["loss"] > last["loss"] else "the same"
    if difference == 0:
        sentence = "The best weights read as many images correctly as the last"
    else:
        more = "more" if difference > 0 else "fewer"
        sentence = f"The best weights read {count(abs(difference), 'image')} {more} correctly than the last{doubt}"
    if by_loss == "lower":
        if difference > 0:
            return f"{sentence}, and their loss is lower."
        return f"{sentence}, but their loss is lower: it also counts how sure each answer was."
    return f"{sentence}; their loss is {by_loss}."
