"""Every scheduler of torch gives the same learning rates and the same training as with torch's."""

import inspect

import pytest

pytest.importorskip("torch")

import torch
from torch.optim import lr_scheduler, swa_utils

from shardopt.errors import RankMismatchError
from tests.support.errors import is_last, refused
from tests.support.torch_models import Twins

pytestmark = pytest.mark.mpi

RECIPES = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda epoch: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, step_size=3, gamma=0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, milestones=[2, 5], gamma=0.5),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, factor=0.5, total_iters=4),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.1, total_iters=6),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, gamma=0.8),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=5, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=3),  # betas too
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=12),  # betas too
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1, factor=0.5),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1), lr_scheduler.ExponentialLR(opt, 0.9)], [3]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1), lr_scheduler.ExponentialLR(opt, 0.9)], opt
    ),
    "SWALR": lambda opt: swa_utils.SWALR(opt, swa_lr=0.05, anneal_epochs=4),
}


def scheduler_names():
    """The classes of schedulers that torch has, but for the base class."""
    members = {**vars(lr_scheduler), **vars(swa_utils)}.values()
    return {
        member.__name__
        for member in members
        if inspect.isclass(member)
        and issubclass(member, lr_scheduler.LRScheduler)
        and member.__name__ not in ("LRScheduler", "_LRScheduler")
    }


def advance(scheduler, step):
    """Advance a scheduler; most count epochs, and one takes a metric."""
    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    scheduler.step(1.0 + step % 3) if plateau else scheduler.step()


def test_there_is_a_recipe_for_every_scheduler():
    assert scheduler_names() <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_learning_rates_and_training_are_torchs(comm, name, kind):
    def groups(model):
        return [
            {"params": model[0].parameters()},
            {"params": model[2].parameters(), "lr": make_lr(0.02)},
        ]

    make_lr = float if kind == "float" else torch.tensor
    with Twins(comm, params=groups) as twins:
        for opt in twins.both:
            opt.param_groups[0]["lr"] = make_lr(0.04)
        schedulers = [RECIPES[name](opt) for opt in twins.both]
        seen = []
        for step in range(10):
            twins.step()
            ours, theirs = (
                [(float(group["lr"]), group["betas"]) for group in opt.param_groups]
                for opt in twins.both
            )
            assert ours == theirs
            seen.append(ours[0][0])
            for scheduler in schedulers:
                advance(scheduler, step)
        twins.assert_same()
        assert len(set(seen)) > 1
        assert isinstance(twins.opt.param_groups[0]["lr"], torch.Tensor) == (kind == "tensor")


@pytest.mark.parametrize("name", ["OneCycleLR", "SequentialLR", "ReduceLROnPlateau"])
def test_a_saved_schedule_goes_on(comm, name):
    with Twins(comm, lr=0.04) as twins:
        schedulers = [RECIPES[name](opt) for opt in twins.both]
        for step in range(4):
            twins.step()
            for scheduler in schedulers:
                advance(scheduler, step)
        saved = [scheduler.state_dict() for scheduler in schedulers], twins.opt.state_dict()
        again = [RECIPES[name](opt) for opt in twins.both]  # writes lr and initial_lr
        for scheduler, state in zip(again, saved[0], strict=True):
            scheduler.load_state_dict(state)
        twins.opt.load_state_dict(saved[1])
        for ours, theirs in zip(twins.opt.param_groups, twins.whole_opt.param_groups, strict=True):
            theirs["lr"] = ours["lr"]
            theirs["betas"] = ours["betas"]
        for step in range(4, 8):
            twins.step()
            for scheduler in again:
                advance(scheduler, step)
            assert twins.opt.param_groups[0]["lr"] == twins.whole_opt.param_groups[0]["lr"]
        twins.assert_same()


@pytest.mark.mpi(min_size=2)
def test_a_metric_that_differs_between_ranks_is_found_out(comm):
    with Twins(comm, lr=0.04) as twins:
        scheduler = lr_scheduler.ReduceLROnPlateau(twins.opt, patience=0, factor=0.5)
        twins.step()
        scheduler.step(1.0)
        scheduler.step(2.0 if is_last(comm) else 0.5)
        with refused(comm, RankMismatchError, "lr of param group 0 must be the same", "0.02 on"):
            twins.opt.step()


def test_no_scheduler_thinks_the_optimizer_came_second(comm):
    with Twins(comm, lr=0.04) as twins:
        scheduler = RECIPES["StepLR"](twins.opt)
        twins.step()
        scheduler.step()  # would warn that step() came too late
        assert scheduler.get_last_lr() == [0.04]
