"""Parameters of 16 bits: a master in float32, scaled gradients, and states with the master in."""

import copy
import io

import pytest
from mpi4py import MPI

pytest.importorskip("torch")

import torch
from torch.amp import GradScaler
from torch.nn import Parameter

from shardopt.errors import CheckpointError, PartitionError
from shardopt.torch import NAdam
from tests.support.errors import POLICY, is_last, refused
from tests.support.torch_models import Twins, make_model, params_of

pytestmark = pytest.mark.mpi

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def values(dtype, numel=300):
    return torch.linspace(-2, 2, numel, dtype=torch.float64).to(dtype)


def grad_of(step, rank, dtype, numel=300):
    """Whole numbers over 64, which both dtypes hold and float32 sums exactly."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return (torch.randint(-64, 64, (numel,), generator=generator) / 64).to(dtype)


class MasterTwins:
    """A parameter of 16 bits over the ranks, and its master in the hands of torch.optim.NAdam."""

    def __init__(self, comm, dtype, **settings):
        self.comm, self.dtype = comm, dtype
        self.param = Parameter(values(dtype))
        self.opt = NAdam([self.param], comm=comm, policy=POLICY, **settings)
        self.master = Parameter(values(dtype).float())
        self.master_opt = torch.optim.NAdam([self.master], **settings)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.opt.__exit__(*error)

    def step(self, step, scale=1.0):
        grads = [grad_of(step, rank, self.dtype).float() for rank in range(self.comm.size)]
        self.opt.zero_grad()
        (self.param * (grad_of(step, self.comm.rank, self.dtype) * scale)).sum().backward()
        self.opt.step()
        self.master.grad = sum(grads) / self.comm.size
        self.master_opt.step()

    def assert_same(self, gathered=None):
        """The master must agree but for rounding, and the parameter be the master, rounded."""
        gathered = gathered or self.comm.bcast(self.opt.gather_state_dict())
        master = gathered["state"][0]["master"]
        assert master.dtype == torch.float32
        assert torch.equal(master.to(self.dtype), self.param.detach())
        torch.testing.assert_close(master, self.master.detach(), rtol=2e-5, atol=2e-6)


@DTYPES
@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}]
)
def test_the_master_is_trained_as_torch_trains_float32(comm, dtype, settings):
    with MasterTwins(comm, dtype, lr=0.01, **settings) as twins:
        for step in range(20):
            twins.step(step)
            assert twins.opt.last_step.copied_nbytes == 0
        twins.assert_same()
        assert twins.param.dtype == twins.param.grad.dtype == dtype


def test_tiny_updates_add_up():
    params = [Parameter(torch.ones(64, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16)]
    with NAdam(params, comm=MPI.COMM_SELF, policy=POLICY, lr=1e-4) as opt:
        for _ in range(400):  # by 1e-4, where bfloat16 resolves 8e-3 and float16 1e-3
            opt.zero_grad()
            for param in params:
                param.grad.fill_(-1.0)
            opt.step()
        state = opt.gather_state_dict()["state"]
    for index, param in enumerate(params):
        master = state[index]["master"]
        expected = torch.full((64,), 1.04, dtype=torch.float32)
        torch.testing.assert_close(master, expected, rtol=0.002, atol=0)
        assert torch.equal(param, master.to(param.dtype))


@DTYPES
@pytest.mark.parametrize("write", ["p.data", "in place"])
def test_the_master_follows_a_parameter_that_was_written_to(comm, dtype, write):
    with MasterTwins(comm, dtype, lr=0.01) as twins:
        twins.step(0)
        new = values(dtype).flip(0).clone()
        if write == "p.data":
            twins.param.data = new
        else:
            with torch.no_grad():
                twins.param.copy_(new)
        twins.master.data = new.float()
        for step in range(1, 4):
            twins.step(step)
        twins.assert_same()


@DTYPES
@pytest.mark.parametrize("how", ["views", "gathered"])
def test_a_run_from_a_file_goes_on_bit_for_bit(comm, dtype, how):
    with MasterTwins(comm, dtype, lr=0.01) as twins:
        for step in range(3):
            twins.step(step)
        opt = twins.opt
        saved = opt.state_dict() if how == "views" else comm.bcast(opt.gather_state_dict())
        file = io.BytesIO()
        torch.save(saved, file)
        start = twins.param.detach().clone()
        for step in range(3, 6):
            twins.step(step)
        expected = twins.param.detach().clone()
        master = comm.bcast(opt.gather_state_dict())["state"][0]["master"]
    with MasterTwins(comm, dtype) as twins:
        twins.param.detach().copy_(start)
        file.seek(0)
        twins.opt.load_state_dict(torch.load(file, weights_only=True))
        for step in range(3, 6):
            twins.step(step)
        assert torch.equal(twins.param, expected)
        gathered = comm.bcast(twins.opt.gather_state_dict())
        assert torch.equal(gathered["state"][0]["master"], master)


@DTYPES
def test_torchs_own_state_has_no_master_and_is_taken_over(comm, dtype):
    param = Parameter(values(dtype))
    theirs = torch.optim.NAdam([param], lr=0.01, eps=1e-3)
    for step in range(3):
        param.grad = grad_of(step, 0, dtype)
        theirs.step()
    with MasterTwins(comm, dtype, lr=0.01, eps=1e-3) as twins:
        twins.param.detach().copy_(param.detach())
        twins.opt.load_state_dict(theirs.state_dict())
        state = comm.bcast(twins.opt.gather_state_dict())["state"][0]
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], theirs.state[param][key].float())
        twins.master.data = param.detach().float()
        saved = copy.deepcopy(theirs.state_dict())
        twins.master_opt.load_state_dict(saved)
        for step in range(3, 6):
            twins.step(step)
        twins.assert_same()


@DTYPES
def test_torch_takes_over_without_the_master(comm, dtype):
    with MasterTwins(comm, dtype, lr=0.01) as twins:
        for step in range(3):
            twins.step(step)
        saved = comm.bcast(twins.opt.gather_state_dict())
        param = Parameter(twins.param.detach().clone())
    theirs = torch.optim.NAdam([param])
    theirs.load_state_dict(saved)
    param.grad = grad_of(3, 0, dtype)
    theirs.step()
    assert int(theirs.state[param]["step"]) == 4
    assert param.isfinite().all()


def test_a_scaled_loss_keeps_small_gradients(comm):
    scaler = GradScaler("cpu", init_scale=2.0**14)
    param = Parameter(torch.ones(64, dtype=torch.float16))
    with NAdam([param], comm=comm, policy=POLICY, lr=0.01) as opt:
        for _ in range(3):
            opt.zero_grad()
            scaler.scale(param.float().sum() * 1e-8).backward()  # vanishes in float16 by itself
            scaler.step(opt)
            scaler.update()
        assert opt.last_step.loss_scale == 2.0**14
        moment = comm.bcast(opt.gather_state_dict())["state"][0]["exp_avg"]
    torch.testing.assert_close(
        moment, torch.full((64,), 1e-8 * (1 - 0.9**3), dtype=torch.float32), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("where", ["every rank", "last rank"])
def test_an_overflow_skips_the_step_on_all_ranks_and_lowers_the_scale(comm, where):
    here = where == "every rank" or is_last(comm)
    scaler = GradScaler("cpu", init_scale=2.0**20)
    param = Parameter(torch.ones(64, dtype=torch.float16))
    with NAdam([param], comm=comm, policy=POLICY, lr=0.01) as opt:
        skipped = []
        for _ in range(8):
            opt.zero_grad()
            loss = param.float().sum() * (1.0 if here else 1e-6)  # overflows above 2**15
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            skipped.append(opt.last_step.skipped)
        assert skipped == [True] * 5 + [False] * 3
        assert scaler.get_scale() == (2.0**15 if here else 2.0**20)
        assert float(opt.state_dict()["state"][0]["step"]) == 3
        assert (param < 1).all()
        assert param.isfinite().all()


def test_gradients_of_16_bits_are_summed_in_float32(comm):
    param = Parameter(torch.ones(8, dtype=torch.float16))
    with NAdam([param], comm=comm, policy=POLICY, lr=0.01) as opt:
        param.grad.fill_(60_000.0)  # two of them are more than float16 holds
        opt.step()
        assert not opt.last_step.skipped
        moment = comm.bcast(opt.gather_state_dict())["state"][0]["exp_avg"]
    torch.testing.assert_close(moment, torch.full((8,), 6000.0, dtype=torch.float32))


def test_dtypes_of_all_sizes_in_one_model(comm):
    def model():
        layers = make_model()
        layers[0].bfloat16()
        layers[2].float()
        return layers

    def loss(model, step, rank):
        values = torch.linspace(-1, 1, 5, dtype=torch.bfloat16) * (1 + step + rank)
        hidden = model[2](torch.tanh(model[0](values).float()))
        return model[3](hidden.double()).square().sum()

    with Twins(comm, model, loss=loss, lr=0.01) as twins:
        for _ in range(3):
            twins.step()
        assert [param.dtype for param in params_of(twins.opt)] == [
            *[torch.bfloat16] * 2,
            *[torch.float32] * 2,
            *[torch.float64] * 2,
        ]
        for ours, theirs in zip(*map(params_of, twins.both), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
        assert twins.opt.last_step.num_updated == 6


@DTYPES
def test_another_dtype_is_refused(comm, dtype):
    param = Parameter(values(dtype))
    with NAdam([("w", param)], comm=comm, policy=POLICY) as opt:
        shared = param.data
        param.data = shared.float()
        told = f"data of parameter 'w' must keep dtype {str(dtype).removeprefix('torch.')}"
        with refused(comm, PartitionError, told, "got float32"):
            opt.step()
        param.data = shared
        param.grad = torch.ones_like(param)
        opt.step()


@DTYPES
def test_a_master_that_does_not_fit_is_refused(comm, dtype):
    with MasterTwins(comm, dtype) as twins:
        twins.step(0)
        saved = comm.bcast(twins.opt.gather_state_dict())
        saved["state"][0]["master"] = torch.ones(3)
        with refused(comm, CheckpointError, "master of 'param0' must have shape (300,)"):
            twins.opt.load_state_dict(saved)
