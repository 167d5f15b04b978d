"""manifest.json: the file whose presence makes a checkpoint exist."""

from __future__ import annotations

import json
import math
import random

import msgspec
import pytest
import xxhash

from highcamp.core import strict
from highcamp.core.manifest import File, Manifest, Object, decode, encode, join_metrics, split_metrics
from highcamp.errors import Damaged, Unreadable

DIGEST = "xxh3-128:" + "0" * 32


def _manifest(**changes):
    metrics, nonfinite = split_metrics({"val_loss": 0.1 + 0.2, "loss": math.nan, "grad": -math.inf, "tiny": 5e-324})
    facts = {
        "run_id": "0123456789abcdef", "step": 450, "epoch": 3, "batch": 2, "sequence": 9, "attempt": 2,
        "parent": "step-00000400", "created_at": "2026-01-31T08:00:00.000Z", "metrics": metrics, "nonfinite": nonfinite,
        "files": (File("model.safetensors", 1024, DIGEST), File("state.json", 80, DIGEST)),
        "objects": {"model": Object(("model.safetensors",), 3, 512), "progress": Object()},
        "versions": {"highcamp": "0.1.0", "name": 'quote " and \\ and ü'},
    }  # fmt: skip
    return Manifest(**{**facts, **changes})


def _signed(body):
    """The bytes of a manifest with a right digest, whatever is in it."""
    head = body.removesuffix(b"\n}")
    return head + f',\n  "digest": "xxh3-128:{xxhash.xxh3_128_hexdigest(head)}"\n}}\n'.encode()


def _edited(**changes):
    document = json.loads(encode(_manifest()))
    del document["digest"]
    return _signed(json.dumps({**document, **changes}, indent=2).encode())


def test_a_manifest_comes_back():
    """A fact that changes on its way to the disk and back is no fact."""
    manifest = _manifest()

    found = decode(encode(manifest), where="m")

    assert found == manifest
    assert repr(found.values) == repr({"val_loss": 0.1 + 0.2, "loss": math.nan, "grad": -math.inf, "tiny": 5e-324})
    assert found.order == (450, 9, 9)


def test_encoding_is_canonical():
    """Two machines that write the same facts must write the same bytes."""
    data = encode(_manifest())

    assert encode(decode(data, where="m")) == data
    assert data.endswith(b'"\n}\n')
    assert json.loads(data, parse_constant=pytest.fail)["metrics"]["loss"] is None
    assert json.loads(data)["nonfinite"] == {"loss": "nan", "grad": "-inf"}


def test_the_digest_is_of_every_byte_before_it():
    """As the format says, so that any language can check it."""
    data = encode(_manifest())
    head, _, tail = data.partition(b',\n  "digest": "')

    assert tail == f'xxh3-128:{xxhash.xxh3_128_hexdigest(head)}"\n}}\n'.encode()


def test_every_flipped_bit_is_found():
    """A flipped bit in the epoch would resume at another one."""
    data = encode(_manifest())
    for at in range(len(data)):
        altered = bytearray(data)
        altered[at] ^= 1 << at % 8
        with pytest.raises(Damaged):
            decode(bytes(altered), where="m")


def test_every_truncation_is_found():
    """A crash while it was copied leaves the beginning of it."""
    data = encode(_manifest())
    for length in range(len(data)):
        with pytest.raises(Damaged):
            decode(data[:length], where="m")
    for more in (b"\n", b" ", b"}", data):
        with pytest.raises(Damaged):
            decode(data + more, where="m")


def test_newer_is_unreadable():
    """A format of the future is listed, never touched, and not called damaged."""
    document = json.loads(encode(_manifest()))
    document["format"] = 2
    for data in (
        _edited(format=2),
        encode(_manifest()).replace(b'"format": 1', b'"format": 2'),
        json.dumps({"format": 2, "anything": "else"}).encode(),
        b'{"format":7}',
    ):
        with pytest.raises(Unreadable, match=r"has format version \d, this highcamp reads up to 1"):
            decode(data, where="m")
    for data in (b'{"other": 1, "format": 2}', b"format 2", b'{"format": 99999999999}', b'{"format": "2"}'):
        with pytest.raises(Damaged) as error:
            decode(data, where="m")
        assert not isinstance(error.value, Unreadable)


def test_fields_of_a_newer_minor_version_are_passed_over():
    """Additions must not make a checkpoint unreadable."""
    assert decode(_edited(healthy=True), where="m").step == 450


def _body(manifest):
    return encode(manifest)[: encode(manifest).rindex(b',\n  "digest"')] + b"\n}"


FORGED = {
    "duplicate key": (b'"step": 450', b'"step": 450, "step": 7'),
    "the same entry twice": (b'"step": 450,\n', b'"step": 450,\n  "step": 450,\n'),
    "one instead of another": (b'"batch": 2', b'"step": 450'),
    "a metric twice": (b'"tiny": 5e-324', b'"tiny": 1.0,\n    "tiny": 5e-324'),
    "a size twice": (b'"size": 80', b'"size": 80,\n      "size": 81'),
    "an object twice": (b'"progress": {', b'"model": {},\n    "progress": {'),
    "a version twice": (b'"highcamp": "0.1.0"', b'"highcamp": "0.2.0", "highcamp": "0.1.0"'),
    "versions twice": (b'"versions": {', b'"versions": {},\n  "versions": {'),
    "objects twice, far apart": (b'"step": 450,', b'"objects": {},\n  "step": 450,'),
    "objects twice, spelled alike": (b'"step": 450,', b'"objects": {\n  },\n  "step": 450,'),
    "an entry in both halves": (b'"versions": {', b'"step": 7,\n  "versions": {'),
    "the same entry in both halves": (b'"versions": {', b'"step": 450,\n  "versions": {'),
    "a metric twice that stands in both halves": (b'"objects": {', b'"metrics": {},\n  "objects": {'),
    "twice where nobody looks": (b'"step": 450', b'"step": 450, "new": {"a": 1, "a": 2}'),
    "nan": (b'"loss": null', b'"loss": NaN'),
    "infinite": (b'"tiny": 5e-324', b'"tiny": 1e999'),
    "infinite where nobody looks": (b'"step": 450', b'"step": 450, "new": 1e999'),
    "a line end in a string": (b"0123456789abcdef", b"0123456\n789abcdef"),
    "a tab in a string": (b"0123456789abcdef", b"0123456\t789abcdef"),
    "half of a pair": (b"0123456789abcdef", b"0123456\\ud800789abcdef"),
    "a digit too many": (b'"step": 450', b'"step": 0450'),
    "a comma too many": (b'"step": 450,', b'"step": 450,,'),
    "a blank in a number": (b'"step": 450', b'"step": 4 50'),
    "a blank in a word": (b'"loss": null', b'"loss": nu ll'),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_another_hand_has_signed_is_read_strictly(name):
    """Two readers would find two steps in one file."""
    body = _body(_manifest())
    forged = body.replace(*FORGED[name])
    assert forged != body

    with pytest.raises(Damaged):
        decode(_signed(forged), where="m")


@pytest.mark.parametrize("manifest", [_manifest(), _manifest(versions={"a": "b"})], ids=["blanks in strings", "none"])
def test_another_spelling_of_the_same_facts_is_read(manifest):
    """Other tools may write manifests, with other blanks and orders; what they say counts, not how it looks."""
    document = json.loads(_body(manifest))
    bodies = [
        json.dumps(document, separators=(",", ":")), json.dumps(document, indent="\t"), json.dumps(document, indent=2),
        json.dumps(dict(reversed(document.items())), indent=2), json.dumps(document, indent=2, ensure_ascii=False),
    ]  # fmt: skip

    for body in bodies:
        whole = body.removesuffix("}").rstrip() + "\n}"
        assert decode(_signed(whole.encode()), where="m") == manifest


def test_nothing_is_read_that_a_strict_reader_refuses():
    """The fast reader forgives much; in 4,000 files that a forger or a bug could have signed it must not once be believed."""
    chance = random.Random(20260131)
    bits = [
        b'"',
        b",",
        b"0",
        b"1e999",
        b"NaN",
        b"{}",
        b'"step": 7,',
        b"\\ud800",
        b"\n",
        b"\x01",
        b"\xff",
        b" ",
        b"-",
        b"e0",
    ]
    read = 0
    for _ in range(4000):
        lines = _body(_manifest()).split(b"\n")
        entries = [line for line in lines if b'": ' in line and not line.endswith((b"{", b"["))]
        for _ in range(chance.randint(1, 2)):
            lines.insert(chance.randrange(1, len(lines) - 1), chance.choice(entries).rstrip(b",") + b",")
        if chance.random() < 0.3:
            del lines[chance.randrange(1, len(lines) - 1)]
        body = b"\n".join(lines)
        if chance.random() < 0.5:
            at = chance.randrange(1, len(body) - 2)
            body = body[:at] + chance.choice(bits) + body[at + chance.randrange(2) :]
        try:
            manifest = decode(_signed(body), where="m")
        except Damaged:
            continue
        read += 1
        document = strict.read(body, where="m", limit=len(body))
        assert (manifest.step, manifest.metrics) == (document["step"], document.get("metrics", {}))
    assert read > 20


def test_a_good_manifest_vouches_for_no_other():
    """The names in a manifest are mostly those of the one before; that must not let a bad one pass."""
    good, digests = _manifest(), {"digest": DIGEST, "size": 1}
    for _ in range(2):
        assert decode(encode(good), where="m") == good
        for files in ([{"name": "../x", **digests}], [{"name": "a", "size": 1, "digest": "md5:0"}]):
            with pytest.raises(Damaged, match="not allowed|no digest"):
                decode(_edited(files=files, objects={}), where="m")
        with pytest.raises(Damaged, match="object file 'model.safetensors' is not listed"):
            decode(_edited(files=[]), where="m")


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1}, {"step": 1.5}, {"step": True}, {"step": "450"}, {"step": 2**60}, {"format": 0}, {"run_id": None},
        {"metrics": {"a": "0.5"}}, {"nonfinite": {"a": "huge"}}, {"objects": {"../model": {}}}, {"objects": {".a": {}}},
        {"files": [{"name": "../../etc/passwd", "size": 1, "digest": DIGEST}]},
        {"files": [{"name": "manifest.json", "size": 1, "digest": DIGEST}]},
        {"files": [{"name": "a/b", "size": 1, "digest": DIGEST}]},
        {"files": [{"name": "a", "size": -1, "digest": DIGEST}]},
        {"files": [{"name": "a", "size": 1, "digest": "md5:0"}]},
        {"files": [{"name": "a", "size": 1, "digest": DIGEST + "\n"}]},
        {"files": [{"name": "a", "size": 1, "digest": DIGEST}] * 2},
        {"files": [{"name": name, "size": 1, "digest": DIGEST} for name in ("a", "A")]},
        {"objects": {"model": {"files": ["other.safetensors"]}}},
        {"files": {}}, {"objects": []}, {"parent": 3},
    ],
    ids=str,
)  # fmt: skip
def test_facts_that_cannot_be_are_refused(changes):
    """A file name in a manifest is opened: `../../etc/passwd` must never be one."""
    with pytest.raises(Damaged, match="m"):
        decode(_edited(**changes), where="m")


def test_a_missing_fact_is_refused():
    """A checkpoint without a step has no place in the order."""
    for name in ("run_id", "step", "epoch", "sequence", "attempt", "created_at"):
        document = json.loads(encode(_manifest()))
        del document["digest"], document[name]
        with pytest.raises(Damaged, match=name):
            decode(_signed(json.dumps(document, indent=2).encode()), where="m")


@pytest.mark.parametrize("data", [b"[" * 100_000, b"{" + b'"a":{' * 50_000, b"\xff" * 99, b"x" * (9 << 20)])
def test_hostile_bytes_are_damage(data):
    """RecursionError, UnicodeDecodeError or an hour of parsing would take the whole listing with them."""
    with pytest.raises(Damaged):
        decode(data, where="m")
    with pytest.raises(Damaged):
        decode(_signed(data), where="m")


def test_a_manifest_never_changes():
    """Facts are frozen."""
    with pytest.raises(AttributeError):
        _manifest().step = 3
    assert msgspec.structs.replace(_manifest(), step=3).step == 3


def test_metrics_are_split_and_joined():
    """JSON has no NaN; the reason why a value is missing stands beside it."""
    values = {"a": 1.0, "b": math.nan, "c": math.inf, "d": -math.inf, "e": -0.0}

    finite, nonfinite = split_metrics(values)

    assert finite == {"a": 1.0, "b": None, "c": None, "d": None, "e": -0.0}
    assert nonfinite == {"b": "nan", "c": "inf", "d": "-inf"}
    assert repr(join_metrics(finite, nonfinite)) == repr(values)
    assert math.isnan(join_metrics({"x": None}, {})["x"])
