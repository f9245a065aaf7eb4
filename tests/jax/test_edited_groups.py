"""Leaves of a tree may move between param groups, and leave them."""

import numpy as np
import pytest

from shardopt.errors import PartitionError
from tests.support.errors import POLICY

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module", autouse=True)
def frameworks():
    global NAdam, jnp
    from shardopt.jax import NAdam
    from tests.support.jax_trees import jnp


def tree(value=1.0):
    return {name: jnp.full(size, value) for name, size in (("a", 3), ("b", 5), ("c", 4500))}


def test_a_leaf_may_have_a_group_of_its_own(comm):
    with NAdam(tree(), lr=0.1, comm=comm, policy=POLICY) as opt:
        opt.step(tree())
        leaf = opt.param_groups[0]["params"].pop(1)
        opt.param_groups.append({"params": [leaf], "lr": 0.0})
        before, after = opt.params, opt.step(tree())
        assert opt.count == 2
        assert list(after) == ["a", "b", "c"]
        np.testing.assert_array_equal(after["b"], before["b"])
        assert (np.asarray(after["c"]) < before["c"]).all()
        assert opt.param_groups[1]["weight_decay"] == 0.0  # completed


def test_a_leaf_that_leaves_is_no_longer_trained(comm):
    with NAdam(tree(), lr=0.1, comm=comm, policy=POLICY) as opt:
        before = opt.step(tree())
        leaf = opt.param_groups[0]["params"].pop(0)
        other = {**before, "a": before["a"] + 1}
        opt.step(tree(), other)
        after = opt.step(tree())
        np.testing.assert_array_equal(after["a"], before["a"])
        assert (np.asarray(after["c"]) < before["c"]).all()
        opt.param_groups[0]["params"].append(leaf)
        opt.param_groups[0]["params"].append(jnp.ones(3))
        with pytest.raises(PartitionError, match="params must be one pytree"):
            opt.step(tree())
        opt.param_groups.clear()
        opt.step(tree())
        assert opt.count == 0
