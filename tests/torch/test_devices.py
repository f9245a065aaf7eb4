"""PyTorch's parameters on a device train as they do on the CPU, in every bit.

The device's memory is the node's, and torch's tensors over it are CPU tensors. That they are on a
device is what the one function says that the front end asks.
"""

import copy

import pytest

pytest.importorskip("torch")

import torch
from torch.amp import GradScaler

import shardopt.core.parts
from shardopt import ShardPolicy
from shardopt.backends.cuda.backend import CudaBackend
from shardopt.backends.cuda.peers import Peers
from shardopt.errors import HyperparamsError, PartitionError
from shardopt.torch import NAdam, devices
from tests.support.arena_device import arena_devices
from tests.support.cuda.arena_gpu import ArenaGpu
from tests.support.errors import is_last

pytestmark = pytest.mark.mpi

WAYS = ["direct", "staged", "offload"]
ANY_WAY = pytest.mark.parametrize("way", ["direct"], indirect=True)  # it makes no difference
QUEUE = 7


class Net(torch.nn.Module):
    """Parameters of three dtypes, one that no backward reaches, and one that is frozen."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = torch.nn.Linear(5, 700, dtype=torch.float32)
            self.second = torch.nn.Linear(700, 3, dtype=torch.bfloat16)
            self.phase = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
            self.unused = torch.nn.Parameter(torch.ones(9))
            self.frozen = torch.nn.Parameter(torch.ones(4), requires_grad=False)
        self.first.weight.data = self.first.weight.data.t().contiguous().t()  # strided

    def forward(self, x):
        out = self.second(torch.tanh(self.first(x)).bfloat16()).float()
        return (out * self.phase.abs() + self.frozen[:3]).square().mean()


def inputs(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 5, generator=generator, dtype=torch.float32)


def without_complex(model):
    model.phase.requires_grad_(False)
    return ((name, p) for name, p in model.named_parameters() if name != "phase")


class Job:
    """One model and its optimizer, on the device or not.

    Args:
        comm: The ranks.
        way: How the device is reached; None for the CPU.
        patch: Puts tensors on the device.
        **settings: Of the optimizer.
    """

    def __init__(
        self, comm, way=None, patch=None, params=lambda m: m.named_parameters(), **settings
    ):
        self.comm, self.way, self.model = comm, way, Net()
        policy = ShardPolicy(timeout_s=60, offload="cpu" if way == "offload" else None)
        settings = {"lr": 0.1, "policy": policy} | settings
        if way is not None:
            patch.setattr(devices, "place_of", lambda tensor: "cuda:0")
            patch.setattr(devices, "current_queue", lambda place: QUEUE)
            patch.setattr(shardopt.core.parts, "make_device", self._make_device)
        self.opt = NAdam(params(self.model), comm=comm, **settings)

    def _make_device(self, name, arena):
        self.gpu = ArenaGpu(arena)
        return CudaBackend(self.gpu, arena, Peers(self.way != "staged"))

    def backward(self, step, scaler=None, **options):
        loss = self.model(inputs(step, self.comm.rank))
        (scaler.scale(loss) if scaler else loss).backward(**options)

    def bits(self):
        with torch.no_grad():
            return {
                name: torch.view_as_real(p).numpy().tobytes()
                if p.is_complex()
                else p.contiguous().view(torch.uint8).numpy().tobytes()
                for name, p in self.model.named_parameters()
            }


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


@pytest.fixture
def same(comm, way, monkeypatch):
    """Return a function that trains on the CPU and on the device, and compares all bits."""

    def run(train, **settings):
        results = []
        for where in (None, way):
            with monkeypatch.context() as patch:
                job = Job(comm, where, patch, **settings)
                found = train(job)
                job.opt.zero_grad()
                job.backward(99)
                job.opt.step()  # sees what users have written last
                results.append((job.bits(), found))
                job.opt.close()
        assert results[0] == results[1]
        return results[1][1]

    return run


@pytest.mark.parametrize("set_to_none", [True, False])
def test_training_has_the_bits_of_the_cpu(same, set_to_none):
    def train(job):
        addresses = []
        for step in range(3):
            job.opt.zero_grad(set_to_none)
            job.backward(2 * step)
            job.backward(2 * step + 1)
            addresses.append(
                [p.grad.data_ptr() for p in job.model.parameters() if p.grad is not None]
            )
            job.opt.step()
        assert addresses[1] == addresses[2]  # autograd adds to the views
        assert job.opt.last_step.copied_nbytes == 0
        return job.opt.last_step.num_updated

    same(train, max_grad_norm=0.5, weight_decay=0.1)


@ANY_WAY
def test_gradients_that_torch_makes_are_copied_in_by_the_hook(same):
    def train(job):
        for step in range(3):
            job.model.zero_grad()
            job.backward(step)
            job.opt.step()
        return job.opt.last_step.copied_nbytes

    assert same(train) > 0


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_gradients_and_values_may_be_replaced(same):
    def train(job):
        job.opt.zero_grad()
        job.backward(0)
        first = job.model.first
        first.weight.grad = (2 * first.weight.grad).t().contiguous().t()
        first.bias.data = first.bias.data + job.comm.rank  # the lowest rank's wins
        job.opt.step()
        job.opt.zero_grad()
        job.backward(1, create_graph=True)
        job.opt.step()
        return job.opt.last_step.copied_nbytes

    assert same(train) > 0


def test_a_scaler_scales_and_skips(comm, same):
    def train(job):
        scaler = GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        skipped = []
        for step in range(4):
            job.opt.zero_grad()
            job.backward(step, scaler)
            if step == 1 and is_last(comm):
                job.model.first.bias.grad[0] = torch.inf
            if step % 2:
                scaler.unscale_(job.opt)
            scaler.step(job.opt)
            scaler.update()  # from now on, the last rank has another scale
            skipped.append(job.opt.last_step.skipped)
        assert job.model.unused.tolist() == [1] * 9  # zeros were divided, which is no gradient
        return skipped, scaler.get_scale()

    skipped, _ = same(train, params=without_complex)  # which torch's scaler refuses
    assert skipped == [False, True, False, False]


@ANY_WAY
def test_closures_are_called(same):
    def train(job):
        def closure():
            job.opt.zero_grad()
            loss = job.model(inputs(0, job.comm.rank))
            loss.backward()
            return loss

        return [job.opt.step(closure).item() for _ in range(2)]

    same(train)


def test_writes_that_torch_counts_are_adopted(same):
    def train(job):
        for step in range(3):
            job.opt.zero_grad()
            job.backward(step)
            job.opt.step()
            with torch.no_grad():
                job.model.first.weight.mul_(0.5)
                job.model.second.weight.clamp_(-0.01, 0.01)
                job.model.frozen.add_(1)

    same(train)


def test_writes_that_torch_does_not_count_hold(same):
    def train(job):
        for step in range(3):
            job.opt.zero_grad()
            job.backward(step)
            job.opt.step()
            job.model.first.weight.data.mul_(0.5)
            job.model.second.weight.data.clamp_(-0.01, 0.01)
            job.model.frozen.data.add_(1)

    same(train)


def test_steps_and_loads_are_no_writes(comm, way, monkeypatch):
    job = Job(comm, way, monkeypatch)
    saved = copy.deepcopy(job.opt.state_dict())
    job.opt.zero_grad()
    job.backward(0)
    job.opt.step()
    changes = job.opt.core.params.find_changes
    assert not changes().written
    values = {name: param.detach().clone() for name, param in job.model.named_parameters()}
    job.opt.load_params(values)
    assert not changes().written
    job.opt.load_state_dict(saved)
    assert not changes().written
    job.opt.adopt()
    assert not changes().written
    with torch.no_grad():
        job.model.frozen.mul_(1)
    assert [each.param for each in changes().written] == [
        [name for name, _ in job.model.named_parameters()].index("frozen")
    ]
    job.opt.close()


@ANY_WAY
def test_a_gradient_is_none_unless_torch_has_counted_a_write(comm, way, monkeypatch):
    job = Job(comm, way, monkeypatch)
    unused, looks = job.model.unused, []
    monkeypatch.setattr(
        torch.Tensor, "any", lambda tensor: looks.append(1) or (tensor != 0).sum() > 0
    )

    def is_updated():
        before = unused.tolist()
        job.backward(0)
        job.opt.step()
        job.opt.zero_grad()
        return before != unused.tolist()

    job.opt.zero_grad()
    assert not is_updated()
    assert not looks  # each would wait for the device
    unused.grad.mul_(2)
    assert not is_updated()  # all zero still
    assert looks
    unused.grad.add_(1)
    assert is_updated()
    unused.grad.data.add_(1)
    assert not is_updated()  # nothing has told
    assert not unused.grad.any()
    job.opt.close()


@ANY_WAY
def test_work_goes_to_the_stream_that_is_current(comm, way, monkeypatch):
    job = Job(comm, way, monkeypatch)
    streams = iter([11, 12, 13])
    monkeypatch.setattr(devices, "current_queue", lambda place: next(streams))
    job.backward(0)
    job.opt.step()
    job.opt.zero_grad()
    job.backward(1)
    job.opt.average_grads()
    used = [stream for call, *args in job.gpu.calls if call == "use" for stream in args]
    assert used == [QUEUE, 11, 12, 13]
    monkeypatch.setattr(devices, "current_queue", lambda place: 0)
    job.opt.close()


@ANY_WAY
def test_a_model_that_moves_is_refused(comm, way, monkeypatch):
    job = Job(comm, way, monkeypatch)
    monkeypatch.setattr(devices, "place_of", lambda tensor: "cpu")
    job.model.first.bias.data = job.model.first.bias.data.clone()
    with pytest.raises(PartitionError, match="must be on cuda:0, where it was; got it on cpu"):
        job.opt.step()
    monkeypatch.setattr(devices, "place_of", lambda tensor: "cuda:1")
    with pytest.raises(PartitionError, match="must be on cuda:0, where it was; got it on cuda:1"):
        job.opt.step()
    job.opt.close()


def test_parameters_of_two_devices_are_refused(comm, monkeypatch):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    places = {params[0].data_ptr(): "cuda:0", params[1].data_ptr(): "cpu"}
    monkeypatch.setattr(devices, "place_of", lambda tensor: places[tensor.data_ptr()])
    monkeypatch.setattr(devices, "current_queue", lambda place: 0)
    with (
        arena_devices(monkeypatch),
        pytest.raises(PartitionError, match="must be on cuda:0, .*got cpu"),
    ):
        NAdam(params, comm=comm)


def test_devices_keep_stage_one(comm, way, monkeypatch):
    offload = "cpu" if way == "offload" else None
    policy = ShardPolicy(timeout_s=60, offload=offload, stage=2)
    with pytest.raises(HyperparamsError, match="policy.stage must be 1 with parameters on a dev"):
        Job(comm, way, monkeypatch, policy=policy)
