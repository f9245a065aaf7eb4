"""Gradients that have left for a step which then begins anew, or which have graphs of their own."""

import numpy as np
import pytest

from shardopt.checkpoint import load, save
from tests.overlap.test_backward import Job
from tests.support.frameworks import require
from tests.support.nodes import several_nodes

torch = require("torch")

pytestmark = pytest.mark.mpi(min_size=2)


def add_group(job, folder):
    late = torch.nn.Parameter(torch.ones(5))
    job.opt.add_param_group({"params": [late]})
    job.params.append(late)


def restore(job, folder):
    load(folder, job.opt)


@pytest.mark.filterwarnings("ignore::shardopt.errors.CheckpointWarning")  # it has no names
@pytest.mark.parametrize("begin_anew", [add_group, restore])
def test_what_was_announced_does_not_count_when_a_step_begins_anew(comm, mpi_tmp_path, begin_anew):
    for number, share in enumerate(several_nodes(comm)):
        results = []
        for overlap in (True, False):
            job = Job(comm, share, overlap=overlap)
            for step in range(2):
                job.opt.zero_grad()
                job.backward(step)
                job.opt.step()
            folder = mpi_tmp_path / f"{number}-{overlap}"
            save(folder, job.opt)
            job.opt.zero_grad()
            job.backward(2)
            begin_anew(job, folder)
            if overlap:
                assert job.overlap.thread.num_ready() == 0
                assert job.reduction.num_started == 0
            for rank in range(comm.size):  # one after the other
                comm.Barrier()
                if rank == comm.rank:
                    job.backward(3)
            job.opt.step()
            results.append(job.finish())
        assert results[0] == results[1]


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_of_gradients_can_be_had_before_the_step(comm):
    results = []
    for overlap in (True, False):
        job = Job(comm, several_nodes(comm)[0], overlap=overlap)
        for step in range(3):
            job.opt.zero_grad()
            rng = np.random.default_rng([step, comm.rank])
            x = torch.from_numpy(rng.standard_normal((3, 90)).astype(np.float32))
            job.extra(job.model(x)).square().mean().backward(create_graph=True)
            size = sum(param.grad.square().sum() for param in job.params)
            curvature = torch.autograd.grad(size, job.params)
            for param, more in zip(job.params, curvature, strict=True):
                param.grad = param.grad.detach() + 0.1 * more
            job.opt.step()
        results.append(job.finish())
    assert results[0] == results[1]
