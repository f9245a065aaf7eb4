"""The distances between two checkpoints, no matter how many ranks saved them."""

import shutil
import tracemalloc

import numpy as np
import pytest

from shardopt.cli.ckpt import pieces
from tests.support.checkpoints import call, flip, make, manifest_of, refused, zero_state

FILE = "rank-00000-of-00002.safetensors"


def params(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "w": generator.standard_normal((700, 500)).astype(np.float32),
        "half": generator.standard_normal(1001).astype(np.float16),
        "brain": generator.standard_normal(77).astype(np.dtype("bfloat16")),
        "wide": np.array(generator.standard_normal()),
        "none": np.zeros((0, 3), np.float32),
    }


def tensors_of(result):
    assert result.code == (0 if result.json["equal"] else 1)
    return {tensor.pop("name"): tensor for tensor in result.json["tensors"]}


@pytest.mark.parametrize("num_files", [1, 2, 3, 7])
def test_equal_whatever_the_number_of_ranks(tmp_path, capsys, num_files):
    a = make(tmp_path / "a", params(), extra={"x": np.arange(9), "nan": float("nan")})
    b = make(
        tmp_path / "b", params(), num_files=num_files, extra={"x": np.arange(9), "nan": np.nan}
    )
    result = call(capsys, "diff", a, b)
    assert (result.code, result.stdout) == (0, "17 of 17 tensors are equal, 0 values differ\n")


def test_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pieces, "BATCH_NBYTES", 10_000)
    ours, theirs = params(), params()
    theirs["w"] = theirs["w"].copy()
    theirs["w"].reshape(-1)[::7] += np.float32(0.25)
    theirs["half"] = theirs["half"] * np.float16(1.5)
    theirs["brain"] = params(5)["brain"]
    a, b = make(tmp_path / "a", ours), make(tmp_path / "b", theirs, num_files=3)
    found = tensors_of(call(capsys, "diff", "--json", a, b))
    assert set(found) == {"w", "half", "half::master", "brain", "brain::master"}
    for name in ("w", "half", "brain"):
        x, y = ours[name].astype(np.float64), theirs[name].astype(np.float64)
        gap = np.abs(x - y)
        assert found[name] == {
            "numel": x.size,
            "different": np.count_nonzero(gap),
            "nan_in_one": 0,
            "max_abs": gap.max(),
            "max_rel": np.max(gap / np.maximum(np.abs(x), np.abs(y))),
        }


def test_nan_inf_and_zeros(tmp_path, capsys):
    nan, inf = np.nan, np.inf
    x = np.array([nan, nan, 1, 0.0, inf, inf, -inf, 2], np.float32)
    y = np.array([nan, 3, nan, -0.0, inf, 5, inf, 2], np.float32)
    a, b = make(tmp_path / "a", {"w": x}), make(tmp_path / "b", {"w": y}, num_files=1)
    found = tensors_of(call(capsys, "diff", "--json", a, b))["w"]
    expected = {"numel": 8, "different": 4, "nan_in_one": 2, "max_abs": "inf", "max_rel": "inf"}
    assert found == expected
    assert "inf" in call(capsys, "diff", a, b).stdout


def test_values(tmp_path, capsys):
    small = {"w": np.ones(3, np.float32), "v": np.ones((2, 3), np.float32)}
    other = {"w": np.ones(3, np.float64), "v": np.ones((3, 2), np.float32)}
    extra = {"n": 1, "x": np.arange(3), "y": np.arange(3), "gone": None}
    a = make(tmp_path / "a", small, extra=extra)
    extra = {"n": 1.0, "x": np.arange(3), "y": np.arange(1, 4), "z": [1, 2]}
    b = make(tmp_path / "b", {**other, "u": np.ones(1)}, step=8, lr=0.2, extra=extra)
    result = call(capsys, "diff", "--json", a, b)
    values = {(v["name"], *v.get("params", ())): (v["a"], v["b"]) for v in result.json["values"]}
    assert result.code == 1
    assert values == {
        ("step",): ("7", "8"),
        ("optimizer steps",): ("7", "8"),
        ("param_groups[0]['lr']",): ("0.1", "0.2"),
        ("extra['n']",): ("1", "1.0"),
        ("extra['y']",): ("array(int64, [3])", "other numbers"),
        ("extra['z']",): (None, "[1, 2]"),
        ("extra['gone']",): ("None", None),
        ("dtype", "w"): ("'float32'", "'float64'"),
        ("shape", "v"): ("(2, 3)", "(3, 2)"),
        ("shape", "u"): (None, "(1,)"),
        ("step", "w", "v"): ("7", "8"),
    }
    assert result.json["compared"] == 3
    assert not result.json["tensors"]  # float32 ones are float64 ones
    assert "step of w, v" in call(capsys, "diff", a, b).stdout


def test_equal_digests_are_not_read(tmp_path, capsys):
    a = make(tmp_path / "a", params())
    b = shutil.copytree(a, tmp_path / "b")
    offset = manifest_of(a).files[0].header_nbytes + 5
    flip(b / FILE, offset)
    assert call(capsys, "diff", a, b).code == 0
    c = make(tmp_path / "c", params(1))
    result = call(capsys, "diff", b, c)  # these must be read
    assert result.code == 1
    assert f"chunk 0 of file {FILE} must have the digest" in result.stderr
    assert not result.stdout


def test_refusals(tmp_path, capsys):
    a = make(tmp_path / "run" / "a", params())
    refused(call(capsys, "diff", a, tmp_path / "nowhere"), "does not exist")
    refused(call(capsys, "diff", a), "arguments", "required: B")
    (a / FILE).unlink()
    assert call(capsys, "diff", a, a).code == 1


def test_memory_is_bounded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pieces, "BATCH_NBYTES", 1 << 20)
    large = {"w": np.zeros(4 << 20, np.float32)}
    a = make(tmp_path / "a", large, zero_state(large))
    large["w"][::1000] = 1
    b = make(tmp_path / "b", large, zero_state(large), num_files=3)
    del large
    tracemalloc.start()
    result = call(capsys, "diff", "--json", a, b)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tensors_of(result)["w"]["different"] == 4195
    assert peak < 24 << 20  # of 96 MB
