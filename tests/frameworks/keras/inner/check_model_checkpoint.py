"""ModelCheckpoint: Keras's files and semantics, with writes that survive and a best that is remembered."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import warnings

import keras
import numpy as np
import pytest

from highcamp.errors import InvalidArgument, InvalidMetric, StorageError
from highcamp.keras import ModelCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5")


@pytest.fixture
def model(make_model):
    """Built and compiled; the weights say at which epoch they were saved."""
    return make_model(optimizer="sgd")


def _names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def _mark(model, number):
    model.get_layer("out").bias.assign([float(number)])


def _saved_epoch(path):
    return float(keras.ops.convert_to_numpy(keras.models.load_model(path).get_layer("out").bias)[0])


def _train(callback, model, rows, first=0):
    """Drive the callback as `fit` does: one row of logs per epoch."""
    callback.set_params({"epochs": first + len(rows), "steps": 1, "verbose": 0})
    callback.set_model(model)
    callback.on_train_begin()
    for epoch, logs in enumerate(rows, start=first):
        _mark(model, epoch + 1)
        callback.on_epoch_begin(epoch)
        callback.on_epoch_end(epoch, {"loss": 1.0, **({"val_loss": logs} if not isinstance(logs, dict) else logs)})
    callback.on_train_end()
    return callback


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
@pytest.mark.once
def test_nan_first_never_wins(tmp_path, model, bad):
    """In Keras nothing beats a NaN: the file keeps the weights of the epoch that diverged."""
    path = tmp_path / "best.keras"

    callback = _train(ModelCheckpoint(path, save_best_only=True), model, [bad, 0.5, 0.4, bad, 0.45])

    assert callback.best == 0.4
    assert _saved_epoch(path) == 3


@pytest.mark.once
def test_nan_first_never_wins_in_max_mode(tmp_path, model):
    """Plus infinity is no accuracy."""
    path = tmp_path / "best.keras"
    rows = [{"val_accuracy": value} for value in (float("inf"), 0.2, 0.3)]

    _train(ModelCheckpoint(path, monitor="val_accuracy", save_best_only=True), model, rows)

    assert _saved_epoch(path) == 3


@pytest.mark.once
def test_missing_metric_leaves_best(tmp_path, model):
    """Keras warns, and writes over the best file."""
    path = tmp_path / "best.keras"
    callback = ModelCheckpoint(path, save_best_only=True)

    with pytest.warns(UserWarning, match=r"only with val_loss available. There is only accuracy, loss; .* stays"):
        _train(callback, model, [0.3, {"accuracy": 0.9}, {"accuracy": 0.8}])

    assert _saved_epoch(path) == 1
    assert callback.best == 0.3


@pytest.mark.once
def test_missing_metric_still_saves(tmp_path, model):
    """A typo in `monitor` must not leave a night of training without any file."""
    path = tmp_path / "best.keras"

    with pytest.warns(UserWarning, match="saved, because there is no file yet"):
        callback = _train(ModelCheckpoint(path, save_best_only=True), model, [{}, {}])

    assert _saved_epoch(path) == 1
    assert callback.best is None


@pytest.mark.once
def test_validation_freq_keeps_best(tmp_path, model):
    """With validation_freq=2, Keras saves every epoch without validation over the best."""
    path = tmp_path / "best.keras"

    with pytest.warns(UserWarning, match="val_loss"):
        _train(ModelCheckpoint(path, save_best_only=True), model, [{}, 0.3, {}, 0.4, {}])

    assert _saved_epoch(path) == 2


@pytest.mark.once
def test_a_measured_epoch_replaces_an_unmeasured_one_after_a_restart(tmp_path, model):
    """A file without a value is no best that a restart would have to beat."""
    path = tmp_path / "best.keras"
    with pytest.warns(UserWarning, match="val_loss"):
        _train(ModelCheckpoint(path, save_best_only=True), model, [{}])

    _train(ModelCheckpoint(path, save_best_only=True), model, [0.9], first=1)

    assert _saved_epoch(path) == 2


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".h5"])
def test_best_survives_restart(tmp_path, model, suffix):
    """Keras begins with no best: 0.9 writes over 0.1."""
    path = tmp_path / f"best{suffix}"
    options = {"save_best_only": True, "save_weights_only": suffix == ".weights.h5"}
    _train(ModelCheckpoint(path, **options), model, [0.5, 0.1])
    before = path.read_bytes()

    callback = _train(ModelCheckpoint(path, **options), model, [0.9, 0.2], first=2)

    assert callback.best == 0.1
    assert path.read_bytes() == before


@pytest.mark.once
def test_best_survives_failed_save(tmp_path, model):
    """Keras raises `best` before it writes: a full disk loses the file and its rank."""
    path = tmp_path / "best.keras"
    callback = ModelCheckpoint(path, save_best_only=True)
    _train(callback, model, [0.5])
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match="could not be written"):
            callback.on_epoch_end(1, {"val_loss": 0.1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert callback.best == 0.5
    assert path.read_bytes() == before
    assert _names(tmp_path) == [path.name]
    callback.on_epoch_end(2, {"val_loss": 0.3})
    assert callback.best == 0.3


@pytest.mark.once
def test_a_full_disk_is_said_with_its_numbers(tmp_path, model, monkeypatch):
    """HDF5 brings down a process in which it could not write to the end."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 5))
    callback = ModelCheckpoint(tmp_path / "a.weights.h5", save_weights_only=True)

    with pytest.raises(StorageError, match=r"it needs .* bytes, 5 are free"):
        _train(callback, model, [0.5])

    assert _names(tmp_path) == []


@pytest.mark.once
def test_moved_folder_keeps_best(tmp_path, model):
    """Absolute paths in a file beside it would break."""
    _train(ModelCheckpoint(tmp_path / "a" / "{epoch}.keras", save_best_only=True), model, [0.5, 0.1])
    shutil.move(tmp_path / "a", tmp_path / "b")

    callback = _train(ModelCheckpoint(tmp_path / "b" / "{epoch}.keras", save_best_only=True), model, [0.3], first=2)

    assert callback.best == 0.1
    assert _names(tmp_path / "b") == ["1.keras", "2.keras"]


@pytest.mark.once
def test_deleted_best_is_forgotten(tmp_path, model):
    """A value without a file would keep every later epoch from being saved."""
    path = tmp_path / "best.keras"
    callback = ModelCheckpoint(path, save_best_only=True)
    _train(callback, model, [0.1])
    path.unlink()

    callback.on_epoch_end(1, {"val_loss": 0.5})

    assert path.exists()
    assert callback.best == 0.5


@pytest.mark.once
def test_another_monitor_is_not_compared(tmp_path, model):
    """An accuracy is no loss."""
    path = tmp_path / "best.keras"
    _train(ModelCheckpoint(path, save_best_only=True), model, [0.1])

    callback = ModelCheckpoint(path, monitor="val_accuracy", save_best_only=True)
    _train(callback, model, [{"val_accuracy": 0.05}], first=1)

    assert callback.best == 0.05


@pytest.mark.once
def test_damaged_file_is_no_best(tmp_path, model):
    """What cannot be loaded must not keep a good epoch from being saved."""
    path = tmp_path / "best.keras"
    _train(ModelCheckpoint(path, save_best_only=True), model, [0.1])
    path.write_bytes(path.read_bytes()[:100])

    with pytest.warns(UserWarning, match="cannot be read"):
        _train(ModelCheckpoint(path, save_best_only=True), model, [0.5], first=1)

    assert _saved_epoch(path) == 2


@pytest.mark.once
def test_a_file_of_keras_itself_is_said_to_be_replaced(tmp_path, model):
    """It may be better than anything that comes; nobody can tell."""
    path = tmp_path / "best.keras"
    model.save(path)

    with pytest.warns(UserWarning, match="does not say what it was saved for"):
        _train(ModelCheckpoint(path, save_best_only=True), model, [0.5])

    assert _saved_epoch(path) == 1


@pytest.mark.once
def test_template_finds_the_best_among_its_files(tmp_path, model):
    """With a name per epoch the best is one of many files."""
    template = str(tmp_path / "{epoch:02d}-{val_loss:.2f}.keras")
    _train(ModelCheckpoint(template, save_best_only=True), model, [0.5, 0.2, 0.3])
    _train(ModelCheckpoint(tmp_path / "other-{epoch}.keras", save_best_only=True), model, [0.01])

    callback = _train(ModelCheckpoint(template, save_best_only=True), model, [0.4, 0.1], first=3)

    assert _names(tmp_path) == ["01-0.50.keras", "02-0.20.keras", "05-0.10.keras", "other-1.keras"]
    assert callback.best == 0.1


@pytest.mark.once
def test_template_checked_early(tmp_path, model):
    """In Keras an unknown key ends `fit` with a KeyError after the first epoch."""
    template = tmp_path / "{epoch:02d}-{val_acc:.2f}.keras"

    with pytest.warns(UserWarning, match=r'names "val_acc", but there is only loss, val_loss: saving as .*01\.keras'):
        _train(ModelCheckpoint(template), model, [0.5, 0.4])

    assert _names(tmp_path) == ["01.keras", "02.keras"]


@pytest.mark.once
def test_template_without_epoch_does_not_overwrite(tmp_path, model):
    """Without the missing value all epochs would share one file."""
    with pytest.warns(UserWarning, match="val_acc"):
        _train(ModelCheckpoint(tmp_path / "m_{val_acc:.2f}.keras"), model, [0.5, 0.4])

    assert _names(tmp_path) == ["m-epoch-0001.keras", "m-epoch-0002.keras"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{epoch.keras", "is no template"),
        ("{}.keras", "names no metric"),
        ("{0}.keras", "names no metric"),
        ("{epoch.real}.keras", "names no metric"),
        ("{epoch:zz}.keras", "a format that no number fits, at epoch"),
        ("{epoch}-{batch}.keras", "only with an integer save_freq"),
        ("gs://bucket/best.keras", "not a local path"),
    ],
)
@pytest.mark.once
def test_impossible_paths_are_refused_at_once(template, words):
    """Found after the first epoch, that epoch would be lost."""
    with pytest.raises(InvalidArgument) as error:
        ModelCheckpoint(template)

    assert words in str(error.value)


@pytest.mark.parametrize("save_freq", [0, -1, True, False])
@pytest.mark.once
def test_cadence_values_checked(save_freq):
    """Keras saves after every batch for 0, True and False."""
    with pytest.raises(InvalidArgument, match="save_freq"):
        ModelCheckpoint("a.keras", save_freq=save_freq)


def test_step_cadence_with_best(tmp_path, make_model, points):
    """In Keras this is a TypeError in the first epoch."""
    path = tmp_path / "best.keras"
    callback = ModelCheckpoint(path, monitor="loss", save_best_only=True, save_freq=2)

    make_model("sgd").fit(*points, batch_size=4, epochs=2, verbose=0, callbacks=[callback])

    assert path.exists()
    assert callback.best is not None


@pytest.mark.once
def test_step_cadence_with_a_validation_metric_is_refused():
    """No batch has a val_loss, so nothing would ever be saved."""
    with pytest.raises(InvalidArgument, match="val_loss is measured when an epoch ends"):
        ModelCheckpoint("a.keras", save_best_only=True, save_freq=10)


@pytest.mark.once
def test_step_cadence_counts_as_keras_does(tmp_path, make_model, points):
    """Batches are counted across epochs: 6 per epoch, every 4th is saved."""
    template = str(tmp_path / "{epoch}-{batch}.weights.h5")
    callback = ModelCheckpoint(template, save_weights_only=True, save_freq=4)

    make_model("sgd").fit(*points, batch_size=4, epochs=2, verbose=0, callbacks=[callback])

    assert _names(tmp_path) == ["1-4.weights.h5", "2-2.weights.h5", "2-6.weights.h5"]


class TestMode:
    """mode="auto" and what is asked of it."""

    @pytest.mark.once
    def test_unknown_mode_warns_as_keras_does(self):
        """Scripts that run with Keras go on running."""
        with pytest.warns(UserWarning, match="ModelCheckpoint mode 'mim' is unknown, fallback to auto mode"):
            ModelCheckpoint("a.keras", mode="mim")

    def test_mode_asked_before_the_first_epoch_ends(self, tmp_path, make_model, points):
        """Keras raises when the first epoch, perhaps of hours, is over."""
        callback = ModelCheckpoint(tmp_path / "a.keras", monitor="val_custom", save_best_only=True)
        ended = []
        watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ended.append(epoch))

        with pytest.raises(InvalidArgument, match="pass mode='min' or mode='max'"):
            make_model().fit(*points, batch_size=12, verbose=0, callbacks=[callback, watch])

        assert ended == []

    def test_compiled_metrics_say_their_direction(self, tmp_path, make_model, points):
        """As in Keras: a metric named by the user is asked itself."""
        metric = keras.metrics.RootMeanSquaredError(name="quality")
        callback = ModelCheckpoint(tmp_path / "a.keras", monitor="val_quality", save_best_only=True)

        make_model(metrics=[metric]).fit(*points, validation_data=points, verbose=0, callbacks=[callback])

        assert callback._direction == "min"

    @pytest.mark.once
    def test_it_is_not_asked_when_every_epoch_is_saved(self, tmp_path, make_model, points):
        """Keras stops with an error about a direction that nobody needs."""
        callback = ModelCheckpoint(tmp_path / "a.keras", monitor="val_custom")

        make_model().fit(*points, verbose=0, callbacks=[callback])

        assert (tmp_path / "a.keras").exists()


@pytest.mark.parametrize("value", [np.ones(3), "0.1", np.ones((1,))], ids=["array", "text", "one"])
@pytest.mark.once
def test_metric_must_be_a_number(tmp_path, model, value):
    """Keras saves always for an array, and keeps a string as the best."""
    with pytest.raises(InvalidMetric, match="val_loss is a"):
        _train(ModelCheckpoint(tmp_path / "a.keras", save_best_only=True), model, [value])


@pytest.mark.parametrize(
    "make", [np.float32, np.asarray, keras.ops.convert_to_tensor], ids=["numpy", "array", "tensor"]
)
def test_single_values_of_any_kind_are_numbers(tmp_path, model, make):
    """Some metrics come as NumPy or backend scalars."""
    callback = ModelCheckpoint(tmp_path / "a.keras", save_best_only=True)

    _train(callback, model, [make(0.5), make(0.25)])

    assert callback.best == 0.25


@pytest.mark.once
def test_ties_keep_the_older(tmp_path, model):
    """An equal value is no improvement."""
    path = tmp_path / "best.keras"

    _train(ModelCheckpoint(path, save_best_only=True), model, [0.5, 0.5])

    assert _saved_epoch(path) == 1


@pytest.mark.once
def test_threshold_is_the_first_best(tmp_path, model):
    """As in Keras; a file that is better counts more."""
    path = tmp_path / "best.keras"
    _train(ModelCheckpoint(path, save_best_only=True, initial_value_threshold=0.3), model, [0.5, 0.4])
    assert not path.exists()

    callback = _train(ModelCheckpoint(path, save_best_only=True, initial_value_threshold=0.3), model, [0.2])

    assert callback.best == 0.2


def test_keras_reads_the_files(tmp_path, make_model, points):
    """A drop-in's files are Keras's."""
    model = make_model()
    callbacks = [
        ModelCheckpoint(tmp_path / "whole.keras", save_best_only=True),
        ModelCheckpoint(tmp_path / "only.weights.h5", save_best_only=True, save_weights_only=True),
        ModelCheckpoint(tmp_path / "each-{epoch}.keras"),
    ]

    model.fit(*points, validation_data=points, verbose=0, callbacks=callbacks)

    expected = model.predict(points[0], verbose=0)
    whole = keras.models.load_model(tmp_path / "whole.keras")
    weights = make_model()
    weights.optimizer.build(weights.trainable_variables)
    weights.load_weights(tmp_path / "only.weights.h5")
    for loaded in (whole, weights, keras.models.load_model(tmp_path / "each-1.keras")):
        assert np.array_equal(loaded.predict(points[0], verbose=0), expected)
    assert _names(tmp_path) == ["each-1.keras", "only.weights.h5", "whole.keras"]


@pytest.mark.once
def test_umask_decides_modes(tmp_path, model):
    """A colleague who may read the folder may read the file."""
    before = os.umask(0o027)
    try:
        _train(ModelCheckpoint(tmp_path / "a.keras"), model, [0.5])
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "a.keras").stat().st_mode) == 0o640


@pytest.mark.once
def test_a_directory_in_the_way_is_named(tmp_path, model):
    """Keras's words, and an error of ours that is an OSError."""
    (tmp_path / "a.keras").mkdir()

    with pytest.raises(OSError, match="Please specify a non-directory filepath"):
        _train(ModelCheckpoint(tmp_path / "a.keras"), model, [0.5])


@pytest.mark.once
def test_a_link_is_written_through(tmp_path, model):
    """As in Keras: the link stays, and what it leads to is the new file."""
    (tmp_path / "store").mkdir()
    (tmp_path / "best.keras").symlink_to(tmp_path / "store" / "real.keras")

    _train(ModelCheckpoint(tmp_path / "best.keras"), model, [0.5])

    assert (tmp_path / "best.keras").is_symlink()
    assert _saved_epoch(tmp_path / "store" / "real.keras") == 1


@pytest.mark.once
def test_leftovers_are_swept_and_foreign_files_stay(tmp_path, model):
    """Each kill within a save would leave a file as large as the model."""
    dead = tmp_path / f".highcamp-pending-{'0' * 8}-1-00000000.keras"
    dead.write_bytes(b"x")
    os.utime(dead, (0, 0))
    fresh = tmp_path / f".highcamp-pending-{'0' * 8}-1-00000001.keras"  # of another machine, perhaps at work
    fresh.write_bytes(b"x")
    foreign = tmp_path / ".pending-of-mine.keras"
    foreign.write_bytes(b"x")

    _train(ModelCheckpoint(tmp_path / "a.keras"), model, [0.5])

    assert (dead.exists(), fresh.exists(), foreign.exists()) == (False, True, True)


@pytest.mark.once
def test_messages_are_kerass_own(tmp_path, model, capsys):
    """Logs that people search stay as they are; digits grow until two values differ."""
    callback = ModelCheckpoint(tmp_path / "a.keras", save_best_only=True, verbose=1)

    _train(callback, model, [0.5, 0.4999999, 0.6, float("nan")])

    said = capsys.readouterr().out
    assert f"Epoch 1: val_loss improved from None to 0.50000, saving model to {tmp_path}/a.keras" in said
    assert "Epoch 2: val_loss improved from 0.5000000 to 0.4999999, saving model" in said
    assert f"Epoch 2: finished saving model to {tmp_path}/a.keras" in said
    assert "Epoch 3: val_loss did not improve from 0.50000" in said
    assert "Epoch 4: val_loss is nan; not saved (best stays 0.50000)" in said


def test_no_warning_in_an_ordinary_run(tmp_path, make_model, points):
    """A callback that warns for nothing teaches people to overlook it."""
    callback = ModelCheckpoint(tmp_path / "a.keras", save_best_only=True)

    with warnings.catch_warnings(record=True) as said:
        make_model().fit(*points, validation_data=points, verbose=0, callbacks=[callback])

    assert [str(entry.message) for entry in said if "__array__" not in str(entry.message)] == []
