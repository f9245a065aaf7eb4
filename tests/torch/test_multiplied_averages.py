"""Averages of stage 2 that are clipped or unscaled: nothing is written before the step."""

import copy

import pytest

pytest.importorskip("torch")

import torch

from shardopt.errors import PartitionError, StageWarning
from shardopt.policy import ShardPolicy
from shardopt.torch import NAdam
from tests.support.errors import warned
from tests.support.torch_models import bytes_of, loss_of, make_model

pytestmark = pytest.mark.mpi(min_size=2)

RING = ShardPolicy(stage=2, timeout_s=20, threads=1, bucket_nbytes=1, ring_nbytes=1)


def written_pages(opt):
    """Where this rank has pages of its own of the averages."""
    return [page for _, view in opt.core.parts.memory.averages for page in view.find_writes()]


def backward(model, opt, comm, step=0, scale=1.0):
    """Leave averages in ``p.grad``; return copies, as torch's own optimizer would have them."""
    opt.zero_grad()
    (loss_of(model, step, comm.rank) * scale).backward()
    params = [torch.nn.Parameter(param.detach().clone()) for param in model.parameters()]
    for twin, param in zip(params, model.parameters(), strict=True):
        twin.grad = param.grad.clone()
    return params


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_clipping_has_the_bits_of_torch_and_writes_nothing(comm, dtype, max_norm):
    model = make_model().to(dtype)
    torch.set_default_dtype(dtype)
    with NAdam(model, comm=comm, policy=RING) as opt:
        twins = backward(model, opt, comm)
        norms = [
            torch.nn.utils.clip_grad_norm_(params, max_norm)
            for params in (model.parameters(), twins)
        ]
        assert bytes_of(norms[0]) == bytes_of(norms[1])
        assert not written_pages(opt)
        again = torch.nn.utils.get_total_norm([param.grad for param in model.parameters()])
        assert bytes_of(again) == bytes_of(torch.nn.utils.get_total_norm([t.grad for t in twins]))
        assert not written_pages(opt)
        opt.step()
        for param, twin in zip(model.parameters(), twins, strict=True):
            assert bytes_of(param.grad) == bytes_of(twin.grad)
        assert not written_pages(opt)


def test_the_product_is_seen_before_the_step(comm):
    model = make_model()
    with NAdam(model, comm=comm, policy=RING) as opt:
        twins = backward(model, opt, comm)
        for params in [*model.parameters()], twins:
            torch.nn.utils.clip_grad_norm_(params, 0.01)
            for param in params:
                param.grad.mul_(3).add_(0.5).mul_(torch.tensor(1.5))
        for param, twin in zip(model.parameters(), twins, strict=True):
            assert bytes_of(param.grad + 0) == bytes_of(twin.grad)
        opt.step()
        for param, twin in zip(model.parameters(), twins, strict=True):
            assert bytes_of(param.grad) == bytes_of(twin.grad)


def test_average_grads_writes_the_product(comm):
    model = make_model()
    with NAdam(model, comm=comm, policy=RING) as opt:
        twins = backward(model, opt, comm)
        for params in [*model.parameters()], twins:
            torch._foreach_mul_([param.grad for param in params], 0.3)
        opt.average_grads()
        assert not written_pages(opt)
        for param, twin in zip(model.parameters(), twins, strict=True):
            assert bytes_of(param.grad) == bytes_of(twin.grad)


@pytest.mark.parametrize(
    "name_again",
    [lambda grad: grad.data, lambda grad: grad.numpy(), lambda grad: grad.view(-1)],
    ids=["data", "numpy", "view"],
)
def test_other_names_of_the_elements_show_the_product(comm, name_again):
    model = make_model()
    with NAdam(model, comm=comm, policy=RING) as opt:
        backward(model, opt, comm)
        weight = model[0].weight
        other, before = name_again(weight.grad), copy.deepcopy(weight.grad)
        weight.grad.mul_(0.5)
        assert other.sum() == pytest.approx(float(before.sum()) * 0.5)
        other *= 2
        assert bytes_of(weight.grad) == bytes_of(before)
        opt.step()


def looked_at_before(model, opt):
    model[0].weight.grad.detach().norm()


def looked_at_through_the_optimizer(model, opt):
    opt.grad(model[0].weight)


def looked_at_afterwards(model, opt):
    model[0].weight.grad.mean()


@pytest.mark.parametrize(
    ("look", "is_before"),
    [
        (looked_at_before, True),
        (looked_at_through_the_optimizer, True),
        (looked_at_through_the_optimizer, False),
        (looked_at_afterwards, False),
    ],
)
def test_one_rank_alone_may_look_at_what_all_clip(comm, look, is_before):
    """As one that logs: it has the product in its elements, and the others have factors."""
    model, scaler = make_model(), torch.amp.GradScaler("cpu", init_scale=8.0)
    with NAdam(model, comm=comm, policy=RING) as opt:
        twins = backward(model, opt, comm, scale=float(scaler.scale(torch.ones(()))))
        if comm.rank == 0 and is_before:
            look(model, opt)
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        if comm.rank == 0 and not is_before:
            look(model, opt)
        for twin in twins:
            twin.grad.mul_(1 / 8)
        torch.nn.utils.clip_grad_norm_(twins, 0.01)
        assert bool(written_pages(opt)) == (comm.rank == 0)
        opt.step()
        for param, twin in zip(model.parameters(), twins, strict=True):
            assert bytes_of(param.grad) == bytes_of(twin.grad)


@pytest.mark.parametrize("value", [None, float("inf"), float("nan")])
def test_grad_scaler_and_clipping_write_nothing(comm, value):
    model = make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with NAdam(model, comm=comm, policy=RING) as opt:
        twins = backward(model, opt, comm, scale=float(scaler.scale(torch.ones(()))))
        if value is not None:
            opt.zero_grad()
            (loss_of(model, 0, comm.rank) * value).backward()
        scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        assert not written_pages(opt)
        before = [bytes_of(param) for param in model.parameters()]
        scaler.step(opt)
        scaler.update()
        assert opt.last_step.skipped == (value is not None)
        assert (before == [bytes_of(param) for param in model.parameters()]) == (value is not None)
        if value is None:
            for twin in twins:
                twin.grad.mul_(1 / 1024)
            assert bytes_of(norm) == bytes_of(torch.nn.utils.clip_grad_norm_(twins, 0.05))
            for param, twin in zip(model.parameters(), twins, strict=True):
                assert bytes_of(param.grad) == bytes_of(twin.grad)


def test_factors_end_with_their_averages(comm):
    """Those of gradients that are zeroed, removed, or replaced are no one's."""
    model = make_model()
    with NAdam(model, comm=comm, policy=RING) as opt:
        backward(model, opt, comm)
        for param in model.parameters():
            param.grad.mul_(float("nan"))
        held = model[0].weight.grad
        twins = backward(model, opt, comm, step=1)
        held.mul_(1.0)
        for param, twin in zip(model.parameters(), twins, strict=True):
            assert bytes_of(param.grad) == bytes_of(twin.grad)
        model[0].bias.grad.mul_(float("nan"))
        model[0].bias.grad = None
        model[2].bias.grad.mul_(0.5)
        model[2].bias.grad = model[2].bias.grad * 2
        opt.step()
        assert opt.last_step.num_updated == 5
        assert all(bool(param.isfinite().all()) for param in model.parameters())
        assert bytes_of(model[2].bias.grad) == bytes_of(twins[3].grad)


def replaced_data(grad, values):
    grad.data = values


@pytest.mark.parametrize(
    "replace",
    [replaced_data, torch.Tensor.set_, lambda grad, values: grad.set_(values.T.contiguous()).t_()],
    ids=["data", "set_", "t_"],
)
def test_elements_may_be_replaced(comm, replace):
    model = torch.nn.Linear(6, 6)
    with NAdam(model, comm=comm, policy=RING) as opt:
        model(torch.full((1, 6), comm.rank + 1.0)).sum().backward()
        grad, values = model.weight.grad, torch.arange(36.0).reshape(6, 6)
        replace(grad, values)
        assert model.weight.grad is grad
        assert torch.equal(grad, values)
        with pytest.raises(PartitionError, match="must keep shape .6, 6. and dtype torch.float64"):
            grad.data = torch.zeros(2)
        opt.step()
        assert torch.equal(model.weight.grad, values)


def test_copies_of_many_elements_are_warned_of_once(comm):
    layer = torch.nn.Linear(400, 400)
    with NAdam(layer, comm=comm, policy=ShardPolicy(stage=2, timeout_s=20, threads=1)) as opt:
        for step in range(2):
            opt.zero_grad()
            layer(torch.ones(1, 400)).sum().backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
            if step == 0:
                opt.step()
                continue
            layer.weight.grad.add_(1.0)
            with warned(comm, StageWarning, "each rank keeps 1 MiB .* max_grad_norm"):
                opt.step()
