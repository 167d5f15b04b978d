"""Strict JSON: one meaning for every text, one error for everything else."""

from __future__ import annotations

import json
import math
import sys
import time
import tracemalloc

import pytest

from highcamp.core import strict
from highcamp.errors import Damaged, InvalidState

MB = 1 << 20


def read(data: bytes, **changes):
    """Read as a state file."""
    return strict.read(data, **{"where": "state.json", "limit": 64 * MB, **changes})


HOSTILE = {
    "nothing": b"",
    "spaces": b"  ",
    "not a number": b"NaN",
    "infinity": b'{"a":Infinity}',
    "minus infinity": b"[-Infinity]",
    "a float beyond range": b"1e999",
    "a negative float beyond range": b"[-1e999]",
    "duplicate keys": b'{"a":1,"b":2,"a":1}',
    "duplicate keys below": b'[{"x":{"a":1,"a":1}}]',
    "duplicate keys, one escaped": b'{"a":1,"\\u0061":2}',
    "half a surrogate pair": b'"\\ud800"',
    "the other half": b'["\\uDC00"]',
    "half a pair in a key": b'{"\\udfff":1}',
    "a pair in the wrong order": b'"\\ude00\\ud83d"',
    "a raw surrogate": b'"\xed\xa0\x80"',
    "not UTF-8": b'"\xff"',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "UTF-32": '{"a":1}'.encode("utf-32-le"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "trailing bytes": b"{} {}",
    "a trailing NUL": b"{}\x00",
    "a trailing comma": b"[1,]",
    "a comment": b"[1] // one",
    "single quotes": b"{'a':1}",
    "a leading zero": b"01",
    "a plus": b"+1",
    "hexadecimal": b"0x10",
    "a raw newline in a string": b'"a\nb"',
    "a raw NUL in a string": b'"a\x00b"',
    "a bad escape": b'"\\x41"',
    "an unterminated string": b'{"a":"b',
    "an unterminated string of escapes": b'"\\"\\"\\',
    "4,301 digits": b"1" * 4301,
    "4,301 digits, negative": b"[-" + b"1" * 4301 + b"]",
    "100,000 levels": b"[" * 100_000 + b"]" * 100_000,
    "100,000 objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "100,000 levels, never closed": b"[" * 100_000,
    "levels behind a string of brackets": b'["]]]]",' + b"[" * 500 + b"]" * 501,
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94.",
    "zip": b"PK\x03\x04" + b"\x00" * 26,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_strict_json(name):
    """Two programs would read two different states from one file, or a hostile one would end the process."""
    with pytest.raises(Damaged, match=r"^state\.json cannot be read: ") as caught:
        read(HOSTILE[name])

    assert caught.value.path == "state.json"
    assert len(str(caught.value)) < 300


def test_the_duplicate_key_is_named():
    """Nobody could find it in a file of megabytes."""
    with pytest.raises(Damaged, match="has the key 'b' twice in one object"):
        read(b'{"a":1,"b":2,"b":3}')


PLAIN = [
    (b"null", None),
    (b" [true, false]\n", [True, False]),
    (b'"\\ud83d\\ude00 \\u00e9 \\\\ud800"', "😀 é \\ud800"),
    ('"😀"'.encode(), "😀"),
    (b'{"b":1,"a":{"b":1}}', {"b": 1, "a": {"b": 1}}),
    (b"1e308", 1e308),
    (b"1e-999", 0.0),
    (b"[" * 400 + b"]" * 400, None),
    (b'["' + b"[" * 1000 + b'"]', ["[" * 1000]),
    (b'["\\"' + b"[" * 1000 + b'\\\\"]', ['"' + "[" * 1000 + "\\"]),
    (b"9" * 4300, int("9" * 4300)),
    (b"-0", 0),
]


@pytest.mark.parametrize("case", range(len(PLAIN)))
def test_plain_json_is_read(case):
    """A file in order would be called damaged."""
    data, expected = PLAIN[case]

    found = read(data)

    if expected is not None:
        assert found == expected


def test_objects_keep_their_order():
    """Optimizers match parameters by position: another order restores another state."""
    assert list(read(b'{"z":1,"a":2,"m":3}')) == ["z", "a", "m"]


def test_negative_zero_and_the_smallest_numbers_come_back():
    """A resumed run would differ in its last bit."""
    for value in (-0.0, 5e-324, 0.1, 1.7976931348623157e308, -1e-7, 123456789.0, 1e22):
        found = read(strict.write(value))
        assert isinstance(found, float)
        assert found.hex() == value.hex()


def test_a_text_above_the_limit_is_not_looked_at():
    """A file of any size would be taken into memory."""
    assert read(b"[1,2]", limit=5) == [1, 2]
    with pytest.raises(Damaged, match="it is 5 bytes, at most 4 are read"):
        read(b"[1,2]", limit=4)


def test_depth_is_counted_outside_strings_only():
    """Brackets in a text would make a shallow file unreadable, or a deep one readable."""
    assert read(b'[["[[[[",{"a":"}}"}]]', max_depth=3)
    with pytest.raises(Damaged, match="nested 4 deep, at most 3"):
        read(b'[["[[[[",{"a":[]}]]', max_depth=3)


def test_the_deepest_allowed_text_is_read_and_one_more_is_not():
    """An off-by-one makes a state that was saved unreadable."""
    deep = b"[" * strict.MAX_DEPTH + b"]" * strict.MAX_DEPTH
    assert isinstance(read(deep), list)
    assert strict.write(read(deep)) == deep

    with pytest.raises(Damaged, match=f"nested {strict.MAX_DEPTH + 1} deep"):
        read(b"[" + deep + b"]")


def _deeper(count):
    return read(b"[[[[[[[[1]]]]]]]]") if count == 0 else _deeper(count - 1)


def test_a_caller_near_the_stack_limit_gets_our_error():
    """RecursionError would pass every `except HighcampError`."""
    outcomes: set[str] = set()
    for count in range(700, 1000):
        try:
            _deeper(count)
            outcomes.add("read")
        except Damaged:
            outcomes.add("damaged")
        except RecursionError:
            outcomes.add("no room for the call itself")
            break

    assert outcomes >= {"read", "damaged"}


def test_digits_are_limited_by_us_and_not_by_a_setting_of_the_interpreter():
    """Where somebody has switched that limit off, one long number would take minutes."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        with pytest.raises(Damaged, match="an integer of 4301 digits, at most 4300"):
            read(b"9" * 4301)
    finally:
        sys.set_int_max_str_digits(before)


def test_too_many_strings_are_not_read(monkeypatch):
    """Fifty bytes of memory for each would take the machine down."""
    monkeypatch.setattr(strict, "MAX_QUOTES", 4)

    assert read(b'["",""]') == ["", ""]
    with pytest.raises(Damaged, match="6 quotation marks, at most 4"):
        read(b'["","",""]')


MONSTERS = {
    "brackets": lambda size: b"[" * size,
    "brackets in balance": lambda size: b"[" * (size // 2) + b"]" * (size // 2),
    "empty lists": lambda size: b"[" + b"[]," * (size // 3),
    "small objects": lambda size: b"[" + b'{"a":0},' * (size // 8),
    "escaped quotes": lambda size: b'"' + b'\\"' * (size // 2),
    "quotes": lambda size: b'"' * size,
    "backslashes": lambda size: b"[" * 401 + b'"' + b"\\" * size,
    "digits": lambda size: b"9" * size,
    "duplicate keys": lambda size: b"{" + b'"a":1,' * (size // 6),
    "spaces": lambda size: b" " * size,
    "surrogates": lambda size: b'"' + b"\\ud800" * (size // 6) + b'"',
}


@pytest.mark.parametrize("name", MONSTERS)
def test_a_monster_is_refused_in_a_second_and_little_memory(name):
    """One small file would take the machine down."""
    data = MONSTERS[name](16 * MB)

    began = time.process_time()
    with pytest.raises(Damaged):
        read(data)
    took = time.process_time() - began
    tracemalloc.start()  # in a second go, for tracing takes most of the time
    with pytest.raises(Damaged):
        read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert took < 2  # 0.6 s at most on an idle machine
    assert peak < 300 * MB


def test_written_json_is_compact_and_in_order():
    """Equal states would have different bytes, and digests that differ."""
    assert strict.write({"b": [1, 2.0, None, True, "é"], "a": {}}) == '{"b":[1,2.0,null,true,"é"],"a":{}}'.encode()


@pytest.mark.parametrize("value", [1.0, 1e16, 1e-7, 2.0**60, -0.0])
def test_a_float_is_written_as_a_float(value):
    """An integer would come back, and `1` is not `1.0` where types matter."""
    assert isinstance(json.loads(strict.write(value)), float)


@pytest.mark.parametrize(
    "value",
    [math.nan, [math.inf], {"a": -math.inf}, b"bytes", {1, 2}, object, "\ud800", {"\udfff": 1}, {(1, 2): 3}],
    ids=repr,
)
def test_what_cannot_be_read_is_not_written(value):
    """A checkpoint would be committed that nobody can load."""
    with pytest.raises(InvalidState, match="cannot be written as JSON"):
        strict.write(value)


def test_a_value_that_contains_itself_is_not_written():
    """The writer would end in RecursionError, or never."""
    value: list[object] = []
    value.append(value)

    with pytest.raises(InvalidState, match="cannot be written"):
        strict.write(value)


def test_a_value_too_deep_to_be_read_is_not_written():
    """A checkpoint would be committed that nobody can load."""
    value: object = 1
    for _ in range(strict.MAX_DEPTH + 1):
        value = [value]

    with pytest.raises(InvalidState, match="nested 401 deep"):
        strict.write(value)


def test_too_many_values_to_be_read_are_not_written(monkeypatch):
    """A checkpoint would be committed that nobody can load."""
    monkeypatch.setattr(strict, "MAX_CONTAINERS", 3)

    assert strict.write([[], []]) == b"[[],[]]"
    with pytest.raises(InvalidState, match="4 lists and objects, at most 3"):
        strict.write([[], [], []])
