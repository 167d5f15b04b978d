from __future__ import annotations

import pytest

from highcamp.errors import StorageError, Taken
from highcamp.storage.memory import MemoryStore

STEP = "checkpoints/step-00000001"


class Recorded(dict):
    """Files, and the order in which names come and go."""

    def __init__(self):
        super().__init__()
        self.log = []

    def __setitem__(self, name, data):
        self.log.append(f"+{name}")
        super().__setitem__(name, data)

    def __delitem__(self, name):
        self.log.append(f"-{name}")
        super().__delitem__(name)


@pytest.fixture
def store():
    """Give a new store that records what happens to its files."""
    made = MemoryStore("test")
    made._files = Recorded()
    return made


def test_a_draft_is_listed_under_its_final_name(store):
    """An object store has nothing to hide a draft behind: who trusts a listing is found out here."""
    assert store.draft(STEP) == STEP
    assert store.list("checkpoints") == ["step-00000001"]

    store.create(f"{STEP}/model.safetensors", [b"1"])
    assert store.list(STEP) == ["model.safetensors"]


def test_a_name_with_anything_below_is_taken(store):
    """No rename would refuse it later."""
    store.create(f"{STEP}/leftover", [b"1"])

    with pytest.raises(Taken, match=r"memory://test/checkpoints/step-00000001 is in use already"):
        store.draft(STEP)


def test_withdraw_takes_the_manifest_first(store):
    """Removed the other way round, a reader would see a manifest whose files are going."""
    store.draft(STEP)
    for name in ("a", "manifest.json", "z"):
        store.create(f"{STEP}/{name}", [b"1"])
    store.publish(STEP, STEP)
    store._files.log.clear()

    store.withdraw(STEP, "trash")
    assert store._files.log[:2] == ["+trash/manifest.json", f"-{STEP}/manifest.json"]
    store._files.log.clear()

    store.publish("trash", STEP)
    assert store._files.log[-2:] == [f"+{STEP}/manifest.json", "-trash/manifest.json"]


def test_a_draft_that_was_withdrawn_is_not_listed(store):
    """Its name is free for the next save."""
    store.create(f"{store.draft(STEP)}/a", [b"1"])

    store.withdraw(STEP, "trash")

    assert store.list("") == ["trash"]


def test_a_reader_keeps_what_it_opened(store):
    """A replaced file is the old one or the new one, never a mix."""
    store.replace("run.json", b"old")

    with store.open("run.json") as reader:
        store.replace("run.json", b"newer")
        assert bytes(reader.map()) == b"old"


def test_what_is_written_is_copied(store):
    """The staging memory is used again after the save."""
    data = bytearray(b"1234")
    store.create("x", [data])
    store.replace("y", data)
    store.append("z", data, durable=True)
    data[:] = b"5678"

    assert [store.read(name, 9) for name in "xyz"] == [b"1234"] * 3
    with pytest.raises(StorageError):
        store.list("x")
