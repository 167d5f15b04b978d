"""Runs an example as it is, on a disk on which its process dies: `deadly_script.py EXAMPLE [KIND:]FUSE DEATHS [ARGUMENT …]`.

Events are counted: each batch of training and of evaluation, each change of the run, each half-written file. At number FUSE
the process is killed; in a batch, if FUSE is odd, it is asked to stop instead. Where, goes to the file DEATHS; how many
events there were, to DEATHS.count. With KIND only events are counted that begin with it, such as "within".
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import keras

sys.path.insert(0, str(Path(__file__).parents[2]))

from deadly import Deadly

from highcamp.keras import callback
from highcamp.training.checkpointer import Checkpointer


class Chosen(Deadly):
    """Counts events of one kind."""

    kind = ""

    def event(self, what):
        """Something happens."""
        if what.startswith(self.kind):
            super().event(what)


BATCHES = {"on_train_batch_begin": "batch", "on_test_batch_begin": "evaluation", "on_epoch_end": "epoch"}


def main(example, fuse, deaths, *arguments):
    """Run it."""
    stores = []

    def checkpointer(directory, **options):
        if not stores:
            Path(directory).mkdir(parents=True, exist_ok=True)
            kind, _, number = fuse.rpartition(":")
            stores.append(Chosen(Path(directory), int(number), deaths=Path(deaths), asking=BATCHES.values()))
            stores[0].kind = kind
        return Checkpointer(stores[0], **options)

    callback.Checkpointer = checkpointer
    for hook, event in BATCHES.items():
        setattr(
            keras.callbacks.CallbackList, hook, _counted(getattr(keras.callbacks.CallbackList, hook), stores, event)
        )
    sys.argv = [example, *arguments]
    runpy.run_path(example, run_name="__main__")
    Path(f"{deaths}.count").write_text(str(stores[0].count))


def _counted(hook, stores, event):
    def counted(self, *arguments, **options):
        if stores:
            stores[0].event(event)
        return hook(self, *arguments, **options)

    return counted


if __name__ == "__main__":
    main(*sys.argv[1:])
