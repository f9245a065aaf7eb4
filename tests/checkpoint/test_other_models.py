"""Models of JAX and lucid in checkpoints, and the arrays of all frameworks in ``extra``."""

import sys

import numpy as np
import pytest
from mpi4py import MPI

from shardopt import Parameter
from shardopt.checkpoint import Checkpointer, load, save
from shardopt.checkpoint.format.reader import read_manifest
from shardopt.errors import CheckpointError, CheckpointWarning
from shardopt.numpy import NAdam as NumpyNAdam
from tests.checkpoint.test_golden import assert_alike
from tests.support.damage import refused_alike
from tests.support.errors import POLICY, warned
from tests.support.frameworks import require

pytestmark = pytest.mark.mpi


@pytest.fixture
def array_opt(comm):
    with NumpyNAdam([Parameter(np.ones(3), "w")], comm=comm, policy=POLICY) as opt:
        yield opt


# -- JAX -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jax():
    return require("jax")


def variables(jax, seed):
    """Parameters, what is not trained, an average of the parameters, and what is no array."""
    rng = np.random.default_rng(seed)
    params = {"dense": {"kernel": rng.standard_normal((3, 4)), "bias": rng.standard_normal(4)}}
    params = jax.tree.map(lambda x: jax.numpy.asarray(x, "float32"), params)
    return {
        "average": jax.tree.map(lambda x: x + 1, params),
        "batch_stats": {"mean": jax.numpy.full(4, seed, "bfloat16"), "host": np.arange(3) * seed},
        "activation": abs,
        "key": jax.random.key(seed),
        "rate": 0.5 * seed,
        "params": params,
    }


def flat(jax, tree):
    def value(leaf):
        if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return type(leaf), np.asarray(leaf).dtype, np.asarray(leaf).tolist()

    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p): abs if x is abs else value(x) for p, x in paths}


def test_a_pytree_comes_back_in_the_result(comm, mpi_tmp_path, jax):
    from shardopt.jax import NAdam

    model, other = variables(jax, 1), variables(jax, 2 + comm.rank)  # rank 0's parameters win
    with (
        NAdam(model["params"], lr=0.1, comm=comm, policy=POLICY) as opt,
        NAdam(other["params"], lr=0.1, comm=comm, policy=POLICY) as other_opt,
        Checkpointer(mpi_tmp_path) as checkpointer,
    ):
        model["params"] = opt.step(jax.tree.map(lambda x: x * 2, opt.params))
        checkpointer.save(1, opt, model=model)
        checkpointer.wait()
        names = [param.name for param in read_manifest(mpi_tmp_path / "step-000000000001").params]
        assert names == ["['params']['dense']['bias']", "['params']['dense']['kernel']"]
        before = flat(jax, other)
        restored = checkpointer.restore(other_opt, model=other)
        assert restored.report.is_perfect
        assert flat(jax, restored.model) == flat(jax, model)
        assert flat(jax, restored.model["params"]) == flat(jax, other_opt.params)
        assert flat(jax, other) == before


def test_an_average_is_not_taken_for_the_parameters(comm, mpi_tmp_path, jax):
    from shardopt.jax import NAdam

    model = variables(jax, 1)
    only_average = {"average": model["average"]}
    with NAdam(model["params"], comm=comm, policy=POLICY) as opt:
        with warned(comm, CheckpointWarning, "the model has none of the optimizer's parameters"):
            save(mpi_tmp_path / "a", opt, model=only_average)
        assert len(read_manifest(mpi_tmp_path / "a").model.values) == 2
        zeros = jax.tree.map(lambda x: x * 0, only_average)
        with warned(comm, CheckpointWarning, "the model has none of the optimizer's parameters"):
            restored = load(mpi_tmp_path / "a", opt, model=zeros)
        assert flat(jax, restored.model) == flat(jax, only_average)


def test_a_pytree_that_does_not_fit_is_refused(comm, mpi_tmp_path, jax):
    from shardopt.jax import NAdam

    model = variables(jax, 1)
    with NAdam(model["params"], comm=comm, policy=POLICY) as opt:
        save(mpi_tmp_path / "a", opt, model=model)
        larger = {**model, "more": jax.numpy.ones(2)}
        told = "the checkpoint must hold \"['more']\", as the model does"
        with refused_alike(comm, CheckpointError, told):
            load(mpi_tmp_path / "a", opt, model=larger)
        with warned(comm, CheckpointWarning, "not in the checkpoint, stay as they are: .*more"):
            found = load(mpi_tmp_path / "a", opt, model=larger, strict=False).model
        assert flat(jax, found) == flat(jax, larger)


def test_jax_arrays_in_extra_come_back_as_jax_arrays(comm, mpi_tmp_path, jax, array_opt):
    jnp = jax.numpy
    extra = {
        "stats": [jnp.arange(3, dtype="bfloat16"), jnp.ones((2, 0)), jnp.array(7), jnp.array(1j)],
        "small": jnp.ones((2, 2), "float8_e4m3fn"),
        "key": jax.random.split(jax.random.key(3)),
        "numpy": np.arange(3),
    }
    save(mpi_tmp_path / "a", array_opt, extra=extra)
    found = load(mpi_tmp_path / "a", array_opt).extra
    assert flat(jax, found) == flat(jax, extra)
    assert [each.shape for each in found["stats"]] == [(3,), (2, 0), (), ()]
    assert found["key"].dtype == extra["key"].dtype


def test_without_the_framework_tensors_are_arrays(comm, mpi_tmp_path, jax, array_opt, monkeypatch):
    save(mpi_tmp_path / "a", array_opt, extra={"x": [jax.numpy.arange(3, dtype="bfloat16")]})
    for name in [name for name in sys.modules if name.startswith("shardopt.jax")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jax", None)
    with warned(comm, CheckpointWarning, "tensors of jax, which cannot be imported, came back"):
        extra = load(mpi_tmp_path / "a", array_opt).extra
    assert_alike(extra, {"x": [np.arange(3).astype("bfloat16")]})


# -- lucid -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* encountered in cast:RuntimeWarning")
def test_a_module_of_lucid_comes_back(comm, mpi_tmp_path):
    lucid = require("lucid")
    from lucid import nn

    from shardopt.lucid import NAdam

    class Net(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.norm = nn.BatchNorm1d(2)
            self.frozen = nn.Parameter(np.full(3, seed, np.float32))
            self.layer.weight.data = np.full((2, 3), 1 + seed, np.float32)
            self.norm.running_mean.data[...] = seed

    def trained(model):
        return [param for param in model.parameters() if param is not model.frozen]

    def bits(model):
        return {name: np.asarray(v).tolist() for name, v in model.state_dict().items()}

    model, other = Net(1), Net(2)
    with (
        NAdam(trained(model), comm=comm, policy=POLICY) as opt,
        NAdam(trained(other), comm=comm, policy=POLICY) as other_opt,
        NAdam(model, comm=MPI.COMM_SELF, policy=POLICY) as whole,
    ):
        assert [p.spec.name for p in whole.partition.params] == [
            name
            for name, v in model.state_dict(keep_vars=True).items()
            if isinstance(v, nn.Parameter)
        ]
        save(mpi_tmp_path / "a", opt, model=model, extra={"x": lucid.Tensor(np.arange(3.0))})
        restored = load(mpi_tmp_path / "a", other_opt, model=other)
        assert restored.report.is_perfect
        assert bits(other) == bits(model)
        assert isinstance(restored.extra["x"], lucid.Tensor)
        assert restored.extra["x"].numpy().tolist() == [0.0, 1.0, 2.0]
        assert isinstance(other.norm.running_mean, nn.Buffer)
        assert "layer.weight" in [param.name for param in read_manifest(mpi_tmp_path / "a").params]
