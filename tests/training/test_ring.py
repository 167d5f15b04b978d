"""Memory smaller than the state: it goes through piece by piece, bounded, and nobody waits for a disk that has failed."""

from __future__ import annotations

import errno
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import highcamp
from highcamp import Checkpointer, Every, Keep
from highcamp.core.array import HostArray
from highcamp.core.tree import flatten
from highcamp.errors import StorageError
from highcamp.run.live import as_array
from highcamp.storage.memory import MemoryStore
from highcamp.training import snapshot, staging, stream
from highcamp.training.overlap import Overlap
from highcamp.training.snapshot import Snapshot

pytestmark = pytest.mark.timeout(120)
RING = 1 << 20
STATE = 4 * RING

MEMORY = """
import re, sys
from pathlib import Path
import numpy as np
from highcamp import Checkpointer, Keep

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def save(where, state, staging_bytes, count):
    with Checkpointer(where, keep=Keep(last=9), staging_bytes=staging_bytes, verbose=0) as checkpointer:
        checkpointer.track(model=state)
        checkpointer.start()
        for step in range(1, count + 1):
            for array in state.values():
                array += 1
            checkpointer.save(step=step)

where, staging_bytes = sys.argv[1], int(sys.argv[2]) or None
save(where + "/warm", {"w": np.zeros(2_000_000)}, None, 1)  # what is imported and set aside once
state = {"large": np.ones(12_000_000), "strided": np.ones((2000, 2000))[:, ::2], "small": np.ones(5)}
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
save(where + "/run", state, staging_bytes, 3)
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")  # noqa: PTH110
@pytest.mark.parametrize("staging_bytes", [16 << 20, 0], ids=["ring", "whole"])
def test_memory_is_bounded(start, tmp_path, staging_bytes):
    """Whoever sets a limit has no room beyond it: the kernel ends the training."""
    done = start(MEMORY, tmp_path, staging_bytes)

    assert done.returncode == 0, done.stderr
    state_bytes = 8 * (12_000_000 + 2_000_000 + 5)
    strided_bytes = 8 * 2_000_000  # NumPy's arrays are made contiguous one at a time
    assert int(done.stdout) <= 1.05 * (staging_bytes or state_bytes) + strided_bytes + (6 << 20)
    run = highcamp.open(tmp_path / "run")
    assert all(result.ok for result in run.verify())
    for entry in run.checkpoints:
        found = entry.load("model")
        assert [np.unique(found[key]).tolist() for key in ("large", "strided", "small")] == [[1.0 + entry.step]] * 3


class Disk(MemoryStore):
    """A disk that is slow, or breaks, at the first piece of a file of tensors."""

    def __init__(self):
        super().__init__()
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.breaks = False

    def create(self, path, chunks):
        """Wait, or fail, with the first piece in hand."""

        def slowly():
            for number, chunk in enumerate(chunks):
                if number == 1 and path.endswith("model.safetensors"):
                    self.entered.set()
                    assert self.go_on.wait(60)
                    if self.breaks:
                        raise StorageError("the disk broke")
                yield chunk

        super().create(path, slowly())


def _state(value):
    return {"model": {"w": np.full(STATE, value, np.uint8)}}


@pytest.fixture
def pieces(monkeypatch):
    """Pieces of 256 KiB, of which four fit into the ring; how many have been copied."""
    monkeypatch.setattr(stream, "PIECE_BYTES", RING // 4)
    counted = threading.Semaphore(0)
    plain = stream.Stream._copy

    def copy(self, piece):
        plain(self, piece)
        if len(self._shares[piece]) == 1 and piece.stop - piece.start == RING // 4:
            counted.release()

    monkeypatch.setattr(stream.Stream, "_copy", copy)
    return counted


def test_a_slow_disk_holds_the_loop_only_for_what_does_not_fit(pieces):
    """The ring takes what it can at once; the rest waits for the disk, and only for that."""
    disk, returned = Disk(), []
    with Checkpointer(disk, staging_bytes=RING, verbose=0) as checkpointer:
        disk.go_on.clear()
        loop = threading.Thread(target=lambda: returned.append(checkpointer.save(_state(1), step=1)), daemon=True)
        loop.start()
        for _ in range(4):
            assert pieces.acquire(timeout=60)
        assert disk.entered.wait(60)
        assert not pieces.acquire(blocking=False)
        assert not returned
        disk.go_on.set()
        loop.join(60)
        assert returned[0].wait().load("model")["w"].tolist() == [1] * STATE
        assert checkpointer._saver._source.size_bytes == RING


def test_a_state_that_fits_does_not_wait_for_the_disk():
    """A limit that is not reached costs nothing."""
    disk = Disk()
    with Checkpointer(disk, staging_bytes=2 * STATE, verbose=0) as checkpointer:
        disk.go_on.clear()
        pending = checkpointer.save(_state(1), step=1)
        assert disk.entered.wait(60)
        assert not pending.is_done
        disk.go_on.set()


def test_a_disk_that_breaks_lets_the_loop_go(pieces):
    """The loop would wait for ever for room that nobody makes."""
    disk = Disk()
    with Checkpointer(disk, staging_bytes=RING, verbose=0, keep=Keep(last=9)) as checkpointer:
        disk.breaks = True
        pending = checkpointer.save(_state(1), step=1)
        with pytest.raises(StorageError, match="the disk broke"):
            pending.wait()
        disk.breaks = False
        checkpointer.save(_state(2), step=2)
        checkpointer.save(_state(3), step=3)

    assert [entry.load("model")["w"][-1] for entry in checkpointer.run.checkpoints] == [2, 3]
    assert all(result.ok for result in checkpointer.run.verify())


@pytest.mark.parametrize("breaks", [True, False])
def test_the_barrier_of_a_ring_waits_for_the_disk_or_its_failure(breaks, monkeypatch):
    """Overlapped, through a ring: the step must wait until the old weights are on the disk, unless they never will be."""
    disk = Disk()
    model = torch.nn.Linear(512, 1024)
    optimizer = torch.optim.AdamW(model.parameters())
    plain = Overlap.wait

    def wait(self):
        disk.go_on.set()
        plain(self)

    def step():
        model(torch.ones(2, 512)).sum().backward()
        optimizer.step()

    with Checkpointer(
        disk, staging_bytes=RING, snapshot="overlap", every=Every(steps=1), keep=Keep(last=9), verbose=0
    ) as checkpointer:
        checkpointer.track(model=model, optimizer=optimizer)
        checkpointer.start()
        step()
        checkpointer.save(step=1).wait()
        step()
        expected = model.weight.detach().clone()
        disk.breaks = breaks
        disk.entered.clear()
        disk.go_on.clear()
        pending = checkpointer.save(step=2)
        assert disk.entered.wait(60)
        monkeypatch.setattr(Overlap, "wait", wait)

        step()

        assert not torch.equal(model.weight, expected)
        if breaks:
            with pytest.raises(StorageError, match="the disk broke"):
                pending.wait()
        else:
            assert np.array_equal(pending.wait().load("model")["weight"], expected.numpy())


def test_ctrl_c_while_the_loop_waits_for_room(monkeypatch):
    """The writer, which waits for the rest, would keep the process from ending."""
    plain, pressed = HostArray.copy_to, []

    def interrupted(array, view, start):
        if start > RING and not pressed:
            pressed.append(start)
            raise KeyboardInterrupt
        plain(array, view, start)

    monkeypatch.setattr(stream, "PIECE_BYTES", RING // 4)
    monkeypatch.setattr(HostArray, "copy_to", interrupted)
    checkpointer = Checkpointer(MemoryStore(), staging_bytes=RING, verbose=0)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save(_state(1), step=1)
    with pytest.raises(KeyboardInterrupt):  # it is what the save in the background has failed of
        checkpointer.save(_state(2), step=2)

    assert checkpointer.save(_state(3), step=3).wait().load("model")["w"].tolist() == [3] * STATE
    checkpointer.close()
    assert [entry.step for entry in checkpointer.run.checkpoints] == [3]


@pytest.fixture
def memory(monkeypatch):
    """The most that the system gives at once, in bytes; it can be set."""
    limit = SimpleNamespace(bytes=1 << 62, asked=[])
    plain = staging.mmap

    def refusing(descriptor, size):
        limit.asked.append(size)
        if size > limit.bytes:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return plain.mmap(descriptor, size)

    fake = SimpleNamespace(mmap=refusing, MADV_HUGEPAGE=plain.MADV_HUGEPAGE, MADV_DONTFORK=plain.MADV_DONTFORK)
    monkeypatch.setattr(staging, "mmap", fake)
    return limit


def _take(taken, value):
    """Copy a state of 8 MiB and read it back."""
    array = np.full(8 << 20, value, np.uint8)
    shot = taken.take({"model": flatten({"w": array}, as_array, where="model")})
    filling = threading.Thread(target=shot.fill, daemon=True)
    filling.start()
    found = b"".join(bytes(piece) for piece in shot.parts[0].files[0].pieces())
    filling.join(60)
    return found == array.tobytes()


@pytest.mark.parametrize("prepares", [True, False])
def test_memory_that_is_refused_is_asked_for_in_smaller_pieces(memory, prepares):
    """A container with little memory saves slowly, which is said once, rather than not at all."""
    memory.bytes = 3 << 20
    said = []
    taken = Snapshot(tell=said.append)
    if prepares:
        taken.prepare({"model": flatten({"w": np.zeros(8 << 20, np.uint8)}, as_array, where="model")})

    assert all(_take(taken, value) for value in (1, 2, 3))

    assert 2 << 20 <= taken.size_bytes <= 3 << 20
    assert len(said) == 1
    assert "9 MB of memory for saving were refused, so 2 MB are used in turns" in said[0]
    assert f"staging_bytes={taken.size_bytes}" in said[0]
    assert len(memory.asked) == 3  # what was refused is not asked for at every save


def test_without_any_memory_it_is_an_error(memory):
    """Less than a MiB is no memory to train with."""
    memory.bytes = snapshot.LEAST_STAGING_BYTES - 1

    with pytest.raises(MemoryError, match="1 MB of staging memory: .*Cannot allocate memory"):
        _take(Snapshot(), 1)


def test_a_training_with_little_memory_saves(memory, tmp_path):
    """Through the whole of it, and to the disk."""
    memory.bytes = 2 << 20
    with Checkpointer(tmp_path, verbose=0, keep=Keep(last=9)) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(_state(step), step=step)

    assert [set(entry.load("model")["w"].tolist()) for entry in checkpointer.run.checkpoints] == [{1}, {2}, {3}]


def test_a_limit_beyond_all_memory_is_no_request(memory):
    """`staging_bytes` is the most, not what is taken."""
    taken = Snapshot(1 << 50)

    assert _take(taken, 1)
    assert taken.size_bytes < 9 << 20
