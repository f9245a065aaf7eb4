"""Checkpoints whose moments are codes: the commands show and compare their values."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from shardopt import NAdam, Parameter, ShardPolicy
from shardopt.checkpoint import save
from shardopt.cli.ckpt import pieces
from tests.support.checkpoints import call


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints, of 8 and of 32 bits, and the moments in the first."""
    folder, states = tmp_path_factory.mktemp("small"), []
    for bits in (8, 32):
        params = [Parameter(np.linspace(-1, 1, n).astype("f4"), f"w{n}") for n in (300_000, 5)]
        with NAdam(params, policy=ShardPolicy(optim_bits=bits, bucket_nbytes=100_000)) as opt:
            for param in params:
                param.grad = np.random.default_rng(0).standard_normal(param.data.shape)
                param.grad = param.grad.astype("f4")
            opt.step()
            save(folder / str(bits), opt)
            states.append(opt.gather_state_dict()["state"])
    return folder, states[0]


def test_they_are_verified_and_shown(capsys, saved):
    folder, _ = saved
    assert call(capsys, "verify", folder / "8").code == 0
    shown = call(capsys, "show", folder / "8", "--json").json
    assert shown["params"][0]["state"] == ["exp_avg", "exp_avg_sq"]


def test_merged_state_has_values(capsys, saved, tmp_path):
    folder, state = saved
    assert call(capsys, "merge", folder / "8", tmp_path / "x.safetensors", "--state").code == 0
    merged = load_file(tmp_path / "x.safetensors")
    for index, name in enumerate(("w300000", "w5")):
        for key in ("exp_avg", "exp_avg_sq"):
            np.testing.assert_array_equal(merged[f"{name}::{key}"], state[index][key])


@pytest.mark.parametrize("batch_nbytes", [None, 4 * 1001])
def test_differences_are_the_same_in_either_direction(capsys, saved, monkeypatch, batch_nbytes):
    if batch_nbytes is not None:  # pieces of the floats that begin within blocks of the codes
        monkeypatch.setattr(pieces, "BATCH_NBYTES", batch_nbytes)
    folder, _ = saved
    one, other = (
        call(capsys, "diff", folder / a, folder / b, "--json").json["tensors"]
        for a, b in (("8", "32"), ("32", "8"))
    )
    assert one == other
    assert len(one) == 2


def test_differences_are_those_of_values(capsys, saved):
    folder, _ = saved
    same = call(capsys, "diff", folder / "8", folder / "8", "--json")
    assert same.code == 0
    found = call(capsys, "diff", folder / "8", folder / "32", "--json").json["tensors"]
    by_name = {each["name"]: each for each in found}
    assert set(by_name) == {"w300000::exp_avg", "w300000::exp_avg_sq"}
    assert all(each["max_rel"] <= 1 for each in found)
    assert by_name["w300000::exp_avg"]["max_abs"] < 0.1 / 16 * 6
