"""Links lead somewhere, and what pages say of the code is complete."""

import re

import pytest
import yaml

from tests.support.pages import ARCHITECTURE, PAGES, README, ROOT, anchors, links, name_of

MODULES = sorted(each for each in (ROOT / "shardopt").rglob("*") if each.suffix in (".py", ".cu"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(page):
    for link in links(page):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_pages_link_to_all_of_docs():
    for page in (README, ROOT / "docs" / "index.md"):
        linked = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
        pages = {page for page in (ROOT / "docs").glob("*.md") if page.name != "index.md"}
        assert pages <= linked, name_of(page)


def test_the_readme_stays_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


def test_a_heading_that_comes_twice_has_two_anchors(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c!\n\n```sh\n# no heading\n```\n\n## Save_it\n## Save_it\n")
    assert anchors(page) == ["a-b-c", "save_it", "save_it-1"]


def defined_notes():
    """Return {name: file} of the notes that are defined in the package: alone on their line."""
    return {
        name: module
        for module in MODULES
        for name in re.findall(
            r"^(?:\s*|// )\[Note: ([^\]]+)\]$", module.read_text("utf-8"), re.MULTILINE
        )
    }


def test_all_notes_are_listed_with_the_file_that_defines_them():
    table = re.search(
        "<!-- notes begin -->(.*)<!-- notes end -->", ARCHITECTURE.read_text("utf-8"), re.DOTALL
    )
    rows = re.findall(r"^\| \[Note: ([^\]]+)\] \| \[.*?\]\((\S+?)\) \|", table[1], re.MULTILINE)
    listed = {name: (ARCHITECTURE.parent / link).resolve() for name, link in rows}
    assert len(rows) == len(listed)
    assert listed == defined_notes()


def test_notes_that_the_code_refers_to_are_defined():
    defined = defined_notes()
    for module in MODULES:
        for name in re.findall(r"\[Note:([^\]]+)\]", module.read_text("utf-8")):
            assert " ".join(name.replace("#", " ").split()) in defined, (module, name)


def test_the_citation_has_what_its_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
