"""torch's profiler sees the spans of steps while it runs, with and without a trace."""

import pytest
import torch

from shardopt.policy import ShardPolicy
from shardopt.torch import NAdam
from tests.support.traces import read, spans

pytestmark = pytest.mark.mpi(max_size=2)


@pytest.mark.parametrize("traced", [False, True])
def test_the_profiler_sees_a_step(comm, tmp_path, traced):
    model = torch.nn.Linear(64, 128)  # each rank owns a part
    policy = ShardPolicy(trace=tmp_path if traced else None, timeout_s=30)
    with NAdam(model.parameters(), comm=comm, policy=policy) as opt:

        def step():
            opt.zero_grad()
            model(torch.ones(2, 64)).sum().backward()
            opt.step()

        step()
        cpu = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[cpu], acc_events=True) as profile:
            step()
        step()
    seen = {each.key: each.count for each in profile.key_averages() if "shardopt" in each.key}
    assert seen["shardopt: step"] == 1
    assert seen["shardopt: consensus"] == 2
    assert seen["shardopt: update"] >= 1
    assert len(spans(read(tmp_path), "step")) == (3 if traced else 0)
