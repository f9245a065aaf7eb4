"""What ranks on any nodes saved, ranks on any others load, and every node shows it."""

import numpy as np
import pytest

from shardopt import ShardPolicy
from shardopt.checkpoint import Checkpointer, load, save
from shardopt.numpy import NAdam
from tests.support.frameworks import require
from tests.support.models import SPECS, content, make_params, params_of, train
from tests.support.nodes import several_nodes, ways_to_share

pytestmark = pytest.mark.mpi(min_size=2)


def build(comm, share, seed=0, bucket_nbytes=30_000):
    """An optimizer; parameters of another seed are not yet what is going to be loaded."""
    policy = ShardPolicy(share_node=share, bucket_nbytes=bucket_nbytes, timeout_s=30)
    return NAdam(make_params(seed, SPECS), comm=comm, policy=policy)


def params_bits(opt):
    return b"".join(param.data.tobytes() for param in params_of(opt))


def test_any_nodes_load_what_any_nodes_saved(comm, mpi_tmp_path):
    ways = ways_to_share(comm)
    for number, saving in enumerate(ways):
        with build(comm, saving) as opt:
            train(opt, range(3))
            save(mpi_tmp_path / str(number), opt)
            saved, bits = content(opt), params_bits(opt)
            for loading in ways:
                with build(comm, loading, seed=9, bucket_nbytes=70_000) as other:
                    load(mpi_tmp_path / str(number), other)
                    assert params_bits(other) == bits  # what this node's window shows
                    assert content(other) == saved


def test_training_goes_on_with_the_gradients_after_the_load(comm, mpi_tmp_path):
    for share in several_nodes(comm):
        folder = mpi_tmp_path / f"run-{share}"
        with build(comm, share) as opt, build(comm, share, seed=9) as resumed:
            train(opt, range(4))
            train(resumed, range(50, 52))
            for param in params_of(resumed):
                param.grad[...] = 1  # left over from before
            with Checkpointer(folder) as checkpointer:
                checkpointer.save(4, opt)
            assert Checkpointer(folder).restore(resumed).step == 4
            for each in opt, resumed:
                train(each, range(4, 7))
            assert params_bits(opt) == params_bits(resumed)
            assert content(opt) == content(resumed)


def test_a_value_that_one_rank_put_in_place_is_saved_and_seen_on_every_node(comm, mpi_tmp_path):
    for share in several_nodes(comm):
        with build(comm, share) as opt, build(comm, share, seed=9) as other:
            train(opt, range(2))
            weight = params_of(opt)[0]
            if comm.rank == comm.size - 1:
                weight.data = np.full_like(weight.data, 7)
            save(mpi_tmp_path / f"replaced-{share}", opt)
            assert (weight.data == 7).all()
            load(mpi_tmp_path / f"replaced-{share}", other)
            assert (params_of(other)[0].data == 7).all()
            for each in opt, other:
                train(each, range(2, 4))
            assert params_bits(opt) == params_bits(other)


def test_gradients_that_change_after_a_save_of_written_weights_count(comm, mpi_tmp_path):
    """The save completes what backward has sent so far; the step must not take that for its own."""
    require("torch")
    import torch

    from shardopt.torch import NAdam as TorchNAdam

    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(9000)) for _ in range(3)]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    policy = ShardPolicy(share_node=False, bucket_nbytes=4 * 4096, timeout_s=30)
    named = zip("abc", ours, strict=True)
    opt, ref = TorchNAdam(named, lr=0.1, policy=policy), torch.optim.NAdam(theirs, lr=0.1)
    for step in range(3):
        for optimizer, params in (opt, ours), (ref, theirs):
            optimizer.zero_grad()
            with torch.no_grad():
                params[1].mul_(0.5)
            sum(param.square().sum() for param in params).backward()
        save(mpi_tmp_path / str(step), opt)
        for params in ours, theirs:
            params[0].sum().backward()
            params[2].grad.numpy()[:] *= 3  # which torch does not see
        opt.step()
        ref.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    opt.close()
