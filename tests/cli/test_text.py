"""How values are spelled."""

from __future__ import annotations

import math

import pytest

from highcamp.cli import text
from highcamp.cli.arguments import find_target
from highcamp.cli.table import Column, Table
from highcamp.errors import InvalidArgument


@pytest.mark.parametrize(
    ("values", "spelled"),
    [
        ([0.3121, 0.3134, 0.0702], ["0.3121", "0.3134", "0.0702"]),
        ([0.31211, 0.31212], ["0.31211", "0.31212"]),
        ([2.302585, 0.5], ["2.303", "0.500"]),
        ([None, math.nan, math.inf, -math.inf, 1.0], ["-", "nan", "inf", "-inf", "1.000"]),
        ([0.5, 0.5], ["0.5000", "0.5000"]),
        ([1e-7, 2.0], ["1e-07", "2"]),
        ([1e12, 0.1234567], ["1e+12", "0.1235"]),
        ([0.0, 0.0], ["0.000", "0.000"]),
        ([-0.25, 0.25], ["-0.2500", "0.2500"]),
        ([], []),
    ],
)
def test_numbers_have_the_digits_they_need(values, spelled):
    """Two values that differ must not look equal."""
    assert text.numbers(values) == spelled


@pytest.mark.parametrize(
    ("size_bytes", "spelled"),
    [(0, "0 B"), (812, "812 B"), (1200, "1.2 kB"), (5000, "5.0 kB"), (137_000_000, "137 MB"), (999_600, "1.0 MB"),
     (1_490_000_000, "1.5 GB"), (5_000_000_000_000, "5.0 TB")],
)  # fmt: skip
def test_sizes_are_decimal(size_bytes, spelled):
    """MB is a million bytes."""
    assert text.size(size_bytes) == spelled


@pytest.mark.parametrize(
    ("seconds", "spelled"), [(-5, "0 s"), (59.9, "59 s"), (60, "1 min"), (3600, "1 h"), (86400, "1 d"), (1e6, "11 d")]
)
def test_ages_have_one_unit(seconds, spelled):
    """A clock that went backwards is no crash."""
    assert text.age(seconds) == spelled


@pytest.mark.parametrize(("seconds", "spelled"), [(7, "0:07"), (750, "12:30"), (11049, "3:04:09")])
def test_durations_read_like_a_clock(seconds, spelled):
    """Hours appear when there are some."""
    assert text.duration(seconds) == spelled


@pytest.mark.parametrize(
    ("name", "spelled"),
    [
        ("val_loss", "val_loss"),
        ("größe", "größe"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\u202e", "\\u202e"),
    ],
)
def test_names_cannot_harm_a_terminal(name, spelled):
    """Letters of all scripts stay; what moves the cursor or turns text around is escaped."""
    assert text.plain(name) == spelled


def test_a_narrow_table_cuts_words_then_drops_columns():
    """Name, step and the monitored value are what a table is for."""
    columns = [
        Column("NAME", ["step-00000001"], drop=0),
        Column("extra", ["0.1234"], right=True, drop=2),
        Column("loss", ["0.5000"], right=True, drop=0),
        Column("BECAUSE", ["best 1 of 1, last 1 of 2, every 10 epochs"], flexible=True),
    ]

    def shown(width):
        return [line.plain for line in Table(columns).lines(width)]

    assert shown(80)[1] == "step-00000001  0.1234  0.5000  best 1 of 1, last 1 of 2, every 10 epochs"
    assert shown(50)[1] == "step-00000001  0.1234  0.5000  best 1 of 1, last…"
    assert shown(40)[1] == "step-00000001  0.5000  best 1 of 1, las…"
    assert shown(30)[1] == "step-00000001  0.5000"
    assert shown(5)[1] == "step-00000001  0.5000"


def test_wide_letters_line_up():
    """Chinese and emoji take two columns each."""
    lines = Table([Column("N", ["数数", "ab"]), Column("X", ["1", "2"])]).lines(80)

    assert [line.plain for line in lines] == ["N     X", "数数  1", "ab    2"]


def test_an_at_sign_in_a_directory_belongs_to_it(run, tmp_path):
    """runs/user@host is a run, not a checkpoint called host."""
    (tmp_path / "runs/digits").rename(tmp_path / "runs/user@host")

    assert find_target("runs/user@host").reference is None
    assert find_target("runs/user@host@best").checkpoint().epoch == 5
    with pytest.raises(InvalidArgument, match="no reference behind its @"):
        find_target("runs/user@")
