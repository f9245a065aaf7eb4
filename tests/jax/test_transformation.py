"""NAdam as a gradient transformation of optax."""

import sys

import numpy as np
import pytest

from shardopt.errors import PartitionError
from tests.support.errors import refused
from tests.support.oracle import Oracle, all_grads, initial

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module", autouse=True)
def frameworks():
    global NAdam, nadam, as_jax, jax, jnp, ones
    from shardopt.jax import NAdam, nadam
    from tests.support.jax_trees import as_jax, jax, jnp, ones


def test_as_a_gradient_transformation(comm):
    optax = pytest.importorskip("optax")
    shapes = [(33, 7), (5000,)]
    values = initial(shapes=shapes)
    schedule = optax.linear_schedule(0.1, 0.0, 8)
    tx = nadam(schedule, weight_decay=0.1, comm=comm)
    assert isinstance(tx, optax.GradientTransformation)
    theirs = optax.chain(optax.scale(2.0), tx)
    oracle = Oracle(values, weight_decay=0.1)
    params = as_jax(values)
    state = theirs.init(params)
    for step in range(6):
        grads = all_grads(step, comm, shapes=shapes)
        updates, state = theirs.update(as_jax(grads[comm.rank]), state, params)
        before, params = params, optax.apply_updates(params, updates)
        oracle.step([[2 * grad for grad in each] for each in grads], lr=float(schedule(step)))
        for leaf, old, expected in zip(params, before, oracle.params, strict=True):
            # Half a unit of the difference, and half a unit of the sum.
            size = np.maximum(np.abs(expected - np.asarray(old)), np.abs(expected))
            assert (np.abs(np.asarray(leaf) - expected) <= np.spacing(size)).all()
        oracle.masters = [np.asarray(leaf) for leaf in params]  # which the optimizer takes over
    opt = state[1].optimizer
    assert isinstance(opt, NAdam)
    assert opt.count == state[1].count == 6
    with refused(comm, PartitionError, "params must be given with weight_decay"):
        tx.update(params, state[1])
    state[1].close()


def test_without_params(comm):
    pytest.importorskip("optax")
    tx = nadam(comm=comm)
    params = as_jax(initial(shapes=[(5,), (2, 3)]))
    updates, state = tx.update(params, tx.init(params))  # optax leaves params out where it may
    expected, _ = tx.update(params, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    state.close()


def test_floats_and_none_in_a_gradient_transformation(comm):
    optax = pytest.importorskip("optax")
    tx = nadam(1.0, variant="optax", comm=comm)
    params = {"bias": None, "gain": np.ones(3, np.float32), "scale": 1.0}
    state = tx.init(params)
    updates, state = tx.update({"bias": None, "gain": None, "scale": 1.0}, state, params)
    params = optax.apply_updates(params, updates)
    assert params["bias"] is None
    np.testing.assert_array_equal(params["gain"], 1)
    assert float(params["scale"]) < 1
    state.close()


def test_updates_of_sixteen_bits_add_up_exactly(comm):
    optax = pytest.importorskip("optax")
    params = {"w": jnp.asarray(np.linspace(-1, 1, 999).astype("bfloat16"))}
    tx = nadam(0.01, comm=comm)
    state = tx.init(params)
    for _ in range(5):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
        assert params["w"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(params["w"], state.optimizer.params["w"])
    state.close()


def test_without_optax(monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(ImportError, match="optax must be installed .* Run pip install optax"):
        nadam()
