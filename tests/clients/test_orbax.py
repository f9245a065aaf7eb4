"""Orbax: states saved by rank 0 and restored on all ranks, with each of its checkpointers."""

import pytest

from tests.support.frameworks import require

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module", autouse=True)
def frameworks():
    global jax, ocp, optax, assert_close, assert_equal, grads_of, mean_grads, nadam, start, train
    jax = require("jax")
    ocp = pytest.importorskip("orbax.checkpoint")

    from shardopt.jax import nadam
    from tests.support.jax_training import (
        assert_close,
        assert_equal,
        grads_of,
        mean_grads,
        optax,
        start,
        train,
    )


def by_pytree(path, rank, state, fresh):
    if rank == 0:
        ocp.PyTreeCheckpointer().save(path / "0", state)
    yield
    yield ocp.PyTreeCheckpointer().restore(path / "0", item=fresh)


def by_standard(path, rank, state, fresh):
    with ocp.StandardCheckpointer() as checkpointer:
        if rank == 0:
            checkpointer.save(path / "0", state)
            checkpointer.wait_until_finished()
        yield
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
        yield checkpointer.restore(path / "0", abstract)


def by_manager(path, rank, state, fresh):
    with ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(create=rank == 0)) as own:
        if rank == 0:
            own.save(3, args=ocp.args.StandardSave({"state": state}))
            own.wait_until_finished()
        yield
        own.reload()
        restored = own.restore(3, args=ocp.args.StandardRestore({"state": fresh}))
        yield restored["state"]


@pytest.mark.parametrize("way", [by_pytree, by_standard, by_manager])
def test_a_restored_state_goes_on_bit_for_bit(comm, mpi_tmp_path, way):
    tx, steps = nadam(0.1, variant="optax", comm=comm), iter(range(5))

    def through(state):
        if next(steps) != 3:
            return state
        restoring = way(mpi_tmp_path, comm.rank, state, tx.init(start()))
        next(restoring)
        comm.Barrier()
        return next(restoring)

    plain = train(tx, lambda *at: grads_of(*at, comm.rank))
    assert_close(plain, train(optax.nadam(0.1), lambda *at: mean_grads(*at, comm)))
    assert_equal(train(tx, lambda *at: grads_of(*at, comm.rank), through=through), plain)
