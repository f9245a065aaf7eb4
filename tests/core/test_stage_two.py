"""Stage 2 where it cannot be had: all ranks raise, and stage 1 is named."""

import numpy as np
import pytest

from shardopt.errors import HyperparamsError
from shardopt.numpy import NAdam, Parameter
from shardopt.policy import ShardPolicy

pytestmark = pytest.mark.mpi


def test_arrays_keep_stage_one(comm):
    params = [Parameter(np.zeros(5), "w")]
    with pytest.raises(HyperparamsError, match="with parameters of NumPy or CuPy"):
        NAdam(params, comm=comm, policy=ShardPolicy(stage=2))
    with NAdam(params, comm=comm, policy=ShardPolicy(stage=1)) as opt:
        assert opt.memory_report().ring_node_nbytes == 0
