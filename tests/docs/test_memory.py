"""The table of docs/memory.md is what the planner computes."""

import re

from benchmarks.report.memory import bytes_text
from tests.support.pages import ROOT


def test_bytes_by_stage_are_those_planned():
    page = (ROOT / "docs" / "memory.md").read_text("utf-8")
    shown = re.search("<!-- bytes begin -->(.*)<!-- bytes end -->", page, re.DOTALL)
    assert shown[1].strip() == bytes_text()
