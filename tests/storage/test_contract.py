# What the three methods do is said by StoreContract.

from __future__ import annotations

from pathlib import Path

import pytest

from highcamp.storage.local import LocalStore
from highcamp.storage.memory import MemoryStore
from highcamp.testing import FaultyStore, StoreContract


class TestLocalStore(StoreContract):
    """The store for which everything else was built."""

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path):
        self.directory = tmp_path / "run"

    def make_store(self):
        return LocalStore(self.directory)

    def raw_read(self, store, path):
        file = Path(store.url, path)
        return file.read_bytes() if file.is_file() else None

    def raw_write(self, store, path, data):
        file = Path(store.url, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


class TestMemoryStore(StoreContract):
    """The reference, with the manners of an object store."""

    has_directories = False

    def make_store(self):
        return MemoryStore("contract")

    def raw_read(self, store, path):
        return store._files.get(path)

    def raw_write(self, store, path, data):
        store._files[path] = data


class TestFaultyStoreThatNeverFails(TestLocalStore):
    """A wrapper that changed anything by itself would make every fault test meaningless."""

    def make_store(self):
        return FaultyStore(LocalStore(self.directory), fail_at=0)
