from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from highcamp.errors import InvalidArgument
from highcamp.policy.candidate import Candidate
from highcamp.policy.monitor import Monitor
from highcamp.policy.retention import DAMAGED, Keep, plan

CASES = json.loads(Path(__file__).with_name("retention.json").read_text(encoding="utf-8"))


def read(case):
    """The arguments of `plan` in a case of retention.json: candidates are [name, step, sequence, epoch, val_loss]."""
    made = [
        Candidate(name, step, sequence, epoch, {} if value is None else {"val_loss": float(value)})
        for name, step, sequence, epoch, value in case["candidates"]
    ]
    monitor = case.get("monitor", {"metric": "val_loss"})
    return Keep(**case["policy"]), monitor and Monitor(**monitor), made, case


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_the_plan_of(case):
    """Each case of retention.json: exactly these stay, for exactly these reasons, and exactly those go."""
    keep, monitor, made, _ = read(case)

    found = plan(
        keep,
        monitor,
        made,
        pins=case.get("pins", {}),
        resumed_from=case.get("resumed_from"),
        damaged=case.get("damaged", []),
    )

    assert {name: list(why) for name, why in found.keep.items()} == case["keep"]
    assert list(found.keep) == list(case["keep"])
    assert list(found.remove) == case["remove"]


def test_what_is_protected_never_goes():
    """Whatever the policy and the order of the list: best, last, resumed from, pinned, damaged and the only whole stay."""
    chance = random.Random(11)
    for _ in range(400):
        made = [
            Candidate(
                f"c{place}",
                chance.randrange(6),
                place,
                chance.randrange(4),
                {"val_loss": chance.choice([0.5, 0.25, np.nan])},
            )
            for place in range(chance.randrange(9))
        ]
        listed = [each.name for each in made]
        pins = {pin: chance.choice([*listed, "gone"]) for pin in ("a", "b") if chance.random() < 0.3}
        damaged = {name for name in listed if chance.random() < 0.3}
        resumed_from = chance.choice([*listed, None])
        keep = Keep(
            best=chance.randrange(3), last=chance.randrange(3), every_steps=chance.choice([None, 2, 3]), every_epochs=1
        )
        monitor = chance.choice([None, Monitor("val_loss"), Monitor("val_loss", "max", 0.1)])
        chance.shuffle(made)

        found = plan(keep, monitor, made, pins=pins, resumed_from=resumed_from, damaged=damaged)

        whole = sorted((each for each in made if each.name not in damaged), key=lambda each: each.order)
        best = monitor and monitor.best(whole)
        must = damaged | ({*pins.values(), resumed_from} & set(listed))
        must |= {each.name for each in (*whole[-1:], *([best] if best else []))}
        assert must <= set(found.keep)
        assert set(found.keep) | set(found.remove) == set(listed)
        assert not set(found.keep) & set(found.remove)
        assert all(found.keep.values())
        assert len(whole) <= 1 or len(whole) - len(set(found.remove)) >= 1


def test_the_plan_is_stable():
    """Pruning twice removes nothing more: what stays is chosen again for the same reasons."""
    made = [Candidate(f"c{place}", place * 50, place, place, {"val_loss": 1 / (1 + place % 7)}) for place in range(30)]
    keep, monitor = Keep(best=2, last=3, every_steps=200, every_epochs=5), Monitor("val_loss")

    first = plan(keep, monitor, made, pins={})
    second = plan(keep, monitor, [each for each in made if each.name in first.keep], pins={})

    assert second.keep == first.keep
    assert second.remove == ()


@pytest.mark.parametrize("policy", [{"best": 0, "last": 0}, {"best": 0, "last": 0, "every_steps": None}])
def test_a_policy_that_removes_everything_is_an_error(policy):
    """A limit of 1 that removed all is on record elsewhere."""
    with pytest.raises(InvalidArgument, match="would remove everything"):
        Keep(**policy)


@pytest.mark.parametrize("name", ["best", "last", "every_steps", "every_epochs"])
@pytest.mark.parametrize("count", [-1, True, False, 1.0, "2", np.float32(1)])
def test_keep_values_checked(name, count):
    """A wrong number is said before training, not when the wrong checkpoints are gone."""
    with pytest.raises(InvalidArgument, match=f"{name} is not an integer of at least"):
        Keep(**{name: count})


def test_zero_is_for_quotas_only():
    """Every 0 epochs is no cadence; none of the best is a policy."""
    assert Keep(best=0).best == 0
    for name in ("every_steps", "every_epochs"):
        with pytest.raises(InvalidArgument, match="at least 1"):
            Keep(**{name: 0})
    with pytest.raises(InvalidArgument, match="best is not an integer"):
        Keep(best=None)


def test_keep_becomes_plain_numbers():
    """It is recorded in run.json."""
    keep = Keep(best=np.int64(3), every_steps=np.int32(5))

    assert [type(keep.best), type(keep.every_steps)] == [int, int]


def test_damaged_reason_is_one_text():
    """The reason is shown in tables and matched by the commands."""
    assert DAMAGED == "damaged: not touched"
