"""JAX hands gradients over in the step: there is nothing to average before."""

import pytest

from shardopt.errors import HyperparamsError
from shardopt.policy import ShardPolicy

pytestmark = pytest.mark.mpi


def test_jax_keeps_stage_one(comm):
    pytest.importorskip("jax")
    import jax.numpy as jnp

    from shardopt.jax import NAdam

    with pytest.raises(HyperparamsError, match="with a framework that does not report"):
        NAdam({"w": jnp.zeros(5)}, comm=comm, policy=ShardPolicy(stage=2))
