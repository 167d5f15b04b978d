"""Any sequence of saves, prunes, pins, removals, crashes and restarts against a model of a dozen lines."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

import highcamp
from highcamp import CheckpointNotFound, Every, Keep, Monitor, Refused, RunLocked, StorageError
from highcamp.core.tree import flatten
from highcamp.run import commit, live
from highcamp.run.attempt import OngoingAttempt
from highcamp.run.run import Run
from highcamp.storage.memory import MemoryStore
from highcamp.testing import FaultyStore
from highcamp.training.snapshot import Snapshot

LOSSES = st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, math.nan, math.inf, None])
KEEPS = st.builds(Keep, best=st.integers(0, 2), last=st.integers(1, 3), best_weights_only=st.booleans())
MONITOR = Monitor("val_loss")


class Entry:
    """What the model knows of a checkpoint."""

    def __init__(self, step, sequence, loss, origin=None):
        self.step, self.sequence, self.loss = step, sequence, loss
        self.origin = origin or self  # whose weights it holds, alone if it is another's

    @property
    def is_whole(self):
        """Whether it is no other's weights."""
        return self.origin is self

    @property
    def order(self):
        """What checkpoints are ordered by."""
        return (self.step, self.origin.sequence, self.sequence)

    @property
    def is_ranked(self):
        """Whether it can be the best."""
        return self.loss is not None and math.isfinite(self.loss)


class RunMachine(RuleBasedStateMachine):
    """highcamp on a store, and a dict that says what should be there."""

    pins = Bundle("pins")

    @initialize()
    def begin(self):
        """An empty run."""
        self.real = MemoryStore("machine")
        self.there: dict[str, Entry] = {}
        self.trash: list[tuple[str, Entry]] = []  # a name may have been given again since, and be there twice
        self.pinned: dict[str, str] = {}
        self.step = 0
        self.resumed_from = None
        self.attempt = None
        self.start()

    def start(self):
        """The next process."""
        if self.attempt is not None:
            self.attempt.release()
        self.attempt = OngoingAttempt(self.real, monitor=MONITOR, keep=Keep(), every=Every(epochs=1))
        self.attempt.note(tracked=["model"])
        last = self.attempt.run.last
        self.attempt.start(last)
        self.resumed_from = last.name if last else None
        self.sequence = max((entry.sequence for entry in self.there.values()), default=0)

    def teardown(self):
        """Its thread ends."""
        if getattr(self, "attempt", None) is not None:
            self.attempt.release()

    # What should be true, in the simplest words

    def best(self):
        """The lowest finite loss; the oldest of equals."""
        ranked = [name for name, entry in self.there.items() if entry.is_ranked]
        return min(ranked, key=lambda name: (self.there[name].loss, self.there[name].order), default=None)

    def last(self):
        """The greatest (step, sequence) of those that can be resumed from."""
        whole = [name for name in self.there if self.there[name].is_whole]
        return max(whole, key=lambda name: self.there[name].order, default=None)

    def protected(self):
        """Never removed."""
        return {name for name in (self.best(), self.last(), self.resumed_from) if name in self.there} | (
            set(self.pinned.values()) & set(self.there)
        )

    def kept(self, keep):
        """What a policy keeps, and of which of that it keeps the weights alone."""
        first = {}  # of each state
        for name in sorted(self.there, key=lambda name: self.there[name].order):
            first.setdefault(self.there[name].origin, name)
        counted = list(first.values())
        ranked = sorted(
            (name for name in counted if self.there[name].is_ranked),
            key=lambda name: (self.there[name].loss, self.there[name].order),
        )[: max(keep.best, 1)]
        newest = [name for name in counted if self.there[name].is_whole][-keep.last :]
        held = {*newest, *({self.resumed_from, *self.pinned.values()} & set(self.there))}
        kept, strip = held | set(ranked), set()
        for name in ranked if keep.best_weights_only else ():
            taken = [other for other in self.weights_of(name) if other in self.there]
            if name in held or not self.there[name].is_whole:
                continue
            if taken:
                kept = kept - {name} | {taken[0]}
            else:
                strip.add(name)
        return kept, strip

    def weights_of(self, name):
        """The checkpoints that hold the weights of another one alone, in their order."""
        found = [other for other, entry in self.there.items() if entry.origin is self.there[name].origin]
        return sorted((other for other in found if other != name), key=lambda other: self.there[other].order)

    def stripped(self, names):
        """Take the names and sequences that the weights have been given from the disk, and put them in the place of all."""
        now = {entry.name: entry for entry in Run(self.real).checkpoints}
        for name in sorted(names, key=lambda name: self.there[name].order):
            old = self.there[name]
            (new,) = [
                entry for entry in now.values()
                if entry.manifest.is_weights_only and entry.manifest.weights_of == old.sequence
                and entry.step == old.step and entry.sequence > self.sequence
            ]  # fmt: skip
            self.sequence = new.sequence
            if name not in now or now[name].manifest.sequence != old.sequence:
                del self.there[name]
            self.there[new.name] = Entry(old.step, new.sequence, old.loss, old)

    def of_this_step(self):
        """Every checkpoint of this step, those in the trash too."""
        entries = [*self.there.values(), *(entry for _, entry in self.trash)]
        return [entry for entry in entries if entry.step == self.step]

    # What happens

    def capture(self):
        """A state that tells the step."""
        model = flatten({"kernel": np.full(3, self.step)}, live.as_array, where="model")
        optimizer = flatten({"moments": np.full(6, self.step)}, live.as_array, where="optimizer")
        shot = Snapshot().take({"model": replace(model, weights=True), "optimizer": optimizer})
        shot.fill()
        return shot.parts

    def commit(self, store, loss):
        """Log and commit the state of this step through `store`."""
        metrics = {} if loss is None else {"val_loss": loss}
        self.attempt._store = store
        try:
            if metrics:
                self.attempt.log(self.step, self.step, metrics)
            self.sequence += 1
            manifest = self.attempt.manifest(step=self.step, epoch=self.step, batch=0, metrics=metrics, versions={})
            return self.attempt.commit(manifest, self.capture())[0]
        finally:
            self.attempt._store = self.real

    @rule(loss=LOSSES)
    def save(self, loss):
        """A step further."""
        self.step += 1
        entry = self.commit(self.real, loss)
        self.there[entry.name] = Entry(self.step, self.sequence, loss)

    # A row counts for the checkpoints of its step that have no value of their own, and cannot tell two of those apart.
    @precondition(lambda self: all(entry.loss is not None for entry in self.of_this_step()))
    @rule(loss=LOSSES.filter(lambda loss: loss is not None))
    def save_the_step_again(self, loss):
        """The same step, another state."""
        entry = self.commit(self.real, loss)
        self.there[entry.name] = Entry(self.step, self.sequence, loss)

    @rule(keep=KEEPS)
    def prune_by_training(self, keep):
        """For good."""
        kept, strip = self.kept(keep)
        self.attempt._keep = keep
        removed = self.attempt.prune()
        assert set(removed) == set(self.there) - kept | strip
        self.there = {name: entry for name, entry in self.there.items() if name in kept}
        self.stripped(strip)

    @rule(keep=KEEPS, dry_run=st.booleans())
    def prune_by_hand(self, keep, dry_run):
        """To the trash."""
        kept, strip = self.kept(keep)
        if strip and not dry_run:  # it would write beside the attempt that is under way
            with contextlib.suppress(RunLocked):
                highcamp.open(self.real).prune(keep)
                raise AssertionError("two have written")
            return
        plan = highcamp.open(self.real).prune(keep, dry_run=dry_run)
        assert set(plan.strip) == strip
        assert set(plan.keep) == kept
        assert set(plan.remove) == set(self.there) - kept
        if not dry_run:
            self.trash += [(name, entry) for name, entry in self.there.items() if name not in kept]
            self.there = {name: entry for name, entry in self.there.items() if name in kept}

    @precondition(lambda self: self.there)
    @rule(target=pins, data=st.data(), pin=st.sampled_from(["paper", "talk", "demo"]))
    def pin(self, data, pin):
        """A name that protects."""
        name = data.draw(st.sampled_from(sorted(self.there)))
        if self.pinned.get(pin, name) != name:
            with contextlib.suppress(Refused):
                highcamp.open(self.real).pin(name, pin)
                raise AssertionError("a pin was moved without a word")
            return multiple()
        assert highcamp.open(self.real).pin(name, pin).name == name
        self.pinned[pin] = name
        return pin

    @rule(pin=consumes(pins))
    def unpin(self, pin):
        """And no longer."""
        if pin in self.pinned:
            assert highcamp.open(self.real).unpin(pin) == self.pinned.pop(pin)

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def remove(self, data):
        """By hand, one of them: refused if protected."""
        name = data.draw(st.sampled_from(sorted(self.there)))
        try:
            highcamp.open(self.real).remove(name)
        except Refused:
            assert name in self.protected()
        else:
            assert name not in self.protected()
            self.trash.append((name, self.there.pop(name)))

    @precondition(lambda self: self.trash)
    @rule(data=st.data())
    def undelete(self, data):
        """Back from the trash; under another name if its own has been given away."""
        run = highcamp.open(self.real)
        trash, name = data.draw(st.sampled_from(sorted(run.trash.items(), key=lambda pair: pair[1])))
        found = [entry for had, entry in self.trash if had == name]
        if len(found) > 1:  # which of them lies under which name in the trash, only its manifest knows
            manifest = commit.read_manifest(self.real, trash)
            found = [entry for entry in found if entry.sequence == manifest.sequence]
        self.trash.remove((name, found[0]))
        taken = name in self.there

        now = run.undelete(trash)

        assert (now != name) == taken
        self.there[now] = found[0]

    @rule()
    def empty_trash(self):
        """Nothing comes back after this."""
        run = highcamp.open(self.real)
        run.empty_trash()
        self.trash = []
        with contextlib.suppress(CheckpointNotFound):
            run.undelete("step-00000001")
            raise AssertionError("the trash was not empty")

    @rule()
    def reopen(self):
        """The script ends and is started again."""
        self.attempt.end("closed", self.step, self.step)
        self.start()

    @rule(loss=LOSSES, keep=KEEPS, at=st.integers(1, 14), torn=st.booleans())
    def crash(self, loss, keep, at, torn):
        """The process dies at some operation of a save and a prune, and the next one begins."""
        self.step += 1
        before, kept_before, sequence = dict(self.there), self.kept(keep)[0], self.sequence + 1
        store = FaultyStore(self.real, fail_at=at, torn=torn, forever=True)
        name = None
        with contextlib.suppress(StorageError):
            name = self.commit(store, loss).name
            self.attempt._keep, self.attempt._store, self.attempt.run = keep, store, Run(store)
            self.attempt.prune()
        self.attempt._store = self.real

        self.start()
        now = {entry.name: entry for entry in self.attempt.run.checkpoints}
        same = {known for known in set(before) & set(now) if before[known].sequence == now[known].sequence}
        new = sorted(set(now) - same, key=lambda added: now[added].sequence)
        assert len([added for added in new if not now[added].manifest.is_weights_only]) <= 1
        assert name is None or name in now, "acknowledged, and gone"
        gone = set(before) - same
        for added in new:
            of = [each for each in before.values() if each.order[:2] == now[added].manifest.order[:2]]
            if now[added].manifest.is_weights_only:
                self.there[added] = Entry(of[0].step, now[added].sequence, of[0].loss, of[0].origin)
            else:
                self.there[added] = Entry(self.step, sequence, loss)
        survived = {self.there[known].origin for known in [*same, *new]}
        assert {before[known].origin for known in self.protected() & gone - {*new}} <= survived
        assert not gone or name is not None, "removed before the new one was there"
        assert name is not None or same >= kept_before
        self.there = {known: entry for known, entry in self.there.items() if known in same or known in new}
        self.sequence = max((entry.sequence for entry in self.there.values()), default=0)

    # What must hold

    @invariant()
    def run_and_model_agree(self):
        """Best, last, the list and the pins, asked of a run that was opened just now."""
        if not hasattr(self, "there"):
            return
        run = Run(self.real)
        assert [entry.name for entry in run.checkpoints] == sorted(self.there, key=lambda name: self.there[name].order)
        assert (run.best.name if run.best else None) == self.best()
        assert (run.last.name if run.last else None) == self.last()
        assert run.pins == self.pinned
        assert sorted(run.trash.values()) == sorted(name for name, _ in self.trash)
        for entry in run.checkpoints:
            assert entry.verify().ok
            assert entry.manifest.is_weights_only == (not self.there[entry.name].is_whole)
            assert entry.objects == (("model", "optimizer") if self.there[entry.name].is_whole else ("model",))
            assert entry.state("model")["kernel"][0] == self.there[entry.name].step


TestRunMachine = RunMachine.TestCase
TestRunMachine.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, derandomize=True, database=None,
    phases=[Phase.generate],  # names in the trash are random, so a smaller case may behave in another way
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
