"""`highcamp export`: a checkpoint's weights as a file for other tools."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING

import click

from highcamp.cli.arguments import find_target, shown_path
from highcamp.cli.program import command
from highcamp.cli.text import plain, size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from highcamp.cli.output import Output

BACKENDS = ("jax", "torch", "tensorflow")  # the lightest first

# Suffix -> how the file is loaded; {path} is its path as a Python literal.
LOADING_LINES = {
    ".safetensors": "from safetensors.numpy import load_file; weights = load_file({path})",
    ".npz": "import numpy; weights = dict(numpy.load({path}))",
    ".weights.h5": "model.load_weights({path})",
    ".keras": "import keras; model = keras.saving.load_model({path})",
    ".pt": "import torch; weights = torch.load({path}, weights_only=True)",
}


@command(epilog="For example: highcamp export runs/digits@best -o model.safetensors")
@click.argument("target", metavar="[RUN[@REF]]", required=False)
@click.option(
    "-o", "--output", "file", metavar="FILE", required=True, help="By its suffix: " + ", ".join(LOADING_LINES) + "."
)
@click.option(
    "--object", "object_name", metavar="NAME", default="model", show_default=True, help="Which tracked object."
)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def export(output: Output, target: str | None, file: str, object_name: str, force: bool) -> int:  # noqa: FBT001
    """Verify a checkpoint, @best by default, then write its weights to FILE, and print the line that loads them."""
    found = find_target(target)
    entry = found.checkpoint(default="best")
    with _frameworks_silenced():
        written = entry.export(file, object=object_name, force=force)
    size_bytes = written.stat().st_size
    if output.as_json:
        output.json(
            "export/1",
            run=found.run.path,
            checkpoint=entry.name,
            object=object_name,
            file=str(written.absolute()),
            size_bytes=size_bytes,
            loading_line=loading_line(written),
        )
    else:
        output.message(
            f"verified {entry.name} (epoch {entry.epoch}), wrote {plain(shown_path(written))}, {size(size_bytes)}"
        )
        output.line(plain(loading_line(written)))
    return 0


@contextlib.contextmanager
def _frameworks_silenced() -> Iterator[None]:
    """What compiled code prints at its first start goes nowhere; Python's own messages still arrive.

    Keras needs a backend to write its files; any will do, and TensorFlow, its default, may not be installed.
    """
    installed = next((name for name in BACKENDS if importlib.util.find_spec(name) is not None), None)
    if installed:
        os.environ.setdefault("KERAS_BACKEND", installed)
    try:
        number = sys.stderr.fileno()
    except (OSError, ValueError):  # no real stream, so nothing compiled writes to it
        yield
        return
    sys.stderr.flush()
    kept, before = os.dup(number), sys.stderr
    try:
        with open(os.devnull, "wb") as nowhere, open(kept, "w", encoding=before.encoding, closefd=False) as ours:  # noqa: PTH123
            os.dup2(nowhere.fileno(), number)
            sys.stderr = ours
            try:
                yield
            finally:
                sys.stderr = before
                ours.flush()
                os.dup2(kept, number)
    finally:
        os.close(kept)


def loading_line(path: Path) -> str:
    """The Python line that loads the weights in `path`."""
    suffix = next(suffix for suffix in LOADING_LINES if path.name.endswith(suffix))
    return LOADING_LINES[suffix].format(path=repr(shown_path(path)))
