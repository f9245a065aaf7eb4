"""Gradients: which parameters have one, as in torch, and that they stay in shared memory."""

import pytest

pytest.importorskip("torch")

import torch
from torch.nn import Parameter

from shardopt.errors import NoGradientWarning, NonFiniteWarning
from tests.support.errors import warned
from tests.support.torch_models import Twins, loss_of, make_model, params_of

pytestmark = pytest.mark.mpi


class Branches(torch.nn.Module):
    """Four vectors, of which a loss may reach any."""

    def __init__(self):
        super().__init__()
        values = torch.arange(1.0, 9.0).reshape(4, 2)
        self.weights = torch.nn.ParameterList(value.clone() for value in values)


def branch_twins(comm, reached, **settings):
    """Twins whose loss reaches, in a step on a rank, the branches that ``reached`` gives."""

    def loss(model, step, rank):
        indices = reached(step, rank)
        terms = [(model.weights[i] * (1.0 + i + step + rank)).square().sum() for i in indices]
        return sum(terms) if terms else None

    return Twins(comm, Branches, loss=loss, lr=0.1, **settings)


def step_counts(twins):
    """Steps that each parameter has taken, by our optimizer and by torch's."""
    states = [[opt.state.get(param) for param in params_of(opt)] for opt in twins.both]
    ours, theirs = ([int(state["step"]) if state else 0 for state in each] for each in states)
    return ours, theirs


def assert_in_step(twins):
    """Parameters and step_counts must agree."""
    twins.assert_same()
    ours, theirs = step_counts(twins)
    assert ours == theirs


# -- who has a gradient ----------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_parameters_that_no_loss_reaches_stand_still(comm, set_to_none):
    def reached(step, rank):  # the last one never, the third on rank 0 in some steps
        return [0] * (step != 1) + [1] * (step % 2) + [2] * (step > 1 and rank == 0)

    with branch_twins(comm, reached, weight_decay=0.1) as twins:
        for _ in range(6):
            twins.step(set_to_none=set_to_none)
            assert_in_step(twins)
        assert len(set(step_counts(twins)[0])) > 2
        assert step_counts(twins)[0][3] == 0


def test_zero_grad_leaves_zeros_that_count_as_none(comm):
    with branch_twins(comm, lambda step, rank: [0, 1]) as twins:
        twins.step()
        views = [param.grad for param in params_of(twins.opt)]
        twins.opt.zero_grad()
        for param, view in zip(params_of(twins.opt), views, strict=True):
            assert param.grad is view
            assert not view.any()
        with warned(comm, NoGradientWarning):
            twins.opt.step()
        assert step_counts(twins)[0] == [1, 1, 0, 0]
        assert twins.opt.last_step.num_updated == 0
        twins.assert_same()


def test_zero_grad_without_set_to_none_keeps_gradients_present(comm):
    with branch_twins(comm, lambda step, rank: [0, 1] if step == 0 else []) as twins:
        for _ in range(3):
            twins.step(set_to_none=False)  # momentum goes on
            assert_in_step(twins)
        assert step_counts(twins)[0] == [3, 3, 0, 0]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_takes_gradients_out_of_any_graph(comm, set_to_none):
    with branch_twins(comm, lambda step, rank: [0]) as twins:
        twins.step()
        grad = twins.ours.weights[0].grad.requires_grad_()
        address = grad.data_ptr()
        twins.opt.zero_grad(set_to_none)
        assert not twins.ours.weights[0].grad.requires_grad
        assert twins.ours.weights[0].grad.data_ptr() == address
        twins.whole_opt.zero_grad(set_to_none)
        twins.step(zero_grad=False)
        assert_in_step(twins)


def test_zeros_from_autograd_are_gradients(comm):
    def loss(model, step, rank):
        return (model.weights[0] * 0.0).sum() + model.weights[1].sum() * step

    with Twins(comm, Branches, loss=loss, lr=0.1) as twins:
        for _ in range(3):
            twins.step()
            assert_in_step(twins)
        assert step_counts(twins)[0] == [3, 3, 0, 0]


TOUCHES = {
    "clip_grad_norm_": lambda params: torch.nn.utils.clip_grad_norm_(params, 1e9),
    "clip_grad_value_": lambda params: torch.nn.utils.clip_grad_value_(params, 1e9),
    "mul_": lambda params: [param.grad.mul_(1.0) for param in params],
    "negative zeros": lambda params: [params[i].grad.neg_() for i in (1, 3)],
    "zero_": lambda params: [params[i].grad.zero_() for i in (1, 3)],
}


@pytest.mark.filterwarnings("ignore:gradients were changed")
@pytest.mark.parametrize("touch", TOUCHES)
def test_what_touches_all_gradients_makes_none_of_them_present(comm, touch):
    with branch_twins(comm, lambda step, rank: [0, 2], weight_decay=0.1) as twins:
        for _ in range(3):
            for opt in twins.both:
                opt.zero_grad()
            twins.backward()
            TOUCHES[touch](params_of(twins.opt))
            for opt in twins.both:
                opt.step()
            assert_in_step(twins)
        assert step_counts(twins)[0] == [3, 0, 3, 0]


WRITES = {
    "copy_": lambda p, value: p.grad.copy_(value),
    "add_": lambda p, value: p.grad.add_(value),
    "+=": lambda p, value: p.grad.__iadd__(value),
    "item": lambda p, value: p.grad.__setitem__(slice(None), value),
    "data": lambda p, value: p.grad.data.copy_(value),
    "set data": lambda p, value: setattr(p.grad, "data", value),
    "numpy": lambda p, value: p.grad.numpy().__setitem__(slice(None), value.numpy()),
    "detached": lambda p, value: p.grad.detach().copy_(value),
    "assigned": lambda p, value: setattr(p, "grad", value),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("stepped", [False, True])
def test_what_users_write_into_a_blank_gradient_counts(comm, write, stepped):
    with branch_twins(comm, lambda step, rank: [0]) as twins:
        if stepped:
            twins.step()
            for opt in twins.both:
                opt.zero_grad()
        value = torch.tensor([0.5, -0.25])
        if comm.rank == comm.size - 1:
            WRITES[write](twins.ours.weights[1], value)
        twins.whole.weights[1].grad = value / comm.size
        for opt in twins.both:
            opt.step()
        assert_in_step(twins)
        assert step_counts(twins)[0][1] == 1


@pytest.mark.mpi(min_size=2)
def test_a_nan_written_into_a_blank_gradient_counts(comm):
    with branch_twins(comm, lambda step, rank: []) as twins:
        if comm.rank == 1:
            twins.ours.weights[1].grad[0] = torch.nan
        with warned(comm, NonFiniteWarning):
            twins.opt.step()
        assert twins.opt.last_step.num_updated == 1
        assert twins.ours.weights[1].isnan().tolist() == [True, False]


def test_a_gradient_that_was_there_before_the_optimizer_counts(comm):
    def model():
        branches = Branches()
        branches.weights[1].grad = torch.tensor([1.0, 2.0])
        return branches

    with Twins(comm, model, loss=lambda model, step, rank: model.weights[0].sum(), lr=0.1) as twins:
        twins.step(zero_grad=False)
        assert_in_step(twins)
        assert step_counts(twins)[0] == [1, 1, 0, 0]


def test_gradients_set_to_none_by_hand(comm):
    with branch_twins(comm, lambda step, rank: [0, 1, 2]) as twins:
        twins.backward()
        for model in twins.models:
            model.weights[1].grad = None
        for opt in twins.both:
            opt.step()
        assert_in_step(twins)
        assert step_counts(twins)[0] == [1, 0, 1, 0]
        assert twins.ours.weights[1].grad is None
        twins.step()
        assert_in_step(twins)


@pytest.mark.parametrize("num_backwards", [1, 3])
def test_after_the_models_zero_grad_backward_puts_gradients_in_their_place(comm, num_backwards):
    with Twins(comm, lr=0.1) as twins:
        before, params = addresses(twins), params_of(twins.opt)
        for _ in range(3):
            for model in twins.models:
                model.zero_grad()
            for _ in range(num_backwards):
                twins.backward()
            assert addresses(twins) == before  # the step has nothing left to copy
            for opt in twins.both:
                opt.step()
            twins.assert_same()
            nbytes = sum(param.nbytes for param in params)
            assert twins.opt.last_step.copied_nbytes == nbytes  # the first of the backward passes


def test_gradients_of_other_strides_are_put_in_their_place(comm):
    def model():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)

    def loss(model, step, rank):
        image = torch.linspace(-1, 1 + step + rank, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
        plain = model(image.to(memory_format=torch.channels_last)).square().mean()
        return plain + (model.bias.expand(5, 4) * 0.1).sum()

    with Twins(comm, model, loss=loss, lr=0.1) as twins:
        before = addresses(twins)
        for _ in range(2):
            for each in twins.models:
                each.zero_grad()
            twins.step(zero_grad=False)
            assert addresses(twins) == before
            twins.assert_same()


def test_users_own_hooks_see_gradients_in_their_place(comm):
    seen = []
    with Twins(comm, lr=0.1) as twins:
        weight = twins.ours[0].weight
        address = weight.grad.data_ptr()
        weight.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad.data_ptr()))
        for _ in range(2):
            for model in twins.models:
                model.zero_grad()
            twins.step(zero_grad=False)
        assert seen == [address, address]
        twins.assert_same()


def test_what_model_zero_grad_takes_away_is_gone(comm):
    def reached(step, rank):
        return [0, 1] if step == 0 else [0]

    with branch_twins(comm, reached) as twins:
        for _ in range(3):
            for model in twins.models:
                model.zero_grad()
            twins.step(zero_grad=False)
            assert_in_step(twins)
        assert step_counts(twins)[0] == [3, 1, 0, 0]


# -- accumulation ----------------------------------------------------------------------------------


def test_micro_batches_accumulate_in_place(comm):
    with Twins(comm, lr=0.1) as twins:
        for _ in range(3):
            for opt in twins.both:
                opt.zero_grad()
            for _ in range(4):
                twins.backward()
            for opt in twins.both:
                opt.step()
            assert twins.opt.last_step.copied_nbytes == 0
        twins.assert_same()


def test_gradients_stay_until_zero_grad(comm):
    with Twins(comm, lr=0.1) as twins:
        for _ in range(4):
            twins.step(zero_grad=False)
        twins.assert_same()
        for opt in twins.both:
            opt.step()  # the same gradients again
        twins.assert_same()


# -- shared memory ---------------------------------------------------------------------------------


def addresses(twins):
    params = params_of(twins.opt)
    return [p.data_ptr() for p in params], [p.grad.data_ptr() for p in params]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_nothing_moves_and_nothing_is_copied(comm, set_to_none):
    with Twins(comm, lr=0.1) as twins:
        before = addresses(twins)
        for _ in range(5):
            twins.step(set_to_none=set_to_none)
            torch.nn.utils.clip_grad_norm_(twins.ours.parameters(), 1.0)
            assert addresses(twins) == before
            assert twins.opt.last_step.copied_nbytes == 0
        assert all(param.grad.is_contiguous() for param in params_of(twins.opt))


def test_a_graph_older_than_the_step_must_not_be_used(comm):
    with branch_twins(comm, lambda step, rank: [0]) as twins:
        stale = [(model.weights[0] ** 2).sum() for model in twins.models]
        fresh = [(model.weights[1] ** 2).sum() for model in twins.models]
        twins.step()
        for loss in stale:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        for loss in fresh:  # nothing has changed there
            loss.backward()


def test_a_second_backward_through_a_step_raises_as_in_torch(comm):
    with Twins(comm) as twins:
        losses = [loss_of(model, 0, comm.rank) for model in twins.models]
        for loss in losses:
            loss.backward(retain_graph=True)
        for opt in twins.both:
            opt.step()
        for loss in losses:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_parameters_of_other_ranks_losses_are_marked_as_changed_too(comm):
    with branch_twins(comm, lambda step, rank: [0] if rank == 0 else []) as twins:
        stale = (twins.ours.weights[0] ** 2).sum()
        twins.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stale.backward()


def test_frozen_and_thawed_parameters(comm):
    with Twins(comm, lr=0.1) as twins:
        for model in twins.models:
            model[0].weight.requires_grad_(False)
        twins.step()
        for model in twins.models:
            model[0].weight.requires_grad_(True)
            model[2].weight.requires_grad_(False)
        for _ in range(2):
            twins.step()
            assert_in_step(twins)
        assert set(step_counts(twins)[0]) == {3, 2, 1}


def test_a_parameter_frozen_from_the_start_may_thaw(comm):
    def frozen():
        model = make_model()
        model[0].weight.requires_grad_(False)
        return model

    with Twins(comm, frozen, lr=0.1) as twins:
        assert not twins.ours[0].weight.requires_grad
        twins.step()
        assert_in_step(twins)
        for model in twins.models:
            model[0].weight.requires_grad_(True)
        twins.step()
        assert_in_step(twins)
        assert twins.opt.last_step.copied_nbytes == 0


def test_a_penalty_on_gradients(comm):
    def loss(model, step, rank):
        plain = loss_of(model, step, rank)
        grads = torch.autograd.grad(plain, list(model.parameters()), create_graph=True)
        return plain + 0.1 * sum(grad.square().sum() for grad in grads)

    with Twins(comm, loss=loss, lr=0.1) as twins:
        for _ in range(3):
            twins.step()
            assert twins.opt.last_step.copied_nbytes == 0
        twins.assert_same()


@pytest.mark.filterwarnings("ignore:Using backward")  # torch says it once in a process
def test_a_gradient_that_requires_grad_is_copied_in(comm):
    with branch_twins(comm, lambda step, rank: [0]) as twins:
        for opt in twins.both:
            opt.zero_grad()
        twins.loss(twins.ours, 0, comm.rank).backward(create_graph=True)
        assert twins.ours.weights[0].grad.requires_grad
        twins.whole.weights[0].grad = (
            sum(
                torch.autograd.grad(twins.loss(twins.whole, 0, rank), twins.whole.weights[0])[0]
                for rank in range(comm.size)
            )
            / comm.size
        )
        for opt in twins.both:
            opt.step()
        assert_in_step(twins)
        twins.opt.zero_grad()
        assert not twins.ours.weights[0].grad.requires_grad
        assert not twins.ours.weights[0].grad.any()


def test_backward_hooks_of_users_still_run(comm):
    seen = []
    with Twins(comm) as twins:
        weight = twins.ours[0].weight
        weight.register_hook(lambda grad: seen.append("grad") or grad)
        weight.register_post_accumulate_grad_hook(lambda param: seen.append("accumulated"))
        twins.step()
        assert seen == ["grad", "accumulated"]
        twins.assert_same()


def test_grads_none_stay_none_in_torchs_sense(comm):
    unused = Parameter(torch.ones(3))
    with Twins(comm, params=lambda model: [*model.parameters(), unused]) as twins:
        for _ in range(3):
            twins.step()
            twins.opt.zero_grad(set_to_none=False)
        state = twins.opt.state_dict()["state"]
        assert [entry["step"] for entry in state.values()] == [3] * 6 + [0]
        assert torch.equal(unused, torch.ones(3))
