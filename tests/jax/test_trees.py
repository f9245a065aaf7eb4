"""Pytrees in and out of the JAX front end, and those that it refuses."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from shardopt.errors import ClosedError, HyperparamsError, PartitionError, RankMismatchError
from tests.support.errors import BOTH_WAYS, POLICY, errs, is_last, refused
from tests.support.oracle import Oracle, all_grads, initial

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module", autouse=True)
def frameworks():
    global NAdam, Block, Pair, jax, jnp, ones, small
    from shardopt.jax import NAdam
    from tests.support.jax_trees import Block, Pair, jax, jnp, ones, small


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


def test_the_common_calls_of_an_optimizer_are_there(comm):
    with NAdam(small(), lr=0.1, comm=comm, policy=POLICY) as opt:
        assert opt.defaults["lr"] == opt.param_groups[0]["lr"] == 0.1
        opt.zero_grad()  # gradients are arguments of step: nothing to forget
        before = opt.params
        after = opt.step(jax.tree_util.tree_map(jnp.ones_like, before))
        leaves = zip(*map(jax.tree_util.tree_leaves, (before, after)), strict=True)
        assert all((new < old).all() for old, new in leaves)
        np.testing.assert_array_equal(opt.sum_over_ranks([1]), [comm.size])
