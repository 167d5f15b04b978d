"""DurableIO under Lightning's own ModelCheckpoint, and by itself."""

from __future__ import annotations

import os
import resource
import signal
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from highcamp.errors import Damaged, Refused, StorageError
from highcamp.lightning import DurableIO, durable

STATE = {"state_dict": {"weight": torch.arange(300_000.0)}, "epoch": 3}


@pytest.fixture
def io():
    return DurableIO()


def names(directory):
    return sorted(path.name for path in Path(directory).iterdir())


def trained(tmp_path, plugin, *, epochs=3, ckpt_path=None):
    theirs = ModelCheckpoint(tmp_path / "ckpt", monitor="epoch", mode="max", save_top_k=1, save_last=True)
    model = BoringModel()
    model.on_train_epoch_end = lambda: model.log("epoch", float(model.current_epoch))
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, limit_train_batches=2,
        enable_model_summary=False, limit_val_batches=0, callbacks=[theirs], plugins=[plugin], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer, theirs


class TestFiles:
    """What a file is, and what is found wrong with it."""

    @pytest.mark.filterwarnings("ignore:Checkpoint directory")
    def test_lightning_saves_removes_and_goes_on_with_it(self, tmp_path, io):
        """Nothing else of a training script has to change."""
        _, theirs = trained(tmp_path, io)

        assert names(tmp_path / "ckpt") == ["epoch=2-step=6.ckpt", "last.ckpt"]
        longer, _ = trained(tmp_path, DurableIO(), epochs=4, ckpt_path=theirs.last_model_path)
        assert longer.global_step == 8

    def test_file_is_one_that_everybody_reads(self, tmp_path, io):
        """A digest that made the file unreadable to torch or to zip tools would be no help."""
        path = tmp_path / "a.ckpt"
        io.save_checkpoint(STATE, path)

        for options in ({"weights_only": True}, {"mmap": True, "weights_only": True}):
            found = torch.load(path, **options)
            assert torch.equal(found["state_dict"]["weight"], STATE["state_dict"]["weight"])
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            assert archive.comment.startswith(b"highcamp xxh3-128:")
        assert TorchCheckpointIO().load_checkpoint(path, weights_only=True)["epoch"] == 3

    @pytest.mark.parametrize("place", [50, 40_000, 700_000, -72, -52, -50, -20, -1])
    def test_flipped_bit_is_found(self, tmp_path, io, place):
        """PyTorch loads a file with a flipped bit without a word."""
        path = tmp_path / "a.ckpt"
        io.save_checkpoint(STATE, path)
        data = bytearray(path.read_bytes())
        data[place] ^= 4
        path.write_bytes(data)

        with pytest.raises(Damaged, match="a.ckpt was altered"):
            io.load_checkpoint(path, weights_only=True)

    @pytest.mark.parametrize("size", [0, 1, 100, 500_000, -1, -30])
    def test_truncated_file_is_found(self, tmp_path, io, size):
        """What a full disk or a copy that was stopped leaves behind."""
        path = tmp_path / "a.ckpt"
        io.save_checkpoint(STATE, path)
        path.write_bytes(path.read_bytes()[:size])

        with pytest.raises(Damaged, match="cut short"):
            io.load_checkpoint(path, weights_only=True)

    def test_file_without_a_digest_loads(self, tmp_path, io):
        """Files from before must not be lost."""
        TorchCheckpointIO().save_checkpoint(STATE, tmp_path / "old.ckpt")
        torch.save(STATE, tmp_path / "older.ckpt", _use_new_zipfile_serialization=False)

        for name in ("old.ckpt", "older.ckpt"):
            assert io.load_checkpoint(tmp_path / name, weights_only=True)["epoch"] == 3
        with pytest.raises(FileNotFoundError):
            io.load_checkpoint(tmp_path / "none.ckpt")

    def test_weights_only_is_passed_on(self, tmp_path, io):
        """Whoever asks for a safe load must get one."""
        io.save_checkpoint({"made": Path("x")}, tmp_path / "a.ckpt")
        with pytest.raises(Exception, match="Weights only load failed"):
            io.load_checkpoint(tmp_path / "a.ckpt", weights_only=True)
        assert io.load_checkpoint(tmp_path / "a.ckpt", weights_only=False) == {"made": Path("x")}

    def test_umask_decides_modes(self, tmp_path, io):
        """Colleagues must be able to read what the umask lets them read."""
        before = os.umask(0o027)
        try:
            io.save_checkpoint(STATE, tmp_path / "a.ckpt")
        finally:
            os.umask(before)
        assert (tmp_path / "a.ckpt").stat().st_mode & 0o777 == 0o640


class TestDurability:
    """How a file comes to be."""

    def test_order_of_a_save(self, tmp_path, io, monkeypatch):
        """Bytes, then the name, then the directory: in any other order a power cut leaves an empty file, or none."""
        calls = []

        def spy(name, original):
            return lambda *arguments: (calls.append(name), original(*arguments))[1]

        for module, name in (
            (durable.system, "sync_file"),
            (durable.os, "replace"),
            (durable.system, "sync_directory"),
        ):
            monkeypatch.setattr(module, name, spy(name, getattr(module, name)))
        io.save_checkpoint(STATE, tmp_path / "new" / "a.ckpt")

        assert calls == ["sync_directory", "sync_file", "replace", "sync_directory"]

    def test_pending_beside_the_target(self, tmp_path, io, monkeypatch):
        """From another file system a rename would be a copy, which a kill cuts in two."""
        seen = []

        def watch(source, target):
            seen.append((Path(source).parent, Path(target).name))
            return rename(source, target)

        rename = os.replace
        monkeypatch.setattr(durable.os, "replace", watch)
        io.save_checkpoint(STATE, tmp_path / "a.ckpt")
        assert seen == [(tmp_path, "a.ckpt")]

    def test_killed_while_saving(self, tmp_path, io):
        """The file of before stays whole, and what the kill has left is swept by the next save."""
        path = tmp_path / "last.ckpt"
        io.save_checkpoint(STATE, path)
        before = path.read_bytes()

        class Deadly:
            def __reduce__(self):
                os.kill(os.getpid(), signal.SIGKILL)

        child = os.fork()
        if child == 0:
            io.save_checkpoint({"fatal": Deadly()}, path)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

        assert path.read_bytes() == before
        assert len(names(tmp_path)) == 2
        io.save_checkpoint(STATE, tmp_path / "b.ckpt")
        assert names(tmp_path) == ["b.ckpt", "last.ckpt"]

    def test_file_of_a_living_writer_is_not_swept(self, tmp_path, io):
        """Two trainings may share a directory."""
        with (tmp_path / ".x.ckpt.pending-0123456789abcdef").open("wb") as other:
            durable.fcntl.flock(other, durable.fcntl.LOCK_EX)
            io.save_checkpoint(STATE, tmp_path / "a.ckpt")
            assert len(names(tmp_path)) == 2
        io.save_checkpoint(STATE, tmp_path / "a.ckpt")
        assert names(tmp_path) == ["a.ckpt"]

    def test_failed_write_is_raised_and_leaves_nothing(self, tmp_path, io):
        """A training must not go on for days with saves that fail, nor lose the file of before to one."""
        path = tmp_path / "last.ckpt"
        io.save_checkpoint(STATE, path)
        before = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
        try:
            with pytest.raises(StorageError, match="EFBIG"):
                io.save_checkpoint(STATE, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

        assert path.read_bytes() == before
        assert names(tmp_path) == ["last.ckpt"]

    def test_errors_are_raised(self, tmp_path, io):
        """Lightning swallows some, and training goes on without a file."""
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            io.save_checkpoint(STATE, tmp_path / "file" / "a.ckpt")
        with pytest.raises(TypeError, match="storage_options"):
            io.save_checkpoint(STATE, tmp_path / "a.ckpt", storage_options={})

    def test_no_silent_no_save_for_remote_paths(self, io):
        """What cannot be made durable is refused, not saved in another way."""
        with pytest.raises(Refused, match="no local path"):
            io.save_checkpoint(STATE, "s3://bucket/a.ckpt")


class TestRemoval:
    """How it goes."""

    def test_only_whole_file_stays_until_the_next_is_durable(self, tmp_path, io):
        """Between a removal and a save that fails there would be nothing."""
        first, second = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
        io.save_checkpoint(STATE, first)
        io.remove_checkpoint(first)
        assert names(tmp_path) == ["a.ckpt"]
        (tmp_path / "torn.ckpt").write_bytes(b"PK\x03\x04")  # is no whole one
        io.remove_checkpoint(first)
        assert first.exists()

        io.save_checkpoint(STATE, second)
        assert names(tmp_path) == ["b.ckpt", "torn.ckpt"]
        io.remove_checkpoint(first)  # gone already

    def test_file_that_is_saved_again_is_not_removed(self, tmp_path, io):
        """Lightning removes and saves `last.ckpt` under one name."""
        io.save_checkpoint(STATE, tmp_path / "last.ckpt")
        io.remove_checkpoint(tmp_path / "last.ckpt")
        io.save_checkpoint(STATE, tmp_path / "last.ckpt")
        io.save_checkpoint(STATE, tmp_path / "b.ckpt")
        assert names(tmp_path) == ["b.ckpt", "last.ckpt"]

    def test_remove_waits_for_writer(self, tmp_path):
        """AsyncCheckpointIO queues the write and removes at once: killed in between, there would be no checkpoint."""
        is_writing, may_write = threading.Event(), threading.Event()

        class Slow(DurableIO):
            def save_checkpoint(self, *arguments, **keywords):
                is_writing.set()
                assert may_write.wait(20)
                super().save_checkpoint(*arguments, **keywords)

        DurableIO().save_checkpoint(STATE, tmp_path / "a.ckpt")
        behind = AsyncCheckpointIO(Slow())
        behind.save_checkpoint(STATE, tmp_path / "b.ckpt")
        assert is_writing.wait(20)
        behind.remove_checkpoint(tmp_path / "a.ckpt")
        assert names(tmp_path) == ["a.ckpt"]

        may_write.set()
        behind.teardown()
        assert names(tmp_path) == ["b.ckpt"]

    def test_temporary_files_of_tuners_go_at_once(self, tmp_path, io):
        """Lightning's learning-rate finder saves one, which would otherwise lie there for ever."""
        io.save_checkpoint(STATE, tmp_path / ".lr_find_1.ckpt")
        io.remove_checkpoint(tmp_path / ".lr_find_1.ckpt")
        assert names(tmp_path) == []

    def test_directories_are_left_to_lightning(self, tmp_path, io):
        """Sharded checkpoints are directories, which others have written."""
        (tmp_path / "sharded.ckpt").mkdir()
        io.remove_checkpoint(tmp_path / "sharded.ckpt")
        assert names(tmp_path) == []
