"""Between ``average_grads()`` and the step users see and change the average, as under DDP."""

import pytest

pytest.importorskip("torch")

import torch
from torch.amp import GradScaler
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from shardopt.errors import (
    CallOrderError,
    HyperparamsError,
    PartitionError,
    RankMismatchError,
)
from shardopt.policy import ShardPolicy
from shardopt.torch import NAdam
from tests.support.errors import differing, errs, is_last, refused
from tests.support.torch_models import Twins, loss_of, make_model, params_of

pytestmark = pytest.mark.mpi

SHARES = pytest.mark.parametrize("share", [True, False], ids=["one node", "a node for each rank"])


def policy(share):
    return ShardPolicy(share_node=share, timeout_s=20)


def begin(twins, num_backwards=1):
    """Compute gradients of both, and average those of the ranks."""
    for opt in twins.both:
        opt.zero_grad()
    for _ in range(num_backwards):
        twins.backward()
    twins.opt.average_grads()


def finish(twins):
    for opt in twins.both:
        opt.step()
    twins.assert_same()


def assert_averaged(twins):
    """Every rank's gradients must be those of one process."""
    for ours, whole in zip(params_of(twins.opt), params_of(twins.whole_opt), strict=True):
        if whole.grad is None:
            assert ours.grad is None or not ours.grad.any()
        else:
            torch.testing.assert_close(ours.grad, whole.grad, rtol=1e-11, atol=1e-14)
    grads = [None if p.grad is None else p.grad.tolist() for p in params_of(twins.opt)]
    assert twins.comm.allgather(grads) == [grads] * twins.comm.size


# -- what users do in between ----------------------------------------------------------------------


def add_noise(params):
    generator = torch.Generator().manual_seed(3)
    for param in params:
        param.grad += torch.randn(param.shape, generator=generator) / 100


def mask_out(params):
    for param in params:
        param.grad = param.grad * (param > 0)


def centralize(params):
    for param in params:
        if param.dim() > 1:
            param.grad -= param.grad.mean(1, keepdim=True)


def rescale_each(params):
    for param in params:
        param.grad.data /= param.grad.norm() + 1e-3


CHANGES = {
    "nothing": lambda params: None,
    "clip_grad_norm_": lambda params: clip_grad_norm_(params, 0.1),
    "clip_grad_value_": lambda params: clip_grad_value_(params, 0.05),
    "noise": add_noise,
    "a mask": mask_out,
    "centralization": centralize,
    "a norm of each": rescale_each,
}


@pytest.mark.parametrize(
    ("change", "share"), [*((each, True) for each in CHANGES), ("noise", False), ("a mask", False)]
)
def test_changes_are_those_of_one_process(comm, change, share):
    with Twins(comm, lr=0.1, eps=1e-3, policy=policy(share)) as twins:
        for num_backwards in (1, 3):
            begin(twins, num_backwards)
            assert_averaged(twins)
            for opt in twins.both:
                CHANGES[change](params_of(opt))
            finish(twins)


def test_each_part_is_taken_from_its_owner(comm):
    with Twins(comm, lr=0.1) as twins:
        begin(twins)
        for param in params_of(twins.opt):
            param.grad.fill_(float(comm.rank))
        twins.opt.step()
        bits = [param.tolist() for param in params_of(twins.opt)]
        assert comm.allgather(bits) == [bits] * comm.size


@SHARES
def test_the_steps_own_clipping_sees_what_is_left(comm, share):
    settings = {"lr": 0.1, "eps": 1e-3}
    with Twins(comm, policy=policy(share), **settings) as twins:
        twins.opt.close()
        twins.opt = NAdam(
            twins.ours.parameters(), max_grad_norm=0.1, comm=comm, policy=policy(share), **settings
        )
        begin(twins)
        norm = clip_grad_norm_(params_of(twins.whole_opt), 0.1)
        twins.opt.step()
        twins.whole_opt.step()
        twins.assert_same(rtol=1e-9)
        assert twins.opt.last_step.grad_norm == pytest.approx(float(norm), rel=1e-9)
        assert twins.opt.last_step.clip_factor == pytest.approx(0.1 / float(norm), rel=1e-4)


# -- which parameters have one ---------------------------------------------------------------------


class Branches(torch.nn.Module):
    """Four vectors, of which a loss may reach any; the last is frozen."""

    def __init__(self):
        super().__init__()
        values = torch.arange(1.0, 9.0).reshape(4, 2)
        self.weights = torch.nn.ParameterList(value.clone() for value in values)
        self.weights[3].requires_grad_(False)


@pytest.mark.parametrize(("zero_grad", "share"), [("optimizer", False), ("model", True)])
def test_a_gradient_on_some_rank_is_one_on_all(comm, share, zero_grad):
    def loss(model, step, rank):
        reached = [0] + [1] * (rank == 0) + [2] * (step == 2)
        return sum((model.weights[i] * (1.0 + i + step + rank)).square().sum() for i in reached)

    with Twins(comm, Branches, loss=loss, lr=0.1, weight_decay=0.1, policy=policy(share)) as twins:
        for step in range(4):
            for zeroed in twins.both if zero_grad == "optimizer" else twins.models:
                zeroed.zero_grad()
            twins.backward()
            twins.opt.average_grads()
            assert_averaged(twins)
            assert twins.ours.weights[3].grad is None
            assert (twins.ours.weights[2].grad is None) == (
                zero_grad == "model" and step != 2
            ) or zero_grad == "optimizer"
            finish(twins)
        counts = [twins.opt.state[param]["step"].item() for param in twins.ours.weights[:3]]
        assert counts == [4, 4, 1]


# -- loss scales -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("unscale", "share"), [(True, True), (False, False)])
def test_grad_scaler(comm, unscale, share):
    scaler = GradScaler("cpu", init_scale=2.0**10)

    def loss(model, step, rank):
        plain = torch.nn.functional.mse_loss(model(torch.full((2, 5), step + rank + 1.0)), TARGET)
        return plain if model is twins.whole else scaler.scale(plain)

    twins = Twins(comm, loss=loss, lr=0.1, eps=1e-3, policy=policy(share))
    with twins:
        for step in range(4):
            for opt in twins.both:
                opt.zero_grad()
            twins.backward()
            is_bad = step == 1
            if is_bad and is_last(comm):
                params_of(twins.opt)[0].grad.view(-1)[0] = torch.inf
            twins.opt.average_grads()
            if unscale:
                scaler.unscale_(twins.opt)
                norm = clip_grad_norm_(params_of(twins.opt), 0.1)
                other = clip_grad_norm_(params_of(twins.whole_opt), 0.1)
                assert is_bad or norm.item() == pytest.approx(other.item())
            scaler.step(twins.opt)
            scaler.update()
            assert twins.opt.last_step.skipped == is_bad
            if not is_bad:
                twins.whole_opt.step()
            twins.assert_same()
        assert scaler.get_scale() == 2.0**9  # on every rank


TARGET = torch.zeros(2, 3)


def test_a_loss_scale_of_its_own(comm):
    with Twins(comm, lr=0.1) as twins:
        for opt in twins.both:
            opt.zero_grad()
        twins.loss = lambda model, step, rank, loss=twins.loss: (
            loss(model, step, rank) * (1.0 if model is twins.whole else 64.0)
        )
        twins.backward()
        twins.opt.average_grads(loss_scale=64.0)
        assert_averaged(twins)
        finish(twins)
        assert twins.opt.last_step.loss_scale == 64.0


@pytest.mark.mpi(min_size=2)
def test_scales_of_ranks_must_be_equal(comm):
    with Twins(comm, lr=0.1) as twins:
        begin(twins)
        twins.opt.grad_scale = torch.tensor(4.0 if is_last(comm) else 2.0)  # as GradScaler does
        twins.opt.found_inf = torch.tensor(0.0)
        with refused(comm, RankMismatchError, differing(comm, "loss_scale", "2.0", "4.0")):
            twins.opt.step()
        finish(twins)  # still averaged
        twins.backward()
        with refused(comm, RankMismatchError, differing(comm, "loss_scale", "1.0", "4.0")):
            twins.opt.average_grads(4.0 if is_last(comm) else 1.0)
        twins.opt.step()
        twins.whole_opt.step()
        twins.assert_same()


# -- the order of calls ----------------------------------------------------------------------------


def test_twice_in_a_row_is_once(comm):
    with Twins(comm, lr=0.1) as twins:
        begin(twins)
        for param in params_of(twins.opt):
            param.grad *= 2.0
        twins.opt.average_grads()
        for param in params_of(twins.whole_opt):
            param.grad *= 2.0
        assert_averaged(twins)
        with refused(comm, HyperparamsError, "loss_scale must be that of the first"):
            twins.opt.average_grads(loss_scale=2.0)
        finish(twins)
        assert twins.opt.last_step.loss_scale == 1.0


@pytest.mark.parametrize(
    ("alone", "call", "share"),
    [(False, "step", True), (True, "step", False), (True, "average_grads", True)],
)
def test_a_backward_after_it_is_refused(comm, alone, call, share):
    with Twins(comm, lr=0.1, policy=policy(share)) as twins:
        begin(twins)
        if errs(comm, alone):
            twins.ours(torch.ones(1, 5)).sum().backward()
        for _ in range(2):
            with refused(
                comm, CallOrderError, "average_grads() must come after the last", alone=alone
            ):
                getattr(twins.opt, call)()
        begin(twins)
        finish(twins)
        for model in twins.models:  # which leaves None
            model.zero_grad()
        twins.step(zero_grad=False)
        twins.assert_same()


@pytest.mark.parametrize(
    ("zero_grad", "again", "share"),
    [("optimizer", True, False), ("optimizer", False, False), ("model", True, True)],
)
def test_zero_grad_ends_it(comm, zero_grad, again, share):
    with Twins(comm, lr=0.1, policy=policy(share)) as twins:
        begin(twins)
        for zeroed in twins.both if zero_grad == "optimizer" else twins.models:
            zeroed.zero_grad()
        twins.backward()
        if again:
            twins.opt.average_grads()
            assert_averaged(twins)
        finish(twins)
        twins.step()
        twins.assert_same()


@pytest.mark.mpi(min_size=2)
def test_ranks_must_agree_that_gradients_are_averaged(comm):
    with Twins(comm, lr=0.1) as twins:
        begin(twins)
        if is_last(comm):
            twins.opt.zero_grad()
        with refused(
            comm,
            RankMismatchError,
            differing(comm, "whether gradients are averaged", "True", "False"),
        ):
            twins.opt.step()
        begin(twins)
        if is_last(comm):
            params_of(twins.opt)[1].grad = None
        with refused(comm, RankMismatchError, "set or removed after average_grads()", "0.bias"):
            twins.opt.step()
        begin(twins)
        with refused(comm, RankMismatchError, "the call must be the same"):
            (twins.opt.step if is_last(comm) else twins.opt.average_grads)()
        finish(twins)


def test_a_step_that_raises_leaves_gradients_averaged(comm):
    with Twins(comm, lr=0.1) as twins:
        begin(twins)
        group = twins.opt.param_groups[0]
        group["lr"] = -1.0 if is_last(comm) else 0.1
        with refused(comm, HyperparamsError, "lr must", alone=True):
            twins.opt.step()
        group["lr"] = 0.1
        finish(twins)


@pytest.mark.parametrize("again", [False, True], ids=["step", "average"])
@pytest.mark.parametrize("how", ["edited", "added"])
@SHARES
def test_parameters_that_come_in_between_are_averaged_with_the_others(comm, share, how, again):
    def loss(pair, step, rank):
        model, new = pair
        return 8.0 * (loss_of(model, step, rank) + (rank + 1) * new.sin().sum())

    def make_pair():
        return make_model(), Parameter(torch.ones(3))

    with Twins(
        comm, make_pair, lambda pair: pair[0].parameters(), loss, policy(share), lr=0.1
    ) as twins:
        twins.backward()
        twins.opt.average_grads(loss_scale=8.0)
        for param in [*params_of(twins.whole_opt), twins.whole[1]]:
            param.grad /= 8.0
        twins.ours[1].grad /= 8.0
        for opt, (_, new) in zip(twins.both, twins.models, strict=True):
            if how == "added":
                opt.add_param_group({"params": [new]})
            else:
                opt.param_groups[0]["params"].append(new)
        if again:
            twins.opt.average_grads(loss_scale=8.0)
            assert_averaged(twins)
        finish(twins)


@pytest.mark.parametrize("how", ["edited", "added"])
def test_a_backward_is_refused_though_parameters_come_as_well(comm, how):
    with Twins(comm, lr=0.1) as twins:
        begin(twins)
        new = Parameter(torch.ones(3))
        if how == "added":
            twins.opt.add_param_group({"params": [new]})
        twins.backward()
        if how == "edited":
            twins.opt.param_groups[0]["params"].append(new)
        with refused(comm, CallOrderError, "average_grads() must come after the last"):
            twins.opt.step()


@pytest.mark.mpi(min_size=2)
def test_gradients_stay_averaged_when_an_edit_is_refused(comm):
    with Twins(comm, lr=0.1) as twins:
        begin(twins)
        if is_last(comm):
            twins.opt.param_groups[0]["params"].pop()
        with refused(comm, RankMismatchError, "the call must be the same"):
            twins.opt.step()
        finish(twins)


def test_a_gradient_that_does_not_fit_is_refused_before_anything_happens(comm):
    with Twins(comm, lr=0.1) as twins:
        twins.backward()
        param = params_of(twins.opt)[0]
        usual = param.grad
        if is_last(comm):
            param.grad = torch.zeros_like(param).to_sparse()
        with refused(
            comm, PartitionError, "grad of parameter '0.weight' must be dense", alone=True
        ):
            twins.opt.average_grads()
        param.grad = usual
        twins.opt.average_grads()
        assert_averaged(twins)
        finish(twins)


# -- 16 bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, True), (torch.float16, False)])
def test_sixteen_bits_are_rounded_once(comm, dtype, share):
    grads = [torch.linspace(-1, 1 + rank, 5000, dtype=torch.float32) for rank in range(comm.size)]
    grads = [grad.to(dtype) for grad in grads]
    param = Parameter(torch.zeros(5000, dtype=dtype))
    master = Parameter(torch.zeros(5000, dtype=torch.float32))
    with NAdam([param], lr=0.01, comm=comm, policy=policy(share)) as opt:
        whole = torch.optim.NAdam([master], lr=0.01)
        for _ in range(2):
            opt.zero_grad()
            (param * grads[comm.rank]).sum().backward()
            opt.average_grads()
            average = sum(grad.float() for grad in grads) * torch.tensor(
                1 / comm.size, dtype=torch.float32
            )
            assert torch.equal(param.grad, average.to(dtype))
            master.grad = param.grad.float()
            opt.step()
            whole.step()
        torch.testing.assert_close(param.float(), master, rtol=2**-8, atol=1e-6)


# -- other processes of torch ----------------------------------------------------------------------


@pytest.mark.mpi(min_size=2)
def test_gradients_are_those_of_ddp(comm, mpi_tmp_path):
    store = torch.distributed.FileStore(str(mpi_tmp_path / "store"), comm.size)
    torch.distributed.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    try:
        with Twins(comm, lr=0.1) as twins:
            replica = torch.nn.parallel.DistributedDataParallel(make_model())
            begin(twins)
            twins.loss(replica, 0, comm.rank).backward()
            for ours, theirs in zip(params_of(twins.opt), replica.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad)
            finish(twins)
            wrapped = torch.nn.parallel.DistributedDataParallel(twins.ours)
            for opt in twins.both:
                opt.zero_grad()
            twins.loss(wrapped, 1, comm.rank).backward()  # averages in place: no warning
            for rank in range(comm.size):
                (twins.loss(twins.whole, 1, rank) / comm.size).backward()
            finish(twins)
    finally:
        torch.distributed.destroy_process_group()
