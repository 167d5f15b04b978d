"""Paths and tensor names: printable, short enough, each one once."""

from __future__ import annotations

import time

import pytest

from highcamp.core.paths import UniqueNames, join, key_text
from highcamp.core.tensorfile import MAX_NAME_BYTES, plan


def taken(*paths: str) -> list[str]:
    """The names of these paths, in this order."""
    unique = UniqueNames()
    return [unique.take(path) for path in paths]


def test_a_plain_path_is_its_own_name():
    """Nobody would recognise the tensors of a model in its file."""
    assert taken("a/0/weight", "é", "a b", "50%", "../../x", "~2") == ["a/0/weight", "é", "a b", "50%", "../../x", "~2"]


def test_equal_paths_are_numbered():
    """One tensor would silently take the place of another."""
    assert taken("a/b", "a/b", "a/b") == ["a/b", "a/b~2", "a/b~3"]


def test_a_number_that_is_taken_already_is_passed_over():
    """Numbering itself would make two names equal."""
    assert taken("a~2", "a", "a", "a~2", "a~3", "a") == ["a~2", "a", "a~3", "a~2~2", "a~3~2", "a~4"]
    assert len(set(taken(*["a", "a~2", "a~2~2"] * 50))) == 150


@pytest.mark.parametrize(
    ("path", "name"),
    [("a\nb", "a%0Ab"), ("\x00", "%00"), ("\u202ex", "%E2%80%AEx"), ("\ud800", "%ED%A0%80"), ("a\xa0b", "a%C2%A0b")],
    ids=ascii,
)
def test_what_cannot_be_printed_is_escaped(path, name):
    """A name could hide the rest of a line, or end the C strings of other readers."""
    assert taken(path) == [name]


def test_an_escaped_name_does_not_collide_with_one_that_looks_like_it():
    """One tensor would silently take the place of another."""
    assert taken("a%0A", "a\n") == ["a%0A", "a%0A~2"]


def test_the_reserved_name_of_the_format_is_not_used():
    """A parameter of that name would be read as metadata and lost."""
    assert taken("__metadata__", "__metadata__") == ["__metadata__~2", "__metadata__~3"]


def test_long_names_are_cut_and_stay_apart():
    """Deep models would not be saved, or two of their tensors be one."""
    start = "x" * 600
    paths = [start + "a", start + "b", start + "a", "é" * 300, "😀" * 200, "x" * 500, "x" * 501, "é" * 250, "é" * 251]

    names = taken(*paths)

    assert len(set(names)) == len(paths)
    assert all(len(name.encode()) <= MAX_NAME_BYTES for name in names)
    assert names[0].startswith("x" * 400)
    assert names[2] == names[0] + "~2"
    assert names[5] == paths[5]
    assert names[6] != paths[6]
    assert names[7] == paths[7]
    plan(dict.fromkeys(names, ("U8", ())), {})


def test_a_shortened_name_is_the_same_in_every_process():
    """Two saves of one state would have different names, and frozen tensors be written again."""
    assert taken("x" * 600) == ["x" * 467 + "~" + "c5a9e7847a66a4ee50d6ce9d7b01c4c5"]


def test_100_000_equal_paths_take_a_moment():
    """Numbering that starts over each time grows with the square."""
    began = time.process_time()

    assert len(set(taken(*["a"] * 100_000))) == 100_000

    assert time.process_time() - began < 3


def test_keys_stand_in_paths_as_people_write_them():
    """Errors and files would not say which key they mean."""
    assert [key_text(key) for key in ("a", 0, -1, True, None, 0.5)] == ["a", "0", "-1", "True", "None", "0.5"]
    assert key_text((1, "a", (None,))) == '{"$tuple":[1,"a",{"$tuple":[null]}]}'
    assert join("", "a") == "a"
    assert join("a", 0) == "a/0"
    assert join("a/0", "b/c") == "a/0/b/c"


def test_a_set_as_a_key_has_one_text():
    """Python prints sets in an order that differs from process to process."""
    keys = [f"key{i}" for i in range(20)]

    assert key_text(frozenset(keys)) == key_text(frozenset(reversed(keys))) != str(frozenset(keys))
