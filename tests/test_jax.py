"""The face for JAX: pytrees in, arrays out that never change; the numbers of optax and torch."""

import dataclasses
import json
import sys
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from mpi4py import MPI

from shardopt.errors import ClosedError, HyperparamsError, PartitionError, RankMismatchError
from tests.core.test_golden import FOLDER, MAX_ULPS, ulps
from tests.support.errors import BOTH_WAYS, POLICY, errs, is_last, refused
from tests.support.frameworks import require
from tests.support.oracle import Oracle, all_grads, initial

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module", autouse=True)
def frameworks():
    """Load JAX when the first test runs: collecting tests must stay cheap."""
    global jax, jnp, NAdam, nadam, Block
    jax = require("jax")
    jnp = jax.numpy
    from shardopt.jax import NAdam, nadam

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Block:
        kernel: Any
        bias: Any


@pytest.fixture
def x64(frameworks):
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


class Pair(NamedTuple):
    left: Any
    right: Any


def as_tree(values):
    """Nine values in a tree that flattens to their order."""
    a, b, c, d, e, f, g, h, i = values
    return {"a": [a, b], "b": (c, None, Pair(d, e)), "c": Block(f, g), "d": {"x": h, "y": {"z": i}}}


NAMES = ["['a'][0]", "['a'][1]", "['b'][0]", "['b'][2].left", "['b'][2].right"]
NAMES += ["['c'].kernel", "['c'].bias", "['d']['x']", "['d']['y']['z']"]


def as_jax(values):
    return jax.tree.map(jnp.asarray, values)


def assert_tree(tree, values):
    """The tree must be ``as_tree`` of jax arrays with these values, bit for bit."""
    assert jax.tree.structure(tree) == jax.tree.structure(as_tree(values))
    for leaf, value in zip(jax.tree.leaves(tree), values, strict=True):
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == value.dtype
        np.testing.assert_array_equal(leaf, value)


def ones(*shape, dtype="float32"):
    return jnp.asarray(np.ones(shape, dtype))  # jnp.ones would have to be compiled


def small(value=1.0):
    """Two parameters, or their gradients, that are ``value`` everywhere."""
    return as_jax({"b": np.full(5, value, np.float32), "w": np.full((2, 3), value, np.float32)})


# -- numbers ---------------------------------------------------------------------------------------


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


# -- trees -----------------------------------------------------------------------------------------


SHAPE = st.lists(st.integers(0, 3), max_size=3).map(tuple)
TREES = st.recursive(
    SHAPE.map(lambda shape: ("leaf", shape)) | st.none(),
    lambda nodes: st.one_of(
        st.lists(nodes, max_size=3),
        st.dictionaries(st.sampled_from(["a", "b", 3.5, "c d"]), nodes, max_size=3).filter(
            lambda tree: 3.5 not in tree or len(tree) == 1  # JAX must be able to sort the keys
        ),
        st.tuples(nodes, nodes),
        st.tuples(nodes, nodes).map(lambda pair: Pair(*pair)),
        st.tuples(nodes, nodes).map(lambda pair: Block(*pair)),
    ),
    max_leaves=8,
)


@pytest.mark.filterwarnings("ignore::shardopt.errors.NoGradientWarning")
@hypothesis.settings(max_examples=15)
@hypothesis.given(TREES, st.data())
def test_any_tree(comm, outline, data):
    def is_leaf(node):
        return type(node) is tuple and node[:1] == ("leaf",)

    shapes = [leaf[1] for leaf in jax.tree.leaves(outline, is_leaf=is_leaf)]
    hypothesis.assume(shapes)
    structure = jax.tree.structure(outline, is_leaf=is_leaf)
    kinds = data.draw(st.lists(st.sampled_from(["numpy", "jax", "none"]), min_size=9, max_size=9))

    def as_outlined(values):
        makers = {"numpy": np.array, "jax": jnp.asarray, "none": jnp.asarray}
        leaves = [makers[kinds[i % 9]](value) for i, value in enumerate(values)]
        return jax.tree.unflatten(structure, leaves)

    values = initial(shapes=shapes)
    oracle = Oracle(values)
    with NAdam(as_outlined(values), comm=comm) as opt:
        for step in range(2):
            grads = all_grads(step, comm, shapes=shapes)
            gone = [kinds[i % 9] == "none" and step == 1 for i in range(len(shapes))]
            grads = [
                [None if no else grad for no, grad in zip(gone, each, strict=True)]
                for each in grads
            ]
            oracle.step(grads)
            mine = as_outlined([0.0 if grad is None else grad for grad in grads[comm.rank]])
            leaves = [
                None if no else leaf
                for no, leaf in zip(gone, structure.flatten_up_to(mine), strict=True)
            ]
            params = opt.step(jax.tree.unflatten(structure, leaves))
    assert jax.tree.structure(params) == structure
    for leaf, expected in zip(jax.tree.leaves(params), oracle.params, strict=True):
        assert isinstance(leaf, jax.Array)
        np.testing.assert_array_equal(leaf, expected)


def test_an_array_alone_is_a_tree(comm):
    with NAdam(ones(3), comm=comm) as opt:
        params = opt.step(ones(3))
        assert params.shape == (3,)
        np.testing.assert_array_less(params, 1)
        assert opt.partition.params[0].spec.name == "params"


def test_leaves_may_be_floats_and_share_an_array(comm):
    zeros = jnp.asarray(np.zeros(4, np.float32))
    with NAdam({"b": zeros, "c": zeros, "scale": 1.0}, lr=0.5, comm=comm) as opt:
        assert opt.params["scale"].dtype == jnp.float32
        params = opt.step({"b": ones(4), "c": np.full(4, -1, np.float32), "scale": 2.0})
    np.testing.assert_array_less(params["b"], 0)
    np.testing.assert_array_less(0, params["c"])
    assert params["scale"] < 1


def test_a_parameter_without_gradient_stands_still(comm):
    with NAdam(small(), comm=comm) as opt:
        # The last rank alone has one for b; nobody has one for w.
        params = opt.step({"b": ones(5) if is_last(comm) else None, "w": None})
        np.testing.assert_array_less(params["b"], 1)
        np.testing.assert_array_equal(params["w"], 1)
        assert [entry["step"] for entry in opt.state_dict()["state"].values()] == [1, 0]
        params = opt.step(small(0.0))
        assert opt.last_step.num_updated == 2


# -- arrays ----------------------------------------------------------------------------------------


def test_arrays_handed_out_never_change(comm):
    values = initial(shapes=[(16,), (4096,), (2, 3), ()])
    given = as_jax(values)
    with NAdam(given, lr=0.1, comm=comm) as opt:
        windows = [leaf.data for leaf in opt.param_groups[0]["params"]]
        assert any(window.ctypes.data % 64 == 0 for window in windows)  # what JAX would alias
        history = [(given, values), (opt.params, values)]
        for _ in range(5):
            params = opt.step(given)
            history.append((params, [np.array(param) for param in params]))
            history.append((opt.params, history[-1][1]))
        addresses = [leaf.unsafe_buffer_pointer() for params, _ in history for leaf in params]
        assert len(set(addresses)) == len(addresses)
        for window in windows:
            inside = range(window.ctypes.data, window.ctypes.data + max(window.nbytes, 1))
            assert not any(address in inside for address in addresses)
        comm.Barrier()
        for window in windows if comm.rank == 0 else ():
            window[...] = 7.0  # what a later step might do
        comm.Barrier()
        for params, copies in history:
            for param, copy in zip(params, copies, strict=True):
                np.testing.assert_array_equal(param, copy)
    for params, copies in history:  # the windows are gone
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


# -- the rest of the optimizer ---------------------------------------------------------------------


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


# -- misuse ----------------------------------------------------------------------------------------


def wrong_grads():
    deleted = ones(5)
    deleted.delete()
    return {
        "a leaf too few": ({"w": ones(2, 3)}, ["TREE must be", "nothing for \"['b']"]),
        "a leaf too many": ({**small(), "x": 1.0}, ["TREE must be", "something for \"['x']"]),
        "None for all": (None, ["TREE must be", "nothing for \"['b']"]),
        "another node": ([ones(5), ones(2, 3)], ["nothing for \"['b']"]),
        "a node for a leaf": ({**small(), "b": {"x": 1.0}}, ["['b']", "got dict"]),
        "a list for a leaf": ({**small(), "b": [1.0, 2.0]}, ["['b']", "shape (5,); got (2,)"]),
        "shape": ({**small(), "b": ones(6)}, ["['b']", "shape (5,); got (6,)"]),
        "dtype": ({**small(), "w": ones(2, 3, dtype="float16")}, ["['w']", "dtype float32"]),
        "NumPy's float64": ({**small(), "w": np.ones((2, 3))}, ["['w']", "got float64"]),
        "ints": ({**small(), "w": ones(2, 3, dtype="int32")}, ["['w']", "of dtype", "got int32"]),
        "a key": ({**small(), "b": jax.random.key(0)}, ["['b']", "readable", "key"]),
        "a deleted array": ({**small(), "b": deleted}, ["['b']", "readable", "deleted"]),
        "text": ({**small(), "b": "five!"}, ["['b']", "of dtype", "got str"]),
    }


@BOTH_WAYS
@pytest.mark.parametrize("as_params", [False, True], ids=["grads", "params"])
def test_wrong_trees_are_refused(comm, alone, as_params):
    with NAdam(small(), comm=comm, policy=POLICY) as opt:
        before = opt.state_dict()
        for grads, told in wrong_grads().values():
            told = [words.replace("TREE", "params" if as_params else "grads") for words in told]
            if as_params and grads is None:
                continue
            wrong = grads if errs(comm, alone) else small(2.0)
            with refused(comm, PartitionError, *told, alone=alone):
                if as_params:
                    opt.step(small(), wrong)
                else:
                    opt.step(wrong, small(3.0))
            np.testing.assert_array_equal(opt.params["w"], 1)
        assert repr(opt.state_dict()) == repr(before)
        params = opt.step(small())
        assert opt.last_step.step == 1
        np.testing.assert_array_less(params["w"], 1)
        np.testing.assert_array_less(0.9, params["w"])


def test_a_tree_of_other_nodes_is_refused(comm):
    with NAdam([ones(2), (None, 1.0)], comm=comm, policy=POLICY) as opt:
        with refused(comm, PartitionError, "grads must be a tree", "got Expected list"):
            opt.step((ones(2), (None, 1.0)))
        with refused(comm, PartitionError, "grads must be a tree", "something for '[1][0]'"):
            opt.step([ones(2), (1.0, 1.0)])
        with refused(comm, PartitionError, "grads must be a tree", "got Expected list"):
            opt.step({"a": 1.0, 2: 1.0})


@BOTH_WAYS
def test_wrong_params_are_refused(comm, alone):
    wrong = {
        "an int leaf": (ones(5, dtype="int32"), ["\"['b'][0]\" must be of dtype", "got int32"]),
        "complex": (ones(5, dtype="complex64"), ["['b'][0]", "got complex64"]),
        "bool": (True, ["['b'][0]", "got bool"]),
        "float8": (ones(5, dtype="float8_e4m3fn"), ["['b'][0]", "got float8_e4m3fn"]),
        "float64": (np.ones(5), ["['b'][0]", "got float64", "jax_enable_x64"]),
        "another shape": (ones(6), ["['b'][0]", "(5,)", "(6,)"]),
        "nothing": (None, ["the number of parameters must be the same", "got 2 on"]),
    }
    for case, (leaf, told) in wrong.items():
        mismatch = case in ("another shape", "nothing")
        if mismatch and not (alone and comm.size > 1):
            continue
        error = RankMismatchError if mismatch else PartitionError
        tree = {"a": ones(3), "b": [leaf if errs(comm, alone) else ones(5)]}
        with refused(comm, error, *told, alone=alone and not mismatch):
            NAdam(tree, comm=comm, policy=POLICY)
    with refused(comm, PartitionError, "params must hold at least one"):
        NAdam({"a": None, "b": []}, comm=comm)
    with refused(comm, HyperparamsError, "lr must be"):
        NAdam(small(), lr=-1.0, comm=comm)


def test_tracers_are_refused(comm):
    with NAdam(small(), comm=comm, policy=POLICY) as opt:
        for traced in (jax.jit(opt.step), jax.vmap(opt.step), jax.grad(opt.step)):
            with refused(comm, PartitionError, "['b']", "got a tracer", "outside of jax.jit"):
                traced(jax.tree.map(lambda leaf: leaf[None], small()))
        with refused(comm, PartitionError, "['b']", "got a tracer"):
            jax.jit(lambda tree: NAdam(tree, comm=comm, policy=POLICY))(small())
        opt.step(small())


def test_misuse_of_the_rest(comm):
    opt = NAdam(small(), comm=comm, policy=POLICY)
    with refused(comm, PartitionError, "params must be one pytree", "got a ArrayImpl later"):
        opt.add_param_group({"params": [ones(3)]})
    opt.close()
    opt.close()
    with pytest.raises(ClosedError):
        opt.step(small())
    np.testing.assert_array_equal(opt.params["w"], 1)


# -- optax's protocol ------------------------------------------------------------------------------


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
    (opt,) = [each for each in state if isinstance(each, NAdam)]
    assert jax.tree.leaves(opt) == []
    assert jax.tree.map(lambda leaf: leaf, state)[1] is opt
    assert opt.count == 6
    with refused(comm, PartitionError, "got a tracer", "outside of jax.jit"):
        jax.jit(tx.update)(params, opt, params)
    updates, _ = tx.update(params, opt)  # optax leaves params out where it may
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    opt.close()


def test_floats_and_none_in_a_gradient_transformation(comm):
    optax = pytest.importorskip("optax")
    tx = nadam(1.0, variant="optax", comm=comm)
    params = {"bias": None, "gain": np.ones(3, np.float32), "scale": 1.0}
    opt = tx.init(params)
    updates, _ = tx.update({"bias": None, "gain": None, "scale": 1.0}, opt, params)
    params = optax.apply_updates(params, updates)
    assert params["bias"] is None
    np.testing.assert_array_equal(params["gain"], 1)
    assert float(params["scale"]) < 1
    opt.close()


def test_updates_of_sixteen_bits_add_up_exactly(comm):
    optax = pytest.importorskip("optax")
    params = {"w": jnp.asarray(np.linspace(-1, 1, 999).astype("bfloat16"))}
    tx = nadam(0.01, comm=comm)
    opt = tx.init(params)
    for _ in range(5):
        updates, _ = tx.update(params, opt, params)
        params = optax.apply_updates(params, updates)
        assert params["w"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(params["w"], opt.params["w"])
    opt.close()


def test_without_optax(monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(ImportError, match="optax must be installed .* Run pip install optax"):
        nadam()
