"""How much is measured: the full table, or every row with tiny states."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.states import Spec

MB = 1_000_000
GB = 1_000_000_000


@dataclass(frozen=True)
class Scale:
    """Sizes of every row.

    state: of the rows of pause, durable, restore and memory. overlap: its states, the peers' one first. sizes: bytes, of
    the curve of cost against size. tensor_counts, tensor_bytes: of the curve of cost against tensors. checkpoint_counts:
    of the curve of checkpoints in a run; ls_count is one of them. epochs, rows: of a Keras fit. width, blocks, tokens: of
    a transformer, trained in stretches of segment_steps. idle_steps: of a fit in which nothing is due. memory_bytes: what has
    to be free. is_tiny: the figures mean nothing, so that drifting limits do not matter, and processes are used again to be
    fast.
    """

    state: Spec
    staging_bytes: int
    overlap: tuple[Spec, ...]
    frozen: Spec
    sizes: tuple[int, ...]
    tensor_counts: tuple[int, ...]
    tensor_bytes: int
    checkpoint_counts: tuple[int, ...]
    ls_count: int
    epochs: int
    rows: int
    width: int
    blocks: int
    tokens: int
    segment_steps: int
    segments: int
    save_every: int
    idle_steps: int
    imports: int
    repeats: int
    memory_bytes: int
    is_tiny: bool = False


FULL = Scale(
    state=Spec("gpt2"),
    staging_bytes=256 * MB,
    overlap=tuple(Spec("even", 600, size) for size in (200 * MB, 10 * MB, GB, 4 * GB)),
    frozen=Spec("even", 600, 600 * MB),
    sizes=(MB, 10 * MB, 100 * MB, GB, 4 * GB),
    tensor_counts=(8, 100, 1_000, 10_000, 100_000),
    tensor_bytes=100 * MB,
    checkpoint_counts=(10, 100, 1_000, 10_000),
    ls_count=1_000,
    epochs=12,
    rows=8_192,
    width=384,
    blocks=6,
    tokens=64,
    segment_steps=20,
    segments=10,
    save_every=10,
    idle_steps=2_000,
    imports=15,
    repeats=5,
    memory_bytes=20 * GB,
)

TINY = Scale(
    state=Spec("even", 40, 2 * MB),
    staging_bytes=1 << 20,  # the least that is allowed
    overlap=(Spec("even", 40, 2 * MB), Spec("even", 40, MB)),
    frozen=Spec("even", 80, 8 * MB),
    sizes=(MB // 4, MB),
    tensor_counts=(8, 100),
    tensor_bytes=MB,
    checkpoint_counts=(5, 20),
    ls_count=20,
    epochs=2,
    rows=256,
    width=32,
    blocks=1,
    tokens=16,
    segment_steps=4,
    segments=2,
    save_every=2,
    idle_steps=30,
    imports=2,
    repeats=2,
    memory_bytes=2 * GB,
    is_tiny=True,
)
