"""Steps whose kernel is the compiled one for GPUs, on memory that the ranks share."""

import numpy as np
import pytest

from tests.support.cuda import nvrtc
from tests.support.cuda.addresses import PtxKernel
from tests.support.device_training import BFLOAT16, up_to_three_ranks

pytestmark = [pytest.mark.mpi, pytest.mark.any_mpi, up_to_three_ranks]


@pytest.fixture
def way():
    return "direct"


def test_steps_have_the_bits_of_the_cpu(comm, make_pair):
    nvrtc.require()
    rng, dtype = np.random.default_rng(0), BFLOAT16 if comm.size == 2 else np.float32
    start = [rng.standard_normal(numel).astype(dtype) for numel in (9000, 5, 3000)]
    kernels = []

    def make_kernel():
        kernels.append(PtxKernel(comm.size))
        return kernels[-1]

    pair = make_pair(start, max_grad_norm=0.5, device={"make_kernel": make_kernel})
    for _ in range(2):
        pair.grads(without=[1])
        pair.step()
    pair.opt.max_grad_norm = pair.reference.max_grad_norm = None
    pair.grads()
    pair.step()
    names = [name for name, _ in kernels[0].launches]
    owned = sum(shard.numel > 0 for shard in pair.opt.partition.shards(0, comm.rank, 0))
    assert names.count("update") == 3 * owned
    assert names.count("reduce") >= 2 * owned
    pair.close()
