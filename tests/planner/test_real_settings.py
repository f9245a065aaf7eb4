"""Plans with other settings against real optimizers: the memory, what is sent, and refusals."""

import os
import re

import pytest

from shardopt.cli.plan.settings import require_combination, with_forms
from shardopt.errors import HyperparamsError
from shardopt.planner.estimate import Layout, estimate
from shardopt.planner.machine import make_machine
from shardopt.planner.model import evenly
from shardopt.policy import ShardPolicy
from tests.support.nodes import ways_to_share

torch = pytest.importorskip("torch")
face = pytest.importorskip("shardopt.torch")
pytestmark = pytest.mark.mpi

MACHINE = make_machine({"memory_nbytes_per_s": 1e11, "link_nbytes_per_s": 1e9}, {}, None, 2)
WIDTH, DEPTH = 512, 4
SMALL = {"optim_bits": 8, "master_weights": False}
IN_BACKWARD = {"stage": 2, "update_in_backward": True}
SETTINGS = {
    "rows": ("bfloat16", False, SMALL),
    "checked": ("bfloat16", False, {"check_finite": True}),
    "float16": ("float16", False, {}),
    "float16 on the wire": ("float32", False, {"wire_dtype": "float16"}),
    "prefetch": ("float32", False, {"prefetch_params": True}),
    "stage 2": ("float32", True, {"stage": 2}),
    "stage 2, small ring": ("float32", False, {"stage": 2, "ring_nbytes": 1}),
    "stage 2, prefetch": ("float32", False, {"stage": 2, "prefetch_params": True}),
    "stage 2, no overlap": ("float32", False, {"stage": 2, "overlap": False}),
    "stage 2, narrow": ("float32", False, {"stage": 2, "wire_dtype": "bfloat16"}),
    "stage 2, 16 bits": ("bfloat16", True, {"stage": 2}),
    "stage 2, float16": ("float16", False, {"stage": 2}),
    "stage 2, less": ("bfloat16", False, {"stage": 2, **SMALL}),
    "sums of nodes": ("float32", True, {"stage": 2, "accumulate": "node"}),
    "sums of nodes, 16 bits": ("bfloat16", False, {"stage": 2, "accumulate": "node"}),
    "in backward": ("float32", False, IN_BACKWARD),
    "in backward, clipped": ("float32", True, IN_BACKWARD),
    "in backward, narrow": ("float32", False, {**IN_BACKWARD, "wire_dtype": "bfloat16"}),
    "in backward, float16 on the wire": (
        "float32",
        False,
        {**IN_BACKWARD, "wire_dtype": "float16"},
    ),
    "in backward, prefetch": ("float32", False, {**IN_BACKWARD, "prefetch_params": True}),
    "in backward, float16": ("float16", False, IN_BACKWARD),
    "in backward, least": ("bfloat16", False, {**IN_BACKWARD, **SMALL}),
}
"""Dtype, whether gradients are clipped, and the policy."""


def make_module(dtype):
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)]
    return torch.nn.Sequential(*layers).to(getattr(torch, dtype))


def place_of(comm, share):
    """Return the number of nodes and the ranks on each, as ``share_node`` cuts them."""
    node_size = comm.size if share is True else int(share) or 1
    return comm.size // node_size, node_size


def refusal(model, layout):
    """Return the sentence with which a plan is refused, or None."""
    try:
        require_combination(model, layout)
    except HyperparamsError as error:
        return str(error)
    return None


def touched_nbytes(opt, comm):
    """The memory of this rank's node that training has touched, staging buffers included."""
    comm.Barrier()
    parts, node_comm = opt.core.parts, opt.core.topology.node_comm
    staging_nbytes = getattr(parts.sync.reduction, "staging_nbytes", 0)
    nbytes = os.fstat(parts.memory.arena.fd).st_blocks * 512
    return nbytes + node_comm.allreduce(staging_nbytes)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_plan_is_the_optimizer(comm, name):
    dtype, clips, settings = SETTINGS[name]
    arguments = {"max_grad_norm": 1.0} if clips else {}
    for share in ways_to_share(comm):
        policy = ShardPolicy(share_node=share, timeout_s=60, **settings)
        layout = Layout(*place_of(comm, share), policy, clips=clips)
        model = with_forms(evenly(DEPTH * WIDTH * WIDTH, dtype, DEPTH), layout)
        module, group = make_module(dtype), comm.Dup()  # whose optimizer has an arena of its own
        refused = refusal(model, layout)
        if refused is None:
            with face.NAdam(module, comm=group, policy=policy, **arguments) as opt:
                compare(opt, module, estimate(model, layout, MACHINE), group)
        else:
            with pytest.raises(HyperparamsError, match=f"^{re.escape(refused)}$"):
                face.NAdam(module, comm=group, policy=policy, **arguments)
        group.Free()


def compare(opt, module, planned, comm):
    """Take two steps, and compare memory and messages with those planned."""
    x = torch.ones(1, WIDTH, dtype=next(module.parameters()).dtype)
    for _ in range(2):
        opt.zero_grad()
        module(x).sum().backward()
        opt.step()
    opt.wait_params()
    memory = planned.memory
    assert memory == opt.memory_report()
    assert touched_nbytes(opt, comm) == pytest.approx(
        memory.node_nbytes - memory.late_node_nbytes, rel=0.03
    )
    report = opt.last_step
    sent = comm.allgather((report.sent_nbytes, report.sent_messages))
    assert tuple(planned.rank_traffic) == max(sent)
