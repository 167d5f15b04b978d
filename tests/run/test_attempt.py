"""The attempt under way, when the disk fails beneath it."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path

import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Damaged, Every, Keep
from highcamp.errors import StorageError
from highcamp.run.attempt import OngoingAttempt
from highcamp.storage.local import LocalStore
from highcamp.storage.memory import MemoryStore


class Tearing(MemoryStore):
    """Its N-th append from `begin` on writes half, and fails."""

    def __init__(self, fail_at):
        super().__init__()
        self.left = fail_at
        self.is_begun = False

    def append(self, path, data, *, durable):
        self.left -= self.is_begun
        if self.is_begun and self.left == 0:
            super().append(path, data[: len(data) // 2], durable=False)
            raise StorageError(f"append of {path} failed: EIO", path=path, errno=errno.EIO)
        super().append(path, data, durable=durable)


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4])
def test_a_row_that_was_torn_comes_back_with_the_next(fail_at):
    """Half of it lies at the end of the file: glued to that, the row is lost when it is written again."""
    store = Tearing(fail_at)
    attempt = OngoingAttempt(store, monitor=None, keep=Keep(), every=Every(epochs=1))
    attempt.start(None)
    store.is_begun = True
    for step in (1, 2, 3):
        with contextlib.suppress(StorageError):
            attempt.log(step, step, {"val_loss": step})
    for _ in range(2):  # the first may be the one that fails
        with contextlib.suppress(StorageError):
            attempt.sync()
    attempt.release()

    assert store.left <= 0
    assert [row.metrics for row in highcamp.open(store).history.rows] == [{"val_loss": step} for step in (1, 2, 3)]


def test_nothing_goes_while_what_would_be_left_is_damaged(tmp_path):
    """The disk has altered what was written a moment ago, and the older one would have been removed for it."""

    class Altering(LocalStore):
        def publish(self, draft, target):
            super().publish(draft, target)
            if target.endswith("2"):
                file = Path(tmp_path, target, "model.safetensors")
                data = bytearray(file.read_bytes())
                data[-1] ^= 1
                file.write_bytes(data)

    checkpointer = Checkpointer(Altering(tmp_path), every=Every(steps=1), keep=Keep(best=0, last=1), verbose=0)
    for step in (1, 2):
        checkpointer.save({"model": {"w": np.full(3, step)}}, step=step).wait()

    with pytest.raises(Damaged, match="nothing was removed: step-00000002 would be all that is left, and is not whole"):
        checkpointer.close()
    assert [result.state for result in highcamp.open(tmp_path).verify()] == ["whole", "altered"]


def test_rows_are_durable_before_the_checkpoint_that_they_rank(tmp_path):
    """After a power cut the best would be unranked, and the one that it has replaced is gone."""
    undurable, published = [], []

    class Watched(LocalStore):
        def append(self, path, data, *, durable):
            super().append(path, data, durable=durable)
            undurable.append(path)
            if durable:
                undurable.clear()

        def create(self, path, chunks):
            if path.endswith("manifest.json"):
                published.append(list(undurable))
            super().create(path, chunks)

    with Checkpointer(Watched(tmp_path), every=Every(steps=1), verbose=0) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.log(val_loss=1 / step, step=step)
            assert undurable
            checkpointer.save({"model": {"w": np.full(3, step)}}, step=step).wait()

    assert published == [[], [], []]
