"""A checkpoint fits an optimizer whose parameters lie elsewhere: names find them, not positions."""

from itertools import pairwise

import numpy as np
import pytest

from shardopt import NAdam, ShardPolicy
from shardopt.checkpoint import load, save
from shardopt.layout import partition
from tests.checkpoint.make_golden import FOLDER, content, make_groups
from tests.support.models import UP_TO_THREE_RANKS
from tests.support.models import build as build_model
from tests.support.models import content as content_of_model
from tests.support.models import train as train_model

pytestmark = [pytest.mark.mpi, UP_TO_THREE_RANKS]

ALIGNMENTS = [32, 64, 256, 4096]  # the golden checkpoints were saved with 32
POLICIES = [ShardPolicy(timeout_s=20), ShardPolicy(bucket_nbytes=1, timeout_s=20)]


def positions(opt):
    return [param.start for param in opt.partition.params]


@pytest.mark.parametrize("num_savers", [1, 2, 3])
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("policy", POLICIES, ids=["one bucket", "small buckets"])
def test_golden_checkpoints_fit_any_alignment(comm, monkeypatch, num_savers, alignment, policy):
    monkeypatch.setattr(partition, "ALIGNMENT_NUMEL", alignment)
    with NAdam(make_groups(num_savers, start=0.0), comm=comm, policy=policy) as opt:
        assert not any(start % alignment for start in positions(opt))
        load(FOLDER / f"v1-{num_savers}", opt)
        values = content(opt)
        if values is None:
            return
        with np.load(FOLDER / f"v1-{num_savers}.npz") as golden:
            for name, expected in golden.items():
                np.testing.assert_array_equal(values[name], expected, strict=True)


@pytest.mark.parametrize(("before", "after"), [*pairwise(ALIGNMENTS), (256, 32)])
def test_what_one_alignment_saves_another_loads(comm, mpi_tmp_path, monkeypatch, before, after):
    monkeypatch.setattr(partition, "ALIGNMENT_NUMEL", before)
    with build_model(comm) as opt:
        train_model(opt, range(2))
        save(mpi_tmp_path / "a", opt)
        saved, places = content_of_model(opt), positions(opt)
    monkeypatch.setattr(partition, "ALIGNMENT_NUMEL", after)
    with build_model(comm, seed=3) as other:
        assert positions(other) != places
        load(mpi_tmp_path / "a", other)
        assert content_of_model(other) == saved
