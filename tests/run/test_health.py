"""The health mark: what a commit finds in the weights, what its manifest says of it, and what of that carries over."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
import torch

import highcamp
from highcamp import Checkpointer, Every, Keep
from highcamp.core.manifest import MAX_NAMED_TENSORS, Health, Manifest, decode, encode
from highcamp.storage.local import LocalStore

ALL = Keep(best=1, last=100)
LARGE = 1 << 18  # numbers of four bytes: from here on a tensor that does not change gets a file of its own


def params(value=1.0, **more):
    """A passed state: weights, and an optimizer."""
    return {"params": {"w": np.full(5, value, np.float32), **more}, "opt_state": {"m": np.zeros(5)}}


def save(place, *states, **options):
    """Save each state as a step of its own; returns the checkpoints."""
    with Checkpointer(place, keep=ALL, verbose=-1, **options) as checkpointer:
        checkpointer.restore(like=states[0])
        begin = checkpointer.step
        for step, state in enumerate(states, start=begin + 1):
            checkpointer.save(state, step=step)
    return checkpointer.run.checkpoints


def forget(entry):
    """Make a checkpoint one of before health was recorded."""
    manifest = msgspec.structs.replace(entry.manifest, health=msgspec.UNSET)
    entry.store.local_path(f"checkpoints/{entry.name}/manifest.json").write_bytes(encode(manifest))


# What is found


@pytest.mark.parametrize(("value", "word"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "inf")])
def test_weights_that_are_not_finite_are_not_healthy(where, value, word):
    """A run would go on from weights of which every prediction is NaN."""
    good, bad = save(where, params(1.0), params(value))

    assert (good.is_healthy, bad.is_healthy) == (True, False)
    assert bad.manifest.health == Health(1, {"params/w": word})
    assert json.loads(LocalStore(where).local_path(f"checkpoints/{bad.name}/manifest.json").read_bytes())["health"] == {
        "nonfinite": 1,
        "tensors": {"params/w": word},
    }


def test_what_is_no_weight_is_not_looked_at(where):
    """An optimizer may hold an infinity on purpose, such as the best loss so far."""
    state = params()
    state["opt_state"]["m"][:] = np.nan

    assert save(where, state)[0].is_healthy is True


def test_where_nothing_is_known_to_be_weights_health_is_unknown(where):
    """The word would be a promise about arrays that nobody has looked at."""
    (entry,) = save(where, {"anything": {"w": np.full(3, np.nan)}})

    assert entry.is_healthy is None
    assert "health" not in json.loads(entry.store.local_path(f"checkpoints/{entry.name}/manifest.json").read_bytes())


def test_of_a_passed_state_infinities_count_where_names_say_that_it_is_trained(where):
    """Running statistics, caches and masks lie beside the parameters, and nothing but a name tells them apart."""
    infinite = np.array([-np.inf, 1])
    for name, part, is_healthy in (
        ("params", {"w": infinite}, False),
        ("weights", [infinite], False),
        ("variables", {"params": {"w": infinite}}, False),
        ("variables", {"constants": {"mask": infinite}, "params": {"w": np.ones(2)}}, True),
        ("batch_stats", {"mean": infinite}, True),
        ("batch_stats", {"mean": infinite * np.nan}, False),
    ):
        entry = save(where / str(len(list(where.parent.rglob("run.json")))), {name: part})[0]

        assert entry.is_healthy is is_healthy, (name, part)


def test_only_so_many_tensors_are_named(where):
    """Once one weight is NaN all are: a manifest that names a million of them is read at every question."""
    (entry,) = save(where, params(np.nan, **{f"l{place:02}": np.full(2, np.nan) for place in range(40)}))

    assert entry.manifest.health.nonfinite == 41
    assert len(entry.manifest.health.tensors) == MAX_NAMED_TENSORS
    assert entry.manifest.nonfinite_tensors("params") is None


def test_what_is_known_of_an_object_is_told_by_object():
    """Names of tensors hold slashes as well, and two objects may have tensors of one name."""
    health = Health(2, {"model/a/w": "nan", "model2/w": "inf"})
    facts = {"run_id": "r", "step": 1, "epoch": 0, "sequence": 1, "attempt": 1, "created_at": "now"}
    objects = {name: highcamp.core.manifest.Object(weights=True) for name in ("model", "model2", "model3")}
    manifest = Manifest(**facts, objects={**objects, "other": highcamp.core.manifest.Object()}, health=health)

    found = {name: manifest.nonfinite_tensors(name) for name in manifest.objects}

    assert found == {"model": {"a/w": "nan"}, "model2": {"w": "inf"}, "model3": {}, "other": None}
    assert decode(encode(manifest), where="m") == manifest


# PyTorch


class Attention(torch.nn.Module):
    """A layer with a causal mask, running statistics, and a table that is not trained."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.table = torch.nn.Parameter(torch.full((3,), -torch.inf), requires_grad=False)
        self.register_buffer("mask", torch.triu(torch.full((4, 4), -torch.inf), 1))


def tracked(place, *changes, model=None):
    """Save a model as it is, and again after each change; returns whether each checkpoint is healthy."""
    model = Attention() if model is None else model
    with Checkpointer(place, keep=ALL, verbose=-1) as checkpointer:
        checkpointer.track(model=model)
        checkpointer.start()
        for step, change in enumerate([lambda _: None, *changes], start=checkpointer.step + 1):
            with torch.no_grad():
                change(model)
            checkpointer.save(step=step)
    return [each.is_healthy for each in checkpointer.run.checkpoints]


def test_a_causal_mask_is_healthy(where):
    """Every checkpoint of every transformer that keeps its mask as a buffer would be called unhealthy."""
    assert tracked(where) == [True]


def test_an_infinite_parameter_is_not(where):
    """The first thing that is seen of weights that run away; the buffers beside it are what they were."""
    assert tracked(where, lambda model: model.linear.weight[1, 2].fill_(torch.inf)) == [True, False]


@pytest.mark.parametrize("name", ["mask", "norm.running_var", "table", "linear.bias"])
def test_nan_counts_wherever_it_is(where, name):
    """Running statistics that are NaN make every prediction NaN, though no parameter is."""
    assert tracked(where, lambda model: model.state_dict()[name][0].fill_(torch.nan)) == [True, False]
    last = highcamp.open(where).last
    assert last.manifest.health.tensors == {f"model/{name}": "nan"}


def test_half_precision_overflows_are_found(where):
    """What training in lower precision dies of."""
    model = torch.nn.Linear(300, 300, dtype=torch.bfloat16)
    half = torch.nn.Linear(300, 300, dtype=torch.float16)

    assert tracked(where, lambda found: found[1].bias[299].fill_(1e9), model=torch.nn.ModuleList([model, half])) == [
        True,
        False,
    ]


def test_strided_weights_are_looked_at_too(where):
    """What is not one stretch of memory goes another way into the snapshot."""
    model = torch.nn.Linear(4, 4)
    model.weight = torch.nn.Parameter(torch.ones(4, 4).T)

    assert not model.weight.is_contiguous()
    assert tracked(where, lambda found: found.weight[0, 3].fill_(-torch.inf), model=model) == [True, False]


# What carries over


class Reads(LocalStore):
    """Counts the bytes that are read through open files."""

    count = 0

    def open(self, path):
        """See `Store.open`."""
        reader = super().open(path)
        original = reader.read_into

        def read_into(offset, view):
            Reads.count += len(view)
            return original(offset, view)

        reader.read_into = read_into
        return reader


def frozen_base(value=0.5):
    """A network whose large base is not trained, so that it lies in a file that is linked from save to save."""
    base = torch.nn.Linear(LARGE // 512, 512, bias=False).requires_grad_(requires_grad=False)
    with torch.no_grad():
        base.weight.fill_(value)
    return torch.nn.Sequential(base, torch.nn.Linear(512, 2))


def linked(run):
    """The file of the base in the last checkpoint, and in how many it is."""
    file = run.store.local_path(f"checkpoints/{run.last.name}/model.1.safetensors")
    return file.stat().st_nlink


@pytest.mark.parametrize(("value", "is_healthy"), [(0.5, True), (float("nan"), False), (float("-inf"), True)])
def test_what_is_linked_is_as_healthy_as_it_was(where, value, is_healthy):
    """The bytes are not written again, so nobody looks at them; the mark would say what is true of the rest alone."""
    found = tracked(where, lambda _: None, lambda _: None, model=frozen_base(value))
    found = tracked(where, lambda _: None, model=frozen_base(value))

    assert found == [is_healthy] * 5
    assert linked(highcamp.open(where)) == 5
    if not is_healthy:
        assert highcamp.open(where).last.manifest.health == Health(1, {"model/0.weight": "nan"})


@pytest.mark.parametrize(("value", "is_healthy"), [(0.5, True), (float("nan"), False)])
def test_of_linked_tensors_that_nobody_knows_the_file_is_read_once(where, value, is_healthy):
    """A run begun by an older version would stay without a mark for ever, or read the frozen weights at every save."""
    tracked(where, model=frozen_base(value))
    forget(highcamp.open(where).last)
    assert highcamp.open(where).last.is_healthy is None

    found = tracked(where, lambda _: None, model=frozen_base(value))

    assert found == [None, is_healthy, is_healthy]
    assert linked(highcamp.open(where)) == 3


def test_a_file_that_is_known_is_not_read_for_a_save(where):
    """The point of a link is that nothing is read or written."""
    model = frozen_base()
    with Checkpointer(Reads(where), keep=ALL, verbose=-1) as checkpointer:
        checkpointer.track(model=model)
        checkpointer.save(step=1).wait()
        Reads.count = 0
        for step in (2, 3):
            checkpointer.save(step=step).wait()

    assert linked(checkpointer.run) == 3
    assert Reads.count < LARGE


@pytest.mark.parametrize(("value", "is_healthy"), [(1.0, True), (np.nan, False), (None, None)])
def test_weights_that_are_kept_alone_are_as_healthy_as_they_were(where, value, is_healthy):
    """The mark is of the weights, and these are the same."""
    keep = Keep(best=1, last=1, best_weights_only=True)
    with Checkpointer(where, monitor="loss", keep=keep, verbose=-1) as checkpointer:
        checkpointer.save(params(value or 1.0), step=1, metrics={"loss": 0.1}).wait()
        if value is None:
            forget(checkpointer.run.last)
        checkpointer.save(params(value or 1.0), step=2, metrics={"loss": 0.9})

    best = checkpointer.run.best
    assert best.manifest.is_weights_only
    assert best.is_healthy is is_healthy
    assert (best.manifest.health == Health(1, {"params/w": "nan"})) is (is_healthy is False)


def test_weights_that_are_kept_alone_are_not_read_again(where):
    """They give back bytes of the disk after a save; reading all of them each time would take from training."""
    keep, large = Keep(best=1, last=2, best_weights_only=True), np.ones(LARGE)
    with Checkpointer(Reads(where), monitor="loss", keep=keep, verbose=-1) as checkpointer:
        checkpointer.save(params(large=large), step=1, metrics={"loss": 0.1}).wait()
        Reads.count = 0
        for step in (2, 3):
            checkpointer.save(params(large=large * step), step=step, metrics={"loss": 0.9})

    assert checkpointer.run.best.manifest.is_weights_only
    assert Reads.count < LARGE


def test_a_manifest_without_the_mark_is_read_as_ever(where):
    """A run begun with an older version goes on, and its checkpoints count as they did."""
    (entry,) = save(where, params())
    forget(entry)

    run = highcamp.open(where)
    assert run.last.is_healthy is None
    assert [each.is_healthy for each in save(where, params(2.0))] == [None, True]
    assert run.last.step == 2


def test_a_passed_state_in_pieces_is_looked_at_to_its_end(where):
    """Through a small ring the bytes come in many pieces."""
    large = np.ones(3 << 20, np.float32)
    large[-1] = np.nan

    (entry,) = save(where, params(1.0, large=large), staging_bytes=1 << 20, every=Every(steps=1))

    assert entry.manifest.health == Health(1, {"params/large": "nan"})
