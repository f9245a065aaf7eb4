"""Frozen parameters on several nodes: no bytes between nodes, and no memory but their values."""

import numpy as np
import pytest

from shardopt import ShardPolicy
from tests.support.frameworks import require

pytestmark = pytest.mark.mpi(min_size=2)

NUMEL = 40_000


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("share", [False, 2])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_frozen_parameters_are_left_alone_until_they_train(comm, share, overlap, max_grad_norm):
    require("torch")
    import torch

    from shardopt.torch import NAdam

    if comm.size % 2 and share == 2:
        pytest.skip("nodes of unequal size")

    def net():
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(NUMEL)) for _ in range(3)]

    policy = ShardPolicy(share_node=share, overlap=overlap, bucket_nbytes=4 * 8192)
    ours, theirs = net(), net()
    for params in ours, theirs:
        params[1].requires_grad_(False)
    opt = NAdam(ours, lr=0.1, policy=policy, max_grad_norm=max_grad_norm)
    ref = torch.optim.NAdam(theirs, lr=0.1)
    sent = []
    for step in range(6):
        if step == 3:
            for params in ours, theirs:
                params[1].requires_grad_(True)
        opt.zero_grad()
        ref.zero_grad()
        sum((p * (comm.rank + 1)).square().sum() for p in ours).backward()
        factor = sum((rank + 1) ** 2 for rank in range(comm.size)) / comm.size
        (sum(p.square().sum() for p in theirs) * factor).backward()
        if step == 1:
            with torch.no_grad():
                for params in ours, theirs:
                    params[1].mul_(0.5)  # must reach all nodes, though nothing else of it does
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm)
        assert step >= 3 or ours[1].grad is None
        opt.step()
        ref.step()
        sent.append(comm.allreduce(opt.last_step.sent_nbytes))
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine.detach(), other.detach(), rtol=2e-5, atol=1e-6)
        values = comm.allgather([p.detach().numpy().tobytes() for p in ours])
        assert all(value == values[0] for value in values)
    if opt.core.topology.num_nodes > 1:
        assert 0 < 1.2 * sent[0] < sent[5]
        assert sent[0] < sent[1]  # the written one
    opt.close()
