"""Gradients that a rank changes before they are averaged bring one warning, and others none."""

import warnings

import pytest

pytest.importorskip("torch")

import torch
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from shardopt.errors import EditedGradientsWarning
from tests.support.errors import is_last, warned
from tests.support.torch_models import Twins, params_of

pytestmark = pytest.mark.mpi(min_size=2)

EDITS = {
    "clip_grad_norm_": lambda params: clip_grad_norm_(params, 0.1),
    "clip_grad_value_": lambda params: clip_grad_value_(params, 0.1),
    "one in place": lambda params: params[1].grad.mul_(2.0),
    "detached": lambda params: params[1].grad.detach().add_(1.0),
}


def step(twins, edit=None, zeroed=None):
    (zeroed or twins.opt).zero_grad()
    twins.loss(twins.ours, next(twins.steps), twins.comm.rank).backward()
    if edit is not None:
        edit(params_of(twins.opt))
    twins.opt.step()


@pytest.mark.parametrize(
    ("edit", "alone"), [*((each, False) for each in EDITS), ("clip_grad_norm_", True)]
)
def test_it_is_said_once(comm, edit, alone):
    mine = EDITS[edit] if is_last(comm) or not alone else None
    with Twins(comm) as twins:
        step(twins)
        step(twins, mine)  # torch counts a write; whether it changes anything, the next one tells
        with warned(comm, EditedGradientsWarning, "max_grad_norm.*average_grads()"):
            step(twins, mine)
        assert twins.opt.last_step.edited_grads
        step(twins, mine)
        step(twins, mine, twins.ours)
        step(twins)
        assert not twins.opt.last_step.edited_grads


def test_all_ranks_raise_if_warnings_are_errors(comm):
    with Twins(comm) as twins, warnings.catch_warnings():
        warnings.simplefilter("error")
        step(twins, EDITS["one in place"])
        with pytest.raises(EditedGradientsWarning):
            step(twins, EDITS["one in place"])
        step(twins)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_what_grad_scaler_does_is_no_edit(comm, unscale, clip):
    scaler = GradScaler("cpu", init_scale=4.0)
    with Twins(comm) as twins:
        step(twins, EDITS["clip_grad_norm_"])  # so that samples are taken
        twins.opt.zero_grad()
        scaler.scale(twins.loss(twins.ours, 0, comm.rank)).backward()
        if unscale:
            scaler.unscale_(twins.opt)
        if clip:
            clip_grad_norm_(params_of(twins.opt), 0.1)
            with warned(comm, EditedGradientsWarning):
                scaler.step(twins.opt)
        else:
            scaler.step(twins.opt)
        scaler.update()


def accumulate(twins):
    for _ in range(3):
        twins.loss(twins.ours, 0, twins.comm.rank).backward()


def assign(twins):
    for param in params_of(twins.opt):
        param.grad = torch.ones_like(param).mul_(2.0).add_(1.0)


def write_by_hand(twins):
    for param in params_of(twins.opt):
        param.grad.fill_(3.0)


def use_a_hook(twins):
    hook = twins.ours[0].weight.register_hook(lambda grad: grad.mul_(2.0))
    accumulate(twins)
    hook.remove()


def leave_some_out(twins):
    accumulate(twins)
    twins.ours.zero_grad(set_to_none=False)
    twins.ours[3](torch.ones(1, 6)).sum().backward()


def make_a_graph(twins):
    params = params_of(twins.opt)
    loss = twins.loss(twins.ours, 0, twins.comm.rank)
    grads = torch.autograd.grad(loss, params, create_graph=True)
    sum(grad.square().sum() for grad in grads).backward()


def clip_nothing(twins):
    accumulate(twins)
    clip_grad_norm_(params_of(twins.opt), torch.inf)  # for its result, as Trainer does


def average(twins):
    accumulate(twins)
    twins.opt.average_grads()
    clip_grad_norm_(params_of(twins.opt), 0.1)


ORDINARY = [
    accumulate,
    assign,
    write_by_hand,
    use_a_hook,
    leave_some_out,
    make_a_graph,
    clip_nothing,
    clip_nothing,
    average,
]


@pytest.mark.parametrize(
    ("zeroed", "set_to_none"), [("opt", True), ("ours", True), ("ours", False)]
)
def test_no_false_alarms(comm, zeroed, set_to_none):
    """pytest makes errors of warnings."""
    with Twins(comm) as twins:
        params_of(twins.opt)[0].grad.add_(1.0)  # before the first backward
        for work in ORDINARY:
            if work is write_by_hand:
                twins.opt.zero_grad()  # which leaves something to write to
            work(twins)
            twins.opt.step()
            clip_grad_norm_(params_of(twins.opt), 0.1)  # nobody needs them any longer
            getattr(twins, zeroed).zero_grad(set_to_none=set_to_none)
