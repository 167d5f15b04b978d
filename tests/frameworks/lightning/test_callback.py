"""CheckpointCallback in a real Trainer, with models of a few numbers."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers.utilities import _scan_checkpoints
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import highcamp
from highcamp import Every, Keep, Monitor
from highcamp.errors import Damaged, InvalidArgument, InvalidState, Mismatch, MissingExtra, Refused, RunLocked
from highcamp.lightning import CheckpointCallback, supported

STEP = Every(steps=1, epochs=1)


class Line(LightningModule):
    """A straight line; val_loss is what the test says it is, or what is measured."""

    def __init__(self, width=1, losses=None, optimizer=torch.optim.SGD, scheduler=None):
        super().__init__()
        self.layer = nn.Linear(2, width)
        self.losses, self.make_optimizer, self.make_scheduler = losses, optimizer, scheduler

    def training_step(self, batch, index):
        loss = self.layer(batch[0]).square().mean()
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, index):
        measured = self.layer(batch[0]).square().mean()
        told = None if self.losses is None else dict(enumerate(self.losses)).get(self.current_epoch, 0.0)
        self.log("val_loss", measured if told is None else float(told))

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters(), lr=0.1)
        return optimizer if self.make_scheduler is None else ([optimizer], [self.make_scheduler(optimizer)])


class Bare(Line):
    """Asks for nothing but a gradient."""

    def validation_step(self, batch, index):
        pass


def loader(count=12, batch_size=2, **options):
    points = torch.randn(count, 2, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(points), batch_size=batch_size, **options)


class Stop(Callback):
    """Raises when the batch of this number is about to be trained on."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise StoppedError


class StoppedError(Exception):
    """What a test has asked for."""


@pytest.fixture
def fit(tmp_path):
    """Train a Line; returns the Trainer and the callback."""

    def train(
        model=None, *, directory=None, callbacks=(), data=None, val=None, ckpt_path=None, options=None, **settings
    ):
        where = tmp_path / "run" if directory is None else directory
        arguments = {"monitor": "val_loss", "verbose": 0, **(options or {})}
        callback = CheckpointCallback(where, **arguments)
        trainer = make_trainer(callback, *callbacks, root=tmp_path, **settings)
        data = loader() if data is None else data
        trainer.fit(model or Line(), data, loader(4) if val is None else val, ckpt_path=ckpt_path)
        return trainer, callback

    return train


def make_trainer(*callbacks, root, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    chosen = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "default_root_dir": root, **quiet, **settings}
    return Trainer(callbacks=list(callbacks), **chosen)


def flip_last_bit(path):
    data = bytearray(Path(path).read_bytes())
    data[-1] ^= 1
    Path(path).write_bytes(data)


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class TestArguments:
    """What the constructor takes, and what it says of the rest."""

    def test_names_of_lightning_lead_to_ours(self, tmp_path):
        """Whoever types what ModelCheckpoint takes is told what to type here."""
        for typed, ours in {
            "dirpath": "directory", "save_top_k": "Keep(best=", "every_n_train_steps": "Every(steps=",
            "train_time_interval": "Every(seconds=", "save_last": "Keep(last=", "every_n_epochs": "Every(epochs=",
        }.items():  # fmt: skip
            with pytest.raises(TypeError, match=f"no argument '{typed}'") as caught:
                CheckpointCallback(tmp_path, **{typed: 1})
            assert ours in str(caught.value)

    def test_mode_auto_names_asks_for_others(self, tmp_path):
        """Lightning ranks every metric as if less were better, an unknown one too."""
        assert CheckpointCallback(tmp_path, monitor="val_acc")._monitor.mode == "max"
        with pytest.raises(InvalidArgument, match="mode"):
            CheckpointCallback(tmp_path, monitor="quality")
        CheckpointCallback(tmp_path, monitor=Monitor("quality", mode="max"))

    def test_version_outside_the_range_is_refused_in_words(self, monkeypatch):
        """Half of what is read of a Trainer is private: another version must not be guessed at."""
        assert supported.is_supported(lightning.__version__)
        monkeypatch.setattr(lightning, "__version__", "2.5.6")
        with pytest.raises(MissingExtra, match=r"lightning >= 2\.6, < 3\.0; 2\.5\.6 is installed"):
            supported.check_version()
        assert [supported.is_supported(each) for each in ("2.6.0rc1", "2.10.0", "3.0.0", "1.9.5")] == [
            True,
            True,
            False,
            False,
        ]

    def test_missing_package_is_named(self, monkeypatch):
        """`pytorch_lightning` alone is not enough, and the error says what is."""
        monkeypatch.setitem(sys.modules, "lightning", None)
        with pytest.raises(MissingExtra, match="not installed"):
            supported.check_version()


class TestGoingOn:
    """The second start of a script."""

    def test_last_checkpoint_is_where_it_goes_on(self, fit):
        """Batches that are trained on twice, or never, are another training."""
        with pytest.raises(StoppedError):
            fit(options={"every": STEP}, callbacks=[Stop(8)])
        seen = []

        class Seen(Callback):
            def on_train_batch_start(self, trainer, module, batch, index):
                seen.append((trainer.current_epoch, index, trainer.global_step))

        _, callback = fit(options={"every": STEP}, callbacks=[Seen()])

        assert seen == [(1, 2, 8), (1, 3, 9), (1, 4, 10), (1, 5, 11)]
        assert [(each.epoch, each.step) for each in callback.run.history.epochs()] == [(1, 6), (2, 12)]

    def test_complete_run_trains_nothing(self, fit, capsys):
        """Running a script again to look at its result must not change the result."""
        first, _ = fit()
        model = Line()

        again, callback = fit(model, options={"verbose": 1})

        assert "Run is complete (2 of 2 epochs); nothing to train" in capsys.readouterr().err
        assert (again.global_step, again.current_epoch) == (12, 2)
        assert equal(weights(model), weights(first.lightning_module))
        assert again.callback_metrics["val_loss"] == first.callback_metrics["val_loss"]
        assert callback.run.is_complete

    def test_more_epochs_go_on(self, fit):
        """A run that has ended can be made longer."""
        fit()
        trainer, callback = fit(max_epochs=3)

        assert (trainer.current_epoch, trainer.global_step) == (3, 18)
        assert [each.epoch for each in callback.run.history.epochs()] == [1, 2, 3]

    def test_fewer_epochs_are_an_error_of_lightning(self, fit):
        """A run cannot be made shorter; Lightning says so in its own words."""
        fit()
        with pytest.raises(MisconfigurationException, match="max_epochs=1"):
            fit(max_epochs=1)

    def test_second_fit_of_one_trainer_goes_on(self, fit, tmp_path):
        """In a notebook a cell is run again."""
        callback = CheckpointCallback(tmp_path / "run", monitor="val_loss", verbose=0)
        trainer, model = make_trainer(callback, root=tmp_path), Line()
        trainer.fit(model, loader(), loader(4))
        trainer.fit_loop.max_epochs = 3
        trainer.fit(model, loader(), loader(4))

        assert trainer.global_step == 18
        assert callback.run.last.epoch == 3

    def test_after_an_exception_the_run_is_free(self, fit):
        """The notebook's next cell must not find its own run locked."""
        with pytest.raises(StoppedError):
            fit(callbacks=[Stop(8)])
        trainer, callback = fit()

        assert trainer.global_step == 12
        assert callback.run.history.attempts[0].ended == "error"

    def test_max_steps_ends_and_goes_on(self, fit):
        """A step limit in the middle of an epoch is an end like any other."""
        fit(max_steps=8, max_epochs=-1, options={"every": STEP})
        again, callback = fit(max_steps=8, max_epochs=-1, options={"every": STEP})
        assert again.global_step == callback.run.last.step == 8

        longer, callback = fit(max_steps=13, max_epochs=-1, options={"every": STEP})
        assert longer.global_step == callback.run.last.step == 13

    def test_early_stopping_stays_stopped(self, fit, capsys):
        """A run that has ended because nothing got better must not train one epoch more each time it is started."""
        losses = [3, 2, 2, 2, 2, 2, 2, 2]
        fit(Line(losses=losses), callbacks=[EarlyStopping("val_loss", patience=1)], max_epochs=6)
        again, callback = fit(
            Line(losses=losses), callbacks=[EarlyStopping("val_loss", patience=1)], max_epochs=6, options={"verbose": 1}
        )
        assert "EarlyStopping ended it after epoch 3" in capsys.readouterr().err
        assert again.current_epoch == callback.run.last.epoch == 3

        longer, _ = fit(Line(losses=losses), callbacks=[EarlyStopping("val_loss", patience=1)], max_epochs=7)
        assert longer.current_epoch == 4

    def test_damaged_checkpoint_is_passed_over(self, fit, capsys):
        """One flipped bit must not cost the run."""
        _, callback = fit(max_epochs=3)
        flip_last_bit(f"{callback.last_model_path}/model.safetensors")

        trainer, _ = fit(max_epochs=3)

        assert "resumed from step-00000012 instead" in capsys.readouterr().err
        assert trainer.global_step == 18

    def test_random_split_is_drawn_again(self, tmp_path):
        """Data that are split when training begins must be split in the same way, or validation data are trained on."""

        class Splitting(Line):
            def train_dataloader(self):
                self.split = torch.randperm(100)
                return loader()

        splits = []
        for stop in (9, 99):
            torch.manual_seed(3)
            model = Splitting()
            with contextlib.suppress(StoppedError):
                make_trainer(CheckpointCallback(tmp_path / "run", verbose=0), Stop(stop), root=tmp_path).fit(model)
            splits.append(model.split)

        assert torch.equal(*splits)


class TestPaths:
    """Checkpoints by their paths, as Lightning wants them."""

    def test_best_and_last_are_read_by_lightning(self, fit, tmp_path):
        """The weights that are tested must be the best ones, not the last."""
        losses = [1.0, 3.0, 2.0]
        trainer, callback = fit(Line(losses=losses), max_epochs=3)
        last = weights(trainer.lightning_module)
        best = callback.run.best.load("model")
        assert callback.best.epoch == 1

        model = Line(losses=losses)
        trainer.validate(model, loader(4), ckpt_path="best", verbose=False)
        assert all(np.array_equal(best[name], value.numpy()) for name, value in weights(model).items())
        trainer.validate(model, loader(4), ckpt_path=callback.last_model_path, verbose=False)
        assert equal(weights(model), last)

        callback.restore("best", model)
        assert all(np.array_equal(best[name], value.numpy()) for name, value in weights(model).items())

    def test_best_is_found_by_a_new_process(self, fit, tmp_path):
        """Evaluation is often a script of its own: nothing may hang on what this Trainer remembers."""
        _, callback = fit(Line(losses=[1.0, 3.0]))
        other = make_trainer(CheckpointCallback(tmp_path / "run", "val_loss", verbose=0), root=tmp_path)
        model = Line(losses=[0.0])
        other.validate(model, loader(4), ckpt_path="best", verbose=False)

        assert np.array_equal(model.layer.weight.detach().numpy(), callback.best.load("model")["layer.weight"])

    def test_names_of_lightning_answer(self, fit, tmp_path):
        """Loggers and scripts ask any checkpoint callback for these."""
        empty = CheckpointCallback(tmp_path / "none", "val_loss")
        assert (empty.best_model_path, empty.last_model_path) == ("", "")
        assert (empty.best_model_score, empty.current_score, empty.best_k_models) == (None, None, {})

        _, callback = fit(Line(losses=[1.0, 3.0]))
        assert callback.best_model_path == f"{tmp_path}/run/checkpoints/step-00000006"
        assert callback.last_model_path == f"{callback.dirpath}/step-00000012"
        assert (float(callback.best_model_score), float(callback.current_score)) == (1.0, 3.0)
        assert {path[-1]: float(score) for path, score in callback.best_k_models.items()} == {"6": 1.0, "2": 3.0}
        assert callback.monitor == "val_loss"
        assert _scan_checkpoints(callback, {}) == []  # directories are not uploaded

    def test_fit_from_another_place_is_refused(self, fit, tmp_path):
        """Two states must not be mixed: the weights of one with the history of another."""
        losses = [1.0, 3.0, 2.0]
        trainer, callback = fit(Line(losses=losses), max_epochs=2)
        before = weights(trainer.lightning_module)
        with pytest.raises(Refused, match="the run goes on from .*step-00000012"):
            fit(Line(losses=losses), max_epochs=3, ckpt_path="best")
        trainer.save_checkpoint(tmp_path / "other.ckpt")
        with pytest.raises(Refused, match="leave ckpt_path out"):
            fit(Line(losses=losses), max_epochs=3, ckpt_path=tmp_path / "other.ckpt")

        model = Line(losses=losses)
        longer, _ = fit(model, max_epochs=3, ckpt_path=callback.last_model_path)  # the very place it goes on from
        assert longer.global_step == 18
        assert not equal(weights(model), before)

    def test_fresh_run_can_begin_at_a_file(self, fit, tmp_path):
        """Who has trained with Lightning's own files moves over without starting anew."""
        trainer = make_trainer(root=tmp_path, enable_checkpointing=False)
        trainer.fit(Line(), loader(), loader(4))
        trainer.save_checkpoint(tmp_path / "old.ckpt")

        longer, callback = fit(max_epochs=3, ckpt_path=tmp_path / "old.ckpt")
        assert longer.global_step == 18
        assert [(each.epoch, each.step) for each in callback.run.checkpoints] == [(3, 18)]

        moved, callback = fit(directory=tmp_path / "third", max_epochs=4, ckpt_path=callback.last_model_path)
        assert (moved.global_step, callback.run.last.epoch) == (24, 4)

    def test_what_slurm_has_saved_gives_way(self, fit, tmp_path, monkeypatch):
        """On Slurm Lightning picks a file of its own unasked; training must go on from the newer checkpoint of the run."""
        trainer, _ = fit()
        trainer.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
        longer, _ = fit(max_epochs=3, ckpt_path=tmp_path / "hpc_ckpt_1.ckpt")
        assert longer.global_step == 18

    def test_checkpoint_io_is_given_back(self, fit):
        """Whoever saves after training does so with the plugin that was chosen."""
        trainer, _ = fit()
        assert type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO"
        assert type(trainer.fit_loop._data_source).__name__ == "_DataLoaderSource"


class TestMismatch:
    """A script that is not the one that saved."""

    def test_model_that_changed_is_not_half_restored(self, fit):
        """Every difference in one error, and no weight of the new model touched."""
        fit(Line(width=1))
        model = Line(width=3)
        model.extra = torch.nn.Linear(2, 2, bias=False)
        before = weights(model)
        with pytest.raises(Mismatch) as caught:
            fit(model, max_epochs=3)

        lines = str(caught.value)
        for line in (
            "model/extra.weight: only here",
            "model/layer.bias: float32 (1,) in the checkpoint, float32 (3,) here",
            "model/layer.weight: float32 (1, 2) in the checkpoint, float32 (3, 2) here",
            "3 differences, nothing was changed",
        ):
            assert line in lines
        assert equal(weights(model), before)
        assert fit(Line(width=1), max_epochs=3)[0].global_step == 18

    def test_dtype_is_compared(self, fit):
        """PyTorch would cast without a word."""
        fit()
        with pytest.raises(Mismatch, match="float32 .* in the checkpoint, float64"):
            fit(Line().double(), max_epochs=3)

    def test_optimizer_of_another_class_leaves_the_model_alone(self, fit):
        """Adam's moments are nothing to SGD; half of a resume is worse than none."""
        fit(Line(optimizer=torch.optim.Adam))
        model = Line()
        before = weights(model)
        with pytest.raises(
            Mismatch, match=r"optimizer: torch\.optim\.adam\.Adam in the checkpoint, torch\.optim\.sgd\.SGD here"
        ):
            fit(model, max_epochs=3)
        assert equal(weights(model), before)

    def test_missing_scheduler_is_told(self, fit):
        """Lightning would leave out what has no partner."""
        fit(Line(scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)))
        with pytest.raises(
            Mismatch, match=r"schedulers: torch\.optim\.lr_scheduler\.StepLR in the checkpoint, none here"
        ):
            fit(max_epochs=3)

    def test_scaler_that_is_gone_is_told(self, fit, tmp_path):
        """The scale of gradients is a state that decides which steps are skipped."""
        fit(plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])
        with pytest.raises(Mismatch, match="precision: MixedPrecision in the checkpoint, Precision here"):
            fit(max_epochs=3)

    def test_loader_of_another_length(self, fit, capsys):
        """In the middle of an epoch no place would fit; between two it is the user's to decide, and is said."""
        fit(max_epochs=1)
        longer, _ = fit(max_epochs=2, data=loader(16))
        assert "was saved with 6 training batches in an epoch, here are 8" in capsys.readouterr().err
        assert longer.global_step == 14
        with pytest.raises(StoppedError):
            fit(max_epochs=3, data=loader(16), callbacks=[Stop(17)], options={"every": STEP})
        with pytest.raises(Mismatch, match="8 training batches in an epoch, here are 6"):
            fit(max_epochs=3, data=loader(), options={"every": STEP})

    def test_number_of_loaders_is_compared(self, fit):
        """The batches of another set of loaders are not those that would have followed."""
        with pytest.raises(StoppedError):
            fit(Pairs(), data={"a": loader(), "b": loader()}, callbacks=[Stop(3)], options={"every": STEP})
        with pytest.raises(Mismatch, match="2 training loaders, here are 1"):
            fit(Pairs(), data={"a": loader()}, options={"every": STEP})

    def test_state_that_files_cannot_hold_is_told_before_training(self, fit):
        """Not after the first epoch, which is then lost; with its path, so that it can be found."""

        class Odd(Line):
            def on_save_checkpoint(self, checkpoint):
                checkpoint["extra"] = {"inner": [1, object()]}

        with pytest.raises(InvalidState, match="trainer/extra/inner/1"):
            fit(Odd())

    def test_hyper_parameters_that_are_objects_are_left_out(self, fit, capsys):
        """A loss function among them is common, and no reason to refuse training."""

        class Parametrized(Line):
            def __init__(self, rate=0.1, loss=None):
                super().__init__()
                self.save_hyperparameters()

        _, callback = fit(Parametrized(loss=torch.nn.functional.mse_loss), options={"verbose": 1})
        assert "hyper-parameters that are no plain values are not saved: loss" in capsys.readouterr().err
        assert callback.run.last.state("trainer")["hyper_parameters"] == {"rate": 0.1}

    def test_names_that_are_no_identifiers_come_back(self, fit):
        """A ModuleDict takes any key; none of them becomes a path."""

        class Named(Line):
            def __init__(self):
                super().__init__()
                self.parts = torch.nn.ModuleDict({"a b/c": torch.nn.Linear(2, 1), "ü/$x": torch.nn.Linear(2, 1)})

            def training_step(self, batch, index):
                return sum(part(batch[0]).square().mean() for part in self.parts.values())

        first, _ = fit(Named())
        model = Named()
        fit(model)
        assert equal(weights(model), weights(first.lightning_module))


class Pairs(Bare):
    """Trains on several loaders at once."""

    def training_step(self, batch, index):
        return sum(self.layer(each[0]).square().mean() for each in batch.values())


class TestMetrics:
    """Which value belongs to which checkpoint."""

    def test_no_borrowed_metric(self, fit):
        """A checkpoint between two validations has no val_loss; Lightning ranks it by that of an older one."""
        _, callback = fit(
            max_epochs=4, check_val_every_n_epoch=2, options={"keep": Keep(best=1, last=9), "every": Every(epochs=1)}
        )
        found = {each.epoch: "val_loss" in each.metrics for each in callback.run.checkpoints}
        assert found == {1: False, 2: True, 3: False, 4: True}

    def test_several_validations_in_an_epoch_belong_to_their_steps(self, fit):
        """The best of them is the checkpoint of its own step."""
        _, callback = fit(max_epochs=1, val_check_interval=2, options={"every": STEP, "keep": Keep(best=1, last=9)})

        measured = [each.step for each in callback.run.checkpoints if "val_loss" in each.metrics]
        assert measured == [2, 4, 6]
        assert [(row.step, row.epoch, row.batch) for row in callback.run.history.rows] == [
            (2, 0, 2),
            (4, 0, 4),
            (6, 1, 0),
        ]

    def test_nan_never_wins(self, fit):
        """With Lightning a NaN may become the best, and stay it."""
        _, callback = fit(Line(losses=[math.nan, 2.0, math.nan]), max_epochs=3)
        assert callback.best.epoch == 2

    def test_metrics_of_two_validation_loaders_are_there(self, fit):
        """Lightning names them by loader."""
        _, callback = fit(
            TwoLoaders(),
            val=[loader(4), loader(6)],
            options={"monitor": Monitor("val_loss/dataloader_idx_1", mode="min")},
        )
        assert {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"} <= callback.best.metrics.keys()

    def test_one_write_for_both(self, fit):
        """Best and last are two questions to one set of files, not two copies."""
        _, callback = fit(Line(losses=[2.0, 1.0]))
        assert callback.best_model_path == callback.last_model_path
        assert len(callback.run.checkpoints) == 2

    def test_changed_settings_keep_best(self, fit):
        """With Lightning another cadence is another `state_key`, and the best score is forgotten."""
        fit(Line(losses=[1.0, 3.0, 3.0]))
        _, callback = fit(Line(losses=[1.0, 3.0, 3.0]), max_epochs=3, options={"every": Every(epochs=1, steps=4)})
        assert callback.best.epoch == 1

    def test_moved_run_keeps_best(self, fit, tmp_path):
        """Lightning forgets the best when `dirpath` changes."""
        fit(Line(losses=[1.0, 3.0, 3.0]))
        (tmp_path / "run").rename(tmp_path / "moved")
        trainer, callback = fit(Line(losses=[1.0, 3.0, 3.0]), max_epochs=3, directory=tmp_path / "moved")
        assert callback.best.epoch == 1
        assert trainer.global_step == 18
        assert callback.best_model_path.startswith(f"{tmp_path}/moved/")


class TwoLoaders(Line):
    """Validates with two loaders."""

    def validation_step(self, batch, index, dataloader_idx=0):
        self.log("val_loss", self.layer(batch[0]).square().mean())


class TestLimits:
    """What is not supported, or writes nothing."""

    def test_fast_dev_run_and_sanity_checks_write_nothing(self, fit, tmp_path):
        """A trial must not leave a checkpoint from which the real training then goes on."""
        fit(fast_dev_run=True)
        assert not (tmp_path / "run").exists()

        class Failing(Line):
            def on_train_start(self):
                raise StoppedError

        with pytest.raises(StoppedError):
            fit(Failing(losses=[0.0]), num_sanity_val_steps=2)
        assert highcamp.open(tmp_path / "run").history.all_rows == ()

    def test_validate_alone_writes_nothing(self, tmp_path):
        """Looking is no training."""
        trainer = make_trainer(CheckpointCallback(tmp_path / "run", "val_loss"), root=tmp_path)
        trainer.validate(Line(), loader(4), verbose=False)
        assert not (tmp_path / "run").exists()

    def test_two_callbacks_are_refused(self, fit, tmp_path):
        """One Trainer cannot go on in two places."""
        with pytest.raises(Refused, match="two CheckpointCallbacks"):
            fit(callbacks=[CheckpointCallback(tmp_path / "run")])

    def test_run_of_another_trainer_is_locked(self, fit, tmp_path):
        """Two trainings in one directory would remove each other's checkpoints."""

        class Meanwhile(Callback):
            def on_train_start(self, trainer, module):
                with pytest.raises(RunLocked):
                    fit()

        fit(callbacks=[Meanwhile()])

    def test_no_second_checkpoint_callback_is_added(self, fit):
        """Lightning's default one would write everything twice."""
        trainer, callback = fit()
        assert trainer.checkpoint_callbacks == [callback]

    def test_model_checkpoint_beside_ours_stays_what_it_is(self, fit, tmp_path):
        """Its files, its place in the list, its state after a restart."""
        theirs = ModelCheckpoint(tmp_path / "ckpt", monitor="val_loss", save_top_k=1)
        trainer, callback = fit(callbacks=[theirs])
        assert trainer.callbacks[-2:] == [callback, theirs] or trainer.checkpoint_callbacks[0] is callback
        assert torch.load(theirs.best_model_path, weights_only=True)["global_step"] == 12

    def test_several_processes_are_refused(self, tmp_path):
        """A checkpoint would hold the random state of one of them: wrong, and nobody would notice."""
        trainer = make_trainer(CheckpointCallback(tmp_path / "run"), root=tmp_path)
        trainer.strategy.__class__ = type("Ours", (type(trainer.strategy),), {})
        with pytest.raises(Refused, match="strategy Ours is not supported yet"):
            trainer.fit(Line(), loader(), loader(4))

        class Two:
            world_size, barebones, strategy = 2, False, None

        with pytest.raises(Refused, match="2 processes is not supported yet"):
            supported.check_trainer(Two(), ())

    def test_barebones_is_refused(self, tmp_path):
        """By Lightning itself for a callback that it is given, by us for one that a module brings."""
        with pytest.raises(MisconfigurationException):
            make_trainer(
                CheckpointCallback(tmp_path / "run"), root=tmp_path, barebones=True, logger=None,
                enable_progress_bar=None, enable_model_summary=None,
            )  # fmt: skip

        class Bringing(Line):
            def configure_callbacks(self):
                return [CheckpointCallback(tmp_path / "run")]

        trainer = make_trainer(
            root=tmp_path, barebones=True, logger=None, enable_progress_bar=None, enable_model_summary=None
        )
        with pytest.raises(Refused, match="barebones"):
            trainer.fit(Bringing(), loader())

    def test_trainer_of_another_package_is_refused(self, tmp_path):
        """`pytorch_lightning` is the same code with other classes; what is not recognized must not be silently ignored."""
        with pytest.raises(Refused, match=r"lightning\.pytorch\.Trainer"):
            CheckpointCallback(tmp_path).setup(object(), None, "fit")

    @pytest.mark.filterwarnings("ignore:Found `dataloader_iter`")
    def test_dataloader_iter_saves_between_epochs_only(self, fit):
        """Where batches are read within a step, no place within an epoch is known."""

        class Reading(Bare):
            def training_step(self, dataloader_iter):
                batch, _, _ = next(dataloader_iter)
                return self.layer(batch[0]).square().mean()

        with pytest.raises(Refused, match="Every\\(epochs=1\\)"):
            fit(Reading(), options={"every": STEP})
        with pytest.raises(StoppedError):
            fit(Reading(), callbacks=[Stop(8)], options={"monitor": None})
        trainer, callback = fit(Reading(), options={"monitor": None})
        assert (trainer.global_step, callback.run.last.epoch) == (12, 2)

    def test_combined_loader_of_a_class_of_its_own_is_refused(self, fit):
        """How it iterates is not known, so neither is where to go on."""

        class Mine(CombinedLoader):
            pass

        with pytest.raises(Refused, match="Mine"):
            fit(Pairs(), data=Mine({"a": loader()}, "min_size"))

    def test_failed_save_stops_or_warns(self, fit, tmp_path, capsys):
        """A run whose saves fail must not end like one that saved, unless that was asked for."""

        class Unwritable(Callback):
            def on_train_epoch_end(self, trainer, module):
                (tmp_path / "run" / "checkpoints").write_text("in the way")

        with pytest.raises(OSError, match="checkpoints"):
            fit(callbacks=[Unwritable()], max_epochs=1)
        (tmp_path / "run" / "checkpoints").unlink()
        fit(callbacks=[Unwritable()], max_epochs=1, options={"on_error": "warn"})
        assert "a save failed and training goes on without it" in capsys.readouterr().err

    def test_iterable_of_batches_goes_on(self, fit):
        """Lightning takes anything that can be iterated over."""
        batches = [[torch.full((2, 2), float(index))] for index in range(6)]

        class Batches:
            def __iter__(self):
                return iter(batches)

        with pytest.raises(StoppedError):
            fit(data=Batches(), callbacks=[Stop(4)], options={"every": STEP})
        seen = []

        class Seen(Callback):
            def on_train_batch_start(self, trainer, module, batch, index):
                seen.append(float(batch[0][0, 0]))

        fit(data=Batches(), callbacks=[Seen()], options={"every": STEP}, max_epochs=1)
        assert seen == [4.0, 5.0]

    def test_damaged_file_is_told_by_the_reader_of_ckpt_path(self, fit):
        """`ckpt_path` reads with the same care as a resume."""
        trainer, callback = fit(Line(losses=[2.0, 1.0]))
        flip_last_bit(f"{callback.best_model_path}/model.safetensors")
        with pytest.raises(Damaged):
            trainer.validate(Line(losses=[0.0]), loader(4), ckpt_path="best", verbose=False)

    def test_limited_batches_are_an_epoch(self, fit):
        """`limit_train_batches` decides how long an epoch is, before and after a restart."""
        settings = {"limit_train_batches": 4, "options": {"every": STEP}}
        with pytest.raises(StoppedError):
            fit(callbacks=[Stop(6)], **settings)
        trainer, callback = fit(**settings)
        assert trainer.global_step == 8
        assert [(row.epoch, row.step) for row in callback.run.history.epochs()] == [(1, 4), (2, 8)]


def test_idle_steps_touch_nothing(fit):
    """Between two saves a step asks the callback for a few counters, never for the state."""
    gathered = itertools.count()

    class Counting(Line):
        def on_save_checkpoint(self, checkpoint):
            next(gathered)

    fit(Counting(), data=DataLoader(loader(200).dataset, batch_size=2), max_epochs=1)
    assert next(gathered) == 2  # the rehearsal, and the end of the epoch
