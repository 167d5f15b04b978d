"""A data source whose order is a function of seed and epoch, so that training can go on in the middle of an epoch."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from highcamp.errors import InvalidArgument, Mismatch

if TYPE_CHECKING:
    from collections.abc import Callable

    Batch = tuple[Any, ...]

_MASK = (1 << 64) - 1  # half of a Philox key


class EpochDataset(keras.utils.PyDataset):
    """Batches of arrays in an order that depends on `seed` and the epoch alone, on every backend and with any workers.

        train = EpochDataset(x, y, batch_size=32, seed=1)
        model.fit(train, epochs=50, callbacks=[CheckpointCallback("runs/digits", data=train)])

    x, y, sample_weight: arrays of the same length along their first axis, or nested lists and dicts of them; what is not
    given is left out of the batches. transform: called with a batch (a tuple) and a `numpy.random.Generator` that
    depends on seed, epoch and position alone; its result is the batch, so augmentation resumes exactly too. workers:
    threads that load ahead. To read samples from files, let `x` be an array of their names and override `load`.

    `CheckpointCallback(data=…)` tells it the epoch. Without one it counts the passes itself, from 0. While an epoch runs,
    batches come in that epoch's order whatever index is asked for: `fit` shuffles the indices once more by default,
    with a generator that nobody could resume. `batch(epoch, position)` reads any batch at any time.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int = 32,
        seed: int = 0,
        shuffle: bool = True,
        transform: Callable[[Batch, np.random.Generator], Batch] | None = None,
        workers: int = 1,
    ) -> None:
        """Raise InvalidArgument for lengths that differ, empty data, and counts below 1."""
        # Keras's own workers keep batches of the pass before in their queue, so ours are threads of our own.
        super().__init__(workers=1, use_multiprocessing=False)
        self.batch_size = _count("batch_size", batch_size)
        self.seed = _whole("seed", seed)
        self.shuffle = bool(shuffle)
        self.transform = transform
        self._arrays = _as_arrays(x, y, sample_weight)
        self.size = _length_of_all(self._arrays)
        self._threads = _count("workers", workers)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: dict[int, Future[Batch]] = {}
        self._epoch = 0
        self._position = 0  # batches of this epoch that are done already: only their places are filled
        self._cursor: int | None = None  # the next batch of the pass under way; None between passes
        self._order: tuple[int, np.ndarray[Any, Any]] | None = None

    def __len__(self) -> int:
        """Batches per epoch; the last one may be smaller."""
        return (self.size + self.batch_size - 1) // self.batch_size

    @property
    def epoch(self) -> int:
        """The epoch, from 0, whose order is in force."""
        return self._epoch

    def set_epoch(self, epoch: int, *, position: int = 0) -> None:
        """Begin `epoch` (from 0) with the next pass. position: batches at its beginning that have been trained on already.

        Those are not loaded: their places are filled with another batch, and whoever sets a position passes over them.
        Raises InvalidArgument outside of 0 <= position <= len(self).
        """
        if epoch < 0 or not 0 <= position <= len(self):
            raise InvalidArgument(
                f"EpochDataset: epoch {epoch}, position {position} is outside of what there is ({len(self)} batches)"
            )
        with self._lock:
            self._epoch, self._position = int(epoch), int(position)
            self._cursor = None if self._cursor is None else 0
            self._forget_ahead()

    def batch(self, epoch: int, position: int) -> Batch:
        """The batch at `position` of `epoch`, both from 0; a pure function of these two."""
        if not 0 <= position < len(self):
            raise IndexError(f"batch {position} of {len(self)}")
        chosen = self._indices(epoch)[position * self.batch_size : (position + 1) * self.batch_size]
        # Philox, because NumPy promises that the raw numbers of a bit generator never change between versions.
        rng = np.random.Generator(np.random.Philox(key=_key(self.seed, epoch), counter=[0, 0, position, 1]))
        batch = self.load(chosen, rng)
        return batch if self.transform is None else self.transform(batch, rng)

    def load(self, indices: np.ndarray[Any, Any], rng: np.random.Generator) -> Batch:  # noqa: ARG002
        """The samples at `indices` ((n,) int64) as one batch `(x,)`, `(x, y)` or `(x, y, sample_weight)`.

        Override it to read them from elsewhere; draw random numbers only from `rng`. Called in several threads at once
        if `workers` is above 1.
        """
        found: Batch = keras.tree.map_structure(lambda array: array[indices], self._arrays)
        return found

    def __getitem__(self, index: int) -> Batch:
        """During a pass the next batch of the epoch's order, otherwise batch `index` of it."""
        with self._lock:
            at = int(index)
            if self._cursor is not None:
                at = min(self._cursor, len(self) - 1)  # Keras builds its signatures from batches it reads twice
                self._cursor += 1
            epoch, position = self._epoch, self._position
            at = max(at, min(position, len(self) - 1))
            future = self._future(epoch, at)
        return self.batch(epoch, at) if future is None else future.result()

    def on_epoch_begin(self) -> None:
        """Keras begins a pass."""
        with self._lock:
            self._cursor = 0

    def on_epoch_end(self) -> None:
        """Keras ends a pass. After a whole one the next epoch is in force, unless `set_epoch` says another."""
        with self._lock:
            if self._cursor is not None and self._cursor >= len(self):
                self._epoch, self._position = self._epoch + 1, 0
            self._cursor = None
            self._forget_ahead()

    def state_dict(self) -> dict[str, Any]:
        """What the order depends on, for comparison after a restart."""
        return {"seed": self.seed, "size": self.size, "batch_size": self.batch_size, "shuffle": self.shuffle}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the data of the run. Raises Mismatch listing every difference: the order would be another one."""
        here = self.state_dict()
        differing = [name for name, value in here.items() if state.get(name) != value]
        lines = [f"\n  {name}: {state.get(name)} in the checkpoint, {here[name]} here" for name in differing]
        if lines:
            raise Mismatch(
                "the data are not those of the run:" + "".join(lines),
                hint="use the same data, batch_size and seed, or another directory",
            )

    def __getstate__(self) -> dict[str, Any]:
        """Everything but threads and locks."""
        return {**self.__dict__, "_lock": None, "_pool": None, "_ahead": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The reverse, with a lock of its own."""
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _indices(self, epoch: int) -> np.ndarray[Any, Any]:
        known = self._order
        if known is not None and known[0] == epoch:
            return known[1]
        if self.shuffle:
            raw = np.random.Philox(key=_key(self.seed, epoch)).random_raw(self.size)
            order = np.argsort(raw, kind="stable")
        else:
            order = np.arange(self.size)
        self._order = (epoch, order)
        return order

    def _future(self, epoch: int, at: int) -> Future[Batch] | None:
        """With workers: the batch being loaded, and the following ones put to work. Called with the lock held."""
        if self._threads == 1:
            return None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="highcamp-data")
        for place in range(at, min(at + 2 * self._threads, len(self))):
            if place not in self._ahead:
                self._ahead[place] = self._pool.submit(self.batch, epoch, place)
        for place in [place for place in self._ahead if place < at]:
            del self._ahead[place]
        return self._ahead[at]

    def _forget_ahead(self) -> None:
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()


def _key(seed: int, epoch: int) -> int:
    return ((seed & _MASK) << 64) | (epoch & _MASK)


def _as_arrays(x: Any, y: Any, sample_weight: Any) -> Batch:
    if x is None:
        raise InvalidArgument("EpochDataset: x is None", hint="give an array, or nested lists and dicts of arrays")
    if sample_weight is not None and y is None:
        raise InvalidArgument("EpochDataset: sample_weight without y", hint="weights belong to targets")
    given = [part for part in (x, y, sample_weight) if part is not None]
    arrays: Batch = tuple(keras.tree.map_structure(np.asarray, part) for part in given)
    return arrays


def _length_of_all(arrays: Batch) -> int:
    lengths = [len(array) if array.ndim else None for array in keras.tree.flatten(arrays)]
    if None in lengths or len(set(lengths)) != 1:
        shown = ", ".join("a single value" if length is None else str(length) for length in lengths)
        raise InvalidArgument(
            f"EpochDataset: the arrays differ in length ({shown})", hint="all of them have one row per sample"
        )
    if not lengths[0]:
        raise InvalidArgument("EpochDataset: the arrays are empty")
    return int(lengths[0])


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InvalidArgument(f"EpochDataset: {name} is {value!r}, not a whole number")
    return int(value)


def _count(name: str, value: Any) -> int:
    count = _whole(name, value)
    if count < 1:
        raise InvalidArgument(f"EpochDataset: {name} is {count}, not at least 1")
    return count
