from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from highcamp.errors import InvalidArgument
from highcamp.storage import open_store
from highcamp.storage.local import LocalStore
from highcamp.storage.memory import MemoryStore
from highcamp.storage.store import parts


def test_a_path_is_a_local_store(tmp_path):
    """Text and Path mean the same place, and looking at it creates nothing."""
    for url in (tmp_path / "run", str(tmp_path / "run"), f"{tmp_path}/x/../run/"):
        store = open_store(url)

        assert isinstance(store, LocalStore)
        assert store.url == str(tmp_path / "run")
        assert open_store(store.url).url == store.url
    assert not list(tmp_path.iterdir())


def test_memory_is_one_store_per_name():
    """A run saved to memory://name is found there again by the same process, and by nobody else."""
    first = open_store("memory://test_store/one")
    first.replace("run.json", b"{}")

    assert isinstance(first, MemoryStore)
    assert open_store("memory://test_store/one") is first
    assert open_store(first.url) is first
    assert open_store("memory://test_store/two").list("") == []


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://bucket/run", "az://container/run", "S3://bucket/run"])
def test_stores_to_come_are_refused(url):
    """no_silent_no_save: a directory called `s3:` would take the checkpoints, and be gone with the machine."""
    for each in (url, Path(url)):
        with pytest.raises(InvalidArgument, match=r"(s3|gs|az):// is not available in this version"):
            open_store(each)


@pytest.mark.parametrize(
    "url", ["ftp://host/run", "file:///tmp/run", "memory:/name", Path("memory://name"), "hdfs://x"]
)
def test_unknown_stores_are_refused(url):
    """A mistyped scheme must not become a local directory either."""
    with pytest.raises(InvalidArgument, match="is no store; give a path, or memory://name"):
        open_store(url)


@pytest.mark.parametrize("url", ["", "a\0b", b"bytes", "memory://", "memory://a//b", "memory://../x"])
def test_what_is_no_url_is_refused(url):
    """Said when the store is opened, not at the first save."""
    with pytest.raises(InvalidArgument):
        open_store(url)


@pytest.mark.parametrize("name", ["runs:2026", "a:b/c", "with space", "-", "ünï"])
def test_odd_names_are_still_paths(tmp_path, monkeypatch, name):
    """A colon alone makes no URL."""
    monkeypatch.chdir(tmp_path)

    assert open_store(name).url == str(tmp_path / name)


def test_parts_allow_what_file_systems_allow():
    """What is refused is in the contract of the stores; names that only look odd are not."""
    assert parts("checkpoints/.pending-x/ü ~2") == ("checkpoints", ".pending-x", "ü ~2")
    assert parts("ü" * 127) == ("ü" * 127,)
    assert parts("", root=True) == ()
    with pytest.raises(InvalidArgument, match="more than 255 bytes"):
        parts("ü" * 128)
    with pytest.raises(InvalidArgument, match="is not a name"):
        parts("")


def test_importing_loads_no_numpy_and_no_test_tools():
    """Listing a run must start at once, on a machine without anything but the core."""
    script = (
        "import sys, highcamp.storage.local, highcamp.storage.memory, highcamp.policy, highcamp.testing\n"
        "highcamp.storage.open_store('somewhere').list('')\n"
        "print(sorted({'numpy', 'pytest', 'ctypes', 'shutil', 'click', 'rich'} & set(sys.modules)))\n"
    )

    ran = subprocess.run([sys.executable, "-S", "-c", script], check=True, capture_output=True, text=True, timeout=60)

    assert ran.stdout == "[]\n"
