"""The JAX front end computes the numbers of optax and torch, whatever surrounds the steps."""

import json

import numpy as np
import pytest
from mpi4py import MPI

from shardopt.errors import HyperparamsError
from tests.core.test_golden import FOLDER, MAX_ULPS, ulps
from tests.support.errors import is_last
from tests.support.oracle import Oracle, all_grads, initial

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module", autouse=True)
def frameworks():
    global NAdam, sharded, Block, NAMES, as_jax, as_tree, assert_tree, jax, jnp, ones, small
    import shardopt.jax as sharded
    from shardopt.jax import NAdam
    from tests.support.jax_trees import (
        NAMES,
        Block,
        as_jax,
        as_tree,
        assert_tree,
        jax,
        jnp,
        ones,
        small,
    )


@pytest.fixture
def x64(frameworks):
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def check_fifty_steps(comm, dtype):
    values = initial(dtype=dtype)
    oracle = Oracle(values, weight_decay=0.01, lr=0.01)
    with NAdam(as_jax(as_tree(values)), lr=0.01, weight_decay=0.01, comm=comm) as opt:
        assert [param.spec.name for param in opt.partition.params] == NAMES
        assert_tree(opt.params, values)
        for step in range(50):
            grads = all_grads(step, comm, dtype)
            lr = 0.01 / (1 + step)
            opt.param_groups[0]["lr"] = jnp.asarray(lr, dtype) if step == 7 else lr
            params = opt.step(as_jax(as_tree(grads[comm.rank])))
            oracle.step(grads, lr=float(opt.param_groups[0]["lr"]))
        assert_tree(params, oracle.params)
        assert opt.last_step.copied_nbytes == sum(value.nbytes for value in values)
        assert opt.count == opt.last_step.step == 50
    assert_tree(opt.params, oracle.params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fifty_steps_bit_for_bit(comm, dtype):
    check_fifty_steps(comm, dtype)


def test_fifty_steps_in_float64(comm, x64):
    check_fifty_steps(comm, "float64")


def check_optax(comm, dtype, weight_decay, rtol):
    optax = pytest.importorskip("optax")
    shapes = [(33, 7), (), (5000,)]
    values = initial(shapes=shapes, dtype=dtype)
    theirs = as_jax(values)
    tx = optax.nadamw(0.01, weight_decay=weight_decay) if weight_decay else optax.nadam(0.01)

    @jax.jit
    def train(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(theirs)
    hyper = {"lr": 0.01, "weight_decay": weight_decay, "variant": "optax"}
    with NAdam(theirs, comm=comm, **hyper) as opt:
        for step in range(50):
            grads = all_grads(step, comm, dtype, shapes)
            mean = [np.mean(np.stack(each), axis=0) for each in zip(*grads, strict=True)]
            theirs, state = train(theirs, state, mean)
            ours = opt.step(as_jax(grads[comm.rank]))
    for our, their, value in zip(ours, theirs, values, strict=True):
        assert our.dtype == their.dtype == dtype
        assert np.abs(our - value).max() > 0.01
        assert np.abs(our - their).max() <= rtol * np.abs(their).max()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_optax_itself(comm, weight_decay):
    check_optax(comm, "float32", weight_decay, rtol=1e-6)  # optax's powers of beta are float32


def test_optax_itself_in_float64(comm, x64):
    check_optax(comm, "float64", 0.1, rtol=1e-14)


@pytest.mark.parametrize("case", ["default.f32", "l2.f32", "none_grads.f32"])
def test_torch_itself(case):
    golden, inputs = np.load(FOLDER / f"{case}.npz"), np.load(FOLDER / "inputs.f32.npz")
    names = [key.removeprefix("p0/") for key in inputs if key.startswith("p0/")]
    names = [name for name in names if f"torch/{name}/param" in golden]
    present = {name: golden.get(f"present/{name}", np.ones(20)) for name in names}
    params = {name: inputs[f"p0/{name}"] for name in names}
    with NAdam(params, **json.loads(str(golden["kw"])), comm=MPI.COMM_SELF) as opt:
        for step in range(20):
            opt.param_groups[0]["lr"] = golden["lr"][step]
            params = opt.step(
                {
                    name: jnp.asarray(inputs[f"g/{name}"][step]) if present[name][step] else None
                    for name in names
                }
            )
            for at in np.flatnonzero(golden["steps"] == step + 1):
                for name in names:
                    expected = golden[f"torch/{name}/param"][at]
                    assert ulps(params[name], expected, np.float32) <= MAX_ULPS["param"]


def loss_of_mlp(params, x, y):
    hidden = jnp.tanh(x @ params["hidden"].kernel + params["hidden"].bias)
    return jnp.mean((hidden @ params["out"] - y) ** 2)


def test_split_batches_train_as_one_process(comm):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((24, 6)), rng.standard_normal((24, 2))
    x, y = x.astype(np.float32), y.astype(np.float32)  # 24 can be split among 1, 2, 3, 4 ranks
    start = {
        "hidden": Block(rng.standard_normal((6, 16), np.float32), np.zeros(16, np.float32)),
        "out": rng.standard_normal((16, 2), np.float32),
    }
    grad, own = jax.jit(jax.grad(loss_of_mlp)), slice(comm.rank, None, comm.size)
    with NAdam(start, comm=comm) as opt, NAdam(start, comm=MPI.COMM_SELF) as alone:
        split = whole = opt.params
        for _ in range(20):
            split = opt.step(grad(split, x[own], y[own]))
            whole = alone.step(grad(whole, x, y))
    assert loss_of_mlp(split, x, y) < 0.9 * loss_of_mlp(start, x, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), split, whole)
    mine = [leaf.tobytes() for leaf in map(np.asarray, jax.tree.leaves(split))]
    assert comm.allgather(mine) == [mine] * comm.size


def test_a_resumed_run_continues_bit_for_bit(comm):
    values = initial()
    oracle = Oracle(values, lr=0.1)

    def train(opt, steps):
        for step in steps:
            grads = all_grads(step, comm)
            opt.step(as_tree(grads[comm.rank]))
            oracle.step(grads)
        return opt.params

    with NAdam(as_tree(values), lr=0.1, comm=comm) as opt:
        weights = train(opt, range(3))
        saved = opt.state_dict()
    for steps in (range(3, 5), range(5, 7)):
        with NAdam(weights, comm=comm) as opt:
            opt.load_state_dict(saved)
            assert opt.count == steps[0]
            weights = train(opt, steps)
            assert_tree(weights, oracle.params)
            saved = opt.gather_state_dict()
    if comm.rank == 0:
        for index, moment in enumerate(oracle.exp_avg):
            np.testing.assert_array_equal(saved["state"][index]["exp_avg"], moment)


def test_clipping_and_loss_scale(comm):
    with NAdam(small(), comm=comm, max_grad_norm=1.0) as opt:
        opt.step(jax.tree.map(lambda leaf: 8 * leaf, small()), loss_scale=4.0)
        assert opt.last_step.grad_norm == pytest.approx(2 * np.sqrt(11))
        opt.step(small(), loss_scale=4.0, overflowed=is_last(comm))
        assert opt.last_step.skipped


OF_OPTAX = [
    ("adam", {}, {}),
    ("adam", {"b1": 0.8, "b2": 0.9, "eps": 1e-3}, {}),
    ("adamw", {}, {}),
    ("adamw", {"weight_decay": 0.1, "b2": 0.9}, {}),
    ("radam", {"b2": 0.9}, {}),  # with 0.999 optax's float32 is off by a tenth of r
    ("radam", {"b2": 0.9, "eps": 1e-3}, {}),
    ("nadam", {}, {"variant": "optax"}),
]


@pytest.mark.parametrize(("name", "settings", "ours_alone"), OF_OPTAX)
def test_transformations_follow_optaxs_of_the_same_name(name, settings, ours_alone):
    """Ten steps, of which some of RAdam's leave the second moment out."""
    optax = pytest.importorskip("optax")
    rng = np.random.default_rng(2)
    start = {
        "a": rng.standard_normal((4, 3)).astype("f4"),
        "b": rng.standard_normal(7).astype("f4"),
    }
    ours = getattr(sharded, name)(1e-2, **settings, **ours_alone, comm=MPI.COMM_SELF)
    theirs = getattr(optax, name)(1e-2, **settings)
    results = []
    for transformation in (ours, theirs):
        params, state = jax.tree.map(jnp.asarray, start), None
        state = transformation.init(params)
        for step in range(10):
            draw = np.random.default_rng(step)
            grads = {k: jnp.asarray(draw.standard_normal(v.shape), "f4") for k, v in start.items()}
            updates, state = transformation.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        results.append(params)
        if transformation is ours:
            assert (state.mu_product is None) == (name != "nadam")
            kept = jax.tree.map(lambda leaf: leaf + 0, state)  # a state of leaves goes on as well
            transformation.update(grads, kept, params)
            state.close()
    for key in start:
        np.testing.assert_allclose(results[0][key], results[1][key], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("adam", {"nesterov": True}, "nesterov must be False; got True"),
        ("adamw", {"mask": {"a": True}}, "mask must be None"),
        ("radam", {"threshold": 4.0}, "threshold must be 5.0; got 4.0"),
        ("adam", {"eps_root": 1e-8}, "eps_root must be 0.0"),
        ("radam", {"variant": "keras"}, "variant must be one of torch, optax, lucid"),
    ],
)
def test_what_optax_has_and_a_step_has_not_is_refused(name, settings, told):
    transformation = getattr(sharded, name)(1e-2, **settings, comm=MPI.COMM_SELF)
    with pytest.raises(HyperparamsError, match=told):
        transformation.init({"a": jnp.ones(3)})
