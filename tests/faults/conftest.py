from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # fault_scene, which the killed processes import too
pytest.register_assert_rewrite("fault_scene", "fault_trace")


def pytest_configure(config):
    """Marks of tests that need more than Python; CI has all of it, so there a skipped one is a failure."""
    config.addinivalue_line("markers", "needs_strace: kills and fails system calls with strace")
    config.addinivalue_line("markers", "needs_root: mounts a file system, or becomes another user")


def pytest_runtest_setup(item):
    """Skip what this machine cannot run, or fail in CI, where it has to run."""
    missing = None
    if item.get_closest_marker("needs_strace") and shutil.which("strace") is None:
        missing = "strace is not installed"
    elif item.get_closest_marker("needs_root") and os.geteuid() != 0:
        missing = "this test needs root"
    if missing is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)


@pytest.fixture
def place():
    """A directory in memory where there is one: these tests kill processes, not power, and fsync thousands of times."""
    shared = Path("/dev/shm")  # noqa: S108  (made unguessable by mkdtemp)
    where = Path(tempfile.mkdtemp(prefix="highcamp-", dir=shared if os.access(shared, os.W_OK) else None))
    yield where
    shutil.rmtree(where)


@pytest.fixture(scope="session")
def nursery():
    """A process whose children are killed."""
    import fault_trace

    found = fault_trace.Nursery()
    yield found
    found.close()


@pytest.fixture(scope="session")
def points(nursery, tmp_path_factory):
    """The calls of a work that goes through, in their order."""
    import fault_scene
    import fault_trace

    place = tmp_path_factory.mktemp("points")
    store, diary = fault_trace.prepared(place, "run")
    assert nursery.run(place / "run", diary, log=place / "log") == "ended 0"
    fault_scene.look(store, fault_trace.whole_lines(diary))
    found = fault_trace.calls_of(place / "log", place / "run")
    assert len(found) > 120
    assert {"mkdir", "openat", "write", "fsync", "renameat2"} <= {call for call, _, _ in found}
    return found
