from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from highcamp.errors import InvalidArgument
from highcamp.policy.candidate import Candidate
from highcamp.policy.monitor import Monitor
from highcamp.policy.retention import DAMAGED, Keep, doomed, plan

CASES = json.loads(Path(__file__).with_name("retention.json").read_text(encoding="utf-8"))


def read(case):
    """The arguments of `plan` in a case of retention.json: candidates are [name, step, sequence, epoch, val_loss].

    A sixth entry is the sequence of the one whose weights alone it holds, or says that it is indivisible.
    """
    made = [
        Candidate(
            name,
            step,
            sequence,
            epoch,
            {} if value is None else {"val_loss": float(value)},
            weights_of=next((each for each in more if isinstance(each, int)), None),
            is_divisible=not more,
            is_healthy=name not in case["unhealthy"] if "unhealthy" in case else None,
        )
        for name, step, sequence, epoch, value, *more in case["candidates"]
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
    assert list(found.strip) == case.get("strip", [])
    assert list(found.indivisible) == case.get("indivisible", [])


def test_what_goes_is_found_out_with_few_questions():
    """Retention runs after each save: it must remove what the plan says, without a look at each of thousands."""
    chance = random.Random(12)
    asked_count = candidate_count = 0
    for _ in range(1500):
        made = [
            Candidate(f"c{place}", step, place, step // 2, {"val_loss": chance.choice([0.5, 0.25, 0.125, np.nan])})
            for place, step in enumerate(sorted(chance.randrange(20) for _ in range(chance.randrange(14))))
        ]
        made = [
            each._replace(is_divisible=chance.random() < 0.8, is_healthy=chance.choice([None, True, True, False]))
            for each in made
        ]
        made += [_weights_of(each, 50 + place) for place, each in enumerate(made) if chance.random() < 0.3]
        made = [each for each in made if each.is_resumable or chance.random() < 0.7]
        chance.shuffle(made)
        listed = [each.name for each in made]
        broken = {name for name in listed if chance.random() < 0.2}
        known = {name for name in broken if chance.random() < 0.3}
        pins = {"a": chance.choice(listed)} if listed and chance.random() < 0.3 else {}
        resumed_from = chance.choice([*listed, None])
        keep = Keep(
            best=chance.randrange(3),
            last=chance.randrange(1, 3),
            every_steps=chance.choice([None, 3]),
            every_epochs=chance.choice([None, 2]),
            best_weights_only=chance.random() < 0.5,
        )
        monitor = chance.choice(
            [None, Monitor("val_loss"), Monitor("val_loss", "max"), Monitor("val_loss", "min", 0.2)]
        )
        asked = []

        def is_whole(name, asked=asked, broken=broken):
            asked.append(name)
            return name not in broken

        found = doomed(keep, monitor, made, pins=pins, resumed_from=resumed_from, damaged=known, is_whole=is_whole)

        known_all = plan(keep, monitor, made, pins=pins, resumed_from=resumed_from, damaged=broken)
        assert (found.remove, found.strip) == (known_all.remove, known_all.strip)
        assert len(set(asked)) == len(asked)
        assert not set(asked) & known
        asked_count, candidate_count = asked_count + len(asked), candidate_count + len(made)
    assert asked_count < 0.85 * candidate_count  # most of these runs are nothing but quotas


def test_with_min_delta_any_one_may_decide():
    """Whether the third is better by enough depends on the first, and nobody asked whether that is whole: it is pinned."""
    made = [
        Candidate(f"c{step}", step, step, step, {"val_loss": value}) for step, value in enumerate([1.0, 0.95, 0.9, 2.0])
    ]
    monitor, keep = Monitor("val_loss", min_delta=0.08), Keep(best=1, last=1)
    for broken, removed in ((set(), ("c1",)), ({"c0"}, ("c2",))):
        found = doomed(
            keep, monitor, made, pins={"paper": "c0"}, is_whole=lambda name, broken=broken: name not in broken
        )

        assert found.remove == removed
        assert found == plan(keep, monitor, made, pins={"paper": "c0"}, damaged=broken)


@pytest.mark.parametrize(("keep", "most"), [(Keep(last=5000), 0), (Keep(every_epochs=1), 0), (Keep(every_epochs=2), 5)])
def test_of_thousands_few_are_asked(keep, most):
    """A run that keeps much for ever would stat every file of it after each save."""
    made = [Candidate(f"c{step}", step, step, step, {"val_loss": 1.0 / step}) for step in range(1, 1001)]
    if keep.every_epochs == 2:
        made = [each for each in made if not each.epoch % 2 or each.epoch > 996]  # as it is after a thousand saves
    asked = []

    found = doomed(keep, Monitor("val_loss"), made, pins={}, is_whole=lambda name: asked.append(name) or True)

    assert found == plan(keep, Monitor("val_loss"), made, pins={})
    assert len(asked) <= most


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
            best=chance.randrange(3),
            last=chance.randrange(3),
            every_steps=chance.choice([None, 2, 3]),
            every_epochs=1,
            best_weights_only=chance.random() < 0.5,
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


def test_a_healthy_one_to_go_on_from_always_stays():
    """NaN from some step on, with two last ones kept: after two saves nothing would be left but weights that are lost."""
    chance = random.Random(14)
    for _ in range(800):
        made = [
            Candidate(
                f"c{step}",
                step,
                step,
                step,
                {"val_loss": chance.random()},
                is_healthy=chance.choice([None, True, False]),
            )
            for step in range(chance.randrange(1, 12))
        ]
        damaged = {each.name for each in made if chance.random() < 0.2}
        keep = Keep(best=chance.randrange(3), last=chance.randrange(1, 4))

        found = plan(keep, chance.choice([None, Monitor("val_loss")]), made, pins={}, damaged=damaged)

        fit = [each.name for each in made if not each.is_unhealthy and each.name not in damaged]
        assert set(fit[-keep.last :]) <= set(found.keep)
        if fit:
            assert len(found.remove) >= len(made) - len(damaged) - max(keep.best, 1) - keep.last - 1


def _weights_of(each, sequence):
    """What is there when its weights have been taken."""
    return each._replace(name=f"{each.name}.2", sequence=sequence, weights_of=each.sequence, is_divisible=False)


def test_giving_back_ends():
    """A plan that is followed, and a plan that a crash has left half done, come to the same rest, and the best survives."""
    chance, monitor = random.Random(13), Monitor("val_loss")
    for _ in range(800):
        made = [
            Candidate(
                f"c{place}", step, place, step, {"val_loss": chance.choice([0.5, 0.25, 0.125])}, is_divisible=True
            )
            for place, step in enumerate(sorted(chance.randrange(20) for _ in range(chance.randrange(1, 10))))
        ]
        keep = Keep(best=chance.randrange(4), last=chance.randrange(1, 3), best_weights_only=True)
        best, last = monitor.best(made).state, made[-1].name
        first = plan(keep, monitor, made, pins={})
        both = [each for each in made if each.name in first.keep]
        both += [_weights_of(each, 100 + place) for place, each in enumerate(both) if each.name in first.strip]

        second = plan(keep, monitor, both, pins={})

        assert (set(second.remove), second.strip) == (set(first.strip), ())
        rest = [each for each in both if each.name in second.keep]
        assert plan(keep, monitor, rest, pins={}).remove == plan(keep, monitor, rest, pins={}).strip == ()
        assert monitor.best(rest).state == best
        assert [each.name for each in rest if each.is_resumable][-1] == last


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


@pytest.mark.parametrize("flag", [1, 0, None, "yes"])
def test_a_number_is_no_flag(flag):
    """Somebody who means two of the best would get one, without its optimizer."""
    with pytest.raises(InvalidArgument, match="best_weights_only is neither True nor False; how many"):
        Keep(best_weights_only=flag)


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
