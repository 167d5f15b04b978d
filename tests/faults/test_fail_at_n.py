"""The N-th operation of a store fails, for N = 1, 2, 3, … until a run goes through untouched."""

from __future__ import annotations

import contextlib
import itertools

import fault_scene as scene
import fault_trace as trace
import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Keep
from highcamp.errors import StorageError
from highcamp.storage.local import LocalStore
from highcamp.storage.memory import MemoryStore
from highcamp.testing import FaultyStore


@pytest.mark.parametrize("forever", [False, True], ids=["once", "for_ever"])
@pytest.mark.parametrize("torn", [False, True], ids=["clean", "torn"])
@pytest.mark.parametrize("kind", scene.STORES)
def test_a_failure_anywhere_loses_nothing_acknowledged(place, kind, torn, forever):
    """Disks fail and processes die at any operation of a save, a prune or a pin; what was promised before must stay."""
    operations = scene.fail_at_each(lambda n: scene.STORES[kind](place, n), torn=torn, forever=forever)

    assert len(operations) >= 45
    words = {operation.split()[0] for operation in operations}
    assert words == {"create", "link", "draft", "publish", "withdraw", "remove", "replace", "append"}


@pytest.mark.parametrize("forever", [False, True], ids=["once", "for_ever"])
@pytest.mark.parametrize("torn", [False, True], ids=["clean", "torn"])
@pytest.mark.parametrize("kind", scene.STORES)
def test_a_failure_while_a_best_gives_back_its_resume_state(place, kind, torn, forever):
    """Its weights are committed anew before it goes: at no moment may the best be in neither of the two."""
    operations = scene.fail_at_each(
        lambda n: scene.STORES[kind](place, n), torn=torn, forever=forever, keep=scene.STRIP
    )

    copied = [operation for operation in operations if "step-00000004.2" in operation]
    words = [operation.split()[0] for operation in copied][:6]
    assert words == ["draft", "link", "link", "create", "create", "publish"]
    assert operations.index(copied[5]) < next(
        n for n, operation in enumerate(operations) if operation.startswith("withdraw checkpoints/step-00000004 ")
    )


def train_through_a_ring(store):
    """A training whose state goes through memory of a third of its size, while the loop waits."""
    weights = {"kernel": np.zeros(400_000)}
    with Checkpointer(store, monitor="val_loss", keep=Keep(best=1, last=2), staging_bytes=1 << 20, verbose=0) as saver:
        saver.track(model=weights)
        for epoch in saver.epochs(3):
            saver._saver.raise_failed(wait=True)
            weights["kernel"] += 1
            saver.log(val_loss=1 / (epoch + 1))
    return weights["kernel"]


@pytest.mark.parametrize("torn", [False, True], ids=["clean", "torn"])
def test_a_failure_anywhere_never_leaves_the_loop_waiting(place, torn):
    """The loop waits for room in the ring that only the writer makes; a writer that has failed makes none."""
    for n in itertools.count(1, trace.STRIDE):
        real = LocalStore(place / str(n))
        store = FaultyStore(real, fail_at=n, torn=torn)

        with contextlib.suppress(StorageError):
            train_through_a_ring(store)

        assert train_through_a_ring(real).tolist() == [3.0] * 400_000
        assert all(result.ok for result in highcamp.open(real).verify())
        if not store.failed:
            return


@pytest.mark.parametrize("kind", scene.STORES)
def test_clean_up_on_base_exception(place, kind):
    """Ctrl-C and the panics of foreign libraries are no Exceptions; half a save must not stay behind either."""
    for n in itertools.count(1):
        real = scene.STORES[kind](place, n)
        scene.prepare(real, scene.Diary())
        attempt = scene.begin(real)
        attempt._store = store = FaultyStore(real, fail_at=n, error=KeyboardInterrupt())

        with contextlib.suppress(KeyboardInterrupt):
            scene.save(attempt, 3)

        attempt.release()
        assert real.list("checkpoints") == [f"step-0000000{step}" for step in ((1, 2) if store.failed else (1, 2, 3))]
        if not store.failed:
            return


def train(store, *, epochs=4, on_error="raise", verbose=0):
    """A training script: the weights grow by what NumPy draws, so they tell whether the run was exact."""
    np.random.seed(7)
    weights = {"kernel": np.zeros(4)}
    with Checkpointer(
        store, monitor="val_loss", keep=Keep(best=1, last=2), on_error=on_error, verbose=verbose
    ) as saver:
        saver.track(model=weights)
        for epoch in saver.epochs(epochs):
            saver._saver.raise_failed(wait=True)  # so that the operations come in the same order each time
            weights["kernel"] += np.random.random(4)
            saver.log(val_loss=abs(epoch - 1.5) + epoch / 10)
    return weights["kernel"]


@pytest.mark.parametrize("torn", [False, True], ids=["clean", "torn"])
def test_errors_are_raised_and_the_next_start_goes_on(place, torn):
    """A save that failed in the background must not look like one that worked, and must not cost exactness."""
    expected = train(MemoryStore.named("uninterrupted"))
    best = highcamp.open("memory://uninterrupted").best.metrics
    for n in itertools.count(1):
        real = LocalStore(place / str(n))
        store = FaultyStore(real, fail_at=n, torn=torn)

        try:
            train(store)
        except StorageError as error:
            assert "injected" in str(error)  # noqa: PT017  (it may also go through)
        else:
            assert not store.failed or store.operations[n - 1] == "remove owner.json"

        assert np.array_equal(train(real), expected)
        assert highcamp.open(real).best.metrics == best
        assert all(result.ok for result in highcamp.open(real).verify())
        if not store.failed:
            return


@pytest.mark.parametrize("torn", [False, True], ids=["clean", "torn"])
@pytest.mark.parametrize("forever", [False, True], ids=["once", "for_ever"])
def test_with_on_error_warn_a_failed_disk_does_not_end_training(place, capsys, torn, forever):
    """People choose "warn" so that hours of computing survive a full disk; each failure is said, none is fatal."""
    expected = train(MemoryStore("whole"))
    store = LocalStore(place / "0")
    train(counting := FaultyStore(store, fail_at=0))
    first = counting.operations.index("draft checkpoints/step-00000001") + 1  # before that, nothing was trained
    for n in range(first, len(counting.operations) + 1):
        real = LocalStore(place / str(n))
        store = FaultyStore(real, fail_at=n, torn=torn, forever=forever)
        capsys.readouterr()

        found = train(store, on_error="warn")

        said = capsys.readouterr().err
        assert store.failed
        assert np.array_equal(found, expected)
        assert "injected" in said or store.operations[n - 1] == "remove owner.json"
        assert np.array_equal(train(real), expected)
