"""The commands of docs/planning.md print and draw what the page shows."""

import argparse
import json
import re
import shlex
from dataclasses import replace

import pytest

from benchmarks import RESULTS_FOLDER
from benchmarks.report.predictions import predictions_text
from shardopt.cli import main
from shardopt.cli.plan import add_arguments
from shardopt.cli.plan.options import read_request
from shardopt.planner.scaling import choose_bucket
from tests.support.pages import ROOT, blocks

PAGE = ROOT / "docs" / "planning.md"
COMMANDS = blocks(PAGE, "sh")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (model,) = blocks(PAGE, "py")
    (tmp_path / "model.py").write_text(model)
    return tmp_path


def run(capsys, command):
    program, *words = shlex.split(command)
    assert program == "shardopt"
    assert main(words) == 0
    return capsys.readouterr().out


def test_the_report_is_the_one_shown(capsys):
    pytest.importorskip("rich")
    (shown,) = blocks(PAGE, "text")
    assert run(capsys, COMMANDS[0]) == shown


def test_the_picture_is_the_one_shown(capsys, folder):
    said = run(capsys, COMMANDS[1])
    assert (folder / "scaling.svg").read_text() == (PAGE.parent / "scaling.svg").read_text()
    assert re.search(r"^ *64 +33.6 MB +\S+ s +8.39 MB +\S+ s +604 MB$", said, re.MULTILINE)
    assert re.search(r"^ *4096 +2.15 GB +\S+ s +537 MB +\S+ s +38.7 GB$", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("cost", "share"), [("2us", 8), ("5us", 4), ("10us", 2), ("20us", 1), ("30us", 0.5)]
)
def test_the_bucket_that_is_as_good_is_the_one_shown(cost, share):
    """On 64 nodes: the share of the default, and what a larger bucket gains."""
    words = [*shlex.split(COMMANDS[1])[2:-2], "--message-cost", cost]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    request = read_request(parser.parse_args(words))
    choice = choose_bucket(request.model, replace(request.layout, num_nodes=64), request.machine)
    assert choice.default_nbytes == share * choice.best_nbytes
    if share < 1:
        assert f"from {choice.default_s:.2f} to {choice.best_s:.2f} s" in PAGE.read_text()


def test_settings_that_take_less_memory_are_those_shown(capsys):
    (command,) = re.findall(
        r"^    (shardopt plan .*--node-memory.*)$", PAGE.read_text(), re.MULTILINE
    )
    assert main(shlex.split(command)[1:]) == 1
    told = re.sub(r"[─ ]+", " ", capsys.readouterr().out)
    rows = re.findall(
        r"^\| `?(.*?)`? \| ([\d.]+ GB) \| (.*?) \| (.*?)\|$", PAGE.read_text(), re.MULTILINE
    )
    assert len(rows) == 6
    for row in rows:
        assert " ".join(row).strip() in told, row


def test_measured_steps_are_those_of_the_results():
    shown = re.search(
        "<!-- predictions begin -->(.*)<!-- predictions end -->", PAGE.read_text(), re.S
    )
    assert shown[1].strip() == predictions_text(RESULTS_FOLDER)


def test_the_model_is_that_of_the_script(capsys):
    torch = pytest.importorskip("torch")
    found = json.loads(run(capsys, COMMANDS[2]))["model"]
    with torch.device("meta"):
        params = torch.nn.Transformer(
            d_model=256, batch_first=True, dtype=torch.bfloat16
        ).parameters()
        assert found["numel"] == sum(param.numel() for param in params)


def test_every_command_is_run():
    assert len(COMMANDS) == 3
