# Descriptors and names as the system gives them, not paths.
# ruff: noqa: PTH115, PTH208

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import resource
import shutil
import socket
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from highcamp.errors import Damaged, InvalidArgument, StorageError, Taken
from highcamp.storage import local, system
from highcamp.storage.local import DurabilityWarning, LocalStore
from highcamp.storage.store import NotThere, is_plain, parts
from highcamp.testing.reads import BAD_PATHS

STEP = "checkpoints/step-00000001"
NEXT = "checkpoints/step-00000002"


@pytest.fixture
def store(tmp_path):
    """Give a store in which nothing exists yet, its root neither."""
    return LocalStore(tmp_path / "run")


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What is fsynced, renamed and made, in order, with paths below tmp_path; unique parts of names are cut off."""
    log = []

    def name(where):
        return re.sub(r"-[0-9a-f]{16}", "", os.path.relpath(where, tmp_path))

    def on_descriptor(descriptor):
        return name(os.readlink(f"/proc/self/fd/{descriptor}"))

    def watch(module, function, tell):
        real = getattr(module, function)

        def watched(*arguments):
            log.append(tell(*arguments))
            return real(*arguments)

        monkeypatch.setattr(module, function, watched)

    watch(os, "fsync", lambda descriptor: f"fsync {on_descriptor(descriptor)}")
    watch(os, "mkdir", lambda where, *_: f"mkdir {name(where)}")
    watch(os, "replace", lambda source, target: f"replace {name(source)} {name(target)}")
    watch(local, "rename_to_unused", lambda source, target: f"rename {name(source)} {name(target)}")
    return log


def save(store, target=STEP, data=b"weights"):
    """What a commit does, in its order; True when acknowledged."""
    draft = store.draft(target)
    store.create(f"{draft}/model.safetensors", [data])
    store.create(f"{draft}/manifest.json", [b"{}"])
    store.publish(draft, target)


def fail(monkeypatch, function, code, *, at=1, module=os):
    """Let the N-th call of a function of the operating system fail with an errno; the counter of its calls."""
    real, counter = getattr(module, function), []

    def failing(*arguments, **named):
        counter.append(arguments)
        if len(counter) == at:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **named)

    monkeypatch.setattr(module, function, failing)
    return counter


# ------------------------------------------------------------------------------------------------------------ durability


def test_directory_is_fsynced(store, calls):
    """power_cut_after_ack: every step that was left out has lost acknowledged checkpoints on ext4 or xfs."""
    store.draft("checkpoints/other")
    calls.clear()

    save(store)

    assert calls == [
        "mkdir run/checkpoints/.pending-step-00000001",
        "fsync run/checkpoints/.pending-step-00000001/model.safetensors",
        "fsync run/checkpoints/.pending-step-00000001/manifest.json",
        "fsync run/checkpoints/.pending-step-00000001",
        "rename run/checkpoints/.pending-step-00000001 run/checkpoints/step-00000001",
        "fsync run/checkpoints",
    ]


def test_directories_below_a_draft_are_fsynced_from_the_bottom_up(store, calls):
    """A name is durable when its directory is; the draft's own fsync says nothing about what lies deeper."""
    draft = store.draft(STEP)
    store.local_path(f"{draft}/a/b").mkdir(parents=True)
    calls.clear()

    store.publish(draft, STEP)

    inside = "fsync run/checkpoints/.pending-step-00000001"
    assert calls[:3] == [f"{inside}/a/b", f"{inside}/a", inside]


def test_every_directory_made_is_durable(tmp_path, calls):
    """An acknowledged checkpoint vanishes with its run directory if only the checkpoint was fsynced."""
    LocalStore(tmp_path / "runs" / "digits").draft(STEP)

    assert calls == [
        "mkdir runs",
        "fsync .",
        "mkdir runs/digits",
        "fsync runs",
        "mkdir runs/digits/checkpoints",
        "fsync runs/digits",
        "mkdir runs/digits/checkpoints/.pending-step-00000001",
    ]


def test_directories_found_are_made_durable_once(store, calls):
    """The process that made them may have been killed between its mkdir and its fsync."""
    store.local_path("checkpoints").mkdir(parents=True)
    calls.clear()

    store.draft(STEP)
    store.draft(STEP)

    made = "mkdir run/checkpoints/.pending-step-00000001"
    assert calls == ["fsync .", "fsync run", made, made]


def test_a_directory_removed_meanwhile_is_made_again(store):
    """odd_environment: the run directory is removed under a running training; the next save is a new, whole one."""
    save(store)
    shutil.rmtree(store.url)

    save(store)

    assert store.read(f"{STEP}/model.safetensors", 10) == b"weights"


def test_create_outside_a_draft_is_durable_with_its_name(store, calls):
    """An owner record without a draft has nobody else who would fsync its directory."""
    store.local_path("").mkdir()
    calls.clear()

    store.create("owner.json", [b"{}"])

    assert calls == ["fsync run/owner.json", "fsync run"]


def test_replace_is_durable_before_it_is_seen(store, calls):
    """On xfs a rename over an existing file without fsync loses the old content too."""
    store.replace("pins/paper.json", b"old")
    calls.clear()

    store.replace("pins/paper.json", b"new")

    assert calls == [
        "fsync run/pins/.pending-paper.json",
        "replace run/pins/.pending-paper.json run/pins/paper.json",
        "fsync run/pins",
    ]


def test_append_makes_the_name_durable_before_the_first_row(store, calls):
    """The fsync of the manifest's step must find a history whose name is on the disk."""
    store.append("history/a.jsonl", b"1\n", durable=False)
    assert calls[-1] == "fsync run/history"
    calls.clear()

    store.append("history/a.jsonl", b"2\n", durable=False)
    assert calls == []
    store.append("history/a.jsonl", b"3\n", durable=True)
    assert calls == ["fsync run/history/a.jsonl"]


def test_withdraw_and_remove_are_durable(store, calls):
    """What was removed must not come back after a power cut; both directories of a rename are fsynced."""
    save(store)
    store.local_path("elsewhere").mkdir()
    calls.clear()

    store.withdraw(STEP, "checkpoints/.trash-1")
    assert calls == ["rename run/checkpoints/step-00000001 run/checkpoints/.trash-1", "fsync run/checkpoints"]
    calls.clear()
    store.withdraw("checkpoints/.trash-1", "elsewhere/.trash-1")
    assert calls[1:] == ["fsync run/elsewhere", "fsync run/checkpoints"]
    calls.clear()
    store.remove("elsewhere/.trash-1")
    assert calls == ["fsync run/elsewhere"]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace shows the system calls themselves")
def test_the_kernel_sees_what_we_say(tmp_path):
    """The log above is Python's; this one is the kernel's: flags of open, the no-replace rename, the order."""
    trace, root = tmp_path / "trace", tmp_path / "run"
    script = (
        "from highcamp.storage.local import LocalStore\n"
        f"store = LocalStore({str(root)!r})\n"
        "draft = store.draft('checkpoints/s')\n"
        "store.create(draft + '/manifest.json', [b'{}'])\n"
        "store.publish(draft, 'checkpoints/s')\n"
    )
    command = ["strace", "-f", "-y", "-o", trace, "-e", "trace=openat,write,fsync,close,rename,renameat2,mkdir"]

    subprocess.run([*command, sys.executable, "-c", script], check=True, timeout=60)

    text = trace.read_text()
    assert re.search(r"manifest\.json\", O_WRONLY\|O_CREAT\|O_EXCL\|O_NOFOLLOW\|O_CLOEXEC, 0666\)", text)
    order = [
        r"write\(\d+<\S+/\.pending-s-[0-9a-f]{16}/manifest\.json>",
        r"fsync\(\d+<\S+/\.pending-s-[0-9a-f]{16}/manifest\.json>\) = 0",
        r"close\(\d+<\S+/\.pending-s-[0-9a-f]{16}/manifest\.json>\) = 0",
        r"fsync\(\d+<\S+/\.pending-s-[0-9a-f]{16}>\) = 0",
        r"renameat2\(AT_FDCWD\S*, \"\S+/\.pending-s-[0-9a-f]{16}\", AT_FDCWD\S*, \"\S+/checkpoints/s\", RENAME_NOREPLACE\) = 0",
        r"fsync\(\d+<\S+/checkpoints>\) = 0",
    ]
    assert re.search(r"(?s)" + ".*".join(order), text)


# ----------------------------------------------------------------------------------------------------------- failed calls


def test_failed_fsync_is_final(store, monkeypatch):
    """fsync_error: on ext4 a second fsync succeeds and a read shows bytes that are not on the disk: neither is done."""
    draft = store.draft(STEP)
    counter = fail(monkeypatch, "fsync", errno.EIO)

    with pytest.raises(
        StorageError, match=r"fsync of \S+model\.safetensors failed: Input/output error \(EIO\)"
    ) as caught:
        store.create(f"{draft}/model.safetensors", [b"weights"])

    assert len(counter) == 1
    assert caught.value.errno == errno.EIO
    assert store.list(draft) == []
    save(store)
    assert store.read(f"{STEP}/model.safetensors", 10) == b"weights"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("function", ["fsync", "close", "write", "open", "mkdir"])
def test_any_failed_call_fails_the_save_and_nothing_else(tmp_path, monkeypatch, function, code):
    """One error naming call and path, the earlier checkpoint untouched, and the next save works."""
    for at in itertools.count(1):
        store = LocalStore(tmp_path / f"run-{at}")
        save(store)
        with monkeypatch.context() as patched:
            counter = fail(patched, function, code, at=at)
            try:
                save(LocalStore(store.url), NEXT)
            except StorageError as error:
                told = error
            else:
                assert len(counter) < at
                break
        assert told.errno == code
        assert f"({errno.errorcode[code]})" in str(told)
        assert str(tmp_path) in str(told)
        assert store.read(f"{STEP}/model.safetensors", 10) == b"weights"
        if NEXT.rpartition("/")[2] not in store.list("checkpoints"):
            save(store, NEXT)
        assert store.read(f"{NEXT}/manifest.json", 10) == b"{}"
    assert at > 1


def test_a_failed_close_is_a_failed_file(store, monkeypatch):
    """NFS and quotas report at close what they could not write; the number is not closed a second time."""
    draft = store.draft(STEP)
    real, closed = os.close, []

    def close(descriptor):
        real(descriptor)
        closed.append(descriptor)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "close", close)
    with pytest.raises(StorageError, match=r"close of \S+x failed: Disk quota exceeded \(EDQUOT\)"):
        store.create(f"{draft}/x", [b"1"])

    assert len(closed) == 1
    assert store.list(draft) == []


def test_the_first_error_is_the_one_told(store, monkeypatch):
    """A disk that is full fails the close and the clean-up as well; the message is about the write."""
    draft = store.draft(STEP)
    real = os.close

    def close(descriptor):
        real(descriptor)
        raise OSError(errno.EIO, "close")

    monkeypatch.setattr(os, "close", close)
    fail(monkeypatch, "write", errno.ENOSPC)
    fail(monkeypatch, "unlink", errno.EIO)

    with pytest.raises(StorageError, match="write of") as caught:
        store.create(f"{draft}/x", [b"1"])
    assert caught.value.errno == errno.ENOSPC


def test_disk_full_says_needed_and_free(store, monkeypatch):
    """disk_full: the numbers tell whether removing one checkpoint will do."""
    draft = store.draft(STEP)
    fail(monkeypatch, "write", errno.ENOSPC, at=2)

    with pytest.raises(StorageError) as caught:
        store.create(f"{draft}/x", [bytes(100_000), bytes(200_000)])

    text = str(caught.value)
    assert re.search(
        r"No space left on device \(ENOSPC\), 200000 bytes still to write, \d+ free on the file system; ", text
    )
    assert text.endswith("what was committed before is untouched")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_disk_that_is_really_full(tmp_path):
    """The kernel's own ENOSPC, in the middle of a file: nothing half is left, and the space is free again."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run([shutil.which("mount"), "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], check=True, timeout=60)
    try:
        store = LocalStore(mount / "run")
        save(store)
        draft = store.draft(NEXT)

        with pytest.raises(StorageError) as caught:
            store.create(f"{draft}/x", iter([bytes(700_000), bytes(700_000)]))

        assert caught.value.errno == errno.ENOSPC
        assert store.list(draft) == []
        save(store, NEXT, bytes(500_000))
        assert store.size(f"{NEXT}/model.safetensors") == 500_000
    finally:
        subprocess.run([shutil.which("umount"), mount], check=True, timeout=60)


def test_file_too_large(store):
    """file_too_large: a limit of the shell is named as what it is."""
    draft = store.draft(STEP)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"File too large \(EFBIG\); .*ulimit -f"):
            store.create(f"{draft}/x", [bytes(300_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert store.list(draft) == []


def test_too_many_files(store):
    """too_many_files: the process ran out of descriptors, the disk is fine."""
    draft = store.draft(STEP)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        with pytest.raises(StorageError, match=r"Too many open files \(EMFILE\); .*ulimit -n"):
            store.create(f"{draft}/x", [b"1"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_no_permission_says_whose_it_is(tmp_path):
    """no_permission: path and owner in the message; the user who runs it is often not the one who made it."""
    root = tmp_path / "run"
    root.mkdir(mode=0o500)
    store = LocalStore(root)
    before = os.geteuid()
    if before == 0:  # root ignores permission bits
        os.seteuid(65534)
    try:
        with pytest.raises(
            StorageError, match=r"EACCES\), \S+ belongs to user \d+ with mode \d{4}, this process is user"
        ):
            store.draft(STEP)
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("size", [10, 1 << 20])
def test_short_writes(store, monkeypatch, size):
    """short_writes: the kernel may take less than it was given, as it does above 2 GiB; no byte is lost or doubled."""
    draft = store.draft(STEP)
    data = os.urandom(size)
    real = os.write
    step = size // 7 + 1
    monkeypatch.setattr(os, "write", lambda descriptor, view: real(descriptor, view[:step]))

    store.create(f"{draft}/x", [data, data])
    store.append("history/a.jsonl", data, durable=True)

    assert store.read(f"{draft}/x", 1 << 30) == data + data
    assert store.read("history/a.jsonl", 1 << 30) == data


def test_a_write_that_takes_nothing_is_an_error(store, monkeypatch):
    """Not an endless loop in the thread that saves."""
    draft = store.draft(STEP)
    monkeypatch.setattr(os, "write", lambda *_: 0)

    with pytest.raises(StorageError, match="write took 0 bytes"):
        store.create(f"{draft}/x", [b"1"])


def test_small_chunks_are_gathered(store, monkeypatch):
    """100,000 small tensors must not be 100,000 writes; a large one is written as it is."""
    draft = store.draft(STEP)
    counter = fail(monkeypatch, "write", 0, at=-1)

    store.create(f"{draft}/x", (b"12345678" for _ in range(200_000)))
    assert len(counter) == 2
    counter.clear()
    store.create(f"{draft}/y", [b"1", bytes(1 << 22), b"2", b"3"])
    assert [len(view) for _, view in counter] == [1, 1 << 22, 2]


# -------------------------------------------------------------------------------------------------------------- publishing


def test_pending_beside_the_target(store):
    """Staged elsewhere, the rename would be a copy across devices; a name is never used twice."""
    drafts = {store.draft(STEP) for _ in range(20)}

    assert len(drafts) == 20
    for draft in drafts:
        assert re.fullmatch(r"checkpoints/\.pending-step-00000001-[0-9a-f]{16}", draft)
        assert store.local_path(draft).is_dir()
    assert re.fullmatch(r"\.pending-name-[0-9a-f]{16}", store.draft("name"))


@pytest.fixture(params=["renameat2", "refused", "absent"])
def rename(request, monkeypatch):
    """The three ways to rename: the system call, a file system that refuses it (FUSE), a library without it (macOS)."""
    if request.param == "refused":
        monkeypatch.setattr(system, "_renameat2", lambda: lambda *_: errno.EINVAL)
    if request.param == "absent":
        monkeypatch.setattr(system, "_renameat2", lambda: None)


@pytest.mark.parametrize("there", ["empty directory", "full directory", "file", "dangling link"])
def test_rename_onto_a_directory(store, rename, there):
    """rename(2) silently replaces an empty directory; whatever lies there is Taken, and both stay as they are."""
    draft = store.draft(STEP)
    store.create(f"{draft}/manifest.json", [b"{}"])
    target = store.local_path(STEP)
    if there == "file":
        target.write_bytes(b"1")
    elif there == "dangling link":
        target.symlink_to("nowhere")
    else:
        target.mkdir()
        if there == "full directory":
            (target / "x").write_bytes(b"1")
    before = target.lstat()

    with pytest.raises(Taken, match="step-00000001 is in use already; take another name"):
        store.publish(draft, STEP)

    assert target.lstat().st_ino == before.st_ino
    assert store.list(draft) == ["manifest.json"]
    store.publish(draft, NEXT)
    assert store.list(NEXT) == ["manifest.json"]


def test_both_errnos_of_a_full_directory_mean_taken(store, monkeypatch):
    """ext4 says ENOTEMPTY, xfs EEXIST."""
    for code in (errno.ENOTEMPTY, errno.EEXIST):
        draft = store.draft(STEP)
        fail(monkeypatch, "rename_to_unused", code, module=local)

        with pytest.raises(Taken):
            store.publish(draft, STEP)


def test_a_rename_across_devices_is_an_error(store, monkeypatch):
    """rename_errors: the draft stays, both paths are named, nothing is copied."""
    draft = store.draft(STEP)
    fail(monkeypatch, "rename_to_unused", errno.EXDEV, module=local)

    with pytest.raises(StorageError, match=rf"rename of \S+{draft} to \S+{STEP} failed: .*EXDEV"):
        store.publish(draft, STEP)
    assert store.list(draft) == []


def test_lost_reply_is_our_success(store, monkeypatch):
    """NFS repeats the call and answers ENOENT: the target is ours, so it is saved."""
    real = local.rename_to_unused

    def lost(source, target):
        real(source, target)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    draft = store.draft(STEP)
    store.create(f"{draft}/manifest.json", [b"{}"])
    monkeypatch.setattr(local, "rename_to_unused", lost)

    store.publish(draft, STEP)

    assert store.list(STEP) == ["manifest.json"]


def test_a_draft_that_vanished_is_not_taken_for_saved(store, monkeypatch):
    """ENOENT beside a target of somebody else is no success."""

    def swept(source, target):
        Path(target).mkdir()
        Path(source).rmdir()
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(local, "rename_to_unused", swept)

    with pytest.raises(NotThere, match="rename of"):
        store.publish(store.draft(STEP), STEP)


def test_a_draft_must_be_a_directory(store):
    """A file published as a checkpoint would be listed and never load."""
    store.local_path("checkpoints").mkdir(parents=True)
    store.local_path("checkpoints/file").write_bytes(b"")
    store.local_path("checkpoints/link").symlink_to(store.url)

    with pytest.raises(Damaged, match="a regular file, expected a directory"):
        store.publish("checkpoints/file", STEP)
    with pytest.raises(Damaged, match="a symbolic link, expected a directory"):
        store.publish("checkpoints/link", STEP)


def test_a_checkpoint_that_was_moved_and_linked_can_be_withdrawn(store, tmp_path):
    """The link goes to the trash, what it points to stays where its owner put it."""
    save(store)
    store.local_path(STEP).rename(tmp_path / "moved")
    store.local_path(STEP).symlink_to(tmp_path / "moved")

    store.withdraw(STEP, "checkpoints/.trash-1")
    store.remove("checkpoints/.trash-1")

    assert sorted(os.listdir(tmp_path / "moved")) == ["manifest.json", "model.safetensors"]


def test_no_directory_fsync(store, monkeypatch):
    """no_directory_fsync: some FUSE and CIFS mounts cannot; one warning, then the save succeeds. EIO is never swallowed."""
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)

    with pytest.warns(DurabilityWarning, match=r"durability is not guaranteed on this file system.*EINVAL") as caught:
        save(store)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(store, NEXT)
    assert store.list("checkpoints") == ["step-00000001", "step-00000002"]


# ------------------------------------------------------------------------------------------------------ files of all kinds


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000, 0o002])
def test_umask_decides_modes(store, mask):
    """Others make files 0600 that a group cannot read; who may read is for the umask to say."""
    before = os.umask(mask)
    try:
        save(store)
        store.replace("run.json", b"{}")
        store.append("history/a.jsonl", b"1\n", durable=False)
    finally:
        os.umask(before)

    for path in ("run.json", "history/a.jsonl", f"{STEP}/manifest.json", f"{STEP}/model.safetensors"):
        assert stat.S_IMODE(store.local_path(path).stat().st_mode) == 0o666 & ~mask
    for path in ("", "history", "checkpoints", STEP):
        assert stat.S_IMODE(store.local_path(path).stat().st_mode) == 0o777 & ~mask


def make_odd(path, kind, target):
    """Put something that is no regular file at a path."""
    if kind == "link":
        path.symlink_to(target)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        before = Path.cwd()
        os.chdir(path.parent)  # a socket's address holds 107 bytes
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(before)


@pytest.mark.parametrize("kind", ["link", "dangling link", "loop", "FIFO", "socket"])
@pytest.mark.timeout(20)
def test_odd_files(store, tmp_path, kind):
    """odd_files: nothing is followed, nothing blocks, nothing under another name is read, written or removed."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    store.local_path("").mkdir()
    odd = store.local_path("x")
    make_odd(odd, kind, outside)

    assert store.size("x") is None
    for call in (lambda: store.read("x", 100), lambda: store.open("x")):
        with pytest.raises(Damaged, match=r"run/x is a (symbolic link|FIFO|socket), expected a regular file"):
            call()
    with pytest.raises(Taken):
        store.create("x", [b"1"])
    with pytest.raises((StorageError, Damaged)):
        store.append("x", b"1", durable=False)
    assert store.list("") == ["x"]
    store.replace("x", b"ours")
    assert store.read("x", 100) == b"ours"
    store.remove("x")
    make_odd(odd, kind, outside)
    store.remove("x")
    assert store.list("") == []
    assert outside.read_bytes() == b"secret"


@pytest.mark.parametrize("kind", ["link", "dangling link", "loop", "FIFO", "socket", "directory"])
@pytest.mark.timeout(20)
def test_odd_files_among_many_are_told_in_their_place(store, tmp_path, kind):
    """One FIFO where a manifest was would stop the listing of a run, also when its bytes are known from before."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"{}")
    for target in (STEP, NEXT):
        save(store, target)
    names = ["step-00000001", "step-00000002"]
    odd = store.local_path(f"{STEP}/manifest.json")
    odd.unlink()
    if kind == "directory":
        odd.mkdir()
    make_odd(odd, kind, outside)

    for known in ({}, dict.fromkeys(names, b"{}"), dict.fromkeys(names, b"")):
        (_, first), second = store.read_each("checkpoints", names, "manifest.json", 10, known)

        assert isinstance(first, Damaged)
        assert re.search(
            r"step-00000001/manifest\.json is a (symbolic link|FIFO|socket|directory), expected", str(first)
        )
        assert second == ("step-00000002", b"{}")


def test_reading_many_is_told_where_it_failed(store, monkeypatch):
    """A disk that fails in the middle of a listing is no damage of one checkpoint; and no descriptor is lost."""
    for target in (STEP, NEXT):
        save(store, target)
    before = set(os.listdir("/proc/self/fd"))
    for known in ({}, {"step-00000002": b"{}"}):
        with monkeypatch.context() as patched:
            fail(patched, "pread", errno.EIO, at=2)
            fail(patched, "fstat", errno.EIO, at=2)
            reading = store.read_each("checkpoints", ["step-00000001", "step-00000002"], "manifest.json", 10, known)
            assert next(reading) == ("step-00000001", b"{}")
            with pytest.raises(StorageError, match=r"read of \S+step-00000002/manifest\.json failed: .*EIO"):
                next(reading)

    store.read_each("checkpoints", ["step-00000001"], "manifest.json", 10, {}).close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_file_swapped_before_it_is_opened_is_not_followed(store, tmp_path, monkeypatch):
    """Between the look and the open a link may take the file's place."""
    (tmp_path / "outside").write_bytes(b"secret")
    store.local_path("").mkdir()
    store.local_path("x").write_bytes(b"1")
    real = os.open

    def swap(where, *arguments, **named):
        Path(where).unlink()
        Path(where).symlink_to(tmp_path / "outside")
        return real(where, *arguments, **named)

    monkeypatch.setattr(os, "open", swap)

    with pytest.raises(StorageError, match="ELOOP"):
        store.open("x")
    with pytest.raises(Damaged, match="a symbolic link, expected a regular file"):
        store.read("x", 100)


def test_remove_does_not_follow_links_below(store, tmp_path):
    """foreign_files_stay: a link in a checkpoint must not empty the directory it points to."""
    save(store)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_bytes(b"1")
    store.local_path(f"{STEP}/link").symlink_to(tmp_path / "outside")

    store.remove(STEP)

    assert store.list("checkpoints") == []
    assert (tmp_path / "outside" / "kept").exists()


def test_two_pruners_remove_the_same_tree(store, monkeypatch):
    """two_pruners: what the other was faster to remove is no error."""
    save(store)
    store.local_path("file").write_bytes(b"")
    real = os.unlink

    def faster(*arguments, **named):
        real(*arguments, **named)
        real(*arguments, **named)

    monkeypatch.setattr(os, "unlink", faster)

    store.remove(STEP)
    store.remove("file")

    assert store.list("") == ["checkpoints"]
    assert store.list("checkpoints") == []


def test_what_cannot_be_removed_is_said(store, monkeypatch):
    """errors_are_raised: a prune that frees nothing must not report that it did."""
    save(store)
    fail(monkeypatch, "unlink", errno.EIO)

    with pytest.raises(StorageError, match=r"remove of .*EIO"):
        store.remove(STEP)


def test_truncated_while_open(store):
    """truncated_while_mapped: a file that lost its end is an error, not half a tensor and not SIGBUS."""
    save(store, data=bytes(10_000))

    with store.open(f"{STEP}/model.safetensors") as reader:
        os.truncate(store.local_path(f"{STEP}/model.safetensors"), 5_000)
        with pytest.raises(Damaged, match="ends at byte 5000, expected 5000 bytes more; it was truncated"):
            reader.read_into(0, memoryview(bytearray(10_000)))
        with pytest.raises(Damaged, match="shorter than the 10000 bytes it had"):
            reader.map()


def test_an_open_reader_survives_removal(store):
    """reader_against_pruner: a restore that has begun ends, whatever is pruned meanwhile."""
    save(store)

    with store.open(f"{STEP}/model.safetensors") as reader:
        store.remove("checkpoints")
        buffer = bytearray(7)
        reader.read_into(0, memoryview(buffer))

    assert bytes(buffer) == b"weights"


def test_read_errors_are_told(store, monkeypatch):
    """A disk that cannot read says so with its path; it is not taken for damage by content."""
    save(store)
    fail(monkeypatch, "preadv", errno.EIO)
    fail(monkeypatch, "pread", errno.EIO)

    with (
        store.open(f"{STEP}/manifest.json") as reader,
        pytest.raises(StorageError, match=r"read of \S+manifest\.json .*EIO"),
    ):
        reader.read_into(0, memoryview(bytearray(2)))
    with pytest.raises(StorageError, match=r"read of \S+manifest\.json failed: .*EIO"):
        store.read(f"{STEP}/manifest.json", 10)


@pytest.mark.parametrize("function", ["open", "fstat", "pread", "close"])
def test_a_small_file_is_read_or_the_failed_call_is_told(store, monkeypatch, function):
    """Too many open files, or a disk that is gone, is not damage: the checkpoint must not be passed over as broken."""
    save(store)
    descriptors = set(os.listdir("/proc/self/fd"))
    for code in (errno.EIO, errno.EMFILE, errno.ESTALE):
        with monkeypatch.context() as patched:
            real = getattr(os, function)

            def failing(*arguments, real=real, code=code, **_):
                if function == "close":
                    real(*arguments)
                raise OSError(code, os.strerror(code))

            patched.setattr(os, function, failing)
            with pytest.raises(
                StorageError, match=rf"of \S+manifest\.json failed: .*\({errno.errorcode[code]}\)"
            ) as caught:
                store.read(f"{STEP}/manifest.json", 10)

        assert caught.value.errno == code
    assert set(os.listdir("/proc/self/fd")) == descriptors


def test_short_reads(store, monkeypatch):
    """A network file system may give a few bytes at a time: all of them come, and an end that comes too early is damage."""
    save(store, data=b"0123456789")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, count, offset: real(descriptor, min(count, 3), offset))
    assert store.read(f"{STEP}/model.safetensors", 10) == b"0123456789"

    given = [b"0123", b""]
    monkeypatch.setattr(os, "pread", lambda *_: given.pop(0))

    with pytest.raises(Damaged, match="ends at byte 4, expected 6 bytes more"):
        store.read(f"{STEP}/model.safetensors", 10)


@pytest.mark.parametrize(
    "path", ["a", "a/b.c", "a-b_c.2/d", "x" * 100, "_/-", *BAD_PATHS, ".", ".a", "a/.b", "a/b.", "x" * 101, "a\n", "é"]
)
def test_a_plain_path_is_one_that_needs_no_closer_look(store, path):
    """Names become paths thousands of times in a listing: the short way must lead where the long one does, or not at all."""
    if is_plain(path):
        assert os.path.join(store.url, *parts(path)) == str(store.local_path(path))  # noqa: PTH118
    else:
        assert path in BAD_PATHS or not path.isascii() or "." in path or len(path) > 100 or not path.isprintable()


# ------------------------------------------------------------------------------------------------------------ small files


def test_a_row_is_one_write(store, monkeypatch):
    """Rows of O_APPEND do not mix, and a reader sees whole ones, if each is one write."""
    store.append("history/a.jsonl", b"1\n", durable=False)
    counter = fail(monkeypatch, "write", 0, at=-1)

    store.append("history/a.jsonl", b"x" * 100_000 + b"\n", durable=False)

    assert len(counter) == 1


def test_half_a_row_is_taken_back(store, monkeypatch):
    """A full disk takes half a row; the next row glued to it would be lost too."""
    store.append("history/a.jsonl", b"first\n", durable=False)
    real, counter = os.write, []

    def write(descriptor, view):
        counter.append(1)
        if len(counter) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, view[:3])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        with pytest.raises(StorageError, match="4 bytes still to write"):
            store.append("history/a.jsonl", b"second\n", durable=False)
    store.append("history/a.jsonl", b"third\n", durable=False)

    assert store.read("history/a.jsonl", 100) == b"first\nthird\n"


def test_a_history_whose_name_could_not_be_made_durable_is_begun_again(store, monkeypatch):
    """Found by the next append, it would be taken for one whose name is on the disk."""
    store.append("history/other.jsonl", b"1\n", durable=False)
    with monkeypatch.context() as patched:
        counter = fail(patched, "fsync", errno.EIO)
        with pytest.raises(StorageError, match=r"fsync of \S+history failed"):
            store.append("history/a.jsonl", b"1\n", durable=False)
    assert len(counter) == 1

    assert store.list("history") == ["other.jsonl"]


def test_a_failed_replace_keeps_the_old_file(store, monkeypatch):
    """A pin or run.json is the old one or the new one, and no leftover lies beside it."""
    store.replace("pins/paper.json", b"old")

    for function in ("write", "fsync", "replace"):
        with monkeypatch.context() as patched:
            fail(patched, function, errno.EIO)
            with pytest.raises(StorageError, match="EIO"):
                store.replace("pins/paper.json", b"new")
        assert store.read("pins/paper.json", 10) == b"old"
        assert store.list("pins") == ["paper.json"]


# --------------------------------------------------------------------------------------------------------------- the place


def test_opening_a_store_creates_nothing(tmp_path):
    """read_only_reader: looking at a run leaves no trace, and a mistyped path makes no directory."""
    store = LocalStore(tmp_path / "typo" / "run")
    store.list("checkpoints")
    store.size("run.json")
    store.free_bytes()
    store.remove("owner.json")

    assert os.listdir(tmp_path) == []


def test_a_relative_path_survives_chdir(tmp_path, monkeypatch):
    """odd_environment: a training script that changes its directory goes on saving into the same run."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = LocalStore("run")

    monkeypatch.chdir(tmp_path / "elsewhere")
    save(store)

    assert store.url == str(tmp_path / "run")
    assert os.listdir(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("name", ["with space", "ünï-é-日本", "new\nline", os.fsdecode(b"\xff\xfe")])
def test_odd_environment(tmp_path, name):
    """Spaces, emoji, newlines and names that are no UTF-8 in the user's own path are not ours to refuse."""
    store = LocalStore(tmp_path / name)

    save(store)
    store.withdraw(STEP, "checkpoints/.trash-1")

    assert store.list("checkpoints") == [".trash-1"]


def test_a_file_in_place_of_the_run_is_an_error(tmp_path):
    """It is said which path is no directory."""
    (tmp_path / "run").write_bytes(b"")
    store = LocalStore(tmp_path / "run")

    with pytest.raises(StorageError, match=r"run failed: Not a directory \(ENOTDIR\)"):
        store.list("")
    with pytest.raises(StorageError, match=r"run failed: Not a directory \(ENOTDIR\)"):
        store.draft(STEP)
    with pytest.raises(NotThere):
        store.read("run.json", 10)


@pytest.mark.parametrize("root", ["", "a\0b"])
def test_a_root_that_is_no_path_is_refused(root):
    """An empty path would mean the current directory, whatever that is."""
    with pytest.raises(InvalidArgument, match="not a path"):
        LocalStore(root)


def test_a_part_can_be_linked_to_another_disk(tmp_path):
    """Large checkpoints on another disk by a link to the directory: common, and the draft lies there as well."""
    (tmp_path / "big").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "big")
    store = LocalStore(tmp_path / "run")

    save(store)

    assert os.listdir(tmp_path / "big") == ["step-00000001"]


def test_a_parent_that_may_not_be_opened_is_not_ours_to_sync(tmp_path):
    """A run below a directory with search permission only, as on shared machines, can be written."""
    outer = tmp_path / "outer"
    (outer / "run").mkdir(parents=True)
    before = os.geteuid()
    chain = [tmp_path, *list(tmp_path.parents)[:-2]]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in chain}
    try:
        if before == 0:  # root ignores permission bits, so another user, who needs a way in
            for path in chain:
                with contextlib.suppress(PermissionError):
                    path.chmod(modes[path] | 0o011)
            os.chown(outer / "run", 65534, -1)
            outer.chmod(0o711)
            os.seteuid(65534)
        else:
            outer.chmod(0o311)
        store = LocalStore(outer / "run")

        save(store)

        assert store.list("checkpoints") == ["step-00000001"]
    finally:
        os.seteuid(before)
        outer.chmod(0o755)
        for path, mode in modes.items():
            path.chmod(mode)


def test_a_descriptor_is_given_back_whatever_happens(store, monkeypatch):
    """A run of a million steps with an error now and then must not run out of files."""
    save(store)
    store.local_path("pipe").symlink_to("nowhere")
    before = len(os.listdir("/proc/self/fd"))

    for function, code in itertools.product(("fsync", "write", "replace", "fstat"), (errno.EIO, errno.ENOSPC)):
        with monkeypatch.context() as patched:
            fail(patched, function, code)
            for call in (
                lambda: store.create("x", [b"1"]),
                lambda: store.replace("run.json", b"1"),
                lambda: store.append("history/a", b"1", durable=True),
                lambda: store.read(f"{STEP}/manifest.json", 10),
            ):
                with contextlib.suppress(OSError):
                    call()
        store.remove("x")

    assert len(os.listdir("/proc/self/fd")) == before
