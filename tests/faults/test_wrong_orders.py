"""Mutants: with a wrong order, the loop over N must find what it costs. A loop that finds nothing proves nothing."""

from __future__ import annotations

import contextlib
import itertools

import fault_scene as scene
import pytest

from highcamp.errors import StorageError
from highcamp.run import attempt as attempt_room
from highcamp.run import commit

MANIFEST = "manifest.json"


class Reordered:
    """A store whose files are created in another order, or without a word when that fails."""

    def __init__(self, store, create):
        self._store, self._create = store, create

    def __getattr__(self, name):
        return getattr(self._store, name)

    def create(self, path, chunks):
        """In the other way."""
        self._create(self._store, path, chunks)


def manifest_before_data(monkeypatch):
    """The manifest is created when the draft is, and the data after it."""
    write = commit.commit

    def mutant(store, manifest, parts, **options):
        class Recorder:
            def __init__(self):
                self.files = []

            def __getattr__(self, name):
                return getattr(store, name)

            def create(self, path, chunks):
                self.files.append((path, [bytes(chunk) for chunk in chunks]))

            def publish(self, draft, target):
                for path, chunks in sorted(self.files, key=lambda file: not file[0].endswith(MANIFEST)):
                    store.create(path, chunks)
                store.publish(draft, target)

        return write(Recorder(), manifest, parts, **options)

    monkeypatch.setattr(commit, "commit", mutant)


def published_before_written(monkeypatch):
    """The directory gets its final name first, and its files there: what most libraries do."""
    write = commit.commit

    def mutant(store, manifest, parts, **options):
        class Early:
            def __getattr__(self, name):
                return getattr(store, name)

            def draft(self, target):
                draft = store.draft(target)
                store.publish(draft, target)
                return target

            def publish(self, draft, target):
                assert draft == target

        return write(Early(), manifest, parts, **options)

    monkeypatch.setattr(commit, "commit", mutant)


def data_removed_before_the_manifest(monkeypatch):
    """A removal that takes the data first leaves, when it stops, a manifest that promises what is gone."""

    def mutant(store, name, *, doomed=False):
        path = commit.checkpoint_path(name)
        if store.size(f"{path}/{MANIFEST}") is None:
            return None
        if doomed:
            for file in sorted(store.list(path), key=lambda file: file == MANIFEST):
                store.remove(f"{path}/{file}")
            store.remove(path)
            return None
        return withdraw(store, name)

    withdraw = commit.withdraw
    monkeypatch.setattr(commit, "withdraw", mutant)


def removed_before_added(monkeypatch):
    """The old ones go before the new one is there: a save that fails leaves less than there was."""
    add = attempt_room.OngoingAttempt.commit

    def mutant(self, manifest, parts, **options):
        there = self.run.checkpoints
        for entry in there if len(there) > 2 else []:  # the preparation stays as it is
            if entry.name not in {*self.run.pins.values(), self.run.resumed_from}:
                self._store.remove(commit.checkpoint_path(commit.withdraw(self._store, entry.name)))
        return add(self, manifest, parts, **options)

    monkeypatch.setattr(attempt_room.OngoingAttempt, "commit", mutant)


def failure_without_a_word(monkeypatch):
    """A save that could not write its data says that it has worked."""
    write = commit.commit

    def create(store, path, chunks):
        data = [bytes(chunk) for chunk in chunks]
        with contextlib.suppress(StorageError):
            store.create(path, data)

    def mutant(store, manifest, parts, **options):
        return write(Reordered(store, create), manifest, parts, **options)

    monkeypatch.setattr(commit, "commit", mutant)


def leftovers_not_swept(monkeypatch):
    """What crashes leave behind fills the disk."""
    monkeypatch.setattr(commit, "sweep", lambda _: [])


def acknowledged_before_published(monkeypatch):
    """A save is called durable while it still lies under its pending name."""
    write = commit.commit

    def mutant(store, manifest, parts, **options):
        class Late:
            def __getattr__(self, name):
                return getattr(store, name)

            def publish(self, draft, target):
                with contextlib.suppress(StorageError):
                    store.publish(draft, target)

        return write(Late(), manifest, parts, **options)

    monkeypatch.setattr(commit, "commit", mutant)


def best_is_remembered(monkeypatch):
    """The best is known to a variable that a restart forgets, so retention lets it go."""
    plan = attempt_room.Run.plan

    def mutant(self, keep=None, *, monitor=None, damaged=()):
        found = plan(self, keep, monitor=monitor, damaged=damaged)
        safe = {*self.pins.values(), self.resumed_from, list(found.keep)[-1]}
        kept = {name: reasons for name, reasons in found.keep.items() if name in safe}
        return type(found)(kept, (*found.remove, *(name for name in found.keep if name not in kept)))

    monkeypatch.setattr(attempt_room.Run, "plan", mutant)


@pytest.mark.parametrize(
    ("mutant", "kind", "finding"),
    [
        # In a local store a draft is hidden whatever its order, and listed only when it is complete.
        (manifest_before_data, "memory", "is listed and missing"),
        (published_before_written, "local", "half of a save is seen"),
        (data_removed_before_the_manifest, "memory", "is listed and missing"),
        (data_removed_before_the_manifest, "local", "is listed and missing"),
        (removed_before_added, "memory", "the last, step-00000003, is gone"),
        (removed_before_added, "local", "the last, step-00000003, is gone"),
        (failure_without_a_word, "local", "is listed and missing"),
        (leftovers_not_swept, "local", "not swept"),
        (acknowledged_before_published, "local", "is gone"),
        (best_is_remembered, "local", "the best, step-00000004, is gone"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_wrong_order_is_found(place, monkeypatch, mutant, kind, finding):
    """The loop of test_fail_at_n.py, on code with one order changed."""
    mutant(monkeypatch)

    with pytest.raises(AssertionError, match=finding):
        all_ways(lambda n: scene.STORES[kind](place, n))


def all_ways(make_store):
    """The loop, torn and clean, once and for ever."""
    numbers = itertools.count(1)  # each store is a new one
    for torn, forever in itertools.product((False, True), (True, False)):
        scene.fail_at_each(lambda _: make_store(next(numbers)), torn=torn, forever=forever)
