"""The examples of launch/examples learn what they say, on the ranks of the tests."""

import re
import runpy
import sys

import pytest

from tests.support.clients import lend_operators
from tests.support.pages import ROOT

pytestmark = pytest.mark.mpi

EXAMPLES = ROOT / "launch" / "examples"
NUMBERS = re.compile(r"(?<![\w.-])\d+\.\d+")

ACCURATE = {
    "numpy_logistic": (lambda loss, accuracy: loss < 0.4 and accuracy > 0.85, []),
    "torch_vision": (lambda last, average: average > 0.8, ["--checkpoint", "{folder}"]),
    "torch_gan": (lambda distance: distance < 0.7, ["--steps", "200"]),
    "hf_trainer": (lambda before, after: after < before - 1.5, ["--output", "{folder}"]),
    "peft_lora": (lambda loss: loss < 3.8, ["--output", "{folder}"]),
    "lightning_module": (lambda error, start: error < 0.25 * start, []),
    "flax_nnx": (lambda loss, accuracy: accuracy > 0.95, ["--steps", "100"]),
}
"""By example: what holds of the numbers in its last line with any, and its arguments."""


def run(name, arguments, monkeypatch, capsys):
    """Run an example on this rank as a program; return what it printed."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    lend_operators()
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def test_every_example_is_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(ACCURATE)


@pytest.mark.parametrize("name", ACCURATE)
def test_an_example_learns(comm, mpi_tmp_path, monkeypatch, capsys, name):
    holds, arguments = ACCURATE[name]
    arguments = [each.format(folder=mpi_tmp_path / "out") for each in arguments]
    printed = run(name, arguments, monkeypatch, capsys)
    lines = [line for line in printed.splitlines() if NUMBERS.search(line)]
    if comm.rank == 0:
        assert holds(*map(float, NUMBERS.findall(lines[-1]))), lines


def test_the_vision_example_resumes(comm, mpi_tmp_path, monkeypatch, capsys):
    folder = ["--checkpoint", str(mpi_tmp_path / "shapes")]
    run("torch_vision", [*folder, "--steps", "4"], monkeypatch, capsys)
    once = run("torch_vision", [*folder, "--steps", "8"], monkeypatch, capsys)
    fresh = str(mpi_tmp_path / "whole")
    whole = run("torch_vision", ["--checkpoint", fresh, "--steps", "8"], monkeypatch, capsys)
    assert (once == whole) or comm.rank > 0


@pytest.mark.mpi(min_size=2)
def test_lightnings_ddp_learns_as_well(comm, process_group, monkeypatch, capsys):
    printed = run("lightning_module", ["--ddp"], monkeypatch, capsys)
    if comm.rank == 0:
        error, start = map(float, NUMBERS.findall(printed.splitlines()[-1]))
        assert error < 0.25 * start
