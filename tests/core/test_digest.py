"""Digests: one text for the same bytes, however they arrive."""

from __future__ import annotations

import numpy as np
import xxhash

from highcamp.core.digest import Hasher, digest


def test_a_digest_names_its_algorithm_and_has_a_known_value():
    """Files written today could not be checked by a later version with another algorithm."""
    assert digest(b"") == "xxh3-128:99aa06d3014798d86001c324468d497f"
    assert digest(b"highcamp") == "xxh3-128:" + xxhash.xxh3_128_hexdigest(b"highcamp")


def test_pieces_have_the_digest_of_the_whole():
    """A file written in pieces would never verify."""
    data = np.random.default_rng(0).bytes(100_003)
    hasher = Hasher()

    for start in range(0, len(data), 4096):
        hasher.update(memoryview(data)[start : start + 4096])

    assert hasher.text() == digest(data)


def test_an_array_has_the_digest_of_its_bytes():
    """The digest taken from live memory would differ from that of the file."""
    array = np.arange(12, dtype="<f4").reshape(3, 4)

    assert digest(array) == digest(array.tobytes())


def test_every_single_flipped_bit_changes_the_digest():
    """Damage would load silently."""
    data = bytearray(np.random.default_rng(1).bytes(64))
    whole = digest(data)

    for bit in range(len(data) * 8):
        data[bit // 8] ^= 1 << bit % 8
        assert digest(data) != whole
        data[bit // 8] ^= 1 << bit % 8


def test_a_digest_may_be_read_before_the_end():
    """Asking for the digest so far would change the final one."""
    hasher = Hasher()
    hasher.update(b"high")
    assert hasher.text() == digest(b"high")

    hasher.update(b"camp")

    assert hasher.text() == digest(b"highcamp")
