"""The contract of a store, as tests: subclass `StoreContract`, say how to make a store and how to look behind it.

    class TestMyStore(StoreContract):
        def make_store(self): ...
        def raw_read(self, store, path): ...
        def raw_write(self, store, path, data): ...

The two raw accessors bypass the store, so that it cannot vouch for itself.
"""

from __future__ import annotations

import errno
import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import pytest

from highcamp.errors import Damaged, HighcampError, InvalidArgument, StorageError, Taken
from highcamp.storage.store import NotThere

if TYPE_CHECKING:
    from collections.abc import Iterator

    from highcamp.storage.store import Store

STEP = "checkpoints/step-00000001"
OTHER = "checkpoints/step-00000002"
TRASH = "checkpoints/.trash-step-00000001-0badcafe"
BAD_PATHS = (
    "/etc/passwd", "..", "../x", "a/../b", "a/./b", "./a", "a//b", "a/", "a\\b", "a\0b", "..\\x", "x" * 256,
)  # fmt: skip


class StoreContract(ABC):
    """Every test a store has to pass. `has_directories = False`: there are none that could be missing."""

    has_directories = True

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

    # ------------------------------------------------------------------------------------------------------- reading

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

    # ------------------------------------------------------------------------------------------------------- writing

    def test_create_writes_all_chunks_in_order(self, store: Store) -> None:
        """Large and small chunks mixed, and of any shape: the file is their bytes, one after the other."""
        draft = store.draft(STEP)
        large = bytes(range(256)) * 1024
        words: Any = memoryview(b"12345678").cast("I")
        chunks = [b"head", memoryview(large), b"", bytearray(b"mid"), memoryview(large)[5:], words]

        store.create(f"{draft}/x", chunks)

        assert self.raw_read(store, f"{draft}/x") == b"head" + large + b"mid" + large[5:] + b"12345678"

    def test_create_reads_each_chunk_before_the_next(self, store: Store) -> None:
        """The staging memory is used again: a chunk kept by reference would be written with the next one's bytes."""
        draft = store.draft(STEP)

        def chunks(size: int) -> Iterator[memoryview]:
            staging = bytearray(size)
            for value in b"abc":
                staging[:] = bytes([value]) * size
                yield memoryview(staging)

        for size in (10, 100_000):
            store.create(f"{draft}/{size}", chunks(size))
            assert self.raw_read(store, f"{draft}/{size}") == b"a" * size + b"b" * size + b"c" * size

    def test_create_makes_empty_files(self, store: Store) -> None:
        """An object without bytes is still an object."""
        draft = store.draft(STEP)

        store.create(f"{draft}/x", [])

        assert self.raw_read(store, f"{draft}/x") == b""

    def test_create_never_overwrites(self, store: Store) -> None:
        """Two writers with the same name: the second is told, the first keeps its bytes."""
        self.raw_write(store, "owner.json", b"first")
        self.raw_write(store, "directory/x", b"")

        for path in ("owner.json", "directory"):
            with pytest.raises(Taken, match=path):
                store.create(path, [b"second"])
        assert self.raw_read(store, "owner.json") == b"first"

    def test_a_failed_create_leaves_no_file(self, store: Store) -> None:
        """Half a file must not be found later, whatever ended the write: BaseExceptions do too."""
        draft = store.draft(STEP)

        def chunks() -> Iterator[bytes]:
            yield b"x" * 100_000
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            store.create(f"{draft}/x", chunks())
        assert self.raw_read(store, f"{draft}/x") is None

    def test_create_makes_no_parents(self, store: Store) -> None:
        """A run directory removed under a running training is an error, not a new run without its history."""
        if self.has_directories:
            with pytest.raises(NotThere, match="absent"):
                store.create("absent/x", [b"x"])
            assert store.list("") == []
        else:
            store.create("absent/x", [b"x"])
            assert self.raw_read(store, "absent/x") == b"x"

    def test_a_link_outlives_its_source(self, store: Store) -> None:
        """Each checkpoint is complete and removable by itself, however many share a file."""
        draft = store.draft(STEP)
        store.create(f"{draft}/model.safetensors", [b"frozen"])
        store.publish(draft, STEP)
        later = store.draft(OTHER)
        store.link(f"{STEP}/model.safetensors", f"{later}/model.1.safetensors")
        store.publish(later, OTHER)
        with store.open(f"{STEP}/model.safetensors") as one, store.open(f"{OTHER}/model.1.safetensors") as two:
            assert one.identity == two.identity
        store.remove(STEP)
        assert self.raw_read(store, f"{OTHER}/model.1.safetensors") == b"frozen"
        assert self.raw_read(store, f"{STEP}/model.safetensors") is None

    def test_a_link_never_overwrites_and_needs_a_file(self, store: Store) -> None:
        """A name in use stays what it is, and what is not there is said."""
        draft = store.draft(STEP)
        store.create(f"{draft}/one", [b"1"])
        store.create(f"{draft}/two", [b"2"])
        with pytest.raises(Taken):
            store.link(f"{draft}/one", f"{draft}/two")
        with pytest.raises(NotThere):
            store.link(f"{draft}/absent", f"{draft}/three")
        assert self.raw_read(store, f"{draft}/two") == b"2"

    def test_replace_puts_new_bytes_in_place(self, store: Store) -> None:
        """Shorter, longer, first: what is read afterwards is exactly what was given."""
        for data in (b"first, long", b"short", b"", b"longer again"):
            store.replace("pins/paper.json", data)

            assert self.raw_read(store, "pins/paper.json") == data
        assert store.list("pins") == ["paper.json"]

    def test_replace_of_a_directory_fails(self, store: Store) -> None:
        """A small file never takes the place of a checkpoint."""
        self.raw_write(store, f"{STEP}/x", b"1")

        with pytest.raises(StorageError):
            store.replace(STEP, b"")
        assert self.raw_read(store, f"{STEP}/x") == b"1"
        assert store.list("checkpoints") == ["step-00000001"]

    def test_append_adds_rows(self, store: Store) -> None:
        """The history is one row after the other, durable or not."""
        for row, durable in ((b"1\n", False), (b"22\n", True), (b"", True), (b"3\n", False)):
            store.append("history/attempt-0001.jsonl", row, durable=durable)

        assert self.raw_read(store, "history/attempt-0001.jsonl") == b"1\n22\n3\n"

    def test_append_to_a_directory_fails(self, store: Store) -> None:
        """A directory in place of the history is said, not worked around."""
        self.raw_write(store, "history/x", b"")

        with pytest.raises(HighcampError, match="history"):
            store.append("history", b"row\n", durable=False)

    # ---------------------------------------------------------------------------------------------------- publishing

    def build(self, store: Store, target: str = STEP, manifest: bytes = b"{}") -> str:
        """Make a draft with two files in it; its path."""
        draft = store.draft(target)
        store.create(f"{draft}/model.safetensors", [b"weights"])
        store.create(f"{draft}/manifest.json", [manifest])
        return draft

    def test_publish_makes_the_draft_visible(self, store: Store) -> None:
        """The whole point: all files under the final name, and the draft is gone."""
        draft = self.build(store)

        store.publish(draft, STEP)

        assert store.list("checkpoints") == ["step-00000001"]
        assert self.raw_read(store, f"{STEP}/model.safetensors") == b"weights"
        assert self.raw_read(store, f"{STEP}/manifest.json") == b"{}"

    def test_a_draft_has_no_manifest_under_its_target(self, store: Store) -> None:
        """unfinished_is_invisible: those who go by the manifest do not see a draft, on any store."""
        draft = store.draft(STEP)
        store.create(f"{draft}/model.safetensors", [b"weights"])

        assert store.size(f"{STEP}/manifest.json") is None

    def test_rename_onto_a_directory(self, store: Store) -> None:
        """A name in use is Taken, at the draft or at the publish, and what is there stays; an empty directory too."""
        self.raw_write(store, f"{STEP}/manifest.json", b"first")

        with pytest.raises(Taken, match="step-00000001"):
            store.publish(self.build(store, manifest=b"second"), STEP)
        assert self.raw_read(store, f"{STEP}/manifest.json") == b"first"
        assert store.list(STEP) == ["manifest.json"]

    def test_a_taken_name_leaves_the_draft_for_another(self, store: Store) -> None:
        """same_step_again: the save goes on as `step-….2`, with the bytes it has written."""
        draft = self.build(store, OTHER)
        self.raw_write(store, f"{STEP}/manifest.json", b"first")

        with pytest.raises(Taken):
            store.publish(draft, STEP)
        store.publish(draft, f"{STEP}.2")

        assert self.raw_read(store, f"{STEP}.2/manifest.json") == b"{}"
        assert self.raw_read(store, f"{STEP}.2/model.safetensors") == b"weights"
        assert store.list("checkpoints") == ["step-00000001", "step-00000001.2"]

    def test_drafts_are_never_shared(self, store: Store) -> None:
        """Leftovers of a crash are not reused: their bytes must not get into the next checkpoint."""
        first = self.build(store)

        try:
            second = store.draft(STEP)
        except Taken:
            return
        assert first != second
        assert store.list(second) == []

    def test_publish_of_nothing_is_an_error(self, store: Store) -> None:
        """A draft swept by somebody else must not be acknowledged."""
        with pytest.raises(NotThere):
            store.publish(STEP, OTHER)

    def test_withdraw_and_publish_again(self, store: Store) -> None:
        """Remove is un-publish first, and what is in the trash can come back whole."""
        store.publish(self.build(store), STEP)

        store.withdraw(STEP, TRASH)
        assert store.size(f"{STEP}/manifest.json") is None
        assert self.raw_read(store, f"{TRASH}/manifest.json") == b"{}"
        assert store.list("checkpoints") == [TRASH.rpartition("/")[2]]

        store.publish(TRASH, STEP)
        assert self.raw_read(store, f"{STEP}/model.safetensors") == b"weights"
        assert store.list("checkpoints") == ["step-00000001"]

    def test_withdraw_never_overwrites(self, store: Store) -> None:
        """Two removals under the same trash name keep both."""
        store.publish(self.build(store), STEP)
        self.raw_write(store, f"{TRASH}/manifest.json", b"older")

        with pytest.raises(Taken):
            store.withdraw(STEP, TRASH)
        assert self.raw_read(store, f"{STEP}/manifest.json") == b"{}"
        assert self.raw_read(store, f"{TRASH}/manifest.json") == b"older"

    def test_withdraw_of_nothing_is_not_there(self, store: Store) -> None:
        """Two pruners: the second sees that the first was faster."""
        with pytest.raises(NotThere):
            store.withdraw(STEP, TRASH)

    # ------------------------------------------------------------------------------------------------------ removing

    def test_remove_takes_all_below_and_nothing_beside(self, store: Store) -> None:
        """A prefix is no directory: removing step-1 must not take step-10."""
        for path in ("c/step-1/x", "c/step-1/deep/y", "c/step-10/x", "c/step-1.2/x", "c/file"):
            self.raw_write(store, path, b"1")

        store.remove("c/step-1")
        store.remove("c/file")

        assert store.list("c") == ["step-1.2", "step-10"]
        assert self.raw_read(store, "c/step-10/x") == b"1"

    def test_remove_of_nothing_is_no_error(self, store: Store) -> None:
        """Sweeping twice is harmless."""
        store.remove(STEP)
        store.remove("owner.json")
        self.raw_write(store, "owner.json", b"")
        store.remove("owner.json/below")

        assert store.size("owner.json") == 0

    def test_a_draft_can_be_thrown_away(self, store: Store) -> None:
        """After a failed save its name is free again, and nothing is listed."""
        store.remove(self.build(store))

        assert store.list("checkpoints") == []
        store.publish(self.build(store), STEP)
        assert store.list("checkpoints") == ["step-00000001"]

    # -------------------------------------------------------------------------------------------------------- errors

    def test_errors_say_where(self, store: Store) -> None:
        """A message without a path helps nobody at night."""
        with pytest.raises(NotThere) as caught:
            store.read(f"{STEP}/manifest.json", 10)

        assert caught.value.path is not None
        assert caught.value.path.endswith(f"{STEP}/manifest.json")
        assert str(caught.value.path) in str(caught.value)
        assert caught.value.errno in {None, errno.ENOENT}

    def test_free_bytes_is_a_number_or_unknown(self, store: Store) -> None:
        """Asked before anything exists, and never a guess."""
        free = store.free_bytes()

        assert free is None or free > 0
