"""Settings that may change when a run resumes, and the message for each that may not."""

import re
from pathlib import Path

import numpy as np
import pytest

from shardopt.checkpoint import Restored
from train_lm.checkpoints import (
    Origin,
    find_origin,
    identify_run,
    read_origin,
    require_same_run,
)
from train_lm.corpus import Corpus
from train_lm.options import parse_options

TEXT = Corpus("text", np.arange(200, dtype=np.uint8), np.arange(20, dtype=np.uint8))
ORIGIN = Origin("name", batch=16, step=400, path=Path("x/step-000000000400"), num_ranks=2)


def ask(*arguments, text=TEXT, num_ranks=2):
    """Ask to resume a run that was started with the default options."""
    saved = identify_run(parse_options([]), TEXT)
    options = parse_options(["--checkpoint", "x", *arguments])
    require_same_run(options, text, num_ranks, ORIGIN, saved)


def test_what_is_to_come_may_be_another():
    ask("--steps", "401", "--lr", "0.1", "--batch", "7", "--out", "there", num_ranks=16)


@pytest.mark.parametrize(
    ("arguments", "name", "was", "got"),
    [
        (("--layers", "3"), "layers", 4, 3),
        (("--width", "64"), "width", 128, 64),
        (("--context", "64"), "context", 128, 64),
        (("--seed", "1"), "seed", 0, 1),
        (("--framework", "torch"), "framework", "numpy", "torch"),
    ],
)
def test_what_makes_the_run_may_not(arguments, name, was, got):
    sentence = (
        f"--{name} must be {was}, as in the run saved in x; got {got}. "
        "Use the original value, or another folder for --checkpoint."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        ask(*arguments)


def test_another_text_is_another_run():
    other = Corpus("text", TEXT.train[::-1].copy(), TEXT.held_out)
    with pytest.raises(ValueError, match=r"^--text must be 220 bytes with checksum .* got 220 by"):
        ask(text=other)


def test_there_must_be_steps_left():
    with pytest.raises(ValueError, match=r"^--steps must be more than 400, .*; got 400\. "):
        ask("--steps", "400")


def test_each_rank_needs_a_sequence():
    with pytest.raises(
        ValueError, match=r"^the number of ranks must be at most 16, .*; got 17\. Start"
    ):
        ask(num_ranks=17)


@pytest.mark.parametrize("extra", [None, {}, {"run": "x", "batch": "16", "ranks": 1}])
def test_what_another_program_saved_is_refused(extra):
    with pytest.raises(ValueError, match=r"^--checkpoint must be .* own; got 'x', where another"):
        read_origin(Restored(400, extra, ORIGIN.path))


def test_a_folder_is_made_and_a_file_refused(tmp_path):
    assert find_origin(tmp_path / "a" / "b") == (None, {})
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for path in tmp_path / "file", tmp_path / "file" / "below":
        with pytest.raises(ValueError, match=r"^--checkpoint must be a folder .*; got .*\. Choose"):
            find_origin(path)
