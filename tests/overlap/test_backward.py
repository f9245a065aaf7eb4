"""Gradients that leave while backward runs; ranks of one machine play several nodes."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardopt import ShardPolicy
from shardopt.layout.traffic import plan_traffic
from tests.support.frameworks import require
from tests.support.nodes import several_nodes

torch = require("torch")

from shardopt.torch import NAdam  # noqa: E402

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("ignore:gradients were changed"),  # when they have left already
]

WIDTH, DEPTH = 90, 4
BUCKET_NBYTES = 20_000  # a layer is some two buckets


class Job:
    """A model of which one part is used in some steps only, and its optimizer."""

    def __init__(self, comm, share, **policy):
        torch.manual_seed(0)
        self.comm = comm
        self.model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
        self.extra = torch.nn.Linear(WIDTH, WIDTH)
        self.params = [*self.model.parameters(), *self.extra.parameters()]
        policy = ShardPolicy(share_node=share, bucket_nbytes=BUCKET_NBYTES, timeout_s=30, **policy)
        self.opt = NAdam(self.params, lr=0.01, comm=comm, policy=policy)
        self.reduction = self.opt.core.parts.sync.reduction
        self.overlap = self.opt.core.parts.overlap

    def backward(self, seed, *, with_extra=True):
        rng = np.random.default_rng([seed, self.comm.rank])
        x = torch.from_numpy(rng.standard_normal((3, WIDTH)).astype(np.float32))
        y = self.model(x)
        if with_extra:
            y = self.extra(y)
        y.square().mean().backward()

    def wait_until_reduced(self):
        """Wait for the progress thread: nobody else works on the reduction."""
        stop = time.monotonic() + 30
        while self.reduction.num_reduced < len(self.reduction.plans):
            assert time.monotonic() < stop, "gradients were not sent before the step"
            time.sleep(0.001)  # the thread wants Python's lock

    def sent_as_planned(self):
        topology, report = self.opt.core.topology, self.opt.last_step
        planned = plan_traffic(self.opt.partition, topology.node, topology.node_rank)
        as_planned = (report.sent_nbytes, report.sent_messages) == planned
        return all(self.comm.allgather(as_planned))

    def finish(self):
        bits = b"".join(param.detach().numpy().tobytes() for param in self.params)
        self.opt.close()
        assert len(set(self.comm.allgather(bits))) == 1
        return bits


def test_all_gradients_have_left_before_the_step(comm):
    for share in several_nodes(comm):
        job = Job(comm, share)
        for step in range(4):
            job.opt.zero_grad()
            job.backward(step)
            if step > 0:  # how often backward comes is known from the step before
                job.wait_until_reduced()
            job.opt.step()
            assert job.sent_as_planned()
        job.finish()


def test_micro_batches_leave_with_the_last_one(comm):
    job = Job(comm, several_nodes(comm)[0])
    for step in range(3):
        job.opt.zero_grad()
        job.backward(step)
        assert job.reduction.num_started == 0
        job.backward(step + 100)
        if step > 0:
            job.wait_until_reduced()
        job.opt.step()
        assert job.sent_as_planned()
    job.finish()


def test_unused_parameters_hold_up_nothing(comm):
    job = Job(comm, several_nodes(comm)[0])
    for step in range(3):
        job.opt.zero_grad()
        job.backward(step, with_extra=False)
        if step > 0:
            job.wait_until_reduced()
        job.opt.step()
        assert job.opt.last_step.num_updated == 2 * DEPTH
        assert job.sent_as_planned()
    job.finish()


def test_zeros_of_parameters_that_are_no_longer_used_are_not_stale(comm):
    job = Job(comm, several_nodes(comm)[0])
    for step in range(4):
        job.opt.zero_grad(set_to_none=False)
        job.backward(step, with_extra=step == 0)
        if step > 1:
            job.wait_until_reduced()
        job.opt.step()
        assert job.opt.last_step.num_updated == len(job.params)
        assert job.sent_as_planned()
    job.finish()


def test_what_is_stale_is_sent_again_and_then_stays_at_home(comm):
    job = Job(comm, several_nodes(comm)[0])
    has_begun = []
    for step in range(6):
        job.opt.zero_grad()
        job.backward(step)
        has_begun.append(job.overlap.thread.num_announced > 0)
        torch.nn.utils.clip_grad_norm_(job.params, 0.1)
        job.opt.step()
        assert job.sent_as_planned() != has_begun[-1]
    assert has_begun == [False, True, False, True, False, False]
    job.finish()


def touch_nothing(job):
    pass


def clip(job):
    torch.nn.utils.clip_grad_norm_(job.params, 0.1)


def replace(job):
    job.params[0].grad = torch.ones_like(job.params[0])


def drop(job):
    job.params[2].grad = None


def add_more(job):
    job.backward(77)


def use_less_and_more(job):
    job.opt.zero_grad()
    job.backward(78, with_extra=False)


def begin_anew(job):
    for param in job.params:
        param.grad = None
    job.backward(79)


def write_to_an_unused_one(job):
    job.extra.weight.grad = torch.full_like(job.extra.weight, 0.5)


EVENTS = [
    touch_nothing,
    clip,
    replace,
    drop,
    add_more,
    use_less_and_more,
    begin_anew,
    write_to_an_unused_one,
]


@settings(max_examples=12)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(EVENTS), st.sampled_from(EVENTS), st.booleans()),
        min_size=2,
        max_size=5,
    )
)
def test_the_bits_are_those_without_overlap(comm, steps):
    """Whatever happens to gradients after backward, on some ranks or on all."""
    results = []
    for overlap in (True, False):
        job = Job(comm, several_nodes(comm)[-1 if len(steps) % 2 else 0], overlap=overlap)
        for step in range(2 + len(steps)):
            job.opt.zero_grad()
            if step < 2:
                job.backward(step)
            else:
                first, others, with_extra = steps[step - 2]
                job.backward(step, with_extra=with_extra or comm.rank > 0)
                (first if comm.rank == 0 else others)(job)
            job.opt.step()
        results.append(job.finish())
    assert results[0] == results[1]


def test_gradients_under_way_are_no_trouble_at_the_end(comm):
    job = Job(comm, several_nodes(comm)[0])
    for step in range(2):
        job.opt.zero_grad()
        job.backward(step)
        job.opt.step()
    job.opt.zero_grad()
    if comm.rank > 0:
        job.backward(2)
    late = torch.nn.Parameter(torch.ones(5))
    job.opt.add_param_group({"params": [late]})
    job.backward(3)
    job.params.append(late)
    job.finish()
