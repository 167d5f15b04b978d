"""The trace of a state tree: as long as it says that nothing but plain values has changed, flattening would say the same."""

from __future__ import annotations

import copy
import math
from collections import Counter, OrderedDict, namedtuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from highcamp.core.array import HostArray
from highcamp.core.trace import trace
from highcamp.core.tree import flatten
from highcamp.errors import InvalidState

Point = namedtuple("Point", ["x", "y"])  # noqa: PYI024

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.complex_numbers(),
)
leaves = plain | st.builds(lambda number: np.full(2, number), st.integers(0, 9))
keys = st.text("ab$é", max_size=2) | st.integers(-2, 2) | st.booleans() | st.tuples(st.integers(0, 2))
trees = st.recursive(
    leaves,
    lambda below: st.one_of(
        st.lists(below, max_size=4),
        st.lists(below, max_size=4).map(tuple),
        st.dictionaries(keys, below, max_size=4),
        st.dictionaries(keys, below, max_size=4).map(OrderedDict),
        st.tuples(below, below).map(lambda pair: Point(*pair)),
    ),
    max_leaves=12,
)


def as_array(leaf):
    """NumPy's arrays."""
    return HostArray.from_numpy(leaf) if isinstance(leaf, np.ndarray) else None


def flat(tree):
    """Its skeleton."""
    return flatten(tree, as_array, where="state").skeleton


def traced(tree):
    """Its trace and its tensors."""
    found = []
    return trace(tree, flat(tree), found), [leaf for _, leaf in found]


def is_equal(left, right):
    """Equal as JSON is written: NaN is NaN, 1 is not 1.0 and not True."""
    return repr(left) == repr(right)


@settings(max_examples=300)
@given(trees, trees)
def test_a_trace_that_fits_another_tree_gives_what_flattening_gives(tree, other):
    """Otherwise a checkpoint would hold the state of the save before."""
    made, _ = traced(tree)
    if made is None:
        return
    leaves = []
    again = made.again(other, leaves)
    if again is None:
        return
    if all(
        isinstance(leaf, np.ndarray) for leaf in leaves
    ):  # whoever asks compares them, so that nothing else comes through
        assert is_equal(again.skeleton, flat(other))


@settings(max_examples=200)
@given(trees, plain)
def test_a_plain_value_that_moves_on_is_seen_and_nothing_else(tree, value):
    """A learning rate changes at every step, and is all that does."""
    tree = {"group": [{"lr": 0.5, "name": "a"}], "rest": tree}
    made, tensors = traced(tree)
    skeleton = made.skeleton
    before = copy.deepcopy(skeleton)
    again = made.again(tree, [])
    assert is_equal(again.skeleton, skeleton)
    tree["group"][0]["lr"] = value
    leaves = []
    moved = made.again(tree, leaves)
    if type(value) is not float:
        assert moved is None  # of another type: taken apart anew
        return
    assert is_equal(moved.skeleton, flat(tree))
    assert all(leaf is tensor for leaf, tensor in zip(leaves, tensors, strict=True))
    assert is_equal(skeleton, before)  # somebody may be writing it


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["state"].pop(1),
        lambda tree: tree["state"].update({2: {}}),
        lambda tree: tree["state"].update({True: tree["state"].pop(1)}),
        lambda tree: tree.update(state=dict(reversed(tree["state"].items()))),
        lambda tree: tree.update(betas=list(tree["betas"])),
        lambda tree: tree.update(betas=(*tree["betas"], 0.9)),
        lambda tree: tree.update(betas=Point(*tree["betas"])),
        lambda tree: tree.update(name=None),
    ],
    ids=["less", "more", "key of another type", "other order", "list for tuple", "longer", "named", "other type"],
)
def test_another_structure_is_not_taken_for_the_same(change):
    """Its tensors would be written under names of others."""
    tree = {"state": {0: {"a": np.zeros(1)}, 1: {"a": np.ones(1)}}, "betas": (0.9, 0.99), "name": "x"}
    made, _ = traced(tree)
    assert made.again(tree, []) is made
    change(tree)
    assert made.again(tree, []) is None


def test_what_can_change_in_place_is_looked_at_again():
    """A set that has grown is the same object."""
    tree = {"seen": {1}, "count": Counter(a=1)}
    made, _ = traced(tree)
    tree["seen"].add(2)
    tree["count"]["a"] += 1
    assert is_equal(made.again(tree, []).skeleton, flat(tree))


def test_what_cannot_be_saved_any_more_is_left_for_flattening_to_refuse():
    """It names the place."""
    tree = {"text": "a", "number": 1.0}
    made, _ = traced(tree)
    tree["text"] = "\ud800"
    assert made.again(tree, []) is None
    with pytest.raises(InvalidState):
        flat(tree)


def test_zero_and_minus_zero_are_two_numbers():
    """They are equal, and write differently."""
    tree = {"offset": 0.0}
    made, _ = traced(tree)
    tree["offset"] = -0.0
    assert math.copysign(1, made.again(tree, []).skeleton["offset"]) == -1


def test_a_state_that_is_one_leaf_has_no_trace():
    """There is nothing to remember."""
    assert trace(np.zeros(1), {"$tensor": "state"}, []) is None
    assert trace(Counter(a=1), {"$counter": [["a", 1]]}, []) is None
