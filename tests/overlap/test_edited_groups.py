"""Gradients that leave while backward runs, of parameters that come, leave and move."""

import pytest

from shardopt.errors import RankMismatchError
from tests.overlap.test_backward import WIDTH, Job
from tests.support.frameworks import require
from tests.support.nodes import several_nodes

torch = require("torch")

pytestmark = pytest.mark.mpi(min_size=2)


def edit(job):
    """Another layer in the place of the second, and all parameters in another order."""
    params = job.opt.param_groups[0]["params"]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = torch.nn.Linear(WIDTH, WIDTH)
    left = {id(param) for param in job.model[1].parameters()}
    job.model[1] = layer
    job.params = [*layer.parameters(), *(p for p in reversed(params) if id(p) not in left)]
    job.opt.param_groups[0]["params"] = list(job.params)


@pytest.mark.parametrize("when", ["before backward", "after backward"])
def test_buckets_leave_early_again_after_an_edit(comm, when):
    for share in several_nodes(comm):
        results = []
        for overlap in (True, False):
            job = Job(comm, share, overlap=overlap)
            for step in range(6):
                if step == 2 and when == "before backward":
                    edit(job)
                job.opt.zero_grad()
                job.backward(step)
                if step == 2 and when == "after backward":
                    edit(job)
                if overlap and step not in (0, 2, 3):  # no one knows yet what to expect
                    job.wait_until_reduced()
                job.opt.step()
                assert job.sent_as_planned() or step == 2
            results.append(job.finish())
        assert results[0] == results[1]


def test_an_edit_of_one_rank_is_no_trouble_once_it_is_undone(comm):
    results = []
    for with_edit in (True, False):
        job = Job(comm, several_nodes(comm)[0])
        for step in range(5):
            job.opt.zero_grad()
            job.backward(step)
            if with_edit and step == 2:
                if comm.rank == 0:
                    job.opt.param_groups[0]["params"].pop()
                with pytest.raises(RankMismatchError, match="step.. with edited param_groups"):
                    job.opt.step()
            job.opt.step()
        results.append(job.finish())
    assert results[0] == results[1]
