"""Equinox: filtered models, and states serialised leaf by leaf, beside optax.nadam alone."""

import numpy as np
import pytest

from tests.support.frameworks import require

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module", autouse=True)
def frameworks():
    global eqx, jax, jnp, optax, assert_close, assert_equal, nadam
    jax = require("jax")
    eqx = pytest.importorskip("equinox")
    from jax import numpy as jnp

    from shardopt.jax import nadam
    from tests.support.jax_training import assert_close, assert_equal, optax


def trained(tx, batch, through=lambda tx, model, state: (model, state)):
    """Return the arrays of a model that was trained, and the state."""
    model = eqx.nn.Linear(4, 2, key=jax.random.key(0))
    loss_of = lambda model, x, y: jnp.mean((jax.vmap(model)(x) - y) ** 2)  # noqa: E731
    grads_of = eqx.filter_jit(eqx.filter_grad(loss_of))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    for step in range(4):
        if step == 2:
            model, state = through(tx, model, state)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads_of(model, *batch), state, params)
        model = eqx.apply_updates(model, updates)
    return eqx.filter(model, eqx.is_inexact_array), state


def test_a_model_trains_and_resumes(comm, mpi_tmp_path):
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((12, size)).astype(np.float32) for size in (4, 2))
    own = x[comm.rank :: comm.size], y[comm.rank :: comm.size]

    def saved(tx, model, state):
        path = mpi_tmp_path / "state.eqx"
        if comm.rank == 0:
            eqx.tree_serialise_leaves(path, (model, state))
        comm.Barrier()
        fresh = tx.init(eqx.filter(model, eqx.is_inexact_array))
        return eqx.tree_deserialise_leaves(path, (model, fresh))

    def split(tx, model, state):
        parts = eqx.partition(state, eqx.is_inexact_array)
        assert parts[0].step is None
        return model, eqx.combine(*parts)

    tx = nadam(0.1, variant="optax", comm=comm)
    expected, _ = trained(optax.nadam(0.1), (x, y))
    plain, state = trained(tx, own)
    assert_close(plain, expected)
    for through in (saved, split):
        again, last = trained(tx, own, through)
        assert_equal(again, plain)
        assert_equal(last, state)
        last.close()
    state.close()
