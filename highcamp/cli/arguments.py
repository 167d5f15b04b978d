"""What the arguments mean: a run, `RUN@REF`, or nothing at all, which is the nearest run upwards."""

from __future__ import annotations

import difflib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from highcamp.errors import InvalidArgument, RunNotFound
from highcamp.run.run import open_run

if TYPE_CHECKING:
    from highcamp.run.checkpoint import Checkpoint
    from highcamp.run.run import Run

RUN_VARIABLE = "HIGHCAMP_RUN"
SEARCH_DEPTH = 2  # levels below a directory of runs: runs/digits, runs/digits/seed-1
MAX_SEARCHED = 10_000  # directories looked at; a home directory by mistake must not take minutes


@dataclass(frozen=True)
class Target:
    """A run that an argument names, and the reference behind its "@", if there is one."""

    run: Run
    reference: str | None = None

    def checkpoint(self, default: str | None = None) -> Checkpoint:
        """The checkpoint meant; default: the reference where none was given. Raises CheckpointNotFound."""
        reference = self.reference or default
        if reference is None:
            name = refer(self.run, "best")
            raise InvalidArgument(f"{self.run.path} is a run, not a checkpoint", hint=f"say which one, such as {name}")
        return self.run.checkpoint(reference)


def find_target(argument: str | None) -> Target:
    """The run, or the checkpoint of a run, that `argument` means; None means the nearest run.

    `runs/digits`, `runs/digits@best`, `@best` (of the nearest run), or the path of a checkpoint. Raises RunNotFound.
    """
    if not argument:
        return Target(open_run(_default_run()))
    if "://" not in argument and Path(argument).exists():  # an "@" in the name of a directory is part of it
        return _existing(Path(argument))
    place, separator, reference = argument.rpartition("@")
    if not separator:
        return Target(_open(argument))
    if not reference:
        raise InvalidArgument(f"{argument} has no reference behind its @", hint="for example @best, @last, @epoch:12")
    return Target(_open(place) if place else open_run(_default_run()), reference)


def find_run(argument: str | None) -> Run:
    """The run that `argument` means. Raises RunNotFound, or InvalidArgument for a checkpoint."""
    target = find_target(argument)
    if target.reference is not None:
        raise InvalidArgument(
            f"{argument} is a checkpoint, and a run is wanted", hint=f"for example {refer(target.run) or 'no argument'}"
        )
    return target.run


def is_run(path: Path) -> bool:
    """Whether a directory looks like a run; cheap, and never wrong about one that has its `run.json`."""
    return (path / "run.json").is_file() or ((path / "checkpoints").is_dir() and (path / "history").is_dir())


def nearest_run(start: Path) -> Path | None:
    """The run that `start` is, or lies in."""
    return next((path for path in (start, *start.parents) if is_run(path)), None)


def runs_below(directory: Path) -> list[Path]:
    """The runs at most SEARCH_DEPTH levels below, by name; hidden directories and links are not entered."""
    found: list[Path] = []
    level, searched = [directory], 0
    for _ in range(SEARCH_DEPTH):
        below: list[Path] = []
        for parent in level:
            for path in _directories(parent):
                searched += 1
                if searched > MAX_SEARCHED:
                    return sorted(found)
                (found if is_run(path) else below).append(path)
        level = below
    return sorted(found)


def refer(run: Run, reference: str | None = None) -> str:
    """How to name the run, or one of its checkpoints, on a command line here; "" is the nearest run itself."""
    behind = f"@{reference}" if reference else ""
    if "://" in run.path:
        return shlex.quote(run.path + behind)
    path = Path(run.path)
    if os.environ.get(RUN_VARIABLE) is None and nearest_run(Path.cwd()) == path:
        return behind
    return shlex.quote(shown_path(path) + behind)


def shown_path(path: Path | str) -> str:
    """A path as short as it can be said from here."""
    text = str(path)
    if "://" in text:
        return text
    relative = os.path.relpath(text)
    is_longer = relative.startswith("..") and len(relative) > len(text)
    return text if is_longer or relative == "." else relative


def _default_run() -> str:
    named = os.environ.get(RUN_VARIABLE)
    if named:
        return named
    here = Path.cwd()
    nearest = nearest_run(here)
    if nearest is not None:
        return str(nearest)
    below = [shown_path(path) for path in runs_below(here)]
    if below:
        hint = f"name one of those below: {', '.join(below[:5])}{', …' if len(below) > 5 else ''}"
    else:
        hint = 'name one, or begin with "highcamp demo"'
    raise RunNotFound(f"neither {here} nor a directory above it is a run", path=str(here), hint=hint)


def _existing(path: Path) -> Target:
    absolute = path.absolute()
    holder = absolute.parent
    if not is_run(absolute) and holder.name == "checkpoints" and is_run(holder.parent):
        return Target(open_run(str(holder.parent)), absolute.name)
    return Target(_open(str(path)))


def _open(argument: str) -> Run:
    try:
        return open_run(argument)
    except RunNotFound as error:
        near = _near(argument)
        if near is None:
            raise
        raise RunNotFound(error.message, path=error.path, hint=f"did you mean {near}?") from error


def _near(argument: str) -> str | None:
    """The run whose name is closest to a mistyped one, or a run right below a directory."""
    if "://" in argument:
        return None
    path = Path(argument)
    if path.is_dir():
        below = runs_below(path)
        return shown_path(below[0]) if below else None
    siblings = {entry.name: entry for entry in _directories(path.parent) if is_run(entry)}
    found = difflib.get_close_matches(path.name, siblings, n=1)
    return shown_path(siblings[found[0]]) if found else None


def _directories(parent: Path) -> list[Path]:
    try:
        return [
            Path(entry.path)
            for entry in os.scandir(parent)
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
        ]
    except OSError:  # not there, or not ours to read: nothing to find in it
        return []
