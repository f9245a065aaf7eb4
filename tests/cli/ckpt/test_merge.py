"""The merged file, as stock safetensors reads it."""

import json
import os
import tracemalloc

import numpy as np
import pytest

from shardopt.cli.ckpt import merge, pieces
from tests.support.checkpoints import call, flip, make, manifest_of, refused, zero_state

FILE = "rank-00001-of-00003.safetensors"
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def params():
    generator = np.random.default_rng(3)
    return {
        "layers.0.weight": generator.standard_normal((30, 500)).astype(np.float32),
        "half": generator.standard_normal((7, 1001)).astype(np.float16),
        "brain": generator.standard_normal(77).astype(np.dtype("bfloat16")),
        "scale": np.array(generator.standard_normal()),
        "none": np.zeros((0, 3), np.float32),
    }


@pytest.fixture
def path(tmp_path):
    state = zero_state(params())
    for index, arrays in enumerate(state.values()):
        for key, array in arrays.items():
            array += index + len(key) / 7
    return make(tmp_path / "a", params(), state, num_files=3), state


def read(file):
    """Read a safetensors file by its specification."""
    raw = file.read_bytes()
    base = 8 + int.from_bytes(raw[:8], "little")
    assert base % 8 == 0
    header = json.loads(raw[8:base])
    metadata, reached, tensors = header.pop("__metadata__"), 0, {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        dtype = np.dtype(DTYPES[entry["dtype"]])
        assert start == reached
        assert start % dtype.itemsize == 0
        reached = stop
        tensors[name] = np.frombuffer(raw[base + start : base + stop], dtype).reshape(
            entry["shape"]
        )
    assert len(raw) == base + reached
    return metadata, tensors


def same(x, y):
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


@pytest.mark.parametrize("batch_nbytes", [1000, 8 << 20])
def test_parameters(path, tmp_path, capsys, monkeypatch, batch_nbytes):
    monkeypatch.setattr(pieces, "BATCH_NBYTES", batch_nbytes)
    out = tmp_path / "out.safetensors"
    result = call(capsys, "merge", path[0], out)
    assert result.code == 0
    assert "5 tensors" in result.stdout
    metadata, tensors = read(out)
    assert metadata == {"format": "pt", "step": "7"}
    assert set(tensors) == set(params())
    assert all(same(tensors[name], array) for name, array in params().items())
    assert sorted(os.listdir(tmp_path)) == ["a", "out.safetensors"]


def test_state(path, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    found = call(capsys, "merge", "--json", "--state", path[0], out).json
    _, tensors = read(out)
    expected = dict(params())
    for name, arrays in path[1].items():
        for key, array in arrays.items():
            expected[f"{name}::{key}"] = array.reshape(params()[name].shape)
    assert set(tensors) == set(expected)
    assert all(same(tensors[name], array) for name, array in expected.items())
    assert found == {
        "path": str(out),
        "tensors": len(expected),
        "nbytes": out.stat().st_size,
        "step": 7,
        "overflows": 0,
        "positions": 0,
        "left_out": [],
    }


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_dtype(path, tmp_path, capsys, dtype):
    out = tmp_path / "out.safetensors"
    assert call(capsys, "merge", path[0], out, "--dtype", dtype, "--state").code == 0
    _, tensors = read(out)
    for name, array in params().items():
        assert same(tensors[name], array.astype(np.dtype(dtype)))
        assert tensors[f"{name}::exp_avg"].dtype == path[1][name]["exp_avg"].dtype


def test_masters(path, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert call(capsys, "merge", path[0], out, "--masters", "--state").code == 0
    _, tensors = read(out)
    assert same(tensors["half"].reshape(-1), path[1]["half"]["master"])
    assert same(tensors["layers.0.weight"], params()["layers.0.weight"])
    assert not [name for name in tensors if name.endswith("::master")]


def test_what_is_too_large_for_a_dtype(tmp_path, capsys):
    values = np.array([1e6, 1, np.inf, -1e9], np.float32)
    path, out = make(tmp_path / "a", {"w": values}), tmp_path / "out.safetensors"
    result = call(capsys, "merge", path, out, "--dtype", "float16")
    assert result.code == 0
    assert result.stderr == "2 numbers overflow float16 and became inf\n"
    assert read(out)[1]["w"].tolist() == [np.inf, 1, np.inf, -np.inf]


def test_stock_safetensors_reads_it(path, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    stock = pytest.importorskip("safetensors.torch")
    out = tmp_path / "out.safetensors"
    assert call(capsys, "merge", path[0], out).code == 0
    loaded = stock.load_file(out)
    assert loaded["brain"].dtype == torch.bfloat16
    for name, array in params().items():
        assert loaded[name].shape == array.shape
        assert np.array_equal(loaded[name].double().numpy(), array.astype(np.float64))


def test_nothing_is_overwritten_unasked(path, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    refused(call(capsys, "merge", path[0], out), "OUT must not exist", "--force")
    assert out.read_text() == "precious"
    assert call(capsys, "merge", path[0], out, "--force").code == 0
    assert len(read(out)[1]) == 5
    refused(call(capsys, "merge", path[0], tmp_path, "--force"), "Pass the name of a file")
    refused(call(capsys, "merge", path[0], tmp_path / "no" / "out"), "OUT must be in a folder")
    refused(call(capsys, "merge", path[0], out, "--dtype", "int8"), "invalid choice")


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_damaged_checkpoint_leaves_nothing(path, tmp_path, capsys, force):
    out = tmp_path / "out.safetensors"
    if force:
        out.write_text("precious")
    flip(path[0] / FILE, manifest_of(path[0]).files[1].header_nbytes + 9)
    result = call(capsys, "merge", path[0], out, *force)
    assert result.code == 1
    assert f"chunk 0 of file {FILE}" in result.stderr
    assert sorted(os.listdir(tmp_path)) == (["a", out.name] if force else ["a"])
    assert not force or out.read_text() == "precious"


def test_an_interrupt_leaves_nothing(path, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "read_batch", interrupt)
    result = call(capsys, "merge", path[0], tmp_path / "out.safetensors")
    assert (result.code, result.stdout, result.stderr) == (130, "", "")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["w::exp_avg", "w\udc80"])
def test_names_that_cannot_be(tmp_path, capsys, name):
    values = np.ones(3, np.float32)
    path = make(tmp_path / "a", {"w": values, name: values}, num_files=1)
    result = call(capsys, "merge", "--state", path, tmp_path / "out.safetensors")
    refused(result, "names of tensors must be")
    assert os.listdir(tmp_path) == ["a"]


def test_memory_is_bounded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pieces, "BATCH_NBYTES", 1 << 20)
    large = {"w": np.zeros(6 << 20, np.float32)}
    path = make(tmp_path / "a", large, zero_state(large), num_files=3)
    tracemalloc.start()
    result = call(capsys, "merge", "--state", path, tmp_path / "out", "--dtype", "float64")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.code == 0
    assert peak < 16 << 20  # of 96 MB
