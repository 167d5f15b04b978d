"""Run: one training run, its checkpoints and its history, as they are on disk now."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from highcamp.core import strict
from highcamp.core.names import check_name, is_file_name
from highcamp.errors import CheckpointNotFound, Damaged, Refused, RunNotFound
from highcamp.policy import retention
from highcamp.run import commit, verify
from highcamp.run.candidates import candidate, candidate_of, completed
from highcamp.run.history import History, HistoryReader, attempt_numbers, format_time, parse_time
from highcamp.run.references import first_whole, resolve
from highcamp.run.settings import Settings, read_settings
from highcamp.storage.store import open_store

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from highcamp.core.manifest import Manifest
    from highcamp.policy.monitor import Monitor
    from highcamp.policy.retention import Keep, Plan
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.run.verify import Verification
    from highcamp.storage.store import Store

PINS = "pins"
MAX_PIN_BYTES = 1 << 16  # a name and a time


def open_run(path: str | os.PathLike[str] | Store) -> Run:
    """Open the run at `path` (a directory or a store URL) to look at it; takes no lock and writes nothing.

    Raises RunNotFound.
    """
    store = open_store(path)
    if os.path.isfile(store.url):  # noqa: PTH113  (a URL is none)
        raise RunNotFound(f"{store.url} is a file, not a run", path=store.url, hint="name the directory of the run")
    if store.size("run.json") is None and not commit.checkpoint_names(store) and not attempt_numbers(store):
        raise RunNotFound(
            f"there is no run at {store.url}",
            path=store.url,
            hint="a run is a directory that a Checkpointer has written to",
        )
    return Run(store)


class Run:
    """One training run: its checkpoints and its history, across all restarts.

    Every property looks at the disk again, so best and last are always facts; only manifests, which never change, are
    remembered. Reading needs no framework and writes nothing.
    """

    def __init__(self, store: Store) -> None:
        """A run in `store`; use `highcamp.open`."""
        self.store = store
        self._manifests: dict[str, tuple[bytes, Manifest]] = {}
        self._history = HistoryReader(store)

    def __repr__(self) -> str:
        """Where it is."""
        return f"Run({self.path!r})"

    @property
    def path(self) -> str:
        """Its directory, or its URL."""
        return self.store.url

    @property
    def settings(self) -> Settings:
        """What `run.json` says, or what can be told without it."""
        settings = read_settings(self.store)
        if settings is not None:
            return settings
        newest = max((manifest for _, manifest in self._readable()[0]), key=lambda found: found.order, default=None)
        return Settings(run_id=newest.run_id if newest else "", created_at=newest.created_at if newest else "")

    @property
    def run_id(self) -> str:
        """Tells this run from every other one."""
        return self.settings.run_id

    @property
    def created_at(self) -> datetime:
        """When the run began, UTC."""
        return parse_time(self.settings.created_at)

    @property
    def monitor(self) -> Monitor | None:
        """The metric watched, as given to the last Checkpointer."""
        return self.settings.monitor_value()

    @property
    def keep(self) -> Keep:
        """The retention, as given to the last Checkpointer."""
        return self.settings.keep_value()

    @property
    def every(self) -> str:
        """The cadence in words, as given to the last Checkpointer."""
        return self.settings.every

    @property
    def epochs_planned(self) -> int | None:
        """How many epochs the last `epochs(n)` asked for."""
        return self.settings.epochs_planned

    @property
    def is_complete(self) -> bool:
        """Whether all planned epochs are done and committed."""
        planned, last = self.epochs_planned, self.last
        return planned is not None and last is not None and last.epoch >= planned

    @property
    def history(self) -> History:
        """Every row of metrics logged, across attempts."""
        return self._history.read()

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """All readable checkpoints in (step, sequence) order, metrics completed by the history."""
        from highcamp.run.checkpoint import Checkpoint

        store = self.store
        return [Checkpoint(name, manifest, {**metrics}, store=store) for name, manifest, metrics in self._committed()]

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        """What lies among the checkpoints but cannot be read: (name, why). It is never touched."""
        return self._readable()[1]

    @property
    def best(self) -> Checkpoint | None:
        """The best-ranked whole checkpoint; None if none has a finite value of the monitored metric."""
        monitor = self.monitor
        if monitor is None:
            return None
        found = {facts[0]: facts for facts in self._committed()}
        ranking = monitor.ranking([candidate(*facts) for facts in found.values()])
        return first_whole(self._checkpoint(*found[each.name]) for each in ranking)

    @property
    def last(self) -> Checkpoint | None:
        """The newest checkpoint by (step, sequence) whose files are there in their full size, weights alone left aside.

        Training resumes from it, or from an older one where that is healthy and this is not; None where there is nothing to
        resume from.
        """
        resumable = (facts for facts in reversed(self._committed()) if not facts[1].is_weights_only)
        return first_whole(self._checkpoint(*facts) for facts in resumable)

    def rank(self, monitor: Monitor | None = None, checkpoints: list[Checkpoint] | None = None) -> list[Checkpoint]:
        """The checkpoints that have a finite value of the monitored metric, best first.

        monitor: another one than the run's. checkpoints: rank these instead of all.
        """
        monitor = monitor or self.monitor
        if monitor is None:
            return []
        by_name = {entry.name: entry for entry in (self.checkpoints if checkpoints is None else checkpoints)}
        return [by_name[each.name] for each in monitor.ranking(map(candidate_of, by_name.values()))]

    def checkpoint(self, reference: str) -> Checkpoint:
        """The checkpoint that `reference` means: best, best~1, last, last~2, step:450, epoch:45, pin:paper, or a name.

        Raises CheckpointNotFound, which lists what there is.
        """
        checkpoints = self.checkpoints
        monitor = self.monitor
        ranked = self.rank(monitor, checkpoints)
        return resolve(reference, checkpoints, ranked, self.pins, self.path, monitor.metric if monitor else None)

    @property
    def size_bytes(self) -> int:
        """The bytes of all readable checkpoints."""
        return sum(entry.size_bytes for entry in self.checkpoints)

    @property
    def resumed_from(self) -> str | None:
        """The checkpoint that the newest attempt went on from."""
        attempts = self.history.attempts
        return attempts[-1].resumed_from if attempts else None

    # Keeping and removing

    def plan(self, keep: Keep | None = None, *, monitor: Monitor | None = None, damaged: Collection[str] = ()) -> Plan:
        """What `keep` (the run's own by default) would keep, with reasons, and what it would remove; changes nothing.

        damaged: names known to be damaged; they fill no quota and are not removed.
        """
        checkpoints = self.checkpoints
        short = {entry.name for entry in checkpoints if not verify.is_full_size(entry)}
        return retention.plan(
            keep or self.keep,
            monitor or self.monitor,
            map(candidate_of, checkpoints),
            pins=self.pins,
            resumed_from=self.resumed_from,
            damaged=short | set(damaged),
        )

    def doomed(
        self, keep: Keep | None = None, *, monitor: Monitor | None = None, damaged: Collection[str] = ()
    ) -> Plan:
        """A plan that removes and strips what `plan` would, made with few looks at files: for pruning after each save."""
        checkpoints = {entry.name: entry for entry in self.checkpoints}
        return retention.doomed(
            keep or self.keep,
            monitor or self.monitor,
            map(candidate_of, checkpoints.values()),
            pins=self.pins,
            resumed_from=self.resumed_from,
            damaged=damaged,
            is_whole=lambda name: verify.is_full_size(checkpoints[name]),
        )

    def prune(self, keep: Keep | None = None, *, dry_run: bool = False) -> Plan:
        """Move to the trash what `keep` (the run's own by default) does not keep, and return the plan that was followed.

        The best, the last, the one resumed from, pinned ones and the only whole one always stay. `undelete` brings back.
        Where weights are taken from a checkpoint before it goes, a new one is written: raises RunLocked if another process
        writes to the run.
        """
        plan = self.plan(keep)
        if dry_run or not (plan.remove or plan.strip):
            return plan
        self._require_settings()
        if not plan.strip:
            return self._follow(plan)
        from highcamp.run import weights

        with weights.holding(self.store):
            return self._follow(self.plan(keep))

    def _follow(self, plan: Plan) -> Plan:
        from highcamp.run import weights

        self.check_survivors([*plan.remove, *plan.strip])
        checkpoints = self.checkpoints
        sequence = max((entry.sequence for entry in checkpoints), default=0)
        for entry in [entry for entry in checkpoints if entry.name in plan.strip]:
            sequence += 1
            weights.take(entry, sequence)
        for name in [*plan.remove, *plan.strip]:
            self.withdraw_unpinned(name)
        return plan

    def check_survivors(self, doomed: Collection[str], *, damaged: Collection[str] = ()) -> None:
        """Whether something whole would be left without `doomed`. damaged: names known to be damaged. Raises Damaged.

        What would be the only one is read and compared with its digests, the others by their sizes.
        """
        left = [entry for entry in self.checkpoints if entry.name not in doomed and entry.name not in damaged]
        if not any(verify.is_full_size(entry) if len(left) > 1 else entry.verify().is_whole for entry in left):
            names = ", ".join(entry.name for entry in left) or "no checkpoint"
            raise Damaged(
                f"nothing was removed: {names} would be all that is left, and is not whole",
                path=self.path,
                hint=f'"highcamp verify {self.path}" shows the damage',
            )

    def _require_settings(self) -> None:
        """Without `run.json` nobody knows which metric makes the best, so nothing is removed. Raises Refused."""
        if read_settings(self.store) is None:
            raise Refused(
                f"{self.path} has no run.json, so which checkpoint is the best cannot be told; nothing was removed",
                path=self.path,
                hint="the next training writes it again; to remove one by hand, remove its directory",
            )

    def withdraw_unpinned(self, name: str, *, doomed: bool = False) -> str | None:
        """Un-publish the checkpoint called `name` unless it is pinned; returns the name of its trash, see `commit.withdraw`.

        It may be pinned at any moment. Whoever pins looks afterwards whether the checkpoint is there, and whoever removes
        looks afterwards whether there is a pin: so one of the two notices.
        """
        if name in self.pins.values():
            return None
        trash = commit.withdraw(self.store, name, doomed=doomed)
        if trash is not None and name in self.pins.values():
            commit.restore_trash(self.store, trash)
            return None
        return trash

    def remove(self, reference: str) -> str:
        """Move one checkpoint to the trash and return its name. Raises Refused for the best, the last and pinned ones."""
        entry = self.checkpoint(reference)
        self.check_removable(entry)
        commit.withdraw(self.store, entry.name)
        return entry.name

    def check_removable(self, entry: Checkpoint) -> None:
        """Whether a person may remove a checkpoint. Raises Refused, with every reason why it stays."""
        self._require_settings()
        best, last = self.best, self.last
        reasons = ["the best"] if best and best.name == entry.name else []
        reasons += ["the last"] if last and last.name == entry.name else []
        reasons += [f"pin:{pin}" for pin, name in self.pins.items() if name == entry.name]
        reasons += ["the one resumed from"] if self.resumed_from == entry.name else []
        if reasons:
            raise Refused(
                f"{entry.name} is protected: {', '.join(reasons)}; nothing was removed",
                path=entry.path,
                hint="the best, the last, the one resumed from and pinned checkpoints are not removed",
            )

    @property
    def trash(self) -> dict[str, str]:
        """What can be brought back: trash name -> the name the checkpoint had."""
        return commit.trashed(self.store)

    def undelete(self, name: str) -> str:
        """Bring a checkpoint back from the trash by the name it had; returns the name it has now.

        Raises CheckpointNotFound.
        """
        trash = self.trash
        found = [entry for entry, had in trash.items() if name in (entry, had)]
        if not found:
            there = ", ".join(sorted(set(trash.values()))) or "nothing"
            raise CheckpointNotFound(
                f"{name} is not in the trash of {self.path}", path=self.path, hint=f"there is {there}"
            )
        return commit.restore_trash(self.store, found[-1])

    def empty_trash(self) -> list[str]:
        """Remove for good what is in the trash, and return the names the checkpoints had."""
        trash = self.trash
        for entry in trash:
            self.store.remove(commit.checkpoint_path(entry))
        return list(trash.values())

    # Pins

    @property
    def pins(self) -> dict[str, str]:
        """Pin name -> checkpoint name."""
        found = {}
        for file in self.store.list(PINS):
            name = file.removesuffix(".json")
            if file == name or not is_file_name(name):
                continue
            path = f"{PINS}/{file}"
            try:
                document = strict.read(self.store.read(path, MAX_PIN_BYTES), where=path, limit=MAX_PIN_BYTES)
            except (Damaged, FileNotFoundError):
                continue  # torn or just removed: it points nowhere
            if isinstance(document, dict) and isinstance(document.get("checkpoint"), str):
                found[name] = document["checkpoint"]
        return found

    def pin(self, reference: str, name: str) -> Checkpoint:
        """Give a checkpoint a name that protects it; returns the checkpoint.

        Raises Refused if another checkpoint has that pin, InvalidArgument for a name that cannot be a file name.
        """
        check_name(name, "pin")
        if name in ("best", "last"):
            raise Refused(
                f"{name!r} is a query, not a pin: it means another checkpoint from epoch to epoch",
                hint="choose another name",
            )
        entry = self.checkpoint(reference)
        holder = self.pins.get(name)
        if holder not in (None, entry.name):
            raise Refused(
                f"pin {name} is on {holder}", path=self.path, hint=f"unpin {name} first, or choose another name"
            )
        fact = {"checkpoint": entry.name, "created_at": format_time(datetime.now(UTC))}
        self.store.replace(f"{PINS}/{name}.json", strict.write(fact) + b"\n")
        if commit.read_manifest(self.store, entry.name) is None:  # removed while we wrote: a pin must never lie
            self.store.remove(f"{PINS}/{name}.json")
            raise CheckpointNotFound(f"{entry.name} was removed meanwhile", path=entry.path)
        return entry

    def unpin(self, name: str) -> str:
        """Take a pin away; returns the name of the checkpoint it was on. Raises CheckpointNotFound."""
        holder = self.pins.get(name)
        if holder is None:
            hint = f"pins: {', '.join(self.pins) or 'none'}"
            raise CheckpointNotFound(f"{self.path} has no pin {name!r}", path=self.path, hint=hint)
        self.store.remove(f"{PINS}/{name}.json")
        return holder

    # Looking closer

    def verify(self, *, quick: bool = False) -> Iterator[Verification]:
        """Verify every checkpoint, one result each, and whatever else lies where they lie; repairs nothing."""
        checkpoints = self.checkpoints
        for entry in checkpoints:
            yield entry.verify(quick=quick)
        yield from verify.verify_unlisted(self.store, [entry.name for entry in checkpoints])

    def plot(self, path: str | os.PathLike[str], *, metric: str | None = None) -> Path:
        """Draw the history with the best epoch marked; PNG, SVG or PDF by suffix. Raises MissingExtra for `[plot]`."""
        from highcamp.plot import draw

        return draw(self, path, metric=metric)

    def _checkpoint(self, name: str, manifest: Manifest, metrics: Mapping[str, float]) -> Checkpoint:
        from highcamp.run.checkpoint import Checkpoint

        return Checkpoint(name, manifest, {**metrics}, store=self.store)

    def _committed(self) -> list[tuple[str, Manifest, Mapping[str, float]]]:
        """All readable checkpoints in (step, sequence) order: (name, manifest, metrics completed by the history).

        The metrics may be the manifest's own, so they are copied for whoever could change them.
        """
        return completed(self._readable()[0], self.history)

    def _readable(self) -> tuple[list[tuple[str, Manifest]], list[tuple[str, str]]]:
        """(name, manifest) of what can be read and is ours, and (name, why) of the rest."""
        found, unreadable = commit.read_manifests(self.store, self._manifests)
        self._manifests = found
        readable = [(name, manifest) for name, (_, manifest) in found.items()]
        try:
            settings = read_settings(self.store)
        except Damaged:
            settings = None  # a hint that is lost hides no checkpoint
        if settings is not None:
            foreign = [(name, manifest.run_id) for name, manifest in readable if manifest.run_id != settings.run_id]
            unreadable += [(name, f"it belongs to another run ({run_id})") for name, run_id in foreign]
            readable = [pair for pair in readable if pair[1].run_id == settings.run_id] if foreign else readable
        return readable, unreadable
