"""Arrays that the JAX front end hands out never change, and stay where they were put."""

import numpy as np
import pytest

from tests.support.oracle import Oracle, all_grads, initial

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module", autouse=True)
def frameworks():
    global NAdam, as_jax, as_tree, assert_tree, jax, ones, small
    from shardopt.jax import NAdam
    from tests.support.jax_trees import as_jax, as_tree, assert_tree, jax, ones, small


def test_arrays_handed_out_never_change(comm):
    values = initial(shapes=[(16,), (4096,), (2, 3), ()])
    given = as_jax(values)
    with NAdam(given, lr=0.1, comm=comm) as opt:
        shared = [leaf.data for leaf in opt.param_groups[0]["params"]]
        assert any(array.ctypes.data % 64 == 0 for array in shared)  # what JAX would alias
        history = [(given, values), (opt.params, values)]
        for _ in range(5):
            params = opt.step(given)
            history.append((params, [np.array(param) for param in params]))
            history.append((opt.params, history[-1][1]))
        addresses = [leaf.unsafe_buffer_pointer() for params, _ in history for leaf in params]
        assert len(set(addresses)) == len(addresses)
        for array in shared:
            inside = range(array.ctypes.data, array.ctypes.data + max(array.nbytes, 1))
            assert not any(address in inside for address in addresses)
        comm.Barrier()
        for array in shared if comm.rank == 0 else ():
            array[...] = 7.0  # what a later step might do
        comm.Barrier()
        for params, copies in history:
            for param, copy in zip(params, copies, strict=True):
                np.testing.assert_array_equal(param, copy)
    for params, copies in history:  # the shared memory is gone
        for param, copy in zip(params, copies, strict=True):
            np.testing.assert_array_equal(param, copy)


def test_arrays_handed_out_may_be_donated(comm):
    double = jax.jit(lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree), donate_argnums=0)
    with NAdam(small(), comm=comm) as opt:
        params = opt.params
        np.testing.assert_array_equal(double(params)["w"], 2)
        assert params["w"].is_deleted()
        np.testing.assert_array_equal(opt.params["w"], 1)


def test_arrays_stay_where_they_were_put(comm):
    devices = jax.devices()
    assert len(devices) == 2
    mesh = jax.sharding.Mesh(np.array(devices), ("d",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    tree = {
        "free": ones(4),
        "put": jax.device_put(ones(4), devices[1]),
        "split": jax.device_put(ones(4, 3), split),
    }
    with NAdam(tree, comm=comm) as opt:
        params = opt.step({**tree, "free": jax.device_put(ones(4), split)})
    for name, leaf in params.items():
        assert leaf.sharding == tree[name].sharding
        assert leaf.committed == tree[name].committed
        np.testing.assert_array_less(leaf, 1)


def test_rank_0_decides_the_initial_values(comm):
    with NAdam(small(float(comm.rank)), comm=comm) as opt:
        np.testing.assert_array_equal(opt.params["w"], 0)


def test_parameters_changed_outside_take_the_place_of_the_optimizers(comm):
    values = initial()
    oracle = Oracle(values, lr=0.1)
    with NAdam(as_tree(values), lr=0.1, comm=comm) as opt:
        params = opt.params
        for step in range(3):
            clipped = jax.tree.map(lambda leaf: np.clip(np.asarray(leaf), -0.5, 0.5), params)
            oracle.masters = [np.clip(param, -0.5, 0.5) for param in oracle.params]
            grads = all_grads(step, comm)
            params = opt.step(as_tree(grads[comm.rank]), clipped)
            oracle.step(grads)
            assert_tree(params, oracle.params)
        grads = all_grads(3, comm)
        copied_nbytes = opt.last_step.copied_nbytes
        params = opt.step(as_tree(grads[comm.rank]), params)
        oracle.step(grads)
        assert_tree(params, oracle.params)
        assert opt.last_step.copied_nbytes <= copied_nbytes  # equal ones are not copied
        grads = all_grads(4, comm)
        opt.step(as_tree(grads[comm.rank]), as_tree([None] * len(values)))
        oracle.step(grads)
        assert_tree(opt.params, oracle.params)
