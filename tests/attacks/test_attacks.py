"""Every attack we know of, kept as a file: each is refused, with the right error, on every run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from attack_parsers import CORPUS, PARSERS, refusal

from highcamp import errors

INDEX = json.loads((CORPUS / "index.json").read_text("utf-8"))
MAX_BYTES = 16 << 10


@pytest.mark.parametrize("name", INDEX)
def test_the_attack_is_refused(name):
    """Somebody has tried it, on us or on another library."""
    attack = INDEX[name]

    found = refusal(PARSERS[name.partition("/")[0]], (CORPUS / f"{name}.bin").read_bytes())

    assert type(found) is getattr(errors, attack["error"])
    assert attack["words"] in str(found)


def test_every_file_is_in_the_index_and_small():
    """An attack without a note is a riddle, and a checkout is no place for bombs."""
    files = {path.relative_to(CORPUS).with_suffix("").as_posix(): path for path in CORPUS.rglob("*.bin")}

    assert set(files) == set(INDEX)
    assert list(INDEX) == sorted(INDEX)
    assert all(attack["note"] for attack in INDEX.values())
    assert [name for name, path in files.items() if path.stat().st_size > MAX_BYTES] == []


def test_nothing_that_an_attack_would_run_has_run():
    """The files hold calls of os.system that leave a trace."""
    assert not Path("/tmp/highcamp-trap").exists()  # noqa: S108
