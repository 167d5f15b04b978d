"""The snapshot: what is written is what was there when `save` returned."""

from __future__ import annotations

import numpy as np

from highcamp.core.tree import flatten
from highcamp.run.live import as_array
from highcamp.training.snapshot import Snapshot
from highcamp.training.staging import Staging


def _flat(tree: object):
    return flatten(tree, as_array, where="model")


def _shoot(snapshot: Snapshot, name: str, tree: object):
    """Copy a state; its one tensor file."""
    shot = snapshot.take({name: _flat(tree)})
    shot.fill()
    (part,) = shot.parts
    (file,) = part.files
    return file


def _bytes(file) -> bytes:
    return b"".join(bytes(piece) for piece in file.pieces())


def _address(file) -> int:
    return np.frombuffer(next(iter(file.pieces())), np.uint8).__array_interface__["data"][0]


def test_snapshot_is_not_torn():
    """Training goes on while the writer writes: later updates must not leak into the file."""
    weights = np.arange(1000.0)
    snapshot = Snapshot()

    file = _shoot(snapshot, "model", {"w": weights})
    weights += 1

    assert _bytes(file) == np.arange(1000.0).tobytes()


def test_memory_is_reused_from_save_to_save():
    """Fresh memory at every save would cost several times the copy, and memory would grow."""
    snapshot, weights = Snapshot(), np.zeros(100_000)

    first = _address(_shoot(snapshot, "model", {"w": weights}))
    size = snapshot.size_bytes
    second = _address(_shoot(snapshot, "model", {"w": weights}))

    assert first == second
    assert snapshot.size_bytes == size


def test_a_state_that_grows_gets_more_memory_and_one_that_shrinks_keeps_its_own():
    """An optimizer has no state before its first step, and all of it afterwards."""
    snapshot = Snapshot()
    sizes = []
    for count in (10, 500_000, 20):
        values = np.arange(count, dtype=np.int64)
        assert _bytes(_shoot(snapshot, "optimizer", {"m": values})) == values.tobytes()
        sizes.append(snapshot.size_bytes)

    assert sizes[0] <= 4096 * 2
    assert 4_000_000 <= sizes[1] <= 1.05 * 4_000_000
    assert sizes[2] == sizes[1]


def test_views_and_transposed_arrays_are_saved_as_they_look():
    """A view is not contiguous; its bytes in the file are."""
    whole = np.arange(24).reshape(4, 6)
    tree = {"view": whole[1:3, ::2], "turned": whole.T}

    file = _shoot(Snapshot(), "model", tree)

    data = _bytes(file)
    found = {entry.name: data[entry.start : entry.end] for entry in file.layout.entries}
    assert found == {"view": whole[1:3, ::2].tobytes(), "turned": whole.T.tobytes()}


def test_prepared_memory_is_page_aligned_and_used():
    """Memory set aside ahead is what the first save writes into, and direct I/O needs whole pages."""
    weights = {"w": np.ones(300_000)}
    snapshot = Snapshot()

    snapshot.prepare({"model": _flat(weights)})
    before = snapshot.size_bytes
    file = _shoot(snapshot, "model", weights)

    assert before == snapshot.size_bytes > weights["w"].nbytes
    assert _address(file) % 4096 == 0
    assert _bytes(file) == weights["w"].tobytes()


def test_preparing_never_overwrites_a_snapshot():
    """The background thread that faults memory in writes zeros: `take` waits for it."""
    staging = Staging(200 << 20)

    staging.prepare()
    staging.wait()
    staging.view[-3:] = b"end"

    assert bytes(staging.view[-3:]) == b"end"
