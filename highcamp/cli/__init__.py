"""The command line: the only place that knows the terminal. One file per command or small family."""

from __future__ import annotations


def main() -> int:
    """Run `highcamp` with the arguments of this process and return its exit code."""
    from highcamp.cli.program import main as run_program

    return run_program()
