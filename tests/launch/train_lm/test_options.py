"""The command line of ``train_lm.py``: its options, and the message for each mistake."""

import typing

import pytest

from train_lm.options import FRAMEWORKS, parse_options


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_framework_can_be_chosen(monkeypatch, framework):
    monkeypatch.setattr(typing, "override", None, raising=False)
    options = parse_options(["--framework", framework])
    assert (options.framework, options.dtype) == (framework, "float32")


def test_numpy_is_the_default():
    assert parse_options([]).framework == "numpy"


def test_torch_takes_bfloat16():
    assert parse_options(["--framework", "torch", "--dtype", "bfloat16"]).dtype == "bfloat16"


def test_nothing_is_saved_unless_a_folder_is_named():
    options = parse_options([])
    assert (options.checkpoint, options.save_every) == (None, None)


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        parse_options(list(arguments))
    assert error.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("train_lm.py: error: ")


@pytest.mark.parametrize("framework", ["numpy", "jax"])
def test_other_frameworks_refuse_bfloat16(capsys, framework):
    assert refusal(capsys, "--framework", framework, "--dtype", "bfloat16") == (
        f"--dtype must be float32 with --framework {framework}; got bfloat16. "
        "Add --framework torch, or leave --dtype out."
    )


def test_lucid_refuses_a_python_it_cannot_run_on(capsys, monkeypatch):
    monkeypatch.delattr(typing, "override", raising=False)
    sentence = refusal(capsys, "--framework", "lucid")
    assert sentence.startswith("--framework lucid must run on Python 3.12 or later; got 3.")


def test_saves_need_a_folder(capsys):
    assert refusal(capsys, "--save-every", "5") == (
        "--save-every must come with --checkpoint; got 5 alone. Add --checkpoint DIR."
    )
    sentence = refusal(capsys, "--checkpoint", "x", "--save-every", "0")
    assert sentence == "--save-every must be at least 1; got 0. Choose a larger number."


def test_the_wait_for_others_must_be_positive(capsys):
    assert parse_options(["--timeout", "2.5"]).timeout == 2.5
    told = "--timeout must be > 0; got 0. Leave it out for 300."
    assert refusal(capsys, "--timeout", "0") == told


@pytest.mark.parametrize("framework", ["numpy", "jax"])
def test_other_frameworks_refuse_gpus(capsys, framework):
    assert parse_options(["--framework", framework]).device == "auto"
    assert refusal(capsys, "--framework", framework, "--device", "cuda") == (
        f"--device must be cpu or auto with --framework {framework}; got cuda. "
        "Add --framework torch, or leave --device out."
    )
