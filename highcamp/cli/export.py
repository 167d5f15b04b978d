"""`highcamp export`: a checkpoint's weights as a file for other tools."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from highcamp.cli.arguments import find_target, shown_path
from highcamp.cli.program import command
from highcamp.cli.text import plain, size

if TYPE_CHECKING:
    from pathlib import Path

    from highcamp.cli.output import Output

# Suffix -> how the file is loaded; {path} is its path as a Python literal.
LOADING_LINES = {
    ".safetensors": "from safetensors.numpy import load_file; weights = load_file({path})",
    ".npz": "import numpy; weights = dict(numpy.load({path}))",
    ".weights.h5": "model.load_weights({path})",
    ".keras": "import keras; model = keras.saving.load_model({path})",
    ".pt": "import torch; model.load_state_dict(torch.load({path}, weights_only=True))",
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


def loading_line(path: Path) -> str:
    """The Python line that loads the weights in `path`."""
    suffix = next(suffix for suffix in LOADING_LINES if path.name.endswith(suffix))
    return LOADING_LINES[suffix].format(path=repr(shown_path(path)))
