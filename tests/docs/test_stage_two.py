"""The table of what each stage goes with: the page shows the data, and each row has its tests."""

import re

import pytest

from tests.support.pages import ROOT
from tests.support.pairs import REFUSED, ROWS, STAGES, WORKS, table


def test_the_page_shows_the_data():
    page = (ROOT / "docs" / "frameworks.md").read_text("utf-8")
    shown = re.search("<!-- stages begin -->\n(.*)\n<!-- stages end -->", page, re.DOTALL)
    assert shown is not None
    assert shown[1] == table()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.feature)
def test_each_row_has_its_tests(row):
    assert all(row.cell(stage).startswith((WORKS, REFUSED)) for stage in STAGES)
    assert set(row.cells) <= set(STAGES)
    for file, name in (*row.tests, *row.in_backward):
        pattern = rf"^(def )?{re.escape(name)}\("
        assert re.search(pattern, (ROOT / file).read_text("utf-8"), re.MULTILINE), name
    if not row.tests:
        programs = (ROOT / "tests" / "torch" / "test_pairs.py").read_text("utf-8")
        assert re.search(rf'@program\(\s*"{re.escape(row.feature)}"', programs)
