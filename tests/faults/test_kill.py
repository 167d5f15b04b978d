"""SIGKILL at every system call that changes something, and at any time.

The child is forked from a process that has imported everything, and strace is attached before it begins, so N counts the
calls of the work alone. A normal run takes every HIGHCAMP_FAULT_STRIDE-th point; 1 takes all.
"""

from __future__ import annotations

import random
import time

import fault_scene as scene
import fault_trace as trace
import pytest


@pytest.mark.needs_strace
def test_killed_while_saving(nursery, points, place):
    """kill_at_syscall: a process may die on entry to any call of a save, a prune or a pin; nothing promised may go."""
    killed = 0
    for index, (call, number, text) in list(enumerate(points))[:: trace.STRIDE]:
        name = str(index)
        store, diary_path = trace.prepared(place, name)

        ended = nursery.run(place / name, diary_path, inject=f"{call}:signal=KILL:when={number}", log=place / "log")

        assert ended == "killed -9", f"{call} {number}"
        killed += 1
        diary = trace.whole_lines(diary_path)
        try:
            scene.look(store, diary)
            scene.start_again(store, diary)
        except Exception as problem:
            problem.add_note(f"killed at point {index}, {call} number {number}: {text}; {'; '.join(diary.lines)}")
            raise
    assert killed >= len(points) // trace.STRIDE


@pytest.mark.needs_strace
def test_killed_while_a_best_gives_back_its_resume_state(nursery, place):
    """Between the commit of its weights and its own end both are there, before that it alone, after that they alone."""
    _, diary_path = trace.prepared(place, "run")
    assert nursery.run(place / "run", diary_path, log=place / "log", strips=True) == "ended 0"
    calls = trace.calls_of(place / "log", place / "run")
    first = next(index for index, (_, _, text) in enumerate(calls) if "pending-step-00000004.2" in text)
    final = max(index for index, (_, _, text) in enumerate(calls) if "trash-step-00000004-" in text)
    assert 15 < final - first < 80
    seen = set()

    for index, (call, number, text) in list(enumerate(calls))[first : final + 1]:
        store, diary_path = trace.prepared(place, str(index))

        inject = f"{call}:signal=KILL:when={number}"
        ended = nursery.run(place / str(index), diary_path, inject=inject, log=place / "log", strips=True)

        assert ended == "killed -9", f"{call} {number}"
        diary = trace.whole_lines(diary_path)
        try:
            run = scene.look(store, diary)
            assert run.best.step == 4
            seen.add(tuple(entry.name for entry in run.checkpoints if entry.step == 4))
            scene.start_again(store, diary, keep=scene.STRIP)
        except Exception as problem:
            problem.add_note(f"killed at point {index}, {call} number {number}: {text}; {'; '.join(diary.lines)}")
            raise
    assert seen == {("step-00000004",), ("step-00000004", "step-00000004.2"), ("step-00000004.2",)}


def test_killed_at_any_time(nursery, place):
    """The same without knowing where: between calls, in the interpreter, in the middle of a write."""
    rng = random.Random(20260131)
    _, diary = trace.prepared(place, "timed")
    began = time.perf_counter()
    assert nursery.run(place / "timed", diary) == "ended 0"
    seconds = time.perf_counter() - began

    for index in range(60 // trace.STRIDE):
        store, diary_path = trace.prepared(place, str(index))

        nursery.run(place / str(index), diary_path, after_seconds=rng.uniform(0, seconds))

        diary = trace.whole_lines(diary_path)
        scene.look(store, diary)
        scene.start_again(store, diary)
