"""The snapshot: what is written is what was there when `save` returned."""

from __future__ import annotations

import numpy as np

from highcamp.core.tree import flatten
from highcamp.run.live import as_array
from highcamp.training.snapshot import Snapshot
from highcamp.training.staging import Staging


def _flat(tree: object):
    return flatten(tree, as_array, where="model")


def test_snapshot_is_not_torn():
    """Training goes on while the writer writes: later updates must not leak into the file."""
    weights = np.arange(1000.0)
    snapshot = Snapshot()

    (part,) = snapshot.take({"model": _flat({"w": weights})})
    weights += 1

    assert bytes(part.data) == np.arange(1000.0).tobytes()


def test_memory_is_reused_from_save_to_save():
    """Fresh memory at every save would cost several times the copy, and memory would grow."""
    snapshot, weights = Snapshot(), np.zeros(100_000)

    first = np.frombuffer(snapshot.take({"model": _flat({"w": weights})})[0].data, np.uint8)
    second = np.frombuffer(snapshot.take({"model": _flat({"w": weights})})[0].data, np.uint8)

    assert first.__array_interface__["data"] == second.__array_interface__["data"]
    assert snapshot.size_bytes == weights.nbytes


def test_a_state_that_grows_gets_more_memory_and_one_that_shrinks_keeps_its_own():
    """An optimizer has no state before its first step, and all of it afterwards."""
    snapshot = Snapshot()
    sizes = []
    for count in (10, 5000, 20):
        values = np.arange(count, dtype=np.int64)
        (part,) = snapshot.take({"optimizer": _flat({"m": values})})
        assert bytes(part.data) == values.tobytes()
        sizes.append(snapshot.size_bytes)

    assert sizes == [80, 40_000, 40_000]


def test_views_and_transposed_arrays_are_saved_as_they_look():
    """A view is not contiguous; its bytes in the file are."""
    whole = np.arange(24).reshape(4, 6)
    tree = {"view": whole[1:3, ::2], "turned": whole.T}

    (part,) = Snapshot().take({"model": _flat(tree)})

    assert part.layout is not None
    found = {entry.name: bytes(part.data[entry.start : entry.end]) for entry in part.layout.entries}
    assert found == {"view": whole[1:3, ::2].tobytes(), "turned": whole.T.tobytes()}


def test_prepared_memory_is_page_aligned_and_used():
    """Memory set aside ahead is what the first save writes into, and direct I/O needs whole pages."""
    weights = {"w": np.ones(300_000)}
    snapshot = Snapshot()

    snapshot.prepare({"model": _flat(weights)})
    before = snapshot.size_bytes
    (part,) = snapshot.take({"model": _flat(weights)})

    assert before == snapshot.size_bytes == weights["w"].nbytes
    assert np.frombuffer(part.data, np.uint8).__array_interface__["data"][0] % 4096 == 0
    assert bytes(part.data) == weights["w"].tobytes()


def test_preparing_never_overwrites_a_snapshot():
    """The background thread that faults memory in writes zeros: `take` waits for it."""
    staging = Staging(200 << 20)

    staging.prepare()
    staging.wait()
    staging.view[-3:] = b"end"

    assert bytes(staging.view[-3:]) == b"end"
