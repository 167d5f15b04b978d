"""EpochDataset: the order is a function of seed and epoch."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from highcamp.errors import InvalidArgument, Mismatch
from highcamp.keras import EpochDataset


def _order(dataset, epoch):
    return np.concatenate([dataset.batch(epoch, at)[0] for at in range(len(dataset))]).tolist()


class Seen(EpochDataset):
    """Remembers which batches were loaded."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.seen = []

    def load(self, indices, rng):
        """As the parent does."""
        self.seen.append(indices.tolist())
        return super().load(indices, rng)


@pytest.mark.once
def test_every_sample_comes_once_in_an_epoch():
    """A sample left out or repeated would make an epoch something else than it says."""
    dataset = EpochDataset(np.arange(23), batch_size=4, seed=5)

    assert len(dataset) == 6
    assert sorted(_order(dataset, 0)) == list(range(23))


@pytest.mark.once
def test_the_order_depends_on_seed_and_epoch_alone():
    """A restarted script makes a new dataset: the same epoch must have the same order there."""
    one, other = (EpochDataset(np.arange(40), batch_size=4, seed=5) for _ in range(2))
    _ = _order(other, 7)

    assert _order(one, 3) == _order(other, 3)
    assert _order(one, 3) != _order(one, 4)
    assert _order(one, 3) != _order(EpochDataset(np.arange(40), batch_size=4, seed=6), 3)


def test_the_order_stays_the_same_for_ever():
    """A run that is resumed with a newer NumPy or highcamp would see other batches."""
    assert _order(EpochDataset(np.arange(10), batch_size=3, seed=1), 2) == GOLDEN


GOLDEN = [2, 7, 0, 9, 8, 1, 5, 6, 3, 4]


@pytest.mark.once
def test_shuffle_false_keeps_the_order_of_the_arrays():
    """Validation data are read in their own order."""
    assert _order(EpochDataset(np.arange(10), batch_size=3, shuffle=False), 2) == list(range(10))


@pytest.mark.parametrize("workers", [1, 3])
def test_fit_sees_the_order_of_each_epoch(make_model, points, workers):
    """`fit` shuffles the indices of every PyDataset by default, in an order that nobody could resume."""
    given = []

    class Recording(EpochDataset):
        def __getitem__(self, index):
            batch = super().__getitem__(index)
            given.append(batch[0].tolist())
            return batch

    dataset = Recording(*points, batch_size=5, seed=2, workers=workers)

    make_model().fit(dataset, epochs=2, verbose=0)

    expected = [dataset.batch(epoch, at)[0].tolist() for epoch in (0, 1) for at in range(5)]
    assert given[-10:] == expected


@pytest.mark.once
def test_workers_give_the_same_batches():
    """Keras's own workers leave batches of the pass before in their queue."""
    x = np.arange(60)
    plain, threaded = EpochDataset(x, batch_size=4, seed=1), EpochDataset(x, batch_size=4, seed=1, workers=4)
    for dataset in (plain, threaded):
        dataset.set_epoch(3)
        dataset.on_epoch_begin()

    for _ in range(len(plain)):
        assert np.array_equal(plain[0][0], threaded[0][0])


@pytest.mark.once
def test_a_transform_draws_the_same_numbers_again():
    """Augmentation after a restart must continue as it would have."""

    def noisy(batch, rng):
        return (batch[0] + rng.random(batch[0].shape), *batch[1:])

    x = np.zeros((12, 2))
    one, other = (EpochDataset(x, batch_size=4, seed=3, transform=noisy, workers=workers) for workers in (1, 2))

    assert np.array_equal(one.batch(1, 2)[0], other.batch(1, 2)[0])
    assert not np.array_equal(one.batch(1, 2)[0], one.batch(1, 1)[0])
    assert not np.array_equal(one.batch(1, 2)[0], one.batch(2, 2)[0])


@pytest.mark.once
def test_batches_that_are_done_are_not_loaded():
    """fast_skip: half an epoch of images would be read only to be thrown away."""
    dataset = Seen(np.arange(40), batch_size=4, seed=3)
    dataset.set_epoch(2, position=7)
    dataset.on_epoch_begin()

    batches = [dataset[at] for at in range(10)]

    wanted = [dataset._indices(2)[at * 4 : at * 4 + 4].tolist() for at in (7, 8, 9)]
    assert [batch[0].tolist() for batch in batches[7:]] == wanted
    assert all(entry in wanted for entry in dataset.seen)


@pytest.mark.once
def test_it_counts_the_passes_itself():
    """Without a callback that tells the epoch, every epoch would have the same order."""
    dataset = EpochDataset(np.arange(8), batch_size=4, seed=3)
    passes = []
    for _ in range(3):
        dataset.on_epoch_begin()
        passes.append(np.concatenate([dataset[at][0] for at in range(2)]).tolist())
        dataset.on_epoch_end()

    assert passes == [_order(dataset, epoch) for epoch in range(3)]


@pytest.mark.once
def test_nested_inputs_and_weights():
    """Models of several inputs take dicts."""
    dataset = EpochDataset({"a": np.arange(6), "b": np.arange(6) * 10}, np.arange(6), np.ones(6), batch_size=3)

    x, y, weights = dataset.batch(0, 1)

    assert np.array_equal(x["a"] * 10, x["b"])
    assert np.array_equal(x["a"], y)
    assert weights.shape == (3,)


@pytest.mark.once
def test_other_data_are_a_mismatch():
    """The second half of an epoch of other data is no half of the epoch that was begun."""
    saved = EpochDataset(np.arange(8), batch_size=4, seed=3).state_dict()

    with pytest.raises(Mismatch) as error:
        EpochDataset(np.arange(9), batch_size=3, seed=3).load_state_dict(saved)

    assert "size: 8 in the checkpoint, 9 here" in str(error.value)
    assert "batch_size: 4 in the checkpoint, 3 here" in str(error.value)
    assert "seed" not in str(error.value).partition(";")[0]


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((np.arange(3), np.arange(4)), {}, "differ in length (3, 4)"),
        ((np.arange(0),), {}, "empty"),
        ((None,), {}, "x is None"),
        ((np.float32(1),), {}, "a single value"),
        ((np.arange(3),), {"batch_size": 0}, "batch_size is 0"),
        ((np.arange(3),), {"batch_size": True}, "batch_size is True"),
        ((np.arange(3),), {"workers": 1.5}, "workers is 1.5"),
        ((np.arange(3),), {"seed": "a"}, "seed is 'a'"),
    ],
)
@pytest.mark.once
def test_wrong_arguments_are_refused_at_once(arguments, options, words):
    """Found in the middle of the first epoch, the time until then would be lost."""
    with pytest.raises(InvalidArgument) as error:
        EpochDataset(*arguments, **options)

    assert words in str(error.value)


@pytest.mark.once
def test_a_position_outside_is_refused():
    """A position beyond the end would be an epoch without batches."""
    with pytest.raises(InvalidArgument, match="position 3 is outside"):
        EpochDataset(np.arange(4), batch_size=2).set_epoch(0, position=3)


@pytest.mark.once
def test_it_can_be_pickled():
    """Spawned processes get their arguments that way."""
    dataset = EpochDataset(np.arange(8), batch_size=4, seed=3, workers=2)

    copied = pickle.loads(pickle.dumps(dataset))  # noqa: S301  (our own bytes)
    assert _order(copied, 1) == _order(dataset, 1)
