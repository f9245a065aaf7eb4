"""Arrays of CuPy through NumPy's front end, on a GPU that the ranks share.

They have the bits of the path for CPUs, whichever way gradients take between ranks.
"""

import ml_dtypes
import numpy as np
import pytest

from shardopt import ShardPolicy
from shardopt.checkpoint import load, save
from shardopt.numpy import NAdam, Parameter

pytestmark = [pytest.mark.mpi, pytest.mark.gpu, pytest.mark.any_mpi]

SHAPES = [(9000,), (), (3, 5), (700, 70), (0,), (5000,)]
WAYS = ["direct", "staged", "offload"]
DTYPES = [np.float32, np.float64, ml_dtypes.bfloat16, np.float16]


def policy_of(way, **settings):
    return ShardPolicy(timeout_s=60, offload="cpu" if way == "offload" else None, **settings)


def draw(seed, dtype):
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape)).astype(dtype) for shape in SHAPES]


class Twins:
    """The same parameters on the GPU and on the CPU, with an optimizer for each."""

    def __init__(self, comm, gpu, way, monkeypatch, dtype=np.float32, policy=None, **settings):
        self.comm, self.gpu, self.dtype = comm, gpu, dtype
        start = draw(0, dtype)
        self.params = [Parameter(gpu.array(a), f"array{i}") for i, a in enumerate(start)]
        self.others = [Parameter(a, f"array{i}") for i, a in enumerate(start)]
        policy = policy or policy_of(way)
        with monkeypatch.context() as patched, gpu.way(patched, way):
            self.opt = NAdam(self.params, comm=comm, policy=policy, **settings)
        self.other_opt = NAdam(self.others, comm=comm, policy=ShardPolicy(), **settings)
        self.num_steps = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.opt.close()
        self.other_opt.close()

    def set_grads(self, without=()):
        """Give both the gradients of the next step."""
        self.num_steps += 1
        self.opt.zero_grad()
        self.other_opt.zero_grad()
        grads = draw((self.comm.rank, self.num_steps), self.dtype)
        for index, (param, other, grad) in enumerate(
            zip(self.params, self.others, grads, strict=True)
        ):
            if index in without:
                param.grad = other.grad = None
            else:
                self.gpu.fill(param.grad, grad)
                other.grad[...] = grad

    def step(self, without=()):
        self.set_grads(without)
        self.opt.step()
        self.other_opt.step()

    def assert_same(self):
        for param, other in zip(self.params, self.others, strict=True):
            assert self.gpu.host(param.data).tobytes() == other.data.tobytes()

    def assert_same_state(self):
        ours, theirs = self.opt.gather_state_dict(), self.other_opt.gather_state_dict()
        if self.comm.rank > 0:
            return
        for entry, other in zip(ours["state"].values(), theirs["state"].values(), strict=True):
            assert entry.keys() == other.keys()
            for key, value in entry.items():
                assert np.asarray(value).tobytes() == np.asarray(other[key]).tobytes(), key


@pytest.fixture
def twins(comm, gpu, monkeypatch):
    """Return a function that makes twins."""
    return lambda way="direct", **settings: Twins(comm, gpu, way, monkeypatch, **settings)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_steps_have_the_bits_of_the_cpu(twins, way, dtype, max_grad_norm):
    settings = {"max_grad_norm": max_grad_norm, "weight_decay": 0.1, "lr": 0.1}
    with twins(way, dtype=dtype, **settings) as both:
        for step in range(4):
            both.step(without={3} if step == 2 else ())  # nobody has this gradient
            both.assert_same()
        assert both.opt.last_step.grad_norm == both.other_opt.last_step.grad_norm
        both.assert_same_state()


@pytest.mark.parametrize("way", WAYS)
def test_many_steps_lose_no_update(twins, way):
    """Events alone order what ranks write to each other's memory: a lost one would show."""
    with twins(way, lr=0.1) as both:
        for _ in range(30):
            both.step()
        both.assert_same()


@pytest.mark.parametrize("way", WAYS)
def test_what_users_write_to_parameters_is_adopted(twins, gpu, way):
    with twins(way, lr=0.1) as both:
        both.step()
        gpu.fill(both.params[3].data, 0.25)
        both.others[3].data[...] = 0.25
        both.step()
        both.assert_same()


@pytest.mark.parametrize("way", WAYS)
def test_average_grads(twins, gpu, way):
    with twins(way, lr=0.1) as both:
        both.set_grads()
        both.opt.average_grads()
        both.other_opt.average_grads()
        for param, other in zip(both.params, both.others, strict=True):
            assert gpu.host(param.grad).tobytes() == other.grad.tobytes()
        both.opt.step()
        both.other_opt.step()
        both.assert_same()


@pytest.mark.filterwarnings("ignore::shardopt.errors.NonFiniteWarning")
@pytest.mark.parametrize("way", WAYS)
def test_inf_skips_the_step_on_all_ranks(twins, comm, gpu, way):
    with twins(way, lr=0.1, max_grad_norm=1.0) as both:
        both.step()
        before = [gpu.host(param.data).tobytes() for param in both.params]
        both.set_grads()
        if comm.rank == comm.size - 1:
            gpu.fill(both.params[0].grad, np.inf)
        both.opt.step()
        assert both.opt.last_step.skipped
        assert [gpu.host(param.data).tobytes() for param in both.params] == before


@pytest.mark.parametrize("way", WAYS)
def test_work_on_another_stream_comes_before_the_step(twins, gpu, way):
    with twins(way, lr=0.1) as both:
        for _ in range(3):
            with gpu.stream():
                both.step()
            both.step()
        both.assert_same()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_of_a_gpu_is_one_of_cpus(twins, mpi_tmp_path, way, dtype):
    settings = {"dtype": dtype, "lr": 0.1}
    with twins(way, **settings) as both:
        both.step()
        both.step()
        save(mpi_tmp_path / "gpu", both.opt)
        save(mpi_tmp_path / "cpu", both.other_opt)
    with twins(way, **settings) as loaded:
        load(mpi_tmp_path / "cpu", loaded.opt)
        load(mpi_tmp_path / "gpu", loaded.other_opt)
        loaded.assert_same()
        loaded.assert_same_state()
        loaded.step()
        loaded.assert_same()


@pytest.mark.parametrize("way", WAYS)
def test_a_state_dict_goes_to_a_cpu_and_back(twins, comm, way):
    with twins(way, lr=0.1) as both:
        both.step()
        ours, theirs = (comm.bcast(opt.gather_state_dict()) for opt in (both.opt, both.other_opt))
        both.opt.load_state_dict(theirs)
        both.other_opt.load_state_dict(ours)
        both.step()
        both.assert_same()


def test_the_ranks_of_a_gpu_reach_each_other(twins):
    with twins() as both:
        holder = both.opt.core.parts.residence.holder
        assert holder.has_peers, getattr(holder, "why_staged", "")


def test_a_closed_optimizer_leaves_the_values(twins, gpu):
    both = twins(lr=0.1)
    both.step()
    expected = [other.data.tobytes() for other in both.others]
    both.opt.close()
    assert [gpu.host(param.data).tobytes() for param in both.params] == expected
    both.other_opt.close()
