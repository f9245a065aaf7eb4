"""Rank 0 draws the report of a run, and no other rank needs what it takes."""

import subprocess
import sys

import pytest

from tests.support.launchers import LAUNCH
from train_lm.options import parse_options
from train_lm.report import Report, make_report

DRAWING = ("matplotlib", "rich")


def test_the_training_job_loads_nothing_that_draws():
    code = "import sys, train_lm.main; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=LAUNCH).split()
    assert "train_lm.training" in loaded
    assert not {*DRAWING}.intersection(loaded)


@pytest.mark.parametrize("package", DRAWING)
def test_a_package_that_is_missing_is_one_sentence(monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] in (package, "train_lm")]:
        if name not in ("train_lm", "train_lm.report"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    options = parse_options([])
    assert type(make_report(1, options)) is Report
    with pytest.raises(ValueError, match=r"^matplotlib and rich must be installed; got: .*\.$"):
        make_report(0, options)
