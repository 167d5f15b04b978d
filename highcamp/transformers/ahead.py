"""Ahead: the batches that a loader has read but that no step has trained on yet.

accelerate's loaders are one batch ahead, and the Trainer reads all batches of a step before the first is trained on. Where
reading draws random numbers (a collator that masks tokens, an augmentation), those batches cannot be read again: their
numbers were drawn before the save, in between those of the steps. So they are part of the checkpoint.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from highcamp.core.tree import Flat, flatten
from highcamp.errors import InvalidState
from highcamp.run import live
from highcamp.training.rng import random_state


class Ahead:
    """Stands in for the collator of a loader without workers, and remembers what it returned until it is trained on.

    Only where reading a batch draws from a global generator, which the first two batches of each epoch tell.
    """

    def __init__(self, loader: Any) -> None:
        """Nothing is read yet. loader: its `collate_fn` is replaced, if it is one of torch's without workers."""
        if live.is_torch_loader(loader) and loader.num_workers == 0:
            self._collate = loader.collate_fn.inner if isinstance(loader.collate_fn, Ahead) else loader.collate_fn
            loader.collate_fn = self
        self._waiting: deque[Any] = deque()
        self._saved: deque[Any] = deque()
        self._to_drop = self._read = 0
        self._draws = False
        self._mark: Flat | None = None

    @property
    def inner(self) -> Any:
        """The collator in whose place this one stands."""
        return self._collate

    def begin(self, saved: Iterable[Any] | None = None, *, to_drop: int = 0) -> None:
        """An epoch begins. saved: the first batches, as `tree` gave them. to_drop: batches that are read before those."""
        self._waiting.clear()
        self._saved = deque(saved or ())
        self._draws = self._draws or bool(self._saved)
        self._to_drop, self._read, self._mark = to_drop, 0, None

    def __call__(self, samples: Any) -> Any:
        """A batch, made of samples by the loader's own collator."""
        batch = self._collate(samples)
        if self._to_drop:
            self._to_drop -= 1
            return batch
        if self._saved:
            batch = _filled(batch, self._saved.popleft())
        self._read += 1
        if self._read <= 2 and not self._draws:
            self._look()
        if self._draws or self._read < 2:
            self._waiting.append(batch)
        elif self._waiting:
            self._waiting.clear()
        return batch

    def trained(self, count: int) -> None:
        """`count` batches have been trained on."""
        for _ in range(min(count, len(self._waiting))):
            self._waiting.popleft()

    def tree(self) -> list[Any] | None:
        """The batches to come, None where reading them again gives the same. Raises InvalidState if files cannot hold them."""
        if not self._draws:
            return None
        batches = [dict(batch) if isinstance(batch, Mapping) else batch for batch in self._waiting]
        try:
            flatten(batches, live.as_array, where="a batch")
        except InvalidState as error:
            raise InvalidState(
                f"the training data draw random numbers while they are read, so the batches read ahead belong to the "
                f"checkpoint, but they cannot be saved: {error.message}",
                path=error.path,
                hint="let the collator return tensors and plain values, or save at the ends of epochs: every=Every(epochs=1)",
            ) from error
        return batches

    def _look(self) -> None:
        """Whether reading the second batch of an epoch has drawn a number; the first one's order may have been drawn too."""
        now = flatten(random_state(), live.as_array, where="random")
        if self._mark is not None:
            same = all(now.arrays[name].data == array.data for name, array in self._mark.arrays.items())
            self._draws = now.skeleton != self._mark.skeleton or not same
        self._mark = now


def _filled(batch: Any, saved: Any) -> Any:
    """The saved batch, in a container of the kind that the collator returns."""
    if isinstance(batch, MutableMapping) and isinstance(saved, dict):
        batch.clear()
        batch.update(saved)
        return batch
    return saved
