"""The reading half of the contract of a store; see `contract`."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import pytest

from highcamp.errors import Damaged, InvalidArgument, StorageError
from highcamp.storage.store import NotThere

if TYPE_CHECKING:
    from highcamp.storage.store import Store

STEP = "checkpoints/step-00000001"
BAD_PATHS = (
    "/etc/passwd", "..", "../x", "a/../b", "a/./b", "./a", "a//b", "a/", "a\\b", "a\0b", "..\\x", "x" * 256,
)  # fmt: skip


class ReadContract(ABC):
    """What reading has to do, on whatever has been put there past the store."""

    @abstractmethod
    def make_store(self) -> Store:
        """Return a new, empty store that nothing else uses."""

    @abstractmethod
    def raw_read(self, store: Store, path: str) -> bytes | None:
        """Return the bytes at `path`, read without the store; None if there are none."""

    @abstractmethod
    def raw_write(self, store: Store, path: str, data: bytes) -> None:
        """Write a file without the store, with its parents."""

    @pytest.fixture
    def store(self) -> Store:
        """Provide a new, empty store."""
        return self.make_store()

    def test_an_empty_store_answers(self, store: Store) -> None:
        """A first start must find nothing, not fail."""
        assert store.list("") == []
        assert store.list("checkpoints") == []
        assert store.size("run.json") is None

    def test_absent_is_not_there(self, store: Store) -> None:
        """Callers tell "no such file" from "the disk failed", and Python's own habits hold."""
        for call in (lambda: store.read("run.json", 10), lambda: store.open("run.json")):
            with pytest.raises(NotThere, match=r"run\.json") as caught:
                call()
            assert isinstance(caught.value, FileNotFoundError)

    def test_list_names_what_is_directly_below(self, store: Store) -> None:
        """A listing that went deeper, or missed names beginning with a dot, would hide leftovers or invent runs."""
        for path in ("b", "a/x", "a/.hidden", "a/deep/er", "aa/y"):
            self.raw_write(store, path, b"1")

        assert store.list("") == ["a", "aa", "b"]
        assert store.list("a") == [".hidden", "deep", "x"]
        assert store.list("a/deep") == ["er"]
        assert store.list("absent") == []

    def test_list_of_a_file_is_an_error(self, store: Store) -> None:
        """A file in place of a directory must not look like an empty run."""
        self.raw_write(store, "checkpoints", b"")

        with pytest.raises(StorageError, match="checkpoints"):
            store.list("checkpoints")

    def test_size_is_of_regular_files_only(self, store: Store) -> None:
        """A directory named as a file would pass the size check of verify."""
        self.raw_write(store, "a/x", b"12345")
        self.raw_write(store, "empty", b"")

        assert store.size("a/x") == 5
        assert store.size("empty") == 0
        assert store.size("a") is None
        assert store.size("a/x/below") is None

    def test_read_gives_the_bytes(self, store: Store) -> None:
        """What is read is what is there, up to and including the limit."""
        self.raw_write(store, "a/x", b"\0\xff12")
        self.raw_write(store, "empty", b"")

        assert store.read("a/x", 4) == b"\0\xff12"
        assert store.read("empty", 0) == b""

    def test_read_refuses_what_is_too_large(self, store: Store) -> None:
        """A hostile manifest of many GB must not be loaded to find out that it is none."""
        self.raw_write(store, "x", b"12345")

        with pytest.raises(Damaged, match=r"x is 5 bytes, expected at most 4"):
            store.read("x", 4)

    def test_a_directory_is_damage_where_a_file_is_expected(self, store: Store) -> None:
        """Case odd_files: a file replaced by a directory is classified, not crashed on."""
        self.raw_write(store, "model.safetensors/x", b"")

        for call in (lambda: store.read("model.safetensors", 10), lambda: store.open("model.safetensors")):
            with pytest.raises(Damaged, match="directory"):
                call()

    def test_read_each_gives_what_read_gives(self, store: Store) -> None:
        """A run is listed by it: one absent or broken manifest must be told in its place, and hide no other."""
        for name, data in (("a", b"12345"), ("b", b""), ("d", b"123456")):
            self.raw_write(store, f"c/{name}/x", data)
        self.raw_write(store, "c/e/x/below", b"")
        self.raw_write(store, "c/f", b"a file")

        found = dict(store.read_each("c", ["d", "a", "absent", "b", "e", "f"], "x", 5, {}))

        assert list(found) == ["d", "a", "absent", "b", "e", "f"]
        assert (found["a"], found["b"], found["absent"], found["f"]) == (b"12345", b"", None, None)
        for name, why in (("d", r"c/d/x is 6 bytes, expected at most 5"), ("e", r"c/e/x is a directory")):
            assert isinstance(found[name], Damaged)
            assert re.search(why, str(found[name]))
        assert list(store.read_each("absent", ["a"], "x", 5, {})) == [("a", None)]
        assert list(store.read_each("c", [], "x", 5, {})) == []

    def test_read_each_knows_what_has_not_changed(self, store: Store) -> None:
        """Old bytes are given for the very same ones only: a manifest that has grown, shrunk or changed is another one."""
        known = {"same": b"12345", "changed": b"12345", "longer": b"12345", "shorter": b"12345", "gone": b"12345"}
        now = {"same": b"12345", "changed": b"12346", "longer": b"123456", "shorter": b"1234", "new": b"12345"}
        for name, data in now.items():
            self.raw_write(store, f"c/{name}/x", data)

        found = dict(store.read_each("c", [*now, "gone"], "x", 10, known))

        assert found == {**now, "gone": None}
        assert found["same"] is known["same"]
        limited = dict(store.read_each("c", ["longer"], "x", 5, known))["longer"]
        assert isinstance(limited, Damaged)

    def test_reader_fills_buffers(self, store: Store) -> None:
        """Tensors are read straight into live memory: the right bytes, at the right place, and no others."""
        self.raw_write(store, "x", bytes(range(100)))
        buffer = bytearray(12)

        with store.open("x") as reader:
            assert reader.size == 100
            reader.read_into(90, memoryview(buffer)[1:11])
            reader.read_into(100, memoryview(b"").toreadonly())

        assert bytes(buffer) == bytes([0, *range(90, 100), 0])

    def test_reader_says_when_the_file_is_short(self, store: Store) -> None:
        """A truncated file must never leave half a tensor without an error."""
        self.raw_write(store, "x", b"12345")

        with store.open("x") as reader, pytest.raises(Damaged, match="expected 2 bytes more"):
            reader.read_into(3, memoryview(bytearray(4)))
        with store.open("x") as reader, pytest.raises(Damaged):
            reader.read_into(10, memoryview(bytearray(1)))
        with store.open("x") as reader, pytest.raises(InvalidArgument):
            reader.read_into(-1, memoryview(bytearray(1)))

    def test_map_is_read_only_and_outlives_the_reader(self, store: Store) -> None:
        """Arrays handed out by `load` stay valid, and writing into one never reaches a committed file."""
        self.raw_write(store, "x", b"12345")
        self.raw_write(store, "empty", b"")

        with store.open("x") as reader, store.open("empty") as empty:
            mapped, nothing = reader.map(), empty.map()
        reader.close()

        assert bytes(mapped) == b"12345"
        assert mapped.readonly
        assert bytes(nothing) == b""

    @pytest.mark.parametrize("path", BAD_PATHS)
    def test_no_path_leaves_the_store(self, store: Store, path: str) -> None:
        """names_never_become_paths: a name from a file or a user must not reach another directory."""
        calls = (
            lambda: store.list(path),
            lambda: store.size(path),
            lambda: store.read(path, 10),
            lambda: list(store.read_each(path, ["a"], "x", 10, {})),
            lambda: list(store.read_each("a", [path], "x", 10, {})),
            lambda: list(store.read_each("a", ["a"], path, 10, {})),
            lambda: store.open(path),
            lambda: store.create(path, [b"x"]),
            lambda: store.draft(path),
            lambda: store.publish("a", path),
            lambda: store.publish(path, "a"),
            lambda: store.withdraw("a", path),
            lambda: store.withdraw(path, "a"),
            lambda: store.remove(path),
            lambda: store.replace(path, b"x"),
            lambda: store.append(path, b"x", durable=False),
        )
        self.raw_write(store, "a/x", b"")

        for call in calls:
            with pytest.raises(InvalidArgument):
                call()

    def test_the_root_is_no_file(self, store: Store) -> None:
        """An empty name must not remove or replace the whole run."""
        for call in (lambda: store.remove(""), lambda: store.size(""), lambda: store.draft("")):
            with pytest.raises(InvalidArgument):
                call()
