"""Gradients that leave during backward are those that ``average_grads()`` averages."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardopt.layout.traffic import plan_traffic
from tests.overlap.test_backward import EVENTS, Job
from tests.support.frameworks import require
from tests.support.nodes import several_nodes

torch = require("torch")

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("ignore:gradients were changed"),
]


def test_nothing_is_sent_again_because_the_average_is_changed(comm):
    job = Job(comm, several_nodes(comm)[0])
    topology = job.opt.core.topology
    planned = plan_traffic(job.opt.partition, topology.node, topology.node_rank)
    averages = [plan.parts(plan.buffers.grads)[topology.node] for plan in job.reduction.plans]
    more = sum(average.nbytes for average in averages) * (topology.num_nodes - 1)
    for step in range(3):
        job.opt.zero_grad()
        job.backward(step)
        if step > 0:
            job.wait_until_reduced()  # overlap is never off
        job.opt.average_grads()
        torch.nn.utils.clip_grad_norm_(job.params, 0.1)
        job.opt.step()
        assert job.opt.last_step.sent_nbytes == planned.nbytes + more
    job.finish()


def skip(job):
    """Drop the average, and compute another."""
    job.opt.zero_grad()
    job.backward(91)
    job.opt.average_grads()


@settings(max_examples=4)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(EVENTS), st.sampled_from(EVENTS), st.booleans(), st.booleans()),
        min_size=2,
        max_size=3,
    )
)
def test_the_bits_are_those_without_overlap(comm, steps):
    """Whatever happens to gradients before the average, on some ranks or on all."""
    results = []
    for overlap in (True, False):
        job = Job(comm, several_nodes(comm)[-1 if len(steps) % 2 else 0], overlap=overlap)
        for step in range(2 + len(steps)):
            job.opt.zero_grad()
            job.backward(step)
            if step >= 2:
                first, others, averages, skips = steps[step - 2]
                (first if comm.rank == 0 else others)(job)
                if averages:
                    job.opt.average_grads()
                    if skips:
                        skip(job)
                    torch.nn.utils.clip_grad_norm_(job.params, 0.1)
            job.opt.step()
        results.append(job.finish())
    assert results[0] == results[1]
