"""Killed by SIGKILL again and again, a run ends bit for bit as one that was never interrupted."""

from __future__ import annotations

import json

import pytest


def _compare(start, kind, directory, seeds):
    found = start("exactness.py", kind, directory, *seeds)
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


def _check(results, seeds):
    assert len(results) == len(seeds)
    for seed, result in zip(seeds, results, strict=True):
        assert result["different"] == {}, f"seed {seed}, killed at {result['deaths']}"
        assert result["kills"] >= 3
        assert result["kills"] == len(result["deaths"])
    places = {death.split()[0] for result in results for death in result["deaths"]}
    assert places >= {"batch", "before", "within", "after"}  # between and in the middle of writes, and while training


def test_killed_and_resumed_equals_uninterrupted(start, tmp_path):
    """Weights, momentum, random numbers, history, best and last: after a crash the run would be another one."""
    seeds = range(1, 9)

    _check(_compare(start, "numpy", tmp_path, seeds), seeds)


@pytest.mark.timeout(240)
def test_shuffle_and_dropout_exact(start, tmp_path):
    """Shuffled batches, dropout, AdamW, a schedule, saved in mid-epoch: resumed without random states, a run drifts off."""
    seeds = range(1, 6)

    _check(_compare(start, "torch", tmp_path, seeds), seeds)
