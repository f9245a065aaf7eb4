"""Other ways in which torch and its users replace parameters and gradients between steps."""

import pytest

pytest.importorskip("torch")

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from shardopt.errors import NoGradientWarning, PartitionError
from shardopt.torch import NAdam
from tests.support.errors import BOTH_WAYS, POLICY, errs, refused, warned
from tests.support.torch_models import Twins, everything, loss_of, make_model, params_of

pytestmark = pytest.mark.mpi


def assert_bound(opt, own):
    """The step has brought what was replaced back: parameters are where they were at first."""
    assert opt.comm.allreduce(opt.last_step.copied_nbytes) > 0
    assert [param.data_ptr() for param in params_of(opt)] == own


# -- values ----------------------------------------------------------------------------------------


def conv_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2)
        )


def conv_loss(model, step, rank):
    inputs = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4) * (1 + step + rank)
    return model(inputs).square().mean()


def set_data(model):
    for param in model.parameters():
        param.data = param.data.clone() * 0.5


def set_transposed(model):
    for param in model.parameters():
        if param.ndim == 2:
            param.data = param.data.t().clone().t()


def through_vector(model):
    vector_to_parameters(parameters_to_vector(model.parameters()) * 0.5, model.parameters())


def swapped(model):
    """Conversion as it will be one day: other tensors under the names of the parameters."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(memory_format=torch.channels_last)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


REPLACED = {
    "p.data": set_data,
    "other strides": set_transposed,
    "vector_to_parameters": through_vector,
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "channels_last by swapping": swapped,
    "share_memory": lambda model: model.share_memory(),
    "apply": lambda model: model._apply(torch.clone),
}


@pytest.mark.parametrize("way", REPLACED)
@pytest.mark.parametrize("when", ["before", "between"])
def test_replaced_values_return_to_shared_memory(comm, way, when):
    with Twins(comm, conv_model, loss=conv_loss, lr=0.1) as twins:
        own = [param.data_ptr() for param in params_of(twins.opt)]
        twins.step()
        for opt in twins.both:
            opt.zero_grad()
        if when == "between":  # gradients are there already, and may be moved as well
            twins.backward()
        for model in twins.models:
            REPLACED[way](model)
        if when == "before":
            twins.backward()
        for opt in twins.both:
            opt.step()
        twins.assert_same()
        assert_bound(twins.opt, own)
        for _ in range(2):
            twins.step()
            twins.assert_same()
        assert twins.opt.last_step.copied_nbytes == 0


def load_in_place(model):
    model.load_state_dict({key: value * 0.5 for key, value in conv_model().state_dict().items()})


def init_in_place(model):
    torch.manual_seed(5)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.1)


@pytest.mark.parametrize("write", [load_in_place, init_in_place])
def test_values_written_in_place_are_used(comm, write):
    with Twins(comm, conv_model, loss=conv_loss, lr=0.1) as twins:
        twins.step()
        for model in twins.models:
            write(model)
        twins.step()
        twins.assert_same()
        assert comm.allreduce(twins.opt.last_step.copied_nbytes) > 0  # of its shards, by each owner
        twins.step()
        twins.assert_same()
        assert twins.opt.last_step.copied_nbytes == 0


def test_tensors_may_be_exchanged_for_a_while(comm):
    """As for an evaluation with averaged weights, at which ranks need not keep step."""
    with Twins(comm, lr=0.1) as twins:
        twins.step()
        before = [param.detach().clone() for param in params_of(twins.opt)]
        own = [param.data for param in params_of(twins.opt)]
        for param in params_of(twins.opt):
            param.data = torch.zeros_like(param)
        assert not any(param.any() for param in params_of(twins.opt))
        for param, data in zip(params_of(twins.opt), own, strict=True):
            param.data = data
        assert all(map(torch.equal, params_of(twins.opt), before))
        twins.step()
        twins.assert_same()
        assert twins.opt.last_step.copied_nbytes == 0


def test_gradients_bound_in_inference_mode_can_be_accumulated_into(comm):
    with Twins(comm, lr=0.1) as twins:
        with torch.inference_mode():
            for opt in twins.both:
                for param in params_of(opt):
                    param.grad = None
                opt.zero_grad()
        twins.backward()
        for opt in twins.both:
            opt.step()
        twins.assert_same()


@pytest.mark.filterwarnings("ignore::shardopt.errors.NoGradientWarning")
@pytest.mark.mpi(min_size=2)
def test_the_lowest_rank_that_replaced_a_value_decides(comm):
    with Twins(comm, lr=0.1) as twins:
        if comm.rank > 0:
            twins.ours[0].bias.data = torch.full((7,), float(comm.rank))
        twins.whole[0].bias.data.fill_(1.0)
        for opt in twins.both:
            opt.step()  # no gradients
        twins.assert_same()


@pytest.mark.parametrize(("method", "dtype"), [("float", "float32"), ("half", "float16")])
@BOTH_WAYS
def test_another_dtype_is_refused_until_it_is_converted_back(comm, method, dtype, alone):
    with Twins(comm, params=lambda model: model.named_parameters(), lr=0.1) as twins:
        twins.step()
        before = everything(twins.opt)
        values = [param.detach().clone() for param in params_of(twins.opt)]
        twins.opt.zero_grad()
        loss_of(twins.ours, 1, comm.rank).backward()  # gradients are converted with the model
        if errs(comm, alone):
            getattr(twins.ours, method)()
        told = f"data of parameter '0.weight' must keep dtype float64; got {dtype}. Convert it back"
        with refused(comm, PartitionError, told, alone=alone):
            twins.opt.step()
        twins.ours.double()
        for param, value in zip(params_of(twins.opt), values, strict=True):
            param.data = value.clone()  # what the conversion has rounded
        assert everything(twins.opt) == before
        for _ in range(2):
            twins.step()
            twins.assert_same()


def test_a_value_whose_elements_are_one_is_spread_out(comm):
    with Twins(comm, lr=0.1) as twins:
        twins.ours[0].bias.data = torch.ones(1).expand(7)
        twins.whole[0].bias.data = torch.ones(7)
        for _ in range(2):
            twins.step()
            twins.assert_same()


def test_assigned_state_dicts_leave_the_optimizer_behind_as_in_torch(comm):
    with Twins(comm, lr=0.1) as twins:
        values = make_model(seed=1).state_dict()
        for model in twins.models:
            model.load_state_dict(
                {key: value.clone() for key, value in values.items()}, assign=True
            )
        with warned(comm, NoGradientWarning, match=r"load_state_dict\(assign=True\)"):
            twins.step()
        assert twins.opt.last_step.num_updated == 0
        for name, param in twins.ours.named_parameters():
            assert torch.equal(param, values[name])
        twins.assert_same()  # the parameters of old


# -- gradients -------------------------------------------------------------------------------------


def complex_twins(comm):
    def model():
        return torch.nn.ParameterList([torch.tensor([[1 + 2j, 3j, 4], [5, 6, 7 - 1j]])])

    return Twins(comm, model, loss=lambda model, step, rank: None, lr=0.1)


GRADS = {
    "strides": lambda: torch.arange(6.0).reshape(3, 2).t() * (1 + 1j),
    "expanded": lambda: (torch.arange(3.0) + 1j).expand(2, 3),
    "conjugated": lambda: (torch.arange(6.0).reshape(2, 3) * 2j + 1).conj(),
    "part of more": lambda: (torch.arange(24.0).reshape(4, 6) * 1j)[1:3, ::2],
}


@pytest.mark.parametrize("case", GRADS)
def test_assigned_gradients_are_copied_in(comm, case):
    with complex_twins(comm) as twins:
        for _ in range(2):
            for opt in twins.both:
                opt.zero_grad()
            grad = GRADS[case]()
            twins.ours[0].grad = grad
            twins.whole[0].grad = grad.resolve_conj()
            for opt in twins.both:
                opt.step()
            assert twins.opt.last_step.copied_nbytes == 96
            twins.assert_same()
        assert twins.ours[0].grad.is_contiguous()
        assert not twins.ours[0].grad.is_conj()


@pytest.mark.parametrize("what", ["data", "grad"])
def test_a_conjugated_view_of_shared_memory_is_not_mistaken_for_it(comm, what):
    with complex_twins(comm) as twins:
        for model in twins.models:
            model[0].grad = torch.full((2, 3), 1 + 2j)
        for opt in twins.both:
            opt.step()  # binds the gradient
        ours, whole = twins.ours[0], twins.whole[0]
        comm.Barrier()
        setattr(ours, what, getattr(ours, what).conj())
        setattr(whole, what, getattr(whole, what).conj().resolve_conj())
        for opt in twins.both:
            opt.step()
        twins.assert_same()


def test_a_negated_view_of_shared_memory_is_not_mistaken_for_it(comm):
    with Twins(comm, lr=0.1) as twins:
        twins.step()
        for opt in twins.both:
            opt.zero_grad()
        twins.backward()
        for param in (*twins.ours.parameters(), *twins.whole.parameters()):
            param.grad = torch._neg_view(param.grad)
        for opt in twins.both:
            opt.step()
        twins.assert_same()


def test_gradients_may_be_exchanged(comm):
    with Twins(comm, twins_of_one_shape, loss=sum_of_squares, lr=0.1) as twins:
        twins.backward()
        for model in twins.models:
            model[0].grad, model[1].grad = model[1].grad, model[0].grad
        for opt in twins.both:
            opt.step()
        twins.assert_same()


def twins_of_one_shape():
    return torch.nn.ParameterList([torch.ones(5), torch.arange(5.0)])


def sum_of_squares(model, step, rank):
    return sum((param * (1 + index + rank)).square().sum() for index, param in enumerate(model))


def test_gradients_set_aside_and_put_back(comm):
    with Twins(comm, lr=0.1) as twins:
        for opt in twins.both:
            opt.zero_grad()
        twins.backward()
        aside = [[param.grad.clone() for param in model.parameters()] for model in twins.models]
        for opt in twins.both:
            opt.zero_grad()
        twins.backward()
        for model, grads in zip(twins.models, aside, strict=True):
            for param, grad in zip(model.parameters(), grads, strict=True):
                param.grad = param.grad - 0.5 * grad
        for opt in twins.both:
            opt.step()
        twins.assert_same()


@BOTH_WAYS
def test_a_sparse_gradient_is_refused(comm, alone):
    with Twins(comm, params=lambda model: model.named_parameters(), lr=0.1) as twins:
        twins.step()
        before = everything(twins.opt)
        if errs(comm, alone):
            twins.ours[0].weight.grad = torch.ones(7, 5).to_sparse()
        told = "grad of parameter '0.weight' must be dense; got layout torch.sparse_coo"
        with refused(comm, PartitionError, told, alone=alone):
            twins.opt.step()
        assert everything(twins.opt) == before
        twins.step()
        twins.assert_same()


@BOTH_WAYS
def test_a_sparse_gradient_is_refused_from_the_start(comm, alone):
    model = make_model()
    if errs(comm, alone):
        model[2].weight.grad = torch.ones(6, 7).to_sparse()
    with refused(comm, PartitionError, "grad of parameter '2.weight' must be dense", alone=alone):
        NAdam(model.parameters(), comm=comm, policy=POLICY)
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


@BOTH_WAYS
@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_a_gradient_changed_under_torchs_eyes_is_refused(comm, alone, change):
    with Twins(comm, params=lambda model: model.named_parameters(), lr=0.1) as twins:
        twins.step()
        if errs(comm, alone):
            grad = twins.ours[0].weight.grad
            grad.data = torch.ones(5, 7) if change == "shape" else grad.data.float()
        told = f"grad of parameter '0.weight' must keep {change}"
        with refused(comm, PartitionError, told, alone=alone):
            twins.opt.step()
        twins.step()
        twins.assert_same()


# -- models that compute their weights -------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model(comm, backend):
    torch._dynamo.reset()
    with Twins(comm, lr=0.1) as twins:
        compiled = torch.compile(twins.ours, backend=backend)
        twins.loss = lambda model, step, rank: loss_of(
            compiled if model is twins.ours else model, step, rank
        )
        for _ in range(3):
            twins.step()
            assert twins.opt.last_step.copied_nbytes == 0
        twins.assert_same()


def test_weight_norm(comm):
    def model():
        model = make_model()
        torch.nn.utils.parametrizations.weight_norm(model[0])
        return model

    with Twins(comm, model, lr=0.1) as twins:
        assert len(params_of(twins.opt)) == 7
        for _ in range(3):
            twins.step()
        twins.assert_same()


def test_an_averaged_model(comm):
    with Twins(comm, lr=0.1) as twins:
        averages = [torch.optim.swa_utils.AveragedModel(model) for model in twins.models]
        for _ in range(3):
            twins.step()
            for average, model in zip(averages, twins.models, strict=True):
                average.update_parameters(model)
        for ours, theirs in zip(*(average.parameters() for average in averages), strict=True):
            torch.testing.assert_close(ours, theirs)
        twins.assert_same()
