"""PyTorch's loaders: what decides the order of an epoch, and the rest of an epoch that was interrupted.

See `resume_iter` for the order of the calls.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.utils.data import DataLoader, IterableDataset

from highcamp.errors import Mismatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

Tree: TypeAlias = dict[str, Any]

_READ_AGAIN = (
    "an IterableDataset has no indices: {} batches are read again and dropped to resume; "
    "a torchdata StatefulDataLoader over a dataset with state_dict() resumes at once"
)


def order_state(loader: DataLoader[Any]) -> Tree | None:
    """Return what decides the order of the next epoch; to be called before `iter(loader)`, which draws from it.

    {"generators": {where: state}, "workers_running": bool} with the generators of the loader and of its samplers;
    None if torch's global generator decides alone.
    """
    tree: Tree = {
        "generators": {name: generator.get_state() for name, generator in _generators(loader).items()},
        "workers_running": loader.persistent_workers
        and loader.num_workers > 0
        and vars(loader)["_iterator"] is not None,
    }
    return tree if tree["generators"] or tree["workers_running"] else None


def resume_iter(
    loader: DataLoader[Any], order: Mapping[str, Any] | None, skip: int, at_save: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """Return an iterator over what is left of an epoch after its first `skip` batches.

    While training, in this order, once per epoch: `order = order_state(loader)`, `before = random_state()`,
    `iter(loader)`. At a save, after `skip` consumed batches: `at_save = capture(loader)`, `now = random_state()`.
    To resume: `set_random_state(before)`, `resume_iter(loader, order, skip, at_save)`, `set_random_state(now)`.
    The remaining batches, and every later epoch of `loader` itself, are then those of the uninterrupted run: bit for
    bit with num_workers=0, in order with workers (the random numbers that workers draw themselves, as for augmentation,
    begin anew in the epoch resumed midway).

    Skipped batches are not read: their indices are drawn and dropped. `set_epoch` of a DistributedSampler stays the
    caller's. An IterableDataset has no indices: its batches are read and dropped, with a warning. A StatefulDataLoader
    goes on from its own state in `at_save`, and without one is treated like any loader. After a save between epochs,
    `restore(loader, at_save)` and `iter(loader)` do; `resume_iter(loader, at_save, 0)` is the same, and exact also for
    a StatefulDataLoader whose dataset has a state, which otherwise draws one seed more. Python's and NumPy's
    generators are the caller's to set, in the same places as torch's.
    Raises Mismatch if the loader ends before `skip` batches or a generator has no state.
    """
    state = order if at_save is None else at_save
    if state is not None and state.get("loader") is not None:
        return _resume_stateful(loader, state)
    _set_generators(loader, order)
    if isinstance(loader.dataset, IterableDataset):
        iterator: Iterator[Any] = iter(loader)
        if skip:
            warnings.warn(_READ_AGAIN.format(skip), stacklevel=2)
        _drop(iterator, skip)
    else:
        iterator = _iter_after(loader, skip, workers_running=bool(order and order["workers_running"]))
    _set_generators(loader, at_save)
    return iterator


class _Remaining:
    """A batch sampler whose first pass begins after `skip` batches; every later pass is whole."""

    def __init__(self, whole: Iterable[Any], skip: int) -> None:
        self.whole, self.skip = whole, skip
        self.indices: Iterator[Any] | None = None

    def __len__(self) -> int:
        return len(self.whole)  # type: ignore[arg-type]  # asked only of loaders that have a length

    def __iter__(self) -> Iterator[Any]:
        # some samplers draw here; with workers a loader asks twice, and drops the first pass
        self.indices = iter(self.whole)
        return self._after_skip(self.indices)

    def _after_skip(self, indices: Iterator[Any]) -> Iterator[Any]:
        self.advance()
        yield from indices

    def advance(self) -> None:
        """Draw and drop the batches to skip, if that has not been done."""
        skip, self.skip = self.skip, 0
        _drop(self.indices or iter(()), skip)


class _RunningWorkers:
    """Stands in for persistent workers that were running: `iter(loader)` starts new ones without drawing a seed."""

    def _reset(self, loader: DataLoader[Any]) -> None:
        generator, loader.generator = loader.generator, _other_generator()
        try:
            vars(loader)["_iterator"] = loader._get_iterator()  # noqa: SLF001  # as iter(loader) does
        finally:
            loader.generator = generator


def _other_generator() -> torch.Generator:
    """Return a generator to draw from where the saved process did not draw."""
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return generator


def _iter_after(loader: DataLoader[Any], skip: int, *, workers_running: bool) -> Iterator[Any]:
    # a shallow copy keeps the class and every setting; its samplers are the loader's own, so their generators move on
    if "next_iter_state" in vars(loader):  # a StatefulDataLoader's own state would skip once more
        vars(loader)["next_iter_state"] = None
    rest = copy.copy(loader)
    settings = vars(rest)  # __setattr__ refuses these names once a loader is made
    settings["_iterator"] = None
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    remaining = settings[name] = _Remaining(getattr(loader, name), skip)
    if workers_running:  # persistent workers were seeded in an earlier epoch, this one drew no seed
        rest.generator = _other_generator()
    iterator: Iterator[Any] = iter(rest)
    if remaining.indices is not None:
        remaining.advance()  # without workers nothing has been drawn yet, and the caller sets the random state next
    elif skip:  # a class of the user's whose __iter__ is a generator; only reading a batch makes it draw
        iterator = itertools.chain(list(itertools.islice(iterator, 1)), iterator)
    if loader.persistent_workers:
        vars(loader)["_iterator"] = settings["_iterator"]  # later epochs go on with these workers
    return iterator


def _resume_stateful(loader: Any, state: Mapping[str, Any]) -> Iterator[Any]:
    before = torch.get_rng_state()
    loader.load_state_dict(dict(state["loader"]))
    iterator: Iterator[Any] = iter(loader)
    _set_generators(loader, state)
    if state["loader"].get("_iterator_finished"):
        # iter() has made two iterators, one to load into and one to return: the draws of training are those of one
        torch.set_rng_state(before)
        iterator = iter(loader)
    return iterator


def _drop(iterator: Iterator[Any], skip: int) -> None:
    found = sum(1 for _ in itertools.islice(iterator, skip))
    if found < skip:
        message = f"{skip} batches of the epoch had been trained on, the loader ends after {found}"
        raise Mismatch(message, hint="resume with the dataset, sampler and batch size of the save")


def _generators(loader: DataLoader[Any]) -> dict[str, torch.Generator]:
    """Return the generators of a loader and its samplers by where they hang; a shared one is there twice."""
    holders: dict[str, object] = {"loader": loader, "sampler": loader.sampler, "batch_sampler": loader.batch_sampler}
    for depth in range(4):  # samplers around samplers, each holding the inner one under this name
        where = "batch_sampler" + ".sampler" * depth
        holders[f"{where}.sampler"] = getattr(holders[where], "sampler", None)
    found = {}
    for where, holder in holders.items():
        for name, value in getattr(holder, "__dict__", {}).items():
            if isinstance(value, torch.Generator):
                found[f"{where}.{name}"] = value
    return found


def _set_generators(loader: DataLoader[Any], tree: Mapping[str, Any] | None) -> None:
    if tree is not None:
        if differences := _generator_differences(loader, tree):
            raise Mismatch(f"the loader's order does not fit: {'; '.join(differences)}")
        for name, generator in _generators(loader).items():
            generator.set_state(tree["generators"][name])


def loader_state(loader: DataLoader[Any]) -> Tree:
    """The state of a loader between two batches: its generators, and its own where it is a StatefulDataLoader."""
    tree = order_state(loader) or {"generators": {}, "workers_running": False}
    if not _is_stateful_loader(loader):
        return tree
    iterator = vars(loader)["_iterator"]
    if iterator is None:  # asking for its state would start an iterator, and draw
        tree["loader"] = getattr(loader, "next_iter_state", None)
    elif isinstance(iterator, _RunningWorkers) or (iterator._finished and not _has_own_state(loader)):  # noqa: SLF001
        tree["loader"] = None  # between epochs the generators say it all; loading a finished state would draw twice
    else:
        tree["loader"] = loader.state_dict()  # type: ignore[attr-defined]
    return tree


def restore_loader(loader: DataLoader[Any], tree: Mapping[str, Any]) -> None:
    """The reverse of `loader_state`."""
    if tree.get("loader") is not None:
        loader.load_state_dict(tree["loader"])  # type: ignore[attr-defined]
    elif not tree["workers_running"]:
        vars(loader).update(_iterator=None, **({"next_iter_state": None} if _is_stateful_loader(loader) else {}))
    elif vars(loader)["_iterator"] is None:
        vars(loader)["_iterator"] = _RunningWorkers()
    _set_generators(loader, tree)


def loader_differences(loader: DataLoader[Any], tree: Mapping[str, Any]) -> list[str]:
    """One line for each generator or state that is on one side only."""
    lines = _generator_differences(loader, tree)
    own = tree.get("loader")
    if own is None:
        return lines
    if not _is_stateful_loader(loader):
        return [*lines, "loader: the state of a StatefulDataLoader, here is a plain DataLoader"]
    workers = own["_snapshot"]["_main_snapshot"]["_num_workers"] if "_snapshot" in own else 0
    if workers != loader.num_workers:
        lines.append(f"loader: num_workers {workers} in the checkpoint, {loader.num_workers} here")
    return lines


def _generator_differences(loader: DataLoader[Any], tree: Mapping[str, Any]) -> list[str]:
    live, saved = _generators(loader).keys(), tree["generators"].keys()
    return one_sided(live - saved, saved - live, "generators/")


def _is_stateful_loader(loader: DataLoader[Any]) -> bool:
    return any(cls.__module__.startswith("torchdata.stateful_dataloader") for cls in type(loader).__mro__)


def _has_own_state(loader: DataLoader[Any]) -> bool:
    parts = (loader.dataset, loader.sampler, loader.batch_sampler)
    return isinstance(loader.dataset, IterableDataset) or any(hasattr(part, "state_dict") for part in parts)


def one_sided(here: Iterable[str], saved: Iterable[str], where: str = "") -> list[str]:
    """One line for each name that is on one side only."""
    lines = [f"{where}{name}: only here" for name in here]
    return sorted(lines + [f"{where}{name}: only in the checkpoint" for name in saved])
