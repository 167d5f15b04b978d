"""Disks that are full, broken, read-only or somebody else's: a clear error, nothing lost, and the next save works."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import subprocess
import sys
from pathlib import Path

import fault_scene as scene
import fault_trace as trace
import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Keep
from highcamp.errors import Refused, StorageError
from highcamp.storage.local import LocalStore
from highcamp.testing import FaultyStore

# What each call says when a disk or a limit fails; fsync has a test of its own.
CODES = {
    "mkdir": ["ENOSPC", "EROFS", "EDQUOT"],
    "openat": ["ENOSPC", "EMFILE", "EROFS", "EACCES"],
    "write": ["ENOSPC", "EDQUOT", "EFBIG", "EIO"],
    "fsync": ["EIO", "ENOSPC"],
    "renameat2": ["EIO", "EROFS", "ESTALE", "EXDEV"],
    "rename": ["EIO", "EROFS", "ENOSPC"],
    "linkat": ["EPERM", "EIO", "EMLINK", "ENOSPC", "EXDEV"],
    "unlink": ["EIO", "EROFS"],
    "unlinkat": ["EIO", "EROFS"],
    "rmdir": ["EIO", "EROFS"],
    "close": ["EDQUOT", "EIO"],
    "ftruncate": ["EIO"],
}


@pytest.mark.needs_strace
def test_any_error_of_any_call_loses_nothing(nursery, points, place):
    """disk_full, quota_full, file_too_large, read_only_remount, too_many_files, rename_errors, at each call there is."""
    tried = set()
    codes = {call: itertools.cycle(names) for call, names in CODES.items()}
    for index, (call, number, text) in enumerate(points):
        if index % trace.STRIDE != trace.STRIDE - 1 and ".owner.lock" not in text:  # which filelock makes, not a store
            continue
        name, code = str(index), next(codes[call])
        tried.add((call, code))
        store, diary_path = trace.prepared(place, name)
        inject = f"{call}:error={code}:when={number}"

        ended = nursery.run(place / name, diary_path, inject=inject, log=place / "log")

        struck = [line for line in trace.lines_of(place / "log") if "(INJECTED)" in line]
        diary = trace.whole_lines(diary_path)
        try:
            assert ended == "ended 0", "an error that is no StorageError"
            assert len(struck) == 1
            assert str(place / name) in struck[0]
            scene.look(store, diary)
            scene.start_again(store, diary)
        except Exception as problem:
            problem.add_note(f"{code} at point {index}, {call} number {number}: {text}; {'; '.join(diary.lines)}")
            raise
    assert len(tried) > 10


@pytest.mark.needs_strace
def test_fsync_error_is_never_tried_again(nursery, points, place):
    """After a failed fsync the next one succeeds and proves nothing: that file is given up, and so is its checkpoint."""
    numbers = [number for call, number, _ in points if call == "fsync"]
    files = 0
    for number in numbers[:: trace.STRIDE]:
        name = str(number)
        store, diary_path = trace.prepared(place, name)

        assert nursery.run(
            place / name, diary_path, inject=f"fsync:error=EIO:when={number}", log=place / "log"
        ) == "ended 0"  # fmt: skip

        lines = [line for line in trace.lines_of(place / "log") if " fsync(" in line]
        struck = next(place_in_log for place_in_log, line in enumerate(lines) if "(INJECTED)" in line)
        path = lines[struck].partition("<")[2].partition(">")[0]
        if not path.endswith((f"/{name}", "/checkpoints", "/history", "/pins", str(place))):
            files += 1
            assert not [line for line in lines[struck + 1 :] if f"<{path}>" in line], "fsynced again"
        assert not Path(path).is_file() or path.endswith(".jsonl"), "a file that was never durable is still there"
        diary = trace.whole_lines(diary_path)
        scene.look(store, diary)
        scene.start_again(store, diary)
    assert files > 3


@contextlib.contextmanager
def mounted(where, size_bytes):
    """A file system of its own, so small that it can be filled."""
    where.mkdir()
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(where)], check=True)
    try:
        yield where
    finally:
        subprocess.run(["/bin/umount", str(where)], check=True)


def remount(where, options):
    """With other options."""
    subprocess.run(["/bin/mount", "-o", f"remount,{options}", str(where)], check=True)


@pytest.mark.needs_root
def test_disk_full_at_any_page(tmp_path):
    """A disk of which 0, 1, 2, … pages are free: each write of a save is once the one that does not fit."""
    failures = 0
    with mounted(tmp_path / "disk", 4 << 20) as disk:
        for pages in itertools.count():
            store, diary = LocalStore(disk / "run"), scene.Diary()
            scene.prepare(store, diary)
            attempt = scene.begin(store)
            attempt._check_space = lambda _: None  # the estimate before the first write is another test's
            free = os.statvfs(disk).f_bavail * 4096
            (disk / "filler").write_bytes(b"x" * max(0, free - pages * 4096))

            saved = None
            try:
                saved = scene.save(attempt, 3)
            except StorageError as error:
                failures += 1
                assert error.errno == errno.ENOSPC  # noqa: PT017
                assert "ENOSPC" in str(error)  # noqa: PT017
                assert "free on the file system" in str(error)  # noqa: PT017
                assert str(disk / "run") in str(error)  # noqa: PT017
            scene.look(store, diary)
            (disk / "filler").unlink()
            diary.note(f"saved {(saved or scene.save(attempt, 3)).name} 3 0.4")
            attempt.end("closed", 3, 3)
            scene.look(store, diary)
            scene.start_again(store, diary)
            store.remove("checkpoints")
            store.remove("history")
            store.remove("pins")
            store.remove("run.json")
            if saved:
                break
    assert failures >= 4  # two pages of tensors, one of state.json, one of the manifest


@pytest.mark.needs_root
def test_disk_full_is_told_before_it_is_tried(tmp_path):
    """A save that cannot fit ends before it has written gigabytes, and says what it needs and what there is."""
    with mounted(tmp_path / "disk", 1 << 20) as disk:
        weights = {"kernel": np.zeros(25_000)}  # 200 kB
        with (
            pytest.raises(StorageError, match=r"a checkpoint needs 0\.2 MB, 0\.\d MB are free; free some space"),
            Checkpointer(disk / "run", every=highcamp.Every(epochs=1), keep=Keep(last=9), verbose=0) as checkpointer,
        ):
            checkpointer.track(model=weights)
            for epoch in checkpointer.epochs(9):
                weights["kernel"] += epoch

        run = highcamp.open(disk / "run")
        assert 3 <= len(run.checkpoints) < 9
        assert all(result.ok for result in run.verify())
        done = run.last.epoch
        remount(disk, "size=4m")
        with Checkpointer(disk / "run", keep=Keep(last=9), verbose=0) as checkpointer:
            checkpointer.track(model=weights)
            assert list(checkpointer.epochs(9)) == list(range(done, 9))


@pytest.mark.needs_root
def test_disk_full_with_on_error_warn_trains_on(tmp_path, capsys):
    """Whoever chose "warn" gets the trained weights in memory, and what had been saved on the disk."""
    with mounted(tmp_path / "disk", 1 << 20) as disk:
        weights = {"kernel": np.zeros(25_000)}
        with Checkpointer(disk / "run", keep=Keep(last=9), verbose=0, on_error="warn") as checkpointer:
            checkpointer.track(model=weights)
            for _ in checkpointer.epochs(9):
                weights["kernel"] += 1
                (disk / "filler").write_bytes(b"") if checkpointer.epoch < 5 else fill(disk)
                checkpointer.log(loss=1.0)

        assert weights["kernel"][0] == 9
        said = capsys.readouterr().err
        assert "a save failed and training goes on without it" in said
        assert "are free" in said or "free on the file system" in said
        assert all(result.ok for result in highcamp.open(disk / "run").verify())


def fill(disk):
    """Take every byte that is left."""
    with contextlib.suppress(OSError), (disk / "filler").open("ab", buffering=0) as filler:
        while filler.write(b"x" * 4096):
            pass


@pytest.mark.needs_root
def test_read_only_remount(tmp_path):
    """Linux remounts a disk read-only after an error: readers read on, the save says so, and nothing is lost."""
    with mounted(tmp_path / "disk", 4 << 20) as disk:
        store, diary = LocalStore(disk / "run"), scene.Diary()
        scene.prepare(store, diary)
        attempt = scene.begin(store)
        remount(disk, "ro")
        try:
            with pytest.raises(StorageError, match=rf"{disk}/run/.* failed: Read-only file system \(EROFS\)") as caught:
                scene.save(attempt, 3)
            assert "mounted read-only" in str(caught.value)
            scene.look(store, diary)
            with pytest.raises(Refused, match="may not be written to"):
                scene.begin(store)
            attempt.release()
        finally:
            remount(disk, "rw")
        scene.start_again(store, diary)


@pytest.mark.parametrize("kind", scene.STORES)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_best_survives_failed_save(place, kind, code):
    """A better model that could not be written is no best: the rank follows what is on the disk."""
    store, diary = scene.STORES[kind](place, 1), scene.Diary()
    scene.prepare(store, diary)
    for fail_at in (2, 3, 4, 5):
        attempt = scene.begin(store)
        error = StorageError("injected", errno=code)
        attempt._store = FaultyStore(store, fail_at=fail_at, error=error)

        with pytest.raises(StorageError, match="injected"):
            scene.save(attempt, 4)

        attempt.release()
        assert highcamp.open(store).best.name == "step-00000002"


AS_NOBODY = """
import os, sys
import numpy, filelock, msgspec
import highcamp
from highcamp import Checkpointer
from highcamp.core import tree, tensorfile
import highcamp.run.live, highcamp.training.rng, highcamp.storage.local
os.setgroups([]); os.setgid(65534); os.setuid(65534)
"""


def as_nobody(code):
    """Run code as a user who owns nothing (root ignores permission bits); returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY + code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(highcamp.__file__).parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def public(place):
    """A run of root's that everybody may read and nobody else may write."""
    place.chmod(0o755)
    scene.prepare(LocalStore(place / "run"), scene.Diary())
    for path in [place / "run", *(place / "run").rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return place / "run"


@pytest.mark.needs_root
def test_read_only_reader(public):
    """Evaluation runs under other users and on read-only mounts: looking must need no right to write."""
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in public.rglob("*"))

    said = as_nobody(
        f"run = highcamp.open({str(public)!r})\n"
        "print(run.best.name, run.last.name, run.best.load('model')['bias'][0], all(v.ok for v in run.verify()))"
    )

    assert said == "step-00000002 step-00000002 2 True"
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in public.rglob("*")) == before


@pytest.mark.needs_root
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("Checkpointer({path!r})", "Refused {path} may not be written to by this user"),
        ("highcamp.open({path!r}).pin('best', 'mine')", "StorageError {path}/pins"),
        ("highcamp.open({path!r}).prune(highcamp.Keep(last=1, best=0))", ""),
        ("highcamp.open({path!r}).unpin('paper')", "StorageError unlink of {path}/pins/paper.json"),
        ("Checkpointer({path!r} + '/../new')", "Refused"),
    ],
)
def test_no_permission_is_said_with_the_path(public, code, expected):
    """Somebody else's run: the error names the place, and nothing is half done."""
    said = as_nobody(
        "from highcamp.errors import HighcampError\n"
        f"try:\n    {code.format(path=str(public))}\n"
        "except HighcampError as error:\n    print(type(error).__name__, error)"
    )

    for word in expected.format(path=public).split(" ", 1):
        assert word in said
    scene.look(LocalStore(public), scene.Diary())


@pytest.mark.needs_root
def test_a_directory_that_cannot_be_entered_is_refused(place):
    """The parent of the run is closed to this user: an error of ours, in the constructor."""
    place.chmod(0o700)
    (place / "closed").mkdir()

    said = as_nobody(
        "from highcamp.errors import HighcampError\n"
        f"try:\n    Checkpointer({str(place / 'closed' / 'run')!r})\n"
        "except HighcampError as error:\n    print(type(error).__name__, error)"
    )

    assert "may not" in said
