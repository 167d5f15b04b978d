from __future__ import annotations

import errno
import itertools

import pytest

import highcamp.testing
from highcamp.errors import StorageError
from highcamp.storage.memory import MemoryStore
from highcamp.testing import FaultyStore

STEP = "checkpoints/step-00000001"
TRASH = "checkpoints/.trash-1"


def work(store):
    """One of each operation that changes something."""
    draft = store.draft(STEP)
    store.create(f"{draft}/a", [b"12", b"34"])
    store.create(f"{draft}/manifest.json", [b"{}"])
    store.publish(draft, STEP)
    store.replace("run.json", b"{}")
    store.append("history", b"row", durable=True)
    store.withdraw(STEP, TRASH)
    store.remove(TRASH)


OPERATIONS = [
    f"draft {STEP}",
    f"create {STEP}/a",
    f"create {STEP}/manifest.json",
    f"publish {STEP} {STEP}",
    "replace run.json",
    "append history",
    f"withdraw {STEP} {TRASH}",
    f"remove {TRASH}",
]


def test_operations_are_logged_and_nothing_else_changes():
    """The loop over N ends when a run goes through; a miscount would end it early, and prove nothing."""
    for store in (FaultyStore(MemoryStore(), fail_at=0), FaultyStore(MemoryStore(), fail_at=9)):
        work(store)

        assert store.operations == OPERATIONS
        assert not store.failed
        assert store.list("") == ["history", "run.json"]


@pytest.mark.parametrize("at", range(1, 9))
def test_a_clean_failure_changes_nothing(at):
    """Operation N fails, what came before it is there, and nothing of it or after it."""
    real, expected = MemoryStore(), MemoryStore()
    store = FaultyStore(real, fail_at=at)

    with pytest.raises(StorageError, match=f"injected: {OPERATIONS[at - 1]}") as caught:
        work(store)

    with pytest.raises(StorageError):
        work(FaultyStore(expected, fail_at=at))
    assert caught.value.errno == errno.EIO
    assert store.failed
    assert store.operations == OPERATIONS[:at]
    assert len(real._files) == [0, 0, 1, 2, 2, 3, 4, 4][at - 1]
    assert real._files == expected._files


@pytest.mark.parametrize(
    ("at", "left"),
    [
        (1, {}),
        (2, {f"{STEP}/a": b"12"}),
        (3, {f"{STEP}/a": b"1234", f"{STEP}/manifest.json": b"{"}),
        (5, {f"{STEP}/a": b"1234", f"{STEP}/manifest.json": b"{}", "run.json": b"{}"}),
        (6, {f"{STEP}/a": b"1234", f"{STEP}/manifest.json": b"{}", "run.json": b"{}", "history": b"row"}),
        (7, {f"{TRASH}/a": b"1234", f"{TRASH}/manifest.json": b"{}", "run.json": b"{}", "history": b"row"}),
        (8, {f"{TRASH}/manifest.json": b"{}", "run.json": b"{}", "history": b"row"}),
    ],
)
def test_a_torn_failure_half_happens(at, left):
    """Half a file, a removal that got stuck, a rename that worked and was reported as failed."""
    real = MemoryStore()

    with pytest.raises(StorageError, match="injected"):
        work(FaultyStore(real, fail_at=at, torn=True))

    assert real._files == left
    assert real.list("checkpoints") == {1: [STEP[12:]], 7: [TRASH[12:]], 8: [TRASH[12:]]}.get(at, [STEP[12:]])


def test_one_failure_is_over_the_dead_stay_dead():
    """A transient error is followed by a clean-up; after a kill nothing runs, reading neither."""
    once = FaultyStore(MemoryStore(), fail_at=1)
    dead = FaultyStore(MemoryStore(), fail_at=1, forever=True)
    for store in (once, dead):
        with pytest.raises(StorageError):
            store.draft(STEP)

    work(once)
    for call in (
        lambda: dead.draft(STEP),
        lambda: dead.replace("run.json", b""),
        lambda: dead.list(""),
        lambda: dead.size("run.json"),
        lambda: dead.read("run.json", 1),
        lambda: dead.open("run.json"),
    ):
        with pytest.raises(StorageError, match="injected"):
            call()


def test_the_error_can_be_chosen():
    """Ctrl-C and memory errors end a save as well as a disk does."""
    for error in (KeyboardInterrupt(), MemoryError(), StorageError("full", errno=errno.ENOSPC)):
        store = FaultyStore(MemoryStore(), fail_at=2, error=error)
        with pytest.raises(type(error)) as caught:
            work(store)
        assert caught.value is error


def test_the_loop_of_the_docstring_ends():
    """The loop as it is documented: every operation fails once, then a run goes through."""
    for at in itertools.count(1):
        store = FaultyStore(MemoryStore(), fail_at=at, torn=True)
        try:
            work(store)
        except StorageError:
            assert store.failed
        if not store.failed:
            break
    assert at == len(OPERATIONS) + 1


def test_testing_offers_its_names():
    """Others test their stores with what is exported here."""
    assert highcamp.testing.__all__ == ["FaultyStore", "StoreContract"]
    assert highcamp.testing.StoreContract.__name__ == "StoreContract"
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = highcamp.testing.Nothing
