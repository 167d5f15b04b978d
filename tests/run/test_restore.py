"""Restoring: bytes go straight to where they belong, everything is compared first, and damage is said for what it is."""

from __future__ import annotations

import random
import threading
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Keep
from highcamp.errors import Damaged, Mismatch, StorageError
from highcamp.run import tensors
from highcamp.storage.local import LocalStore

MEBIBYTE = 1 << 20


class Watched(LocalStore):
    """A local store that remembers what is looked into, and where the bytes that are read go."""

    def __init__(self, root):
        super().__init__(root)
        self.opened, self.landed = [], []
        self.before_read = lambda path, offset: None

    def read(self, path, limit):
        self.opened.append(path.rpartition("/")[2])
        return super().read(path, limit)

    def open(self, path):
        if path.endswith(".safetensors"):
            self.opened.append(path.rpartition("/")[2])
        return WatchedReader(super().open(path), path, self)


class WatchedReader:
    """A reader of such a store."""

    def __init__(self, reader, path, store):
        self.reader, self.path, self.store = reader, path, store
        self.size, self.where, self.map, self.close = reader.size, reader.where, reader.map, reader.close

    def read_into(self, offset, buffer):
        self.store.before_read(self.path, offset)
        self.store.landed.append((address(np.frombuffer(buffer, np.uint8)), len(buffer)))
        self.reader.read_into(offset, buffer)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def address(array):
    """Where the memory of an array begins."""
    return array.__array_interface__["data"][0]


def save(where, epochs=1, change=lambda epoch: None, **objects):
    """A run with a checkpoint for each epoch; `change` is called in each, before it is saved."""
    with Checkpointer(where, keep=Keep(last=99), verbose=0) as checkpointer:
        checkpointer.track(**objects)
        for epoch in checkpointer.epochs(epochs):
            change(epoch)
    return highcamp.open(where)


def flip(run, name, file, at=-1):
    """Change one bit of one file of the checkpoint called `name`."""
    path = Path(run.path) / "checkpoints" / name / file
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def noise(count, seed=0):
    """Float32 numbers."""
    return np.random.default_rng(seed).standard_normal(count, np.float32)


class Dial:
    """An object of a user, that remembers whether it was given a state."""

    def __init__(self, at=0):
        self.at, self.is_loaded = at, False

    def state_dict(self):
        return {"at": self.at, "array": np.full(3, self.at)}

    def load_state_dict(self, state):
        self.at, self.is_loaded = state["at"], True


# ------------------------------------------------------------------------------------------------- where bytes go


def test_large_arrays_are_read_into_their_own_memory(tmp_path):
    """A copy on the way, and restoring takes twice the memory of the state, and twice the time."""
    save(tmp_path, model={"kernel": noise(3 * MEBIBYTE), "bias": noise(7)})
    store = Watched(tmp_path)
    model = {"kernel": np.zeros(3 * MEBIBYTE, np.float32), "bias": np.zeros(7, np.float32)}
    kernel = model["kernel"]

    tracemalloc.start()
    highcamp.open(store).last.restore(model=model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    start, end = address(kernel), address(kernel) + kernel.nbytes
    assert sum(length for at, length in store.landed if start <= at < end) == kernel.nbytes
    assert model["kernel"] is kernel
    assert np.array_equal(kernel, noise(3 * MEBIBYTE))
    assert np.array_equal(model["bias"], noise(7))
    assert peak < 3 * MEBIBYTE


def test_arrays_that_cannot_take_bytes_as_they_lie_get_the_numbers_all_the_same(tmp_path):
    """Read straight into strided memory, rows would end up in each other."""
    values = noise(60_000).reshape(200, 300)
    saved = {name: values.copy() for name in ("columns", "every other", "backwards", "swapped")}
    saved |= {"one": np.array(2.5), "none": np.empty((0, 3)), "half": values.astype(ml_dtypes.bfloat16)}
    save(tmp_path, model=saved)
    model = {
        "columns": np.zeros((200, 300), np.float32, order="F"),
        "every other": np.zeros((400, 300), np.float32)[::2],
        "backwards": np.zeros((200, 300), np.float32)[::-1],
        "swapped": np.zeros((200, 300), ">f4"),
        "one": np.array(0.0),
        "none": np.empty((0, 3)),
        "half": np.zeros((200, 300), ml_dtypes.bfloat16),
    }
    before = dict(model)

    highcamp.open(tmp_path).last.restore(model=model)

    for name, array in model.items():
        assert array is before[name], name
        assert np.array_equal(array, saved[name]), name


@pytest.mark.parametrize("seed", range(12))
def test_every_size_comes_back_wherever_a_piece_ends(tmp_path, monkeypatch, seed):
    """A tensor cut at the end of a piece, or one behind many small ones, would be a byte off."""
    chance = random.Random(seed)
    sizes = [chance.choice([0, 1, 7, 63, 64, 65, 255, 256, 257, 1000, 5000]) for _ in range(chance.randint(1, 60))]
    model = {f"{at:02d}": np.random.default_rng(at).bytes(size) for at, size in enumerate(sizes)}
    model = {name: np.frombuffer(data, np.uint8).copy() for name, data in model.items()}
    model["wide"] = noise(100)
    saved = {name: array.copy() for name, array in model.items()}
    save(tmp_path, model=model)
    monkeypatch.setattr(tensors, "PIECE_BYTES", chance.choice([1, 100, 256, 4096]))
    monkeypatch.setattr(tensors, "SMALL_BYTES", chance.choice([1, 64, 256]))
    monkeypatch.setattr(tensors, "READ_BYTES", chance.choice([1, 100, 4096]))
    monkeypatch.setattr(tensors, "PROBE_PIECES", chance.choice([0, 1, 3, 16]))
    for array in model.values():
        array.fill(0)

    checkpoint = highcamp.open(tmp_path).last
    checkpoint.restore(model=model)

    copies = checkpoint.load("model", copy=True)
    for name, array in saved.items():
        assert np.array_equal(model[name], array), name
        assert np.array_equal(copies[name], array), name
        assert copies[name].flags.writeable


def test_arrays_that_share_memory_end_as_the_object_would_leave_them(tmp_path):
    """Which of two overlapping arrays is read last is an accident of the file; the order of the tree is not."""
    save(tmp_path, model={"b": noise(8, 1), "a": noise(4, 2)}, other={"c": noise(8, 3)})
    memory = np.zeros(8, np.float32)
    model, other = {"b": memory, "a": memory[:4]}, {"c": np.zeros(8, np.float32)}

    highcamp.open(tmp_path).last.restore(model=model, other=other)

    assert np.array_equal(memory, [*noise(4, 2), *noise(8, 1)[4:]])
    assert np.array_equal(other["c"], noise(8, 3))

    same = np.zeros(8, np.float32)
    highcamp.open(tmp_path).last.restore(model={"b": same, "a": np.zeros(4, np.float32)}, other={"c": same})
    assert np.array_equal(same, noise(8, 3))


def test_ties_of_either_side_come_back(tmp_path):
    """What is tied is written once, and has to arrive at both of its places, tied there or not."""
    table = noise(8)
    save(tmp_path / "tied", model={"first": table, "second": table})
    save(tmp_path / "apart", model={"first": noise(8, 1), "second": noise(8, 2)})
    tied = np.zeros(8, np.float32)
    model = {"first": np.zeros(8, np.float32), "second": np.zeros(8, np.float32)}

    highcamp.open(tmp_path / "tied").last.restore(model=model)
    highcamp.open(tmp_path / "tied").last.restore(model={"first": tied, "second": tied})

    assert np.array_equal(model["first"], table)
    assert np.array_equal(model["second"], table)
    assert not np.shares_memory(model["first"], model["second"])
    assert np.array_equal(tied, table)

    highcamp.open(tmp_path / "apart").last.restore(model=model)
    assert np.array_equal(model["first"], noise(8, 1))
    assert np.array_equal(model["second"], noise(8, 2))


def test_a_tree_that_is_filled_has_memory_of_its_own(tmp_path):
    """Arrays over one buffer keep all of it alive, and two over the same bytes change together."""
    table = noise(8)
    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.save({"params": {"first": table, "second": table, "other": noise(100_000)}}, step=1).wait()
    tied = np.zeros(8, np.float32)
    other = np.zeros(100_000, np.float32)

    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        apart = checkpointer.restore(like={"params": {"first": tied, "second": tied.copy(), "other": other}})["params"]
        both = checkpointer.restore("last", like={"params": {"first": tied, "second": tied, "other": other}})["params"]

    assert np.array_equal(apart["other"], noise(100_000))
    assert not other.any()
    assert np.array_equal(apart["first"], table)
    assert np.array_equal(apart["second"], table)
    assert not np.shares_memory(apart["first"], apart["second"])
    assert np.shares_memory(both["first"], both["second"])
    assert apart["first"].flags.writeable


# ------------------------------------------------------------------------------------------------- what is read


def test_one_object_is_read_without_the_others(tmp_path):
    """The weights for an evaluation are a third of what is saved with an optimizer."""
    save(tmp_path, model={"w": noise(8)}, optimizer={"m": noise(8)}, dial=Dial(3))
    store = Watched(tmp_path)
    checkpoint = highcamp.open(store).last

    store.opened.clear()
    checkpoint.restore(model={"w": np.zeros(8, np.float32)})
    checkpoint.load("model")

    assert {name for name in store.opened if name.endswith(".safetensors")} == {"model.safetensors"}


def test_the_tree_is_parsed_once_for_all_objects(tmp_path):
    """With 100,000 tensors parsing takes a second, and there are as many objects as somebody tracks."""
    live = {"model": {"w": noise(8)}, "optimizer": {"m": noise(8)}, "dial": Dial(3)}
    save(tmp_path, **live)
    store = Watched(tmp_path)
    checkpoint = highcamp.open(store).last

    store.opened.clear()
    checkpoint.restore(**live)

    assert store.opened == ["state.json", "model.safetensors", "optimizer.safetensors", "dial.safetensors"]


def test_what_has_begun_is_read_to_its_end(tmp_path, monkeypatch):
    """A checkpoint that is pruned away by another process would leave half of it in the live objects."""
    monkeypatch.setattr(tensors, "PIECE_BYTES", MEBIBYTE // 4)
    monkeypatch.setattr(tensors, "PROBE_PIECES", 4)
    save(tmp_path, epochs=2, model={"w": noise(3 * MEBIBYTE)}, optimizer={"m": noise(8)})
    store = Watched(tmp_path)
    checkpoint = highcamp.open(store).checkpoint("epoch:1")
    model, optimizer = {"w": np.zeros(3 * MEBIBYTE, np.float32)}, {"m": np.zeros(8, np.float32)}

    first = threading.Lock()  # files are read by more than one thread

    def remove(path, offset):
        if offset and path.endswith("model.safetensors") and first.acquire(blocking=False):
            writer = highcamp.open(tmp_path)
            writer.remove("epoch:1")
            writer.empty_trash()

    store.before_read = remove
    checkpoint.restore(model=model, optimizer=optimizer)

    assert not Path(checkpoint.path).exists()
    assert np.array_equal(model["w"], noise(3 * MEBIBYTE))
    assert np.array_equal(optimizer["m"], noise(8))


# ----------------------------------------------------------------------------------------------- what does not fit


def test_a_mismatch_in_the_last_object_changes_nothing_in_the_first(tmp_path):
    """Half of two states is no state at all."""
    save(tmp_path, model={"w": noise(8)}, dial=Dial(3), optimizer={"m": noise(8)})
    model, dial, optimizer = {"w": np.ones(8, np.float32)}, Dial(), {"m": np.ones(9, np.float32)}

    with pytest.raises(Mismatch, match=r"1 differences, nothing was changed\):\n  optimizer/m: shape \(8,\)"):
        highcamp.open(tmp_path).last.restore(model=model, dial=dial, optimizer=optimizer)

    assert (model["w"] == 1).all()
    assert not dial.is_loaded


def test_an_altered_table_is_damage_and_no_mismatch(tmp_path):
    """Taken for another model, it would end the run instead of going on with the checkpoint before."""
    model = {"w": noise(6).reshape(2, 3)}
    run = save(tmp_path, epochs=2, model=model)
    file = Path(run.last.path) / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"[2,3]", b"[3,2]"))

    with pytest.raises(Damaged, match="model.safetensors differs from its digest"):
        run.last.restore(model=model)
    with pytest.raises(Damaged, match="model.safetensors differs from its digest"):
        run.last.load("model")
    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.track(model=model)
        assert checkpointer.start().epoch == 1
    with Checkpointer(tmp_path / "passed", verbose=0) as checkpointer:
        checkpointer.save({"params": model}, step=1).wait()
        file = Path(checkpointer.run.last.path) / "params.safetensors"
        file.write_bytes(file.read_bytes().replace(b"[2,3]", b"[3,2]"))
        with pytest.raises(Damaged, match="params.safetensors differs from its digest"):
            checkpointer.restore("last", like={"params": model})


# --------------------------------------------------------------------------------------------------------- damage


def test_damage_found_on_the_way_says_that_the_objects_are_undefined(tmp_path, monkeypatch):
    """An evaluation of weights that are half old and half new looks like one of a bad model."""
    monkeypatch.setattr(tensors, "PIECE_BYTES", MEBIBYTE)
    monkeypatch.setattr(tensors, "PROBE_PIECES", 3)
    run = save(tmp_path, model={"w": noise(3 * MEBIBYTE)}, dial=Dial(3))
    flip(run, "step-00000001", "model.safetensors")
    dial = Dial()

    with pytest.raises(Damaged) as error:
        run.last.restore(dial=dial, model={"w": np.zeros(3 * MEBIBYTE, np.float32)})

    assert "step-00000001: model.safetensors differs from its digest" in str(error.value)
    assert "model is undefined now: restore another checkpoint; where they must survive, call verify() first" in str(
        error.value
    )
    assert not dial.is_loaded
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("highcamp-reader")]


def test_damage_found_before_says_no_such_thing(tmp_path):
    """Sizes, tables and trees are looked at first: what was not touched needs no new script."""
    run = save(tmp_path, model={"w": noise(100)}, other={"w": noise(100)})
    checkpoint = run.last
    file = Path(checkpoint.path) / "other.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    model = {"w": np.ones(100, np.float32)}

    with pytest.raises(Damaged) as error:
        checkpoint.restore(model=model, other={"w": np.zeros(100, np.float32)})

    assert "undefined" not in str(error.value)
    assert (model["w"] == 1).all()


def test_a_disk_that_fails_on_the_way_says_it_too(tmp_path, monkeypatch):
    """The objects are in the same state whether the bytes are wrong or cannot be had."""
    monkeypatch.setattr(tensors, "PIECE_BYTES", MEBIBYTE)
    monkeypatch.setattr(tensors, "PROBE_PIECES", 8)  # so that 8 to 16 MiB are read by several threads
    save(tmp_path, model={"w": noise(20 * MEBIBYTE)})
    store = Watched(tmp_path)
    checkpoint = highcamp.open(store).last
    model = {"w": np.zeros(20 * MEBIBYTE, np.float32)}

    def fail(path, offset):
        if offset > 11 * MEBIBYTE:
            raise StorageError("read of it failed", hint="look at the kernel's log")

    store.before_read = fail
    with pytest.raises(StorageError, match="look at the kernel's log; model is undefined now"):
        checkpoint.restore(model=model)

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("highcamp-reader")]
    landed = model["w"].copy()
    store.before_read = lambda path, offset: None
    assert np.array_equal(model["w"], landed)  # nobody goes on writing behind our back
    checkpoint.restore(model=model)
    assert np.array_equal(model["w"], noise(20 * MEBIBYTE))


def test_falling_back_overwrites_what_the_damaged_one_left(tmp_path, capsys):
    """The weights of one checkpoint with the moments of another train on as if nothing had happened."""
    model, optimizer, dial = {"w": noise(100)}, {"m": noise(100)}, Dial()

    def change(epoch):
        model["w"][:], optimizer["m"][:], dial.at = epoch, -epoch, epoch

    run = save(tmp_path, 3, change, model=model, optimizer=optimizer, dial=dial)
    flip(run, "step-00000003", "optimizer.safetensors")  # behind the model, which has been read then
    expected = run.checkpoint("epoch:2").state("progress")["random"]["python"]["words"]

    with Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.track(model=model, optimizer=optimizer, dial=dial)
        found = checkpointer.start()

        assert (found.epoch, checkpointer.epoch, checkpointer.step) == (2, 2, 2)
        assert (model["w"] == 1).all()
        assert (optimizer["m"] == -1).all()
        assert dial.at == 1
        assert list(random.getstate()[1]) == expected.tolist()
    said = capsys.readouterr().err
    assert "step-00000003: optimizer.safetensors differs from its digest; resumed from step-00000002 instead" in said
    assert "undefined" not in said


def test_nothing_but_arrays_is_taken_from_a_damaged_checkpoint(tmp_path):
    """Counters of a state that is not there would make the run skip what it has not trained."""
    np.random.seed(0)
    run = save(tmp_path, 2, dial=Dial(3), model={"w": noise(100)})
    for name in ("step-00000001", "step-00000002"):
        flip(run, name, "model.safetensors")
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tobytes()
    dial = Dial()

    with pytest.raises(Damaged) as error, Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.track(dial=dial, model={"w": np.zeros(100, np.float32)})
        checkpointer.start()

    assert "none is whole: step-00000002, step-00000001" in str(error.value)
    assert "the tracked objects are undefined now" in str(error.value)
    assert "call verify() first" in str(error.value)
    assert (checkpointer.epoch, checkpointer.step) == (0, 0)
    assert not dial.is_loaded
    assert (random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tobytes()) == before


def test_damage_of_sizes_alone_leaves_the_tracked_objects_as_they_were(tmp_path):
    """The error must not send somebody to build a model anew that nobody has touched."""
    run = save(tmp_path, model={"w": noise(100)})
    file = Path(run.last.path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    model = {"w": np.ones(100, np.float32)}

    with pytest.raises(Damaged, match="none is whole") as error, Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.track(model=model)
        checkpointer.start()

    assert "undefined" not in str(error.value)
    assert (model["w"] == 1).all()


def test_an_older_one_that_does_not_fit_is_no_quiet_ending(tmp_path):
    """It says that nothing was changed, of itself: the damaged one before it has been read in part."""
    model = {"w": noise(100)}

    def grow(epoch):
        if epoch == 1:
            model["w"] = noise(200)

    run = save(tmp_path, 2, grow, model=model)
    flip(run, "step-00000002", "model.safetensors")

    told = "the tracked objects are undefined now"
    with pytest.raises(Mismatch, match=told) as error, Checkpointer(tmp_path, verbose=0) as checkpointer:
        checkpointer.track(model={"w": np.zeros(200, np.float32)})
        checkpointer.start()

    assert r"model/w: shape (100,) in the checkpoint, (200,) here" in str(error.value)
