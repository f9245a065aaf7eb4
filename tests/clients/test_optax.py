"""Wrappers of optax that take long to compile, around our transformation and around optax's."""

import numpy as np
import pytest

from tests.support.frameworks import require

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module", autouse=True)
def frameworks():
    global jax, jnp, optax, assert_close, grads_of, mean_grads, nadam, start, train
    jax = require("jax")
    from jax import numpy as jnp

    from shardopt.jax import nadam
    from tests.support.jax_training import (
        assert_close,
        grads_of,
        mean_grads,
        optax,
        start,
        train,
    )


def make(comm, **settings):
    return nadam(0.1, variant="optax", comm=comm, **settings)


def test_lookahead_that_resets_the_state(comm):
    def look(tx):
        return optax.lookahead(tx, 2, 0.5, reset_state=True)

    params = optax.LookaheadParams.init_synced(start())
    own = train(
        look(make(comm)), lambda each, step: grads_of(each.fast, step, comm.rank), params=params
    )
    theirs = train(
        look(optax.nadam(0.1)), lambda each, step: mean_grads(each.fast, step, comm), params=params
    )
    assert_close(own, theirs)


def test_complex_parameters_as_two_real_ones(comm):
    params = {"z": jnp.asarray(np.arange(3) + 1j, jnp.complex64), "r": jnp.asarray(np.ones(2, "f"))}
    split = optax.contrib.split_real_and_imaginary
    own = train(split(make(comm)), lambda *at: grads_of(*at, comm.rank), params=params)
    theirs = train(split(optax.nadam(0.1)), lambda *at: mean_grads(*at, comm), params=params)
    assert_close(own, theirs)


def test_line_search(comm):
    def loss_of(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    def search(tx):
        params = start()
        tx = optax.chain(tx, optax.scale_by_backtracking_linesearch(3))
        state = tx.init(params)
        for _ in range(3):
            value, grad = jax.value_and_grad(loss_of)(params)
            extra = {"value": value, "grad": grad, "value_fn": loss_of}
            updates, state = tx.update(grad, state, params, **extra)
            params = optax.apply_updates(params, updates)
        return params

    assert_close(search(make(comm)), search(optax.nadam(0.1)))


def test_accumulation_outside_of_jit(comm):
    def accumulate(tx, rank):
        params = {"w": jnp.asarray(np.ones(3, np.float32))}
        return train(tx, lambda *at: grads_of(*at, rank), steps=3, params=params)

    theirs = accumulate(optax.MultiSteps(optax.nadam(0.1), 2), (comm.size - 1) / 2)
    with jax.disable_jit():
        own = accumulate(optax.MultiSteps(make(comm, keep_states=True), 2), comm.rank)
    assert_close(own, theirs)
