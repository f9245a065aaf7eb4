"""All kinds of parameters: what torch.optim.NAdam trains is trained, the rest refused by name."""

import pytest

pytest.importorskip("torch")

import torch
from torch.nn import Parameter

from shardopt.errors import PartitionError, RankMismatchError
from shardopt.torch import NAdam
from tests.support.errors import BOTH_WAYS, POLICY, errs, is_last, refused
from tests.support.torch_models import Twins, make_model, params_of, raised_everywhere

pytestmark = pytest.mark.mpi


class Zoo(torch.nn.Module):
    """One parameter of each kind."""

    def __init__(self):
        super().__init__()
        values = torch.linspace(-1, 1, 12)
        self.matrix = Parameter(values.reshape(3, 4))
        self.scalar = Parameter(torch.tensor(0.5))
        self.empty = Parameter(torch.zeros(0, 3))
        self.transposed = Parameter(values.reshape(3, 4).clone().t())
        self.single = Parameter(values.float())
        self.complex = Parameter(torch.complex(values, values.flip(0)).reshape(2, 6))
        self.complex_single = Parameter(torch.complex(values.float(), -values.float()))
        self.complex_scalar = Parameter(torch.tensor(1 - 2j))
        self.complex_empty = Parameter(torch.zeros(2, 0, dtype=torch.complex128))
        self.frozen = Parameter(torch.ones(3), requires_grad=False)
        self.large = Parameter(torch.linspace(0, 1, 10_007))


def zoo_loss(model, step, rank):
    factor = 1 + 0.1 * step + 0.01 * rank
    terms = [
        ((param * factor).abs().square() + param.abs() * 0.1).sum().double()
        for param in model.parameters()
    ]
    return sum(terms)


def zoo_groups(model):
    names = {
        0: ["matrix", "complex", "empty"],
        1: ["single", "scalar", "complex_empty", "frozen"],
        2: ["complex_single", "transposed", "complex_scalar", "large"],
    }
    settings = [{"lr": 0.1}, {"weight_decay": 0.1}, {"maximize": True, "betas": (0.5, 0.75)}]
    return [
        {"params": [getattr(model, name) for name in names[index]], **settings[index]}
        for index in names
    ]


@pytest.mark.parametrize("params", [zoo_groups, lambda model: model.named_parameters()])
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True}])
def test_kinds_dtypes_and_groups_at_once(comm, params, decay):
    with Twins(comm, Zoo, params, zoo_loss, **decay) as twins:
        for _ in range(5):
            twins.step()
            assert twins.opt.last_step.copied_nbytes == 0
        for ours, theirs in zip(*map(params_of, twins.both), strict=True):
            single = ours.dtype in (torch.float32, torch.complex64)
            tolerances = {"rtol": 1e-5, "atol": 1e-6} if single else {"rtol": 1e-11, "atol": 1e-13}
            torch.testing.assert_close(ours, theirs, **tolerances)
        assert twins.opt.last_step.num_updated == 10
        assert not twins.ours.frozen.requires_grad
        assert twins.ours.frozen.tolist() == [1, 1, 1]


def test_tied_weights_are_one_parameter(comm):
    def model():
        model = make_model()
        model.add_module("tied", torch.nn.Linear(6, 3, bias=False))
        model.tied.weight = model[3].weight
        return model

    def loss(model, step, rank):
        hidden = torch.linspace(-1, 1, 6) * (1 + step + rank)
        return (model.tied(hidden) * model[3](hidden)).sum()

    with Twins(comm, model, loss=loss, lr=0.1) as twins:
        assert len(params_of(twins.opt)) == 6
        for _ in range(3):
            twins.step()
        twins.assert_same()
        assert twins.ours.tied.weight is twins.ours[3].weight


def test_plain_tensors_and_subclasses_of_parameter(comm):
    class Special(Parameter):
        pass

    def model():
        return [
            torch.ones(3, requires_grad=True),
            Special(torch.full((2, 2), 2.0)),
            Parameter(torch.ones(1).expand(4)),
        ]

    def loss(model, step, rank):
        return sum((param * (1 + rank)).square().sum() for param in model)

    with Twins(comm, model, params=list, loss=loss, lr=0.1) as twins:
        twins.whole[2].data = torch.ones(4)  # torch cannot write into elements that are one
        for _ in range(3):
            twins.step()
        twins.assert_same()
        assert type(twins.ours[1]) is Special


def test_sparse_gradients_are_summed_up_densely(comm):
    def model(sparse=True):
        torch.manual_seed(0)
        return torch.nn.EmbeddingBag(10, 3, sparse=sparse, mode="sum")

    def loss(model, step, rank):
        return model(torch.tensor([[step, rank, 9]])).square().sum()

    with Twins(comm, model, loss=loss, lr=0.1) as twins:
        twins.whole.sparse = False
        for _ in range(3):
            twins.step()
            assert twins.opt.last_step.copied_nbytes == 0
        twins.assert_same()
        assert twins.ours.weight.grad.layout is torch.strided


@BOTH_WAYS
def test_a_sparse_gradient_of_its_own_is_refused(comm, alone):
    model = torch.nn.Embedding(4, 2, sparse=errs(comm, alone))
    with NAdam(model.parameters(), comm=comm, policy=POLICY) as opt:
        model.weight.grad = None
        model(torch.tensor([1])).sum().backward()
        told = "grad of parameter 'weight' must be dense; got layout torch.sparse_coo. Call"
        with refused(comm, PartitionError, told, "sparse=False", alone=alone):
            opt.step()
        opt.zero_grad()
        model(torch.tensor([1])).sum().backward()
        opt.step()
        assert opt.last_step.num_updated == 1


@pytest.mark.mpi(min_size=2)
def test_a_sparse_gradient_is_refused_where_edits_of_dense_ones_were_looked_for(comm):
    model = torch.nn.Embedding(4, 2, sparse=True)
    with NAdam(model.parameters(), comm=comm, policy=POLICY) as opt:
        model(torch.tensor([1])).sum().backward()
        model.weight.grad.mul_(1.0)
        opt.step()
        model.weight.grad = None
        model(torch.tensor([1])).sum().backward()
        with refused(comm, PartitionError, "grad of parameter 'weight' must be dense"):
            opt.step()


def retained():
    tensor = torch.ones(3, requires_grad=True) * 2
    tensor.retain_grad()
    return tensor


def in_inference_mode():
    with torch.inference_mode():
        return torch.ones(3)


def overlapping():
    base = torch.arange(6.0)
    return [Parameter(base[:4]), Parameter(base[3:])]


def with_grad_dtype():
    param = Parameter(torch.ones(3))
    param.grad_dtype = torch.float32
    return param


REFUSED = {
    "meta": (
        lambda: torch.ones(3, device="meta"),
        PartitionError,
        "on the CPU or a CUDA GPU; got device meta",
    ),
    "int": (
        lambda: torch.arange(3),
        PartitionError,
        "floating point or complex, 16 to 128 bits; got dtype",
    ),
    "bool": (
        lambda: torch.ones(3, dtype=bool),
        PartitionError,
        "16 to 128 bits; got dtype torch.bool",
    ),
    "float8": (
        lambda: torch.ones(3).to(torch.float8_e5m2),
        PartitionError,
        "bits; got dtype torch.float8_e5m2",
    ),
    "sparse": (lambda: torch.ones(3).to_sparse(), PartitionError, "must be dense; got layout"),
    "retained": (retained, PartitionError, "parameter 'param0' must be a leaf; got a result of"),
    "grad_dtype": (with_grad_dtype, PartitionError, "without a grad_dtype of its own; got"),
    "lazy": (lambda: torch.nn.LazyLinear(3).weight, PartitionError, "must be initialised; got a"),
    "non-leaf": (lambda: torch.ones(3, requires_grad=True) * 2, ValueError, "non-leaf Tensor"),
    "number": (lambda: 3.0, TypeError, "can only optimize Tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
@BOTH_WAYS
def test_what_cannot_be_trained_is_refused_on_all_ranks(comm, case, alone):
    make, error, text = REFUSED[case]
    params = [make() if errs(comm, alone) else Parameter(torch.ones(3)), Parameter(torch.ones(2))]

    def make_opt():
        return NAdam(params, comm=comm, policy=POLICY)

    if error is PartitionError:
        with refused(comm, error, text, alone=alone):
            make_opt()
    else:
        raised_everywhere(comm, error, text, make_opt)
    assert params[1].grad is None
    assert not params[1]._post_accumulate_grad_hooks
    with NAdam(params[1:], comm=comm, policy=POLICY) as opt:
        params[1].sum().backward()
        opt.step()
        assert opt.last_step.num_updated == 1


SEVERAL = {
    "no params": (list, ValueError, "empty parameter list"),
    "a tensor": (lambda: torch.ones(3), TypeError, "iterable of Tensors or dicts"),
    "overlapping": (
        overlapping,
        PartitionError,
        "must not share memory; got 'param0' and 'param1'",
    ),
    "twice": (
        lambda: [{"params": [p]} for p in [Parameter(torch.ones(3))] * 2],
        ValueError,
        "more",
    ),
    "same name": (
        lambda: [("w", Parameter(torch.ones(3))), ("w", Parameter(torch.ones(2)))],
        PartitionError,
        "names must be unique; got 'w' for parameters 0 and 1",
    ),
    "generator": (lambda: (1 / 0 for _ in range(3)), ZeroDivisionError, "division"),
}


@pytest.mark.parametrize("case", SEVERAL)
@BOTH_WAYS
def test_parameters_that_do_not_go_together_are_refused(comm, case, alone):
    make, error, text = SEVERAL[case]
    params = make() if errs(comm, alone) else [Parameter(torch.ones(3))]
    raised_everywhere(comm, error, text, lambda: NAdam(params, comm=comm, policy=POLICY))


@BOTH_WAYS
def test_a_parameter_listed_twice_in_a_group_is_refused(comm, alone):
    param = Parameter(torch.ones(3))
    params = [param] * 2 if errs(comm, alone) else [param]
    raised_everywhere(
        comm, UserWarning, "duplicate", lambda: NAdam(params, comm=comm, policy=POLICY)
    )


@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
@BOTH_WAYS
def test_a_parameter_listed_twice_in_a_group_is_no_mere_warning(comm, alone):
    param = Parameter(torch.ones(3))
    params = [param] * 2 if errs(comm, alone) else [param]
    told = "each parameter must be listed once; got 'param0' again as 'param1'"
    with refused(comm, PartitionError, told, alone=alone):
        NAdam(params, comm=comm, policy=POLICY)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("what", ["shape", "dtype", "name", "number of parameters"])
def test_different_models_are_refused(comm, what):
    param = Parameter(torch.ones(3))
    odd = {
        "shape": [("w", Parameter(torch.ones(4)))],
        "dtype": [("w", param.detach().float())],
        "name": [("v", param)],
        "number of parameters": [("w", param), ("v", Parameter(torch.ones(3)))],
    }
    params = odd[what] if is_last(comm) else [("w", param)]
    with refused(comm, RankMismatchError, f"the {what}", "must be the same on every rank"):
        NAdam(params, comm=comm, policy=POLICY)


def test_rank_0_decides_the_initial_values(comm):
    model = make_model(seed=comm.rank)
    with NAdam(model.parameters(), comm=comm, policy=POLICY):
        for ours, first in zip(model.parameters(), make_model(0).parameters(), strict=True):
            assert torch.equal(ours, first)
    for ours, first in zip(model.parameters(), make_model(0).parameters(), strict=True):
        assert torch.equal(ours, first)
