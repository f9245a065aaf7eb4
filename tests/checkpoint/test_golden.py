"""Checkpoints that earlier versions have saved are loaded to the bit; see make_golden.py."""

import numpy as np
import pytest

from shardopt import NAdam, ShardPolicy
from shardopt.checkpoint import load
from shardopt.checkpoint.format.reader import Reader, read_manifest
from tests.checkpoint.make_golden import (
    FOLDER,
    GROUPS,
    LOSS_SCALE,
    NUM_STEPS,
    bits,
    content,
    make_extra,
    make_groups,
)

CASES = sorted(path.stem for path in FOLDER.glob("*.npz"))
POLICIES = [ShardPolicy(timeout_s=20), ShardPolicy(bucket_nbytes=1, timeout_s=20)]


def assert_alike(actual, expected):
    """Equal values of equal types, dtypes and shapes included, to the bit."""
    assert type(actual) is type(expected)
    if isinstance(expected, np.ndarray):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert actual.tobytes() == expected.tobytes()
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        assert_alike(list(actual.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_alike(one, other)
    else:
        assert repr(actual) == repr(expected)


def expected_extra(num_savers):
    per_rank = [make_extra(rank)["per_rank"] for rank in range(num_savers)]
    return make_extra(0) | {"per_rank": per_rank}


def test_there_is_one_of_each_number_of_ranks():
    assert CASES == ["v1-1", "v1-2", "v1-3"]


@pytest.mark.mpi
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", POLICIES, ids=["one bucket", "small buckets"])
def test_it_is_loaded_to_the_bit(comm, case, policy):
    num_savers = int(case.partition("-")[2])
    with NAdam(make_groups(num_savers, start=0.0), comm=comm, policy=policy) as opt:
        for group in opt.param_groups:
            group.update(lr=1.0, betas=(0.5, 0.5), note=None)
        assert_alike(load(FOLDER / case, opt).extra, expected_extra(num_savers))
        assert (opt.last_step.step, opt.last_step.loss_scale) == (NUM_STEPS, LOSS_SCALE)
        for group, settings in zip(opt.param_groups, GROUPS, strict=True):
            assert_alike({key: group[key] for key in settings}, dict(settings))
        values = content(opt)
        if values is None:
            return
        with np.load(FOLDER / f"{case}.npz") as golden:
            assert set(values) == set(golden)
            for name, expected in golden.items():
                assert_alike(np.asarray(values[name]), expected)


@pytest.mark.parametrize("case", CASES)
def test_it_is_read_without_mpi(case):
    with Reader(FOLDER / case, read_manifest(FOLDER / case)) as reader:
        reader.require_files()
        reader.read(reader.whole_files())
        assert_alike(reader.extra(), expected_extra(reader.manifest.world_size))
        with np.load(FOLDER / f"{case}.npz") as golden:
            for index, param in enumerate(reader.manifest.params):
                for key in param.tensors:
                    expected = golden[f"{param.name}/{key}"]
                    assert_alike(bits(reader.tensor(index, key)), expected)
                assert param.step == golden[f"{param.name}/step"]
                assert param.mu_product == golden[f"{param.name}/mu_product"]
