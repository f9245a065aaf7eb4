"""Training loops as people write them after minGPT and nanoGPT, DDP around the model among them."""

import contextlib
import dataclasses
import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.support.clients import (
    MAX_GRAD_NORM,
    NUM_STEPS,
    assert_same_losses,
    assert_same_weights,
    loss_of,
    make_net,
    make_opt,
    make_whole_opt,
    rows_of,
)
from tests.support.errors import POLICY

pytestmark = pytest.mark.mpi

ACCUMULATED = 2


def learning_rate(step, peak=1e-2, num_warmup=2):
    """A warm-up and a cosine, as nanoGPT's ``get_lr``."""
    if step < num_warmup:
        return peak * (step + 1) / (num_warmup + 1)
    ratio = (step - num_warmup) / (NUM_STEPS - num_warmup)
    return 0.1 * peak + 0.45 * peak * (1 + math.cos(math.pi * ratio))


def decay_groups(model):
    """Two groups: matrices, and everything else, which is not decayed."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


class Loop:
    """nanoGPT's loop: it sets lr itself, accumulates, clips, and clears gradients at the end.

    Args:
        model: The model, or what is called in its place.
        opt: Its optimizer.
        comm: The ranks, or None for all rows.
        clip: Called with the parameters before each step.
        zero_grad: Whose ``zero_grad`` is called: "model", "optimizer" or "zeros".
    """

    def __init__(self, model, opt, comm=None, clip=None, zero_grad="model"):
        self.model, self.opt, self.rows = model, opt, rows_of(comm)
        self.clip, self.zero_grad, self.losses, self.step = clip, zero_grad, [], 0

    def run(self, stop=NUM_STEPS):
        while self.step < stop:
            self.take_step()
        return self

    def take_step(self):
        for group in self.opt.param_groups:
            group["lr"] = learning_rate(self.step)
        for part in range(ACCUMULATED):
            last = part == ACCUMULATED - 1
            no_sync = (
                contextlib.nullcontext
                if last
                else getattr(self.model, "no_sync", contextlib.nullcontext)
            )
            with no_sync():
                loss = loss_of(self.model, self.step * ACCUMULATED + part, self.rows)
                (loss / ACCUMULATED).backward()
            self.losses.append(loss.item())
        if self.clip is not None:
            self.clip(self.model.parameters())
        self.opt.step()
        {
            "model": self.model.zero_grad,
            "optimizer": self.opt.zero_grad,
            "zeros": lambda: self.opt.zero_grad(set_to_none=False),
        }[self.zero_grad]()
        self.step += 1


def clip(params):
    torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)


@pytest.fixture(scope="module")
def whole():
    """The finished loop of one process."""
    model = make_net()
    return Loop(model, make_whole_opt(decay_groups(model)), clip=clip).run()


@pytest.mark.parametrize("zero_grad", ["model", "optimizer", "zeros"])
def test_a_loop_in_each_rank_is_one_process(comm, whole, zero_grad):
    model = make_net()
    opt = make_opt(decay_groups(model), comm, max_grad_norm=MAX_GRAD_NORM)
    loop = Loop(model, opt, comm, zero_grad=zero_grad).run()
    assert_same_losses(comm, loop.losses, whole.losses)
    assert_same_weights(model, whole.model)


def test_a_loop_resumes_from_what_rank_0_saved(comm, mpi_tmp_path, whole):
    path = mpi_tmp_path / "ckpt.pt"

    def make_loop():
        model = make_net()
        opt = make_opt(decay_groups(model), comm, max_grad_norm=MAX_GRAD_NORM)
        return Loop(model, opt, comm)

    first = make_loop().run(NUM_STEPS // 2)
    if comm.rank == 0:
        saved = {"model": first.model.state_dict(), "optimizer": first.opt.state_dict()}
        torch.save(saved | {"iter_num": first.step}, path)
    comm.Barrier()
    first.run()

    resumed, saved = make_loop(), torch.load(path)
    resumed.model.load_state_dict(saved["model"])
    resumed.opt.load_state_dict(saved["optimizer"])
    resumed.step = saved["iter_num"]
    resumed.run()
    assert_same_weights(resumed.model, first.model, rtol=0, atol=0)
    assert_same_weights(resumed.model, whole.model)


def test_torchs_own_optimizer_goes_on_with_the_file(comm, mpi_tmp_path, whole):
    model = make_net()
    opt = make_opt(decay_groups(model), comm, max_grad_norm=MAX_GRAD_NORM)
    first = Loop(model, opt, comm).run(NUM_STEPS // 2)
    if comm.rank == 0:
        torch.save([model.state_dict(), opt.state_dict()], mpi_tmp_path / "ckpt.pt")
    comm.Barrier()
    weights, state = torch.load(mpi_tmp_path / "ckpt.pt")
    model = make_net()
    model.load_state_dict(weights)
    whole_opt = make_whole_opt(decay_groups(model))
    whole_opt.load_state_dict(state)
    loop = Loop(model, whole_opt, clip=clip)
    loop.step = first.step
    loop.run()
    assert_same_weights(model, whole.model)


@pytest.mark.parametrize("share_node", [True, False])
@pytest.mark.parametrize("settings", [{}, {"gradient_as_bucket_view": True}])
def test_ddp_around_the_model_averages_twice_and_alike(
    comm, whole, process_group, settings, share_node
):
    model = make_net()
    policy = dataclasses.replace(POLICY, share_node=share_node, bucket_nbytes=256)
    opt = make_opt(decay_groups(model), comm, policy=policy)
    # DDP has averaged when the loop clips: each rank clips the same gradients alike.
    loop = Loop(DistributedDataParallel(model, **settings), opt, comm, clip=clip).run()
    assert_same_losses(comm, loop.losses, whole.losses)
    assert_same_weights(model, whole.model)


def test_torchs_clip_after_average_grads_is_that_of_one_process(comm, whole):
    model = make_net()
    opt = make_opt(decay_groups(model), comm)

    def clip_average(params):
        opt.average_grads()
        clip(params)

    assert_same_weights(Loop(model, opt, comm, clip=clip_average).run().model, whole.model)
