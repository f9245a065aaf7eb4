"""PyTorch models on a GPU that the ranks share: they train as with torch's own NAdam."""

import contextlib

import pytest

pytest.importorskip("torch")

import torch
from torch.amp import GradScaler

from shardopt import ShardPolicy
from shardopt.checkpoint import load, save
from shardopt.errors import CallOrderError
from shardopt.torch import NAdam
from tests.support.torch_models import Twins, assert_same, batch, loss_of, make_model, params_of

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]

WAYS = ["direct", "staged", "offload"]


def on(device, step, rank):
    """A rank's batch, on a device."""
    return tuple(tensor.to(device) for tensor in batch(step, rank))


def loss_on(model, step, rank):
    """The mean squared error on a rank's batch, where the model is."""
    inputs, targets = on(next(model.parameters()).device, step, rank)
    return torch.nn.functional.mse_loss(model(inputs), targets)


@pytest.fixture
def device(gpu):
    return torch.device(gpu.torch_name)


@pytest.fixture
def twins(comm, gpu, monkeypatch, device):
    """Return a function that makes two models on the GPU; see ``Twins``."""

    def make(way="direct", **settings):
        offload = "cpu" if way == "offload" else None
        policy = ShardPolicy(timeout_s=60, offload=offload)
        settings = {"loss": loss_on, "policy": policy} | settings
        with monkeypatch.context() as patched, gpu.way(patched, way):
            return Twins(comm, lambda: make_model().to(device), **settings)

    return make


@pytest.fixture
def require_real(gpu):
    if not gpu.is_real:
        pytest.skip("nothing stands in for graphs of CUDA")


@pytest.mark.parametrize("way", WAYS)
def test_a_model_trains_as_with_torch(twins, way, device):
    with twins(way, lr=0.1, weight_decay=0.01) as both:
        for set_to_none in (True, False, True, False, True):
            both.step(set_to_none=set_to_none)
        both.assert_same()
        assert all(param.device == device for param in params_of(both.opt))
        assert all(param.grad.device == device for param in params_of(both.opt))


def test_gradients_are_accumulated_in_place(twins):
    with twins(lr=0.1) as both:
        both.step()
        both.opt.zero_grad()
        both.whole_opt.zero_grad()
        for _ in range(2):  # two backward passes, one step
            both.backward()
        addresses = [param.grad.data_ptr() for param in params_of(both.opt)]
        both.backward()
        assert [param.grad.data_ptr() for param in params_of(both.opt)] == addresses
        for opt in both.both:
            opt.step()
        assert both.opt.last_step.copied_nbytes == 0
        both.assert_same()


@pytest.mark.parametrize("way", WAYS)
def test_weights_written_with_torch_are_adopted(twins, way):
    with twins(way, lr=0.1) as both:
        both.step()
        for model in both.models:
            with torch.no_grad():
                model[0].weight.clamp_(-0.05, 0.05)
                model[2].bias.fill_(0.5)
        both.step()
        both.assert_same()


def test_average_grads_and_clip(twins):
    with twins(lr=0.1) as both:
        for _ in range(3):
            for opt in both.both:
                opt.zero_grad()
            both.backward()
            both.opt.average_grads()
            for model in both.models:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            for opt in both.both:
                opt.step()
        both.assert_same()


@pytest.mark.filterwarnings("ignore::shardopt.errors.NonFiniteWarning")
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(twins, device, unscale):
    scaler = GradScaler(device.type, init_scale=2.0**10, growth_interval=2)

    def loss(model, step, rank):
        plain = loss_on(model, step, rank)
        return plain if model is both.whole else scaler.scale(plain)

    with twins(lr=0.1, loss=loss) as both:
        for step in range(5):
            for opt in both.both:
                opt.zero_grad()
            both.backward()
            is_poisoned = step == 3
            if is_poisoned:
                params_of(both.opt)[0].grad.view(-1)[0] = torch.inf
            if unscale:
                scaler.unscale_(both.opt)
            scaler.step(both.opt)
            scaler.update()
            if not is_poisoned:
                both.whole_opt.step()
        assert scaler.get_scale() == 2.0**10  # doubled, and halved
        both.assert_same()


@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_go_to_the_cpu_and_back(twins, comm, mpi_tmp_path, way):
    settings = {"comm": comm, "policy": ShardPolicy(timeout_s=60), "lr": 0.1}
    with twins(way, lr=0.1) as both:
        both.step()
        both.step()
        save(mpi_tmp_path / "gpu", both.opt, model=both.ours)
        model = make_model(seed=1)
        opt = NAdam(model.named_parameters(), **settings)
        load(mpi_tmp_path / "gpu", opt, model=model)
        assert_same(params_of(opt), [p.detach().cpu() for p in params_of(both.opt)], 0, 0)
        opt.zero_grad()
        loss_of(model, 2, comm.rank).backward()
        opt.step()
        both.step()
        assert_same(params_of(opt), [p.detach().cpu() for p in params_of(both.opt)])
        save(mpi_tmp_path / "cpu", opt, model=model)
        both.step()
        load(mpi_tmp_path / "cpu", both.opt, model=both.ours)
        assert_same(params_of(opt), [p.detach().cpu() for p in params_of(both.opt)], 0, 0)
        opt.close()


@contextlib.contextmanager
def side_stream(gpu, device):
    """Make another stream the current one, between what comes before and after."""
    if not gpu.is_real:
        yield
        return
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream(device).wait_stream(side)


@pytest.mark.parametrize("way", WAYS)
def test_steps_may_be_on_any_stream(twins, gpu, device, way):
    with twins(way, lr=0.1) as both:
        for _ in range(4):
            with side_stream(gpu, device):
                both.step()
            both.step()
        both.assert_same()


def test_max_grad_norm(twins):
    max_grad_norm = 0.05
    with twins(lr=0.1) as both:
        both.opt.max_grad_norm = max_grad_norm
        for _ in range(3):
            for opt in both.both:
                opt.zero_grad()
            both.backward()
            torch.nn.utils.clip_grad_norm_(both.whole.parameters(), max_grad_norm)
            for opt in both.both:
                opt.step()
        both.assert_same()


def test_sixteen_bits_learn(comm, gpu, device, monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(32, 32).to(device, torch.bfloat16)
        inputs = torch.randn(64, 32).to(device, torch.bfloat16)
    with gpu.way(monkeypatch, "direct"):
        opt = NAdam(model.parameters(), lr=0.02, comm=comm, policy=ShardPolicy(timeout_s=60))
    losses = []
    for _ in range(30):
        opt.zero_grad()
        loss = (model(inputs) - inputs).float().square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    opt.close()
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.usefixtures("require_real")
def test_a_step_inside_a_graph_is_refused(twins):
    with twins(lr=0.1, capturable=False) as both:
        both.step()
        graph = torch.cuda.CUDAGraph()
        refused = pytest.raises(CallOrderError, match="outside of CUDA graphs")
        with refused, torch.cuda.graph(graph):
            both.opt.step()
        torch.cuda.synchronize()
        both.step()
        both.assert_same()


@pytest.mark.usefixtures("require_real")
def test_forward_and_backward_may_be_captured(twins, comm, device):
    with twins(lr=0.1) as both:
        both.step()  # gradients are where they stay
        both.step()
        inputs, targets = (tensor.clone() for tensor in on(device, 0, comm.rank))
        both.opt.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.nn.functional.mse_loss(both.ours(inputs), targets).backward()
        for step in range(2, 5):
            for opt in both.both:
                opt.zero_grad()
            for static, new in zip((inputs, targets), on(device, step, comm.rank), strict=True):
                static.copy_(new)
            graph.replay()
            for rank in range(comm.size):
                (loss_on(both.whole, step, rank) / comm.size).backward()
            for opt in both.both:
                opt.step()
        both.assert_same()
