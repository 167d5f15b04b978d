"""`make fuzz`: the three parsers of a checkpoint under a fuzzer that is guided by what it reaches in the code.

Each parser begins with the attacks in `corpus` and what the tests call sound. What it finds is written to `build/fuzz`, and
becomes a file of the corpus with a line in its index when it is mended. Needs atheris, which has builds for few versions of
Python: the target installs it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FUZZED = ("tensorfile", "signed", "state")
MAX_BYTES = 4096
MEMORY_MB = (
    2048  # for a process with Python, NumPy and the fuzzer's own tables; the tests look at what parsing itself takes
)
INPUT_SECONDS = 10


def fuzz(name: str, arguments: list[str]) -> None:
    """Never returns: the fuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["highcamp.core", "highcamp.run.commit"]):
        import attack_parsers

    parser = attack_parsers.PARSERS[name]

    def look(data: bytes) -> None:
        attack_parsers.refusal(parser, data)

    atheris.Setup([sys.argv[0], *arguments], look)
    atheris.Fuzz()


def main() -> int:
    """Run one process for each parser, side by side; 1 if one has found something."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=int, default=60, help="for each parser")
    options.add_argument("--out", type=Path, default=Path("build/fuzz"), help="where findings are written")
    chosen = options.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory(prefix="highcamp-fuzz-") as place:
        running = {}
        for name in FUZZED:
            grown = Path(place, name)
            grown.mkdir()
            command = [
                sys.executable, __file__, name, f"-max_total_time={chosen.seconds}", f"-max_len={MAX_BYTES}",
                f"-rss_limit_mb={MEMORY_MB}", f"-timeout={INPUT_SECONDS}", "-print_final_stats=1", "-verbosity=0",
                f"-artifact_prefix={chosen.out / name}-", str(grown), str(here / "corpus" / name),
            ]  # fmt: skip
            output = Path(place, f"{name}.txt").open("w+")  # noqa: SIM115  (closed when it has been read)
            running[name] = (subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT), output)
        failed = [name for name, (process, output) in running.items() if not _ended(name, process, output)]
    return 1 if failed else 0


def _ended(name: str, process: subprocess.Popen[bytes], output: object) -> bool:
    """Wait for one; whether it has found nothing."""
    code = process.wait()
    with output:
        output.seek(0)
        text = output.read()
    executed = re.search(r"number_of_executed_units: *(\d+)", text) or re.search(r"Done (\d+) runs", text)
    count = executed[1] if executed else "an unknown number of"
    print(f"{name}: {count} inputs, {'nothing found' if code == 0 else 'a finding:'}")
    if code:
        print(text[-6000:])
    return code == 0


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in FUZZED:
        fuzz(sys.argv[1], sys.argv[2:])
    sys.exit(main())
