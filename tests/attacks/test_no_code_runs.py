"""Opening, listing, verifying, loading and restoring hostile files: nothing is imported, compiled, unpickled or started.

Seen by an audit hook, in a process that has done all of it before on the sound files, so that whatever is imported now was
asked for by a file.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from attack_parsers import CORPUS

import highcamp

ROOT = Path(highcamp.__file__).parents[1]
MODELS = {
    "numpy": """
import numpy as np
def made():
    return {"kernel": np.zeros((2, 3)), "n": [1, (2, {"a": None})]}
""",
    "torch": """
import torch
def made():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
""",
    "keras": """
import os
os.environ["KERAS_BACKEND"] = "jax"
import keras
def made():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(optimizer="sgd", loss="mse")
    return model
""",
}
SCENE = """
import contextlib, io, json, sys, warnings
import numpy as np
from pathlib import Path
import highcamp
from highcamp import Checkpointer, Every, HighcampError, Keep
from highcamp.cli.program import main
from highcamp.core.digest import digest
from highcamp.core.manifest import File, decode, encode
from highcamp.run import verify
import msgspec

where, payloads = Path(sys.argv[1]), {name: Path(file).read_bytes() for name, file in json.loads(sys.argv[2]).items()}
with Checkpointer(where, monitor="loss", every=Every(epochs=1), keep=Keep(last=9), verbose=0) as checkpointer:
    checkpointer.track(model=made())
    for epoch in checkpointer.epochs(2):
        checkpointer.log(loss=1 / (epoch + 1))
newest = Path(highcamp.open(where).last.path)
live = made()

def commands():
    for line in ("ls", "show", "best", "log", "verify", "verify --quick"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            main([line.split()[0], str(where), *line.split()[1:]])

def everything():
    '''How many calls were refused.'''
    refused = 0
    run = highcamp.open(where)
    calls = [commands, lambda: list(run.verify()), lambda: run.best, lambda: run.history.rows, lambda: run.plan()]
    for checkpoint in run.checkpoints:
        calls += [checkpoint.verify, lambda: verify.verify_structure(checkpoint), lambda: checkpoint.restore(model=live)]
        calls += [lambda name=name: checkpoint.state(name) for name in checkpoint.objects]
        calls += [lambda name=name: checkpoint.load(name, copy=True) for name in checkpoint.objects]
        for call in calls:
            try:
                call()
            except HighcampError:
                refused += 1
        calls = []
    return refused

def put(name, data, is_signed):
    (newest / name).write_bytes(data)
    if is_signed and name != "manifest.json":
        manifest = decode(sound["manifest.json"], where="")
        files = tuple(File(name, len(data), digest(data)) if each.name == name else each for each in manifest.files)
        (newest / "manifest.json").write_bytes(encode(msgspec.structs.replace(manifest, files=files)))

sound = {file.name: file.read_bytes() for file in newest.iterdir()}
assert everything() == 0
for name in sound:                       # what errors import is imported now
    put(name, b"{}", True)
    everything()
    put(name, sound[name], True)
for name, data in sound.items():
    (newest / name).write_bytes(data)
for name in ("history/attempt-0001.jsonl", "run.json", "owner.json", "pins/paper.json"):
    file = where / name
    file.parent.mkdir(exist_ok=True)
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(b"{")
    everything()
    file.write_bytes(before) if before is not None else file.unlink()

FORBIDDEN = ("pickle.", "exec", "compile", "import", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn",
             "subprocess.", "socket.", "ctypes.dlopen", "marshal.", "code.", "shutil.unpack")
events, is_on = [], False
def hook(event, arguments):
    if is_on and event.startswith(FORBIDDEN):
        frame = sys._getframe()
        while frame is not None and "highcamp" not in frame.f_globals.get("__name__", ""):
            frame = frame.f_back
        asked = frame and f"{frame.f_code.co_filename}:{frame.f_lineno}"
        events.append((event, repr(arguments)[:200], asked))
sys.addaudithook(hook)
is_on = True
__import__("this_is_seen") if "seen" in sys.argv else None
counts = {}
for name in sound:
    for kind, data in payloads.items():
        for is_signed in (False, True):
            put(name, data, is_signed)
            counts[name] = counts.get(name, 0) + everything()
            for each, good in sound.items():
                (newest / each).write_bytes(good)
for name in ("history/attempt-0001.jsonl", "run.json", "owner.json", "pins/paper.json"):
    file = where / name
    before = file.read_bytes() if file.exists() else None
    for data in payloads.values():
        file.write_bytes(data)
        everything()
    file.write_bytes(before) if before is not None else file.unlink()
is_on = False
assert everything() == 0
print(json.dumps([counts, events]))
"""


@pytest.fixture
def payloads(tmp_path):
    """Name -> file: what other libraries would load, and a way to notice that somebody did."""

    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'trap'}",)

    made = {"pickle": pickle.dumps(Trap()), "pickle-text": pickle.dumps(Trap(), 0)}
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    kept = ("tensorfile/zip", "tensorfile/npy-object", "tensorfile/hdf5", "state/class", "state/namedtuple-of-a-module")
    files = {name: str(CORPUS / f"{name}.bin") for name in kept}
    return {**files, **{name: str(tmp_path / name) for name in made}}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("framework", MODELS)
def test_hostile_files_run_no_code(tmp_path, payloads, framework):
    """Loading a checkpoint from the internet would hand over the machine."""
    done = subprocess.run(
        [sys.executable, "-c", MODELS[framework] + SCENE, tmp_path / "run", json.dumps(payloads)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-3000:]
    counts, events = json.loads(done.stdout.splitlines()[-1])
    assert sorted({str(event) for event in events}) == []
    assert {"model.safetensors", "state.json", "manifest.json"} <= set(counts)
    assert all(count > 2 * len(payloads) for name, count in counts.items() if name != "manifest.json")
    assert not (tmp_path / "trap").exists()


def test_the_hook_sees_an_import(tmp_path, payloads):
    """A guard that cannot fail guards nothing."""
    source = SCENE.replace('__import__("this_is_seen")', '__import__("antigravity_of_nobody")')
    done = subprocess.run(
        [sys.executable, "-c", MODELS["numpy"] + source, tmp_path / "run", json.dumps(payloads), "seen"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert "antigravity_of_nobody" in done.stderr
