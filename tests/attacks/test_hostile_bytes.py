"""Bytes that nobody thought of: each parser reads them to a value that comes back, or refuses them with our own error."""

from __future__ import annotations

import json
import shutil
import tempfile
import tracemalloc
from itertools import count
from pathlib import Path

import msgspec
import pytest
from attack_parsers import CORPUS, PARSERS, read_slot, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from highcamp.core.array import DTYPES
from highcamp.core.digest import digest
from highcamp.core.manifest import File, Manifest, Object, encode
from highcamp.core.tensorfile import plan
from highcamp.run.history import Event, SaveCost
from highcamp.run.owner import Owner
from highcamp.run.settings import MonitorFacts, Settings
from highcamp.training import identity, slot
from highcamp.training.slot import Slot, SlotFile

MB = 1 << 20
FACTS = Manifest(
    run_id="r", step=3, epoch=3, sequence=3, attempt=1, created_at="2026-01-31T08:00:00.000Z", metrics={"val_loss": 0.4},
    files=(File("a.safetensors", 1, digest(b"")), File("state.json", 9, digest(b"x"))),
    objects={"a": Object(("a.safetensors",), 1, 1, weights=True)}, versions={"highcamp": "0"},
)  # fmt: skip
LAYOUT = plan({"a/b": ("F32", (2, 3)), "c": ("BF16", ()), "d": ("U8", (0, 4))}, {"format": "pt"})
STATE = {
    "format": 1,
    "objects": {
        "a": {"w": {"$tensor": "w"}, "n": [1, 2.5, None, "x", {"$int": "123456789012345678901"}, {"$float": "nan"}]},
        "b": {
            "$items": [[{"$tuple": [1, "k"]}, {"$namedtuple": ["T", {"mu": {"$tensor": "mu"}}]}], [2, {"$set": [1, 2]}]]
        },
    },
    "digests": {"a.safetensors": [digest(b"")]},
    "kinds": {"a": {"w": "torch"}},
}
EVENTS = [
    Event(event="start", at="2026-01-31T08:00:00.000Z", step=0, host="h", pid=1),
    Event(event="log", at="2026-01-31T08:00:00.000Z", row=2, step=3, epoch=1, metrics={"val_loss": 0.4}),
    Event(
        event="save", at="", row=3, step=3, checkpoint="step-00000003", cost=SaveCost(pause_seconds=0.1, new_bytes=9)
    ),
    Event(event="end", at="", row=4, how="complete"),
]
SOUND = {
    "tensorfile": LAYOUT.header + bytes(LAYOUT.size),
    "manifest": encode(FACTS),
    "signed": encode(FACTS)[: -len(b',\n  "digest": "xxh3-128:"\n}\n') - 32],
    "state": json.dumps(STATE).encode(),
    "json": json.dumps(STATE).encode(),
    "history": b"".join(msgspec.json.encode(event) + b"\n" for event in EVENTS),
    "owner": msgspec.json.encode(Owner(host="h", boot="b", namespace="n", pid=1, started="2", since="s")),
    "run": msgspec.json.encode(
        Settings(run_id="r", created_at="", monitor=MonitorFacts("val_loss", "min"), keep={"best": 1})
    ),
}
EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FRAGMENTS = st.sampled_from(
    [
        b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"\n", b"\0", b"\xff", b"\\ud800", b"null", b"true", b"NaN", b"-",
        b"1e999", b"-0.0", b"9" * 30, b"1e308", b'{"$tensor":"w"}', b'{"$tuple":[]}', b'{"$int":"-0"}', b'"$set"',
        b'{"$bytes":""}', b'{"$items":[]}', b"../", b'"format":2,', b" " * 4096, "\u202e\U0001f600".encode(), b"[" * 600,
    ]
)  # fmt: skip


@st.composite
def changed(draw, sound):
    """Sound bytes with a few things done to them."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 5)):
            case 0 if data:
                data[at % len(data)] ^= 1 << draw(st.integers(0, 7))
            case 1:
                data[at:at] = draw(st.one_of(FRAGMENTS, st.binary(max_size=8)))
            case 2:
                del data[at : at + draw(st.integers(1, 20))]
            case 3:
                del data[at:]
            case 4:
                data += data[at : at + 200]
            case _:
                data[at : at + draw(st.integers(0, 12))] = draw(FRAGMENTS)
    return bytes(data)


@pytest.mark.parametrize("name", PARSERS)
def test_what_is_sound_is_read(name):
    """A parser that refuses everything would pass all that follows."""
    assert refusal(PARSERS[name], SOUND[name]) is None


@pytest.mark.parametrize("name", PARSERS)
@EXAMPLES
@given(data=st.one_of(st.binary(max_size=300), st.lists(FRAGMENTS, max_size=12).map(b"".join)))
def test_any_bytes(name, data):
    """An error that is none of ours ends a training that could have gone on from the checkpoint before."""
    refusal(PARSERS[name], data)


@pytest.mark.parametrize("name", PARSERS)
@EXAMPLES
@given(data=st.data())
def test_sound_bytes_changed(name, data):
    """Damage looks almost right."""
    refusal(PARSERS[name], data.draw(changed(SOUND[name])))


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=6), st.sampled_from(["$int", "$tensor", "../x", "CON", "nan", "xxh3-128:" + "0" * 32]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=5,
)  # fmt: skip
TAGS = st.sampled_from(
    ["$tensor", "$tuple", "$namedtuple", "$items", "$int", "$float", "$complex", "$bytes", "$scalar", "$set", "$frozenset",
     "$counter", "$class"]
)  # fmt: skip
TREES = st.recursive(
    VALUES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.builds(lambda tag, content: {tag: content}, TAGS, inner),
        st.tuples(st.text(max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)).map(
            lambda pair: {"$namedtuple": list(pair)}
        ),
        st.lists(st.tuples(inner, inner).map(list), max_size=3).map(lambda pairs: {"$items": pairs}),
        st.lists(inner, max_size=3).map(lambda content: {"$tuple": content}),
        st.builds(lambda dtype, value: {"$scalar": [dtype, value]}, st.sampled_from([*DTYPES, "O"]), inner),
        st.lists(st.tuples(inner, st.integers()).map(list), max_size=2).map(lambda pairs: {"$counter": pairs}),
    ),
    max_leaves=12,
)  # fmt: skip


@EXAMPLES
@given(st.one_of(TREES, st.just(None)), TREES)
def test_trees_of_any_structure(one, other):
    """The tags are a language, and somebody will write what no grammar book foresees."""
    refusal(PARSERS["state"], json.dumps({"format": 1, "objects": {"a": one, "b": other}, "digests": {}}).encode())


NUMBERS = st.one_of(
    st.integers(-2, 40), st.sampled_from([2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, True, None, 1.0, "1"])
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(sorted(DTYPES)), st.just("O"), VALUES),
        "shape": st.one_of(st.lists(NUMBERS, max_size=4), VALUES),
        "data_offsets": st.one_of(st.lists(NUMBERS, min_size=2, max_size=2), VALUES),
        "more": VALUES,
    },
)


@EXAMPLES
@given(
    st.lists(st.tuples(st.one_of(st.text(max_size=4), st.just("__metadata__")), st.one_of(ENTRIES, VALUES)), max_size=4),
    st.integers(0, 40), st.integers(-3, 3),
)  # fmt: skip
def test_headers_of_any_structure(entries, size, more):
    """Every library that reads headers has had its overflow."""
    table = ("{" + ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in entries) + "}").encode()
    refusal(PARSERS["tensorfile"], max(0, len(table) + more).to_bytes(8, "little") + table + bytes(size))


@EXAMPLES
@given(st.dictionaries(st.sampled_from([*Manifest.__struct_fields__, "more"]), VALUES, max_size=4))
def test_manifests_of_any_structure(changes):
    """A manifest decides what exists, what is read and what is removed."""
    text = json.dumps({**json.loads(SOUND["signed"] + b"}"), **changes}, indent=2)
    refusal(PARSERS["signed"], text[:-2].encode("utf-8", "surrogatepass"))


@EXAMPLES
@given(
    st.sampled_from(["history", "owner", "run"]),
    st.lists(st.dictionaries(st.sampled_from([*Event.__struct_fields__, *Owner.__struct_fields__, *Settings.__struct_fields__]),
                             VALUES, max_size=6), max_size=4),
)  # fmt: skip
def test_rows_and_records_of_any_structure(name, rows):
    """Whoever may write to the directory may write these, and a reader only wanted to look."""
    refusal(PARSERS[name], b"".join(json.dumps(row).encode() + b"\n" for row in rows))


@pytest.fixture(scope="module")
def shared():
    """A directory in the place of shared memory, and a sound file in it as a killed process leaves it."""
    where = Path(tempfile.mkdtemp(prefix="highcamp-"))
    owner = identity.current("run", 1, None)
    made = Slot(str(where / slot.file_name(owner, 0)), owner, LAYOUT.size, count(1, 2))
    made.begin()
    made.view[: LAYOUT.size] = bytes(LAYOUT.size)
    made.seal({"step": 3}, [SlotFile("a.safetensors", LAYOUT, 0)])
    path = Path(made.path)
    made.release()
    yield path, path.read_bytes()
    shutil.rmtree(where)


def test_a_sound_slot_is_read(shared):
    """As above."""
    path, sound = shared

    assert read_slot(sound, path).step == 3


@EXAMPLES
@given(data=st.data())
def test_slots_changed(shared, data):
    """What is in shared memory when a process dies may be anything, and the next one begins with it."""
    path, sound = shared
    header = data.draw(st.one_of(changed(sound[: slot.IDENTITY_START]), changed(sound[:600]), st.binary(max_size=300)))

    refusal(
        lambda found: read_slot(found, path),
        header.ljust(len(header) if data.draw(st.booleans()) else 600)[:600] + sound[600:],
    )


@EXAMPLES
@given(
    sizes=st.lists(st.one_of(st.integers(0, 40_000), st.integers(0, 2**64 - 1)), min_size=5, max_size=5),
    places=st.sets(st.integers(0, 4)),
    table=st.one_of(st.none(), TREES.map(lambda tree: json.dumps(tree).encode()), st.binary(max_size=50)),
)
def test_slot_tables_of_any_structure(shared, sizes, places, table):
    """Sizes and digests that fit each other, around a table that lies."""
    path, sound = shared
    numbers = list(slot.STATE.unpack_from(sound, slot.STATE_START))
    for place in places:
        numbers[place] = sizes[place]
    content = bytearray(sound)
    if table is not None:
        start = slot.STATE.unpack_from(sound, slot.STATE_START)[2]
        content[start : start + len(table)] = table
        numbers[2:] = [start, len(table), len(table), digest(table).encode()]
    body = slot.STATE.pack(*numbers)
    content[slot.STATE_START : slot.STATE_START + slot.STATE_BYTES] = body + digest(body).encode()

    refusal(lambda found: read_slot(found, path), bytes(content))


@pytest.mark.parametrize("name", PARSERS)
def test_a_megabyte_of_any_fragment_takes_little_memory(name):
    """A small file would take the machine down; the larger ones that are allowed are looked at in test_limits.py."""
    for unit in (b"[", b'{"a":', b'"', b"\n", b"1,", b"\\u0041", b'{"$tuple":['):
        data = SOUND[name][:8] + unit * (MB // len(unit))
        tracemalloc.start()
        refusal(PARSERS[name], data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200 * MB


def test_the_corpus_is_where_the_fuzzer_begins():
    """Attacks are what to vary."""
    assert {path.name for path in CORPUS.iterdir() if path.is_dir()} <= set(PARSERS)
