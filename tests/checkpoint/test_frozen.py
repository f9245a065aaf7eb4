"""Saving and loading take no memory for the state of frozen parameters."""

import os

import pytest

from shardopt.checkpoint import load, save
from tests.support.frameworks import require

pytestmark = pytest.mark.mpi

NUMEL = 1 << 20


def file_nbytes(opt):
    return os.fstat(opt.core.parts.memory.arena.fd).st_blocks * 512


def test_frozen_parameters_take_their_values_only(comm, mpi_tmp_path):
    require("torch")
    import torch

    from shardopt.torch import NAdam

    group = comm.Dup()  # an arena of its own
    params = [torch.nn.Parameter(torch.ones(n), requires_grad=n < 9) for n in (NUMEL, 8)]
    opt = NAdam([("frozen", params[0]), ("trained", params[1])], comm=group)
    group.Barrier()
    before = file_nbytes(opt)
    assert NUMEL * 4 <= before < NUMEL * 4.5
    for number in range(2):
        opt.zero_grad()
        params[1].sum().backward()
        opt.step()
        save(mpi_tmp_path / str(number), opt)
    load(mpi_tmp_path / "0", opt)
    opt.step()
    group.Barrier()
    assert file_nbytes(opt) < before + 100_000
    group.Barrier()
    opt.close()
    group.Free()
