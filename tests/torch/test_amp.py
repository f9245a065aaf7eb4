"""torch.amp.GradScaler works as it does with any optimizer, and ranks may have different scales."""

import copy

import pytest

pytest.importorskip("torch")

import torch
from torch.amp import GradScaler

from shardopt.errors import PartitionError
from tests.support.errors import is_last, refused
from tests.support.torch_models import Twins, loss_of, params_of

pytestmark = pytest.mark.mpi


def scaled_twins(comm, scaler, **settings):
    """Twins of which ours scales its loss; torch's does without, so that any scale must cancel."""

    def loss(model, step, rank):
        plain = loss_of(model, step, rank)
        return plain if model is twins.whole else scaler.scale(plain)

    twins = Twins(comm, loss=loss, **settings)
    return twins


def make_scaler(init_scale=2.0**10, **settings):
    return GradScaler("cpu", init_scale=init_scale, **settings)


def step_scaled(twins, scaler, unscale=False, poison=False):
    """One step; where any rank is poisoned, torch's twin makes none."""
    for opt in twins.both:
        opt.zero_grad()
    twins.backward()
    if poison:
        params_of(twins.opt)[0].grad.view(-1)[0] = torch.inf
    if unscale:
        scaler.unscale_(twins.opt)
    scaler.step(twins.opt)
    scaler.update()
    if not any(twins.comm.allgather(poison)):
        twins.whole_opt.step()


@pytest.mark.parametrize("unscale", [False, True])
def test_scales_that_are_powers_of_two_cancel(comm, unscale):
    scaler = make_scaler(growth_interval=2)
    with scaled_twins(comm, scaler, lr=0.1) as twins:
        for step in range(6):
            scale = scaler.get_scale()
            step_scaled(twins, scaler, unscale)
            assert scaler.get_scale() == scale * (2 if step % 2 else 1)
            report = twins.opt.last_step
            assert report.copied_nbytes == 0
            assert report.loss_scale == (1.0 if unscale else scale)
        assert scaler.get_scale() == 2.0**13
        twins.assert_same()
        assert not hasattr(twins.opt, "grad_scale")
        assert not hasattr(twins.opt, "found_inf")


@pytest.mark.parametrize("scale", [1e-3, 3.7, 65536.0])
def test_any_scale_cancels(comm, scale):
    scaler = make_scaler(scale)
    with scaled_twins(comm, scaler, lr=0.1) as twins:
        for _ in range(3):
            step_scaled(twins, scaler)
        twins.assert_same()


def test_gradients_are_not_divided_in_a_pass_of_their_own(comm):
    scaler = make_scaler(2.0**10)
    with scaled_twins(comm, scaler) as twins:
        step_scaled(twins, scaler)
        (plain,) = torch.autograd.grad(
            loss_of(twins.whole, 0, comm.rank), [twins.whole[0].weight], allow_unused=False
        )
        ratio = twins.ours[0].weight.grad.abs().sum() / plain.abs().sum()
        assert 2.0**9 < ratio < 2.0**11  # still scaled


@pytest.mark.filterwarnings("ignore:gradients were changed")
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("where", ["every rank", "last rank"])
def test_an_inf_skips_the_step_on_all_ranks(comm, unscale, where):
    scaler = make_scaler()
    here = where == "every rank" or is_last(comm)
    with scaled_twins(comm, scaler, lr=0.1) as twins:
        for step in range(6):
            poison = here and step in (1, 2)
            scale = scaler.get_scale()
            step_scaled(twins, scaler, unscale, poison)
            report = twins.opt.last_step
            assert report.skipped == (step in (1, 2))
            assert report.num_updated == (None if report.skipped else 6)
            assert scaler.get_scale() == scale / (2 if poison else 1)
            twins.assert_same()
        assert scaler.get_scale() == 2.0 ** (8 if here else 10)  # they differ from now on
        entries = twins.opt.state_dict()["state"].values()
        assert {float(entry["step"]) for entry in entries} == {4.0}


@pytest.mark.mpi(min_size=2)
def test_one_rank_may_unscale_and_another_not(comm):
    scaler = make_scaler(2.0 ** (4 + comm.rank))
    with scaled_twins(comm, scaler, lr=0.1) as twins:
        for _ in range(3):
            step_scaled(twins, scaler, unscale=comm.rank == 0)
        twins.assert_same()


@pytest.mark.filterwarnings("ignore:gradients were changed")
def test_clipping_between_unscale_and_step(comm):
    scaler = make_scaler()
    with scaled_twins(comm, scaler, lr=0.1, eps=1.0) as twins:
        for step in range(3):
            for opt in twins.both:
                opt.zero_grad()
            twins.backward()
            scaler.unscale_(twins.opt)
            norm = torch.nn.utils.clip_grad_norm_(twins.ours.parameters(), 0.01)
            local = [loss_of(twins.whole, step, rank) for rank in range(comm.size)]
            totals = [torch.zeros_like(param) for param in twins.whole.parameters()]
            for rank, loss in enumerate(local):  # torch's twin: clip each rank's, then average
                grads = torch.autograd.grad(loss, list(twins.whole.parameters()))
                length = torch.nn.utils.get_total_norm(grads)
                if rank == comm.rank:
                    torch.testing.assert_close(norm, length)
                for total, grad in zip(totals, grads, strict=True):
                    total += grad * (0.01 / (length + 1e-6)) / comm.size
            for param, total in zip(twins.whole.parameters(), totals, strict=True):
                param.grad = total
            scaler.step(twins.opt)
            scaler.update()
            twins.whole_opt.step()
        twins.assert_same()


def test_parameters_that_no_loss_reaches_stand_still(comm):
    scaler = make_scaler()
    unused = torch.nn.Parameter(torch.ones(3))

    def params(model):
        return [*model.parameters(), unused]

    for unscale in (False, True):
        with scaled_twins(comm, scaler, params=params, lr=0.1, weight_decay=0.1) as twins:
            for _ in range(2):
                step_scaled(twins, scaler, unscale)
            twins.assert_same()
            assert torch.equal(unused, torch.ones(3))
            assert float(twins.opt.state_dict()["state"][6]["step"]) == 0


def test_a_refused_step_leaves_no_scale_behind(comm):
    scaler = make_scaler()
    with scaled_twins(comm, scaler, lr=0.1) as twins:
        twins.backward()
        param = params_of(twins.opt)[0]
        usual = param.data
        param.data = usual.double().new_ones(2)
        with refused(comm, PartitionError, "data of parameter '0.weight' must keep shape"):
            scaler.step(twins.opt)
        param.data = usual
        scaler.step(twins.opt)
        assert twins.opt.last_step.loss_scale == 2.0**10
        scaler.update()
        twins.whole_opt.step()
        twins.assert_same()


def test_a_disabled_scaler_passes_the_step_on(comm):
    scaler = make_scaler(enabled=False)
    with scaled_twins(comm, scaler, lr=0.1) as twins:
        step_scaled(twins, scaler)
        twins.assert_same()


def test_the_scalers_own_state_goes_on(comm):
    scaler = make_scaler(growth_interval=3)
    with scaled_twins(comm, scaler, lr=0.1) as twins:
        for _ in range(4):
            step_scaled(twins, scaler)
        saved = copy.deepcopy(scaler.state_dict())
        scaler.load_state_dict(saved)
        for _ in range(2):
            step_scaled(twins, scaler)
        assert scaler.get_scale() == 2.0**12
        twins.assert_same()


def test_one_scaler_for_two_optimizers(comm):
    scaler = make_scaler()
    with (
        scaled_twins(comm, scaler, lr=0.1) as first,
        scaled_twins(comm, scaler, lr=0.01) as second,
    ):
        for step in range(3):
            for twins in (first, second):
                for opt in twins.both:
                    opt.zero_grad()
                twins.backward(step)
            scaler.step(first.opt)
            scaler.step(second.opt)
            scaler.update()
            for twins in (first, second):
                twins.whole_opt.step()
                twins.assert_same()
