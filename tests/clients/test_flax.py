"""Flax: its train state, its serialization and the optimizer of nnx, beside optax.nadam alone."""

import numpy as np
import pytest

from tests.support.frameworks import require

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module", autouse=True)
def frameworks():
    global flax, jax, jnp, linen, nnx, optax, TrainState, assert_close, assert_equal, nadam
    jax = require("jax")
    flax = pytest.importorskip("flax")
    pytest.importorskip("flax.serialization")
    from flax import linen, nnx
    from flax.training.train_state import TrainState
    from jax import numpy as jnp

    from shardopt.jax import nadam
    from tests.support.jax_training import assert_close, assert_equal, optax


def batches(comm):
    """Return this rank's part of a batch, and the whole."""
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((12, size)).astype(np.float32) for size in (4, 2))
    return (x[comm.rank :: comm.size], y[comm.rank :: comm.size]), (x, y)


def resumed(state, fresh):
    """Save a train state to bytes and load them into a new one."""
    return flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))


def train_linen(tx, batch, *, resume=False):
    model = linen.Dense(2)
    params = model.init(jax.random.key(0), batch[0])["params"]

    @jax.jit
    def grads_of(params, x, y):
        return jax.grad(lambda each: jnp.mean((model.apply({"params": each}, x) - y) ** 2))(params)

    def new():
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    state = new()
    for step in range(6):
        state = state.apply_gradients(grads=grads_of(state.params, *batch))
        if resume and step == 2:
            state = resumed(state, new())
    return state


def test_a_train_state_trains_and_resumes(comm):
    own, whole = batches(comm)
    tx = nadam(0.1, variant="optax", comm=comm)
    expected = train_linen(optax.nadam(0.1), whole)
    plain = train_linen(tx, own)
    assert_close(plain.params, expected.params)
    again = train_linen(tx, own, resume=True)
    assert_equal(again.params, plain.params)
    assert_equal(again.opt_state.exp_avg, plain.opt_state.exp_avg)
    assert again.step == again.opt_state.count == 6
    saved = flax.serialization.to_state_dict(again)["opt_state"]
    assert sorted(saved["exp_avg"]) == ["bias", "kernel"]
    with pytest.raises(ValueError, match="a saved state must have the fields"):
        flax.serialization.from_state_dict(again.opt_state, {"step": saved["step"]})
    plain.opt_state.close()
    again.opt_state.close()


def train_nnx(tx, batch):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.tanh, nnx.Linear(8, 2, rngs=rngs))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads_of = nnx.jit(nnx.grad(lambda model, x, y: jnp.mean((model(x) - y) ** 2)))
    for _ in range(5):
        optimizer.update(model, grads_of(model, *batch))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer


def test_the_optimizer_of_nnx(comm):
    own, whole = batches(comm)
    expected, _ = train_nnx(optax.nadam(0.1), whole)
    params, optimizer = train_nnx(nadam(0.1, variant="optax", comm=comm), own)
    assert_close(params, expected)
    optimizer.opt_state.close()
