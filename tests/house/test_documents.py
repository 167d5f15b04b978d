"""The documents agree with the code and with each other."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

import highcamp
from highcamp.core.manifest import File, Health, Manifest, Object
from highcamp.run.history import Event, SaveCost
from highcamp.run.owner import Owner
from highcamp.run.settings import PaceFacts, Settings

ROOT = Path(highcamp.__file__).parents[1]
FORMAT = (ROOT / "docs/format.md").read_text("utf-8")
MAX_SCREEN_LINES = 50
TABLES = {
    "`manifest.json`": (Manifest, {"digest"}),  # added to the encoded manifest, so no field of it
    "`owner.json`": (Owner, set()),
    "`run.json`": (Settings, set()),
    "`history/attempt-NNNN.jsonl`": (Event, set()),
}


@pytest.mark.parametrize("heading", TABLES)
def test_the_format_page_lists_every_field(heading):
    """Somebody who writes a reader from the page would meet a field that nobody told of."""
    struct, added = TABLES[heading]
    section = FORMAT.split(f"\n## {heading}\n")[1].split("\n## ")[0]

    listed = {
        name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }

    assert listed == {field.encode_name for field in msgspec.structs.fields(struct)} | added


def test_the_format_page_lists_the_entries_of_what_lies_inside():
    """As above, for what lies inside the manifest, an event or the settings."""
    names = {
        field.encode_name
        for struct in (File, Object, Health, SaveCost, PaceFacts)
        for field in msgspec.structs.fields(struct)
    }

    assert {name for name in names if f"`{name}`" not in FORMAT} == set()


def test_the_format_page_explains_every_tag():
    """A tag that the page does not know is a value that another reader loses."""
    sources = [path.read_text("utf-8") for path in (ROOT / "highcamp/core").glob("*.py")]
    tags = {tag for source in sources for tag in re.findall(r'"(\$[a-z]+)"', source)}

    assert "$tensor" in tags
    assert {tag for tag in tags if f'{{"{tag}":' not in FORMAT} == set()


def test_every_link_leads_somewhere():
    """A moved page leaves dead links behind."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    links = [
        (page, link) for page in pages for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text("utf-8"))
    ]

    assert links
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []


def test_decisions_are_numbered_without_gaps():
    """A decision is referred to by its number."""
    numbers = sorted(int(path.name[:4]) for path in (ROOT / "docs/adr").glob("*.md"))

    assert numbers == list(range(1, len(numbers) + 1))


def test_contributing_fits_on_a_screen_and_knows_every_target():
    """A page that nobody finishes reading is not followed."""
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)

    assert len(page.splitlines()) <= MAX_SCREEN_LINES
    assert [target for target in targets if target != "help" and f"`make {target}`" not in page] == []
