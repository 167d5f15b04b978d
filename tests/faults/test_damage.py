"""Damage of every kind, in every file: it is found, named and survived, and nothing in a file ever runs or blocks."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import h5py
import msgspec
import numpy as np
import pytest

import highcamp
from highcamp import Checkpointer, Every, Keep
from highcamp.core.digest import digest
from highcamp.core.manifest import MANIFEST, STATE, File, decode, encode
from highcamp.errors import Damaged, Refused
from highcamp.storage.local import LocalReader

NEWEST, OLDER = "step-00000003", "step-00000002"
TENSORS = "model.safetensors"
FILES = [TENSORS, "progress.safetensors", STATE, MANIFEST]
LOSSES = [0.5, 0.2, 0.4]


def weights_at(epoch):
    """Three pages of them, so that one can be damaged between two others."""
    return np.random.default_rng(epoch).standard_normal(1536)


def train(path, epochs=3, keep=None, verbose=0):
    """Train, or go on: the weights of an epoch follow from its number."""
    model = {"kernel": np.zeros(1536), "bias": np.zeros(3, np.float16)}
    keep = keep or Keep(best=1, last=5)
    with Checkpointer(path, monitor="val_loss", every=Every(epochs=1), keep=keep, verbose=verbose) as checkpointer:
        checkpointer.track(model=model)
        for epoch in checkpointer.epochs(epochs):
            model["kernel"][:] = weights_at(epoch + 1)
            checkpointer.log(val_loss=LOSSES[epoch] if epoch < 3 else 1.0 + epoch)


def resume(path):
    """Start again as a script does, but train nothing: the Checkpoint gone on from, and the live weights."""
    model = {"kernel": np.zeros(1536), "bias": np.zeros(3, np.float16)}
    with Checkpointer(path, monitor="val_loss", keep=Keep(best=1, last=5), verbose=0) as checkpointer:
        checkpointer.track(model=model)
        return checkpointer.start(), model["kernel"]


@pytest.fixture(scope="module")
def template():
    """A run of three checkpoints, the second of which is the best."""
    shared = Path("/dev/shm")  # noqa: S108  (made unguessable by mkdtemp)
    where = Path(tempfile.mkdtemp(prefix="highcamp-", dir=shared if os.access(shared, os.W_OK) else None))
    train(where / "run")
    yield where / "run"
    shutil.rmtree(where)


@pytest.fixture
def path(template, place):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(template, place / "run"))


def checkpoint_of(path, name=NEWEST):
    """Its directory."""
    return path / "checkpoints" / name


def assert_falls_back(path, capsys, *, says=NEWEST, to=2):
    """Resume takes the newest whole one, its very bytes, and says what it has passed over."""
    capsys.readouterr()
    found, kernel = resume(path)

    said = capsys.readouterr().err
    assert found.epoch == to
    assert np.array_equal(kernel, weights_at(to))
    assert says in said


def states(path):
    """What `verify` says of each checkpoint: name -> state."""
    return {result.name: result.state for result in highcamp.open(path).verify()}


# ----------------------------------------------------------------------------------------------- lengths, bits, kinds


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", ["nothing", "one byte", "half", "all but one byte"])
def test_truncated(path, capsys, name, left):
    """What a power cut or a full disk leaves on file systems that lie: found by its size, and fallen back from."""
    file = checkpoint_of(path) / name
    size = file.stat().st_size
    length = {"nothing": 0, "one byte": 1, "half": size // 2, "all but one byte": size - 1}[left]
    os.truncate(file, length)

    run = highcamp.open(path)

    assert states(path) == {
        "step-00000001": "whole", OLDER: "whole", NEWEST: "altered" if name == MANIFEST else "truncated"
    }  # fmt: skip
    assert run.last.name == OLDER
    assert run.best.name == OLDER
    if name == MANIFEST:
        assert [entry for entry, _ in run.unreadable] == [NEWEST]
    else:
        with pytest.raises(Damaged, match=f"{NEWEST}.*{name} is {length} bytes, its manifest says {size}"):
            restore_all(run.checkpoint(NEWEST))
    assert_falls_back(path, capsys)


def restore_all(checkpoint):
    """Read every object of a checkpoint."""
    return [checkpoint.state(name) for name in checkpoint.objects]


def test_empty_manifest_is_unreadable(path):
    """The others must still be listed, and the damage named."""
    (checkpoint_of(path, "step-00000001") / MANIFEST).write_bytes(b"")

    run = highcamp.open(path)

    assert [entry.name for entry in run.checkpoints] == [OLDER, NEWEST]
    assert run.unreadable[0][0] == "step-00000001"
    assert "step-00000001/manifest.json has no digest of itself" in run.unreadable[0][1]


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit_is_found(path, capsys, name):
    """A weight that changes by 3e37 without a word is worse than a file that is gone."""
    file = checkpoint_of(path) / name
    good = file.read_bytes()
    rng = random.Random(f"flips {name}")
    bits = {0, 8 * len(good) - 1, *(rng.randrange(8 * len(good)) for _ in range(60))}
    for bit in sorted(bits):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)

        run = highcamp.open(path)

        assert states(path)[NEWEST] in ({"altered", "unreadable"} if name == MANIFEST else {"altered"}), bit
        if name == MANIFEST:
            assert [entry for entry, _ in run.unreadable] == [NEWEST], bit
        else:
            with pytest.raises(Damaged, match=f"{NEWEST}.*{name} differs from its digest"):
                restore_all(run.checkpoint(NEWEST))
    assert_falls_back(path, capsys)
    file.write_bytes(good)
    assert resume(path)[0].name == NEWEST


@pytest.mark.parametrize("page", [0, 1, 2, 3])
def test_zeroed_page_is_found(path, capsys, page):
    """What a lost write leaves: right size, right name, 4096 zeros."""
    with (checkpoint_of(path) / TENSORS).open("r+b") as file:
        file.seek(4096 * page)
        file.write(bytes(4096))

    result = highcamp.open(path).checkpoint(NEWEST).verify()

    assert result.state == "altered"
    assert result.findings[0].tensor == (None if page == 0 else "kernel")
    assert_falls_back(path, capsys)


def test_verify_reads_bytes(path):
    """Other weights of the same shapes under the same name are not the same weights."""
    shutil.copy(checkpoint_of(path, OLDER) / TENSORS, checkpoint_of(path) / TENSORS)

    result = highcamp.open(path).checkpoint(NEWEST).verify()

    assert (result.state, result.findings[0].file, result.findings[0].tensor) == ("altered", TENSORS, "kernel")
    assert result.bytes_read == sum(
        file.stat().st_size for file in checkpoint_of(path).iterdir() if file.name != MANIFEST
    )
    assert highcamp.open(path).checkpoint(NEWEST).verify(quick=True).ok


def replaced(file, kind):
    """Something else lies where a file was."""
    good = file.read_bytes()
    file.unlink()
    if kind == "directory":
        file.mkdir()
        (file / "inner").write_bytes(good)
    elif kind == "FIFO":
        os.mkfifo(file)
    elif kind == "link":
        aside = next(above for above in file.parents if above.name == "run").parent / "aside"
        aside.write_bytes(good)
        file.symlink_to(aside)
    elif kind == "dangling link":
        file.symlink_to("/nowhere/at/all")
    elif kind == "link to itself":
        file.symlink_to(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["missing", "directory", "FIFO", "link", "dangling link", "link to itself", "device"])
def test_odd_files_are_classified(path, capsys, name, kind):
    """Nothing is followed, nothing blocks, and what hangs there is not taken for the file."""
    replaced(checkpoint_of(path) / name, kind)

    run = highcamp.open(path)

    expected = "missing" if name != MANIFEST or kind == "missing" else "altered"
    assert states(path) == {"step-00000001": "whole", OLDER: "whole", NEWEST: expected}
    assert run.last.name == OLDER
    if name != MANIFEST:
        with pytest.raises(Damaged, match=f"{NEWEST}.*{name}"):
            restore_all(run.checkpoint(NEWEST))
    # Without any manifest it is no checkpoint: somebody un-published it, or it never was one.
    assert_falls_back(path, capsys, says="" if name == MANIFEST and kind == "missing" else NEWEST)


@pytest.mark.parametrize("kind", ["file", "directory", "FIFO", "link"])
def test_extra_files_are_a_finding_and_no_harm(path, kind):
    """A note beside the weights is reported, and resuming goes on with the newest all the same."""
    extra = checkpoint_of(path) / "notes.txt"
    extra.write_bytes(b"hello")
    if kind != "file":
        replaced(extra, kind)

    result = highcamp.open(path).checkpoint(NEWEST).verify()

    assert result.state == "foreign"
    assert [finding.file for finding in result.findings] == ["notes.txt"]
    assert result.is_whole
    assert not result.ok
    assert resume(path)[0].name == NEWEST


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["directory", "FIFO", "link", "dangling link", "link to itself", "device"])
@pytest.mark.parametrize("name", ["run.json", "owner.json", "history/attempt-0001.jsonl", "pins/paper.json"])
def test_odd_files_of_the_run_never_block(path, name, kind):
    """Beside the checkpoints lie hints and rows; whatever replaces them, the answer is a fact or an error of ours."""
    highcamp.open(path).pin("best", "paper")
    (path / "owner.json").write_bytes(b"{}")
    replaced(path / name, kind)

    for ask in (lambda: highcamp.open(path).checkpoints, lambda: highcamp.open(path).pins, lambda: resume(path)):
        try:
            ask()
        except highcamp.HighcampError as error:
            assert Path(name).name in str(error) or not isinstance(error, Damaged), error  # noqa: PT017

    if name in ("owner.json", "pins/paper.json"):
        assert len(highcamp.open(path).checkpoints) == 3
    if name == "owner.json" and kind != "directory":  # which no file can replace: the error names it
        assert resume(path)[0].name == NEWEST


# ------------------------------------------------------------------------------------------------- hostile documents


def signed(text):
    """A manifest of this text, an object, with a digest that fits: a forger can do that."""
    head = text.rstrip().removesuffix("}").rstrip().encode("utf-8", "surrogatepass")
    return head + f',\n  "digest": "{digest(head)}"\n}}\n'.encode()


def manifest_text(**changes):
    """A manifest as JSON with some entries changed; a value of ... leaves its entry out."""
    sound = {
        "format": 1, "run_id": "r", "step": 3, "epoch": 3, "batch": 0, "sequence": 3, "attempt": 1, "parent": None,
        "created_at": "2026-01-31T08:00:00.000Z", "metrics": {"val_loss": 0.4}, "nonfinite": {}, "files": [],
        "objects": {}, "versions": {},
    }  # fmt: skip
    return json.dumps({key: value for key, value in (sound | changes).items() if value is not ...}, indent=2)


def listed(**changes):
    """The `files` entry with one file, some of its entries changed."""
    return [{"name": "a", "size": 1, "digest": digest(b"")} | changes]


HOSTILE_MANIFESTS = {
    "empty": b"",
    "not JSON": b"\x80\x04\x95 this is no manifest",
    "all zeros": bytes(2000),
    "a list": b"[]",
    "signed, not JSON": signed('{"format": 1, nonsense }'),
    "unsigned": manifest_text().encode(),
    "NaN": signed(manifest_text().replace("0.4", "NaN")),
    "Infinity": signed(manifest_text().replace("0.4", "-Infinity")),
    "1e999": signed(manifest_text().replace("0.4", "1e999")),
    "duplicate key": signed(manifest_text().replace('"step": 3', '"step": 3, "step": 4')),
    "depth 100,000": signed(manifest_text(metrics=...)[:-2] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "depth 100,000 of objects": signed('{"format": 1, "a": ' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}"),
    "5,000-digit integer": signed(manifest_text().replace('"step": 3', '"step": ' + "9" * 5000)),
    "negative step": signed(manifest_text(step=-1)),
    "huge step": signed(manifest_text(step=2**63)),
    "step is text": signed(manifest_text(step="3")),
    "step is true": signed(manifest_text(step=True)),
    "step is a fraction": signed(manifest_text(step=3.5)),
    "step is missing": signed(manifest_text(step=...)),
    "metrics is a list": signed(manifest_text(metrics=[1])),
    "a metric is text": signed(manifest_text(metrics={"val_loss": "0.1"})),
    "files is an object": signed(manifest_text(files={})),
    "negative size": signed(manifest_text(files=listed(size=-1))),
    "huge size": signed(manifest_text(files=listed(size=2**60))),
    "size is text": signed(manifest_text(files=listed(size="1"))),
    "no digest": signed(manifest_text(files=listed(digest="md5:0"))),
    "parent directory": signed(manifest_text(files=listed(name="../../../secret"))),
    "backslashes": signed(manifest_text(files=listed(name="..\\..\\secret"))),
    "absolute name": signed(manifest_text(files=listed(name="/etc/passwd"))),
    "NUL in a name": signed(manifest_text(files=listed(name="a\0b"))),
    "empty name": signed(manifest_text(files=listed(name=""))),
    "hidden name": signed(manifest_text(files=listed(name=".trash"))),
    "long name": signed(manifest_text(files=listed(name="a" * 300))),
    "device name": signed(manifest_text(files=listed(name="CON"))),
    "its own name": signed(manifest_text(files=listed(name=MANIFEST))),
    "a file twice": signed(manifest_text(files=listed() * 2)),
    "case twins": signed(manifest_text(files=listed() + listed(name="A"))),
    "object name": signed(manifest_text(objects={"../x": {"files": [], "tensors": 0, "bytes": 0}})),
    "object file": signed(manifest_text(objects={"x": {"files": ["/etc/passwd"], "tensors": 0, "bytes": 0}})),
    "lone surrogate": signed(manifest_text(run_id="\ud800").replace("\\ud800", "\ud800")),
    "format 0": signed(manifest_text(format=0)),
    "100 MB": b"{" + b" " * (100 << 20) + b"}",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", HOSTILE_MANIFESTS)
def test_hostile_manifest(path, capsys, case):
    """Whatever stands there: classified and listed, the others untouched, resumed from the newest whole one."""
    file = checkpoint_of(path) / MANIFEST
    file.write_bytes(HOSTILE_MANIFESTS[case])
    (path.parent / "secret").write_text("secret")

    run = highcamp.open(path)

    assert states(path) == {"step-00000001": "whole", OLDER: "whole", NEWEST: "altered"}
    assert [name for name, _ in run.unreadable] == [NEWEST]
    assert f"{NEWEST}/{MANIFEST}" in run.unreadable[0][1]
    assert len(run.unreadable[0][1]) < 1000
    assert [entry.name for entry in run.checkpoints] == ["step-00000001", OLDER]
    assert_falls_back(path, capsys)
    assert file.read_bytes() == HOSTILE_MANIFESTS[case], "what is damaged is not touched"


ODD_MANIFESTS = {
    "a time without end": {"created_at": "9999-12-31T23:59:59-14:00"},
    "a time before time": {"created_at": "0001-01-01T00:00:00+14:00"},
    "no time": {"created_at": "yesterday"},
    "a long time": {"created_at": "9" * 100_000},
    "a parent that never was": {"parent": "../../etc"},
    "another run": {"run_id": "somebody else's"},
    "terminal escapes in a metric": {"metrics": {"\x1b[31mval_loss\n": 0.0}},
    "the largest step": {"step": 2**53, "epoch": 2**53, "sequence": 2**53, "attempt": 2**53},
    "files that are not there": {"files": [{"name": "a", "size": 2**53, "digest": digest(b"")}]},
    "unknown entries": {"future": {"a": [1, 2]}},
}


@pytest.mark.parametrize("case", ODD_MANIFESTS)
def test_odd_manifests_break_nothing(path, case):
    """A manifest may be well-formed and still say strange things; every question about the run has an answer."""
    run_id = highcamp.open(path).run_id
    (checkpoint_of(path) / MANIFEST).write_bytes(signed(manifest_text(**{"run_id": run_id, **ODD_MANIFESTS[case]})))

    run = highcamp.open(path)

    assert {OLDER, "step-00000001"} <= {entry.name for entry in run.checkpoints}
    for entry in run.checkpoints:
        assert entry.created_at.tzinfo is not None
    assert run.best.name == OLDER
    assert run.plan(Keep(best=1, last=1)).keep
    assert OLDER in states(path)
    assert repr(run.checkpoints)


def test_a_newer_version_is_unreadable_and_untouched(path, capsys):
    """A checkpoint of tomorrow's highcamp is listed, named, and left alone by resume, save, prune and sweep."""
    text = json.dumps({"format": 2, "everything": "else is different"}, indent=2)
    for number, data in enumerate([text.encode(), signed(text)]):
        (checkpoint_of(path) / MANIFEST).write_bytes(data)
        before = {file.name: file.read_bytes() for file in checkpoint_of(path).iterdir()}

        assert states(path)[NEWEST] == "unreadable"
        assert "format version 2, this highcamp reads up to 1" in highcamp.open(path).unreadable[0][1]
        assert_falls_back(path, capsys, to=2 + 2 * number)

        train(path, epochs=4 + number, keep=Keep(best=1, last=1))
        assert {file.name: file.read_bytes() for file in checkpoint_of(path).iterdir()} == before


def resigned(path, name, data, checkpoint=NEWEST):
    """Replace a file of a checkpoint and make its manifest fit: a forger can do that, and so can a bug of ours."""
    where = checkpoint_of(path, checkpoint)
    (where / name).write_bytes(data)
    manifest = decode((where / MANIFEST).read_bytes(), where="")
    files = tuple(File(name, len(data), digest(data)) if file.name == name else file for file in manifest.files)
    (where / MANIFEST).write_bytes(encode(msgspec.structs.replace(manifest, files=files)))


def state_text(model="null", digests="{}", progress="null"):
    """A `state.json`."""
    return f'{{"format": 1, "objects": {{"model": {model}, "progress": {progress}}}, "digests": {digests}}}'.encode()


HOSTILE_STATES = {
    "empty": b"",
    "not JSON": b"\x80\x04\x95 cos\nsystem\n(S'true'\ntR.",
    "NaN": state_text("NaN"),
    "duplicate key": state_text('{"kernel": 1, "kernel": 2}'),
    "depth 100,000": state_text("[" * 100_000 + "]" * 100_000),
    "depth 100,000 of tuples": state_text('{"$tuple":[' * 100_000 + "]}" * 100_000),
    "5,000-digit integer": state_text("9" * 5000),
    "5,000-digit tagged integer": state_text('{"$int": "' + "9" * 5000 + '"}'),
    "a million-digit tagged integer": state_text('{"$int": "' + "9" * 1_000_000 + '"}'),
    "unknown tag": state_text('{"$class": "os.system"}'),
    "unknown scalar": state_text('{"$scalar": ["object", 1]}'),
    "bad base64": state_text('{"$bytes": "%%%"}'),
    "unhashable key": state_text('{"$items": [[[1], 2]]}'),
    "tuple of no list": state_text('{"$tuple": 3}'),
    "namedtuple of a module": state_text('{"$namedtuple": ["os.system", ["true"]]}'),
    "tensor that is not there": state_text('{"$tensor": "../../../../etc/passwd"}'),
    "tensor of a number": state_text('{"$tensor": 3}'),
    "huge counter": state_text('{"$counter": [["a", 1e999]]}'),
    "a list": b"[]",
    "no objects": b'{"format": 1, "digests": {}}',
    "other objects": b'{"format": 1, "objects": {"other": 1}, "digests": {}}',
    "digests is a list": state_text(digests="[]"),
    "digests of numbers": state_text(digests='{"model.safetensors": [1, 2]}'),
    "lone surrogate": state_text('"\\ud800"'),
    "trailing bytes": state_text() + b"x",
    "progress is text": state_text('{"$tensor": "kernel"}', progress='"far"'),
    "progress counts in text": state_text(progress='{"epoch": "1", "step": 1, "batch": 0, "random": null}'),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", HOSTILE_STATES)
def test_hostile_state(path, capsys, case):
    """Even with a digest that fits, what a file says is checked before it is believed, and nothing is named and imported."""
    resigned(path, STATE, HOSTILE_STATES[case])

    run = highcamp.open(path)

    assert len(run.checkpoints) == 3
    assert set(states(path)) == {"step-00000001", OLDER, NEWEST}
    with pytest.raises(Damaged, match=NEWEST):
        restore_all(run.checkpoint(NEWEST))
        raise Damaged(f"{NEWEST}: only its progress is malformed, which the next lines look at")
    assert_falls_back(path, capsys)


def run_of(name):
    """Bytes under our names that other libraries would load, and a way to notice that somebody did."""

    class Trap:
        def __reduce__(self):
            return os.system, ("touch /tmp/highcamp-trap",)

    if name == "pickle":
        return pickle.dumps(Trap())
    if name == "zip":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Trap()))
            archive.writestr("../../outside", b"x")
        return file.getvalue()
    if name == "npy":
        file = io.BytesIO()
        np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
        return file.getvalue()
    file = io.BytesIO()
    with h5py.File(file, "w") as document:
        document["kernel"] = np.zeros(3)
        document["link"] = h5py.ExternalLink("/etc/passwd", "/")
    return file.getvalue()


AUDITED = """
import sys
import highcamp
from highcamp.errors import Damaged
path = sys.argv[1]
for checkpoint in highcamp.open(path).checkpoints[:2]:   # everything that loading imports is imported now
    assert checkpoint.verify().ok
    [checkpoint.state(name) for name in checkpoint.objects]
    checkpoint.load("model")
forbidden = ("pickle.", "exec", "compile", "import", "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.",
             "socket.", "ctypes.dlopen", "marshal.", "code.", "shutil.")
events = []
sys.addaudithook(lambda event, arguments: events.append((event, arguments)) if event.startswith(forbidden) else None)
run = highcamp.open(path)
states = [result.state for result in run.verify()]
newest = run.checkpoints[-1]
problems = []
for name in newest.objects:
    for attempt in (newest.load, newest.state):
        try:
            attempt(name)
        except Damaged as error:
            problems.append(error)
print(len(problems), events)
"""


@pytest.mark.parametrize("name", [TENSORS, STATE, MANIFEST])
@pytest.mark.parametrize("kind", ["pickle", "zip", "npy", "h5"])
@pytest.mark.parametrize("is_signed", [False, True], ids=["unsigned", "signed"])
def test_foreign_bytes_run_no_code(path, kind, name, is_signed):
    """Loading a checkpoint from the internet must be safe: nothing is unpickled, unpacked, imported or executed."""
    data = run_of(kind)
    if is_signed and name != MANIFEST:
        resigned(path, name, data)
    else:
        (checkpoint_of(path) / name).write_bytes(data)

    done = subprocess.run(
        [sys.executable, "-c", AUDITED, str(path)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(highcamp.__file__).parent.parent)},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    count, _, events = done.stdout.strip().partition(" ")
    assert events == "[]"
    assert int(count) >= (0 if name == MANIFEST else 2)
    assert not Path("/tmp/highcamp-trap").exists()  # noqa: S108


# ---------------------------------------------------------------------------------------------- what is done about it


def test_all_damaged_is_an_error_and_never_a_fresh_start(path):
    """Weeks of training must not be begun again, and pruned away, because nothing could be read this morning."""
    damaged = [checkpoint_of(path, f"step-0000000{number}") / TENSORS for number in (1, 2, 3)]
    good = [file.read_bytes() for file in damaged]
    for file in damaged:
        file.write_bytes(b"x" * file.stat().st_size)

    for _ in range(2):
        with pytest.raises(Damaged, match=f"none is whole: {NEWEST}, {OLDER}, step-00000001"):
            train(path, epochs=9)
    for file in damaged:
        os.truncate(file, 100)
    with Checkpointer(path) as checkpointer, pytest.raises((Damaged, Refused), match="not restored|none is whole"):
        checkpointer.save({"kernel": np.zeros(3)}, step=1)
    for number in (1, 2, 3):
        (checkpoint_of(path, f"step-0000000{number}") / MANIFEST).write_bytes(b"")
    with pytest.raises(Damaged, match="none is whole"):
        train(path, epochs=9)
    with Checkpointer(path) as checkpointer, pytest.raises((Damaged, Refused)):
        checkpointer.save({"kernel": np.zeros(3)}, step=1)

    assert sorted(entry.name for entry in (path / "checkpoints").iterdir()) == ["step-00000001", OLDER, NEWEST]
    assert all(file.exists() for file in damaged)
    assert good


@pytest.mark.parametrize("broken", [(3,), (2, 3), (1, 3), (2,)])
def test_resume_falls_back(path, capsys, broken):
    """The newest whole one, however many newer ones are broken, and each of those is named."""
    for number in broken:
        flip(checkpoint_of(path, f"step-0000000{number}") / TENSORS)
    expected = max({1, 2, 3} - set(broken))

    found, kernel = resume(path)

    said = capsys.readouterr().err
    assert found.epoch == expected
    assert np.array_equal(kernel, weights_at(expected))
    for number in broken:
        assert (f"step-0000000{number}: model.safetensors differs from its digest" in said) == (number > expected)
    assert f"resumed from step-0000000{expected} instead" in said or expected == 3


def flip(file, at=-1):
    """Change one bit."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_no_shared_fate(path):
    """Each checkpoint stands alone: with all others broken, the newest still loads, bit for bit."""
    for name in ("step-00000001", OLDER):
        for file in checkpoint_of(path, name).iterdir():
            file.write_bytes(b"")

    found, kernel = resume(path)

    assert found.name == NEWEST
    assert np.array_equal(kernel, weights_at(3))
    assert highcamp.open(path).checkpoint(NEWEST).verify().ok


def test_error_names_the_damage(path):
    """Whoever reads the error knows what broke, where, by how much, and what to do."""
    os.truncate(checkpoint_of(path) / TENSORS, 812)

    with pytest.raises(Damaged) as caught:
        highcamp.open(path).checkpoint(NEWEST).load("model")

    assert re.fullmatch(
        rf'{NEWEST}: model\.safetensors is 812 bytes, its manifest says \d+; "highcamp verify {path}" shows what is left',
        str(caught.value),
    )
    assert caught.value.path == str(checkpoint_of(path))


def test_truncated_while_mapped(path, monkeypatch):
    """Mapped arrays outlive their checkpoint, and verifying never maps: a shrinking file would end the process."""
    run = highcamp.open(path)
    arrays = run.checkpoint("step-00000001").load("model")
    run.remove("step-00000001")
    run.empty_trash()

    assert np.array_equal(arrays["kernel"], weights_at(1))
    monkeypatch.setattr(LocalReader, "map", lambda _: pytest.fail("mapped"))
    assert all(result.ok for result in run.verify())
    assert np.array_equal(run.best.state("model")["kernel"], weights_at(2))


def test_names_never_become_paths(path):
    """What people and files call things is checked before it is joined to a directory."""
    hostile = [
        "../x",
        "..",
        ".",
        "",
        "a/b",
        "a\\b",
        "a\0b",
        "%2e%2e/x",
        ".hidden",
        "a" * 101,
        "CON",
        "é",
        "a\nb",
        "/etc",
    ]
    run = highcamp.open(path)
    before = sorted(str(file) for file in path.parent.rglob("*"))
    for name in hostile:
        with pytest.raises(highcamp.InvalidArgument):
            run.pin("best", name)
        with pytest.raises(highcamp.InvalidArgument):
            Checkpointer(path).track(**{name: {"kernel": np.zeros(3)}})
        for ask in (run.checkpoint, run.undelete, run.unpin, run.remove):
            with pytest.raises(highcamp.CheckpointNotFound):
                ask(name)

    assert sorted(str(file) for file in path.parent.rglob("*")) == before


def test_a_damaged_history_hides_no_checkpoint(path):
    """Torn and hostile rows are passed over; the metrics of a checkpoint are in its manifest too."""
    rows = [
        b"", b"{", b"null", b"[]", b'{"event":"log"}', b'{"event":"log","at":"x","metrics":{"val_loss":NaN}}',
        b'{"event":"log","at":"9999-12-31T23:59:59-14:00","step":1,"metrics":{"other":1.0}}', b"[" * 100_000,
        b'{"event":"log","at":"x","step":' + b"9" * 5000 + b"}", b"\xff\xfe", b'{"event":"start","at":"x","step":-5}',
    ]  # fmt: skip
    history = path / "history" / "attempt-0001.jsonl"
    with history.open("ab") as file:
        file.write(b"\n".join(rows))
    (path / "history" / "attempt-0002.jsonl").write_bytes(b"\x00" * 5000)
    (path / "history" / "notes.txt").write_bytes(b"hello")

    run = highcamp.open(path)

    assert [entry.metrics["val_loss"] for entry in run.checkpoints] == LOSSES
    assert run.best.name == OLDER
    assert resume(path)[0].name == NEWEST


def test_mixed_damage_at_random(path, capsys):
    """Forty runs with several things broken at once: never a crash, never a wrong byte."""
    rng = random.Random(20260131)
    good = Path(shutil.copytree(path, path.parent / "good"))
    for _ in range(40):
        shutil.rmtree(path)
        shutil.copytree(good, path)
        for _ in range(rng.randint(1, 4)):
            file = checkpoint_of(path, f"step-0000000{rng.randint(1, 3)}") / rng.choice(FILES)
            damage = rng.choice(["flip", "truncate", "remove", "zero"])
            if not file.exists() or file.stat().st_size == 0:
                continue
            if damage == "flip":
                flip(file, rng.randrange(file.stat().st_size))
            elif damage == "truncate":
                os.truncate(file, rng.randrange(file.stat().st_size))
            elif damage == "remove":
                file.unlink()
            else:
                file.write_bytes(bytes(file.stat().st_size))
        whole = [name for name, state in states(path).items() if state == "whole"]

        try:
            found, kernel = resume(path)
        except Damaged:
            assert whole == []
        else:
            assert (found.name if found else None) == max(whole, default=None)
            assert found is None or np.array_equal(kernel, weights_at(found.epoch))
    capsys.readouterr()
