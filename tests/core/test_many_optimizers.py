"""Many optimizers alive at once, and many groups in one, with few descriptors and communicators."""

import pytest

SOURCE = """
import resource
import numpy as np
from mpi4py import MPI

resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from shardopt.numpy import NAdam, Parameter

def new():
    return Parameter(np.ones(10, np.float32))

def check(params):
    assert len({param.data.tobytes() for param in params}) == 1
    assert params[0].data.max() < 1

made = [(param, NAdam([param])) for param in [new() for _ in range(NUM_OPTIMIZERS)]]
for param, opt in made:
    param.grad += 1
    opt.step()
check([param for param, _ in made])

params = [new()]
opt = NAdam(params)
for _ in range(NUM_GROUPS):
    params.append(new())
    opt.add_param_group({"params": params[-1:]})
for param in params:
    param.grad += 1
opt.step()
check(params)
print("done")
"""


@pytest.mark.parametrize(
    ("num_optimizers", "num_groups"),
    [
        # More than there may be descriptors. MPICH has the fewest communicators.
        pytest.param(300, 300, marks=pytest.mark.any_mpi),
        pytest.param(1000, 500, marks=pytest.mark.thorough),
        pytest.param(1000, 5000, marks=pytest.mark.long),
    ],
)
def test_many_optimizers_and_groups(mpirun, num_optimizers, num_groups):
    source = SOURCE.replace("NUM_OPTIMIZERS", str(num_optimizers))
    job = mpirun(2, source=source.replace("NUM_GROUPS", str(num_groups)))
    assert job.returncode == 0, job.output
    assert job.stdout.count("done") == 2
