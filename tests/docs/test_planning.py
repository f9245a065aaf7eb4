"""The commands of docs/planning.md print and draw what the page shows."""

import json
import re
import shlex

import pytest

from shardopt.cli import main
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
    assert re.search(r"^ *4096 +2.15 GB +\S+ s +268 MB +\S+ s +45.1 GB$", said, re.MULTILINE)


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
