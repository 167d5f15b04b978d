"""The contract of a store, as tests: subclass `StoreContract`, say how to make a store and how to look behind it.

    class TestMyStore(StoreContract):
        def make_store(self): ...
        def raw_read(self, store, path): ...
        def raw_write(self, store, path, data): ...

The two raw accessors bypass the store, so that it cannot vouch for itself.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from highcamp.errors import HighcampError, StorageError, Taken
from highcamp.storage.store import NotThere
from highcamp.testing.reads import STEP, ReadContract

if TYPE_CHECKING:
    from collections.abc import Iterator

    from highcamp.storage.store import Store

OTHER = "checkpoints/step-00000002"
TRASH = "checkpoints/.trash-step-00000001-0badcafe"


class StoreContract(ReadContract):
    """Every test a store has to pass. `has_directories = False`: there are none that could be missing."""

    has_directories = True

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
