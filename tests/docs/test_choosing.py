"""docs/choosing.md shows what the formulas of the optimizer give, and the newest measurement."""

import re

import pytest

from benchmarks import PLOTS_FOLDER, RESULTS_FOLDER
from benchmarks.__main__ import main
from benchmarks.report.stages import stages_text
from tests.support.pages import ROOT

FIGURE = PLOTS_FOLDER / "choosing.svg"
REDRAW = "run python -m benchmarks plot choosing"


def test_the_figure_is_the_one_that_is_drawn(tmp_path):
    path = tmp_path / "choosing.svg"
    main(["plot", "choosing", "--to", str(path)])
    assert path.read_text("utf-8") == FIGURE.read_text("utf-8"), REDRAW


@pytest.mark.parametrize(
    ("dtype", "stage_one", "stage_two", "in_backward"),
    [("float32", 4 + 8 * 4 + 8, 4 + 4 + 8, 4 + 8), ("bfloat16", 2 + 8 * 2 + 12, 2 + 4 + 12, 14)],
)
def test_bars_are_as_long_as_the_pages_formulas_say(dtype, stage_one, stage_two, in_backward):
    from benchmarks.report.choosing_plot import rows

    totals = [sum(row.parts[1]) for row in rows(dtype)[::2]]
    most_beside = 0.08 * (4 if dtype == "float32" else 2) + 0.01  # ring of 5 %, late gradients
    assert totals[0] == pytest.approx(stage_one, rel=1e-3)
    for total, formula in zip(totals[1:], (stage_two, in_backward), strict=True):
        assert formula < total < formula + most_beside


def test_the_page_shows_the_newest_measurement():
    page = (ROOT / "docs" / "choosing.md").read_text("utf-8")
    shown = re.search("<!-- stages begin -->(.*)<!-- stages end -->", page, re.DOTALL)
    redo = "run python -m benchmarks tables --stages --into docs/choosing.md"
    assert shown[1].strip() == stages_text(RESULTS_FOLDER), redo
