"""lucid's models train under mpirun as they do with lucid's own optimizer in one process."""

import inspect
import types

import numpy as np
import pytest

from shardopt.errors import CallOrderError, HyperparamsError, PartitionError, RankMismatchError
from shardopt.policy import ShardPolicy
from tests.core.test_golden import LUCID, assert_lucids_numbers, assert_torchs_numbers, ulps
from tests.support.errors import BOTH_WAYS, POLICY, errs, refused
from tests.support.frameworks import require
from tests.support.oracle import Oracle

lucid = require("lucid")

from lucid import nn, optim  # noqa: E402
from lucid.optim import lr_scheduler  # noqa: E402

import shardopt.lucid  # noqa: E402
from shardopt.lucid import NAdam  # noqa: E402

# nn.Linear and others cast memory that they have not written yet.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in cast:RuntimeWarning")

BATCH = 12  # divides among 1 to 4 ranks
FRONT_END = types.SimpleNamespace(Parameter=nn.Parameter, NAdam=NAdam)


class Net(nn.Module):
    """Two layers and a parameter that is never used.

    No biases: lucid sums the gradient of a vector that was broadcast in the wrong order, so that it
    depends on the batch's size.
    """

    def __init__(self, seed=0):
        super().__init__()
        self.hidden, self.out = nn.Linear(5, 7, bias=False), nn.Linear(7, 2, bias=False)
        self.scale = nn.Parameter(np.ones(1, np.float32))
        self.unused = nn.Parameter(np.ones(4, np.float32))
        rng = np.random.default_rng(seed)
        for param in self.parameters():
            param.data = rng.standard_normal(param.shape).astype(param.data.dtype)

    def forward(self, x):
        return self.out(nn.functional.relu(self.hidden(x))) * self.scale


def batch(step, rows=slice(None), dtype="float32"):
    """Input and target of a step, equal on all ranks; each takes its rows."""
    rng = np.random.default_rng(step)
    x, y = rng.standard_normal((BATCH, 5)), rng.standard_normal((BATCH, 2))
    return lucid.Tensor(x[rows].astype(dtype)), lucid.Tensor(y[rows].astype(dtype))


def train(model, opt, steps, rows=slice(None), scheduler=None):
    for step in steps:
        x, y = batch(step, rows)
        opt.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        opt.step()
        if scheduler is not None:
            scheduler.step()


def split(comm):
    return slice(comm.rank * BATCH // comm.size, (comm.rank + 1) * BATCH // comm.size)


def values(model):
    return [np.array(param.data) for param in model.parameters()]


def assert_close(actual, expected, max_ulps):
    for ours, theirs in zip(actual, expected, strict=True):
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype
        assert ulps(ours, theirs, np.float32) <= max_ulps


def assert_near(comm, actual, expected):
    """Several ranks add the gradients of a batch up in another order."""
    assert_close(actual, expected, 1 if comm.size == 1 else 16)


# -- in the place of lucid.optim.NAdam -------------------------------------------------------------


def test_arguments_stand_in_lucids_order():
    ours, theirs = (
        [(p.name, p.default) for p in inspect.signature(cls).parameters.values() if p.kind == 1]
        for cls in (NAdam, optim.NAdam)
    )
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("case", LUCID)
def test_lucids_golden_numbers(case):
    assert_lucids_numbers(case, face=FRONT_END)


@pytest.mark.parametrize("case", ["default.f32", "l2.f64d", "none_grads.f32"])
def test_torchs_golden_numbers(case):
    assert_torchs_numbers(case, face=FRONT_END)


def follow_the_page(optim, rows):
    """Run the example of lucid's page on NAdam, with data and a loss; ``optim`` is the import."""

    class Scaling(nn.Module):
        def __init__(self):
            super().__init__()
            self.factors = nn.Parameter([1.0, 2.0, 3.0])

        def forward(self, x):
            return x * self.factors

    model = Scaling()
    optimizer = optim.NAdam(
        model.parameters(),
        lr=0.001,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.01,
        momentum_decay=0.004,
    )
    rng = np.random.default_rng(0)
    for x, y in rng.standard_normal((20, 2, BATCH, 3)):
        optimizer.zero_grad()
        loss = ((model(lucid.Tensor(x[rows])) - lucid.Tensor(y[rows])) ** 2).mean()
        loss.backward()
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    return model.factors.data


@pytest.mark.mpi
def test_the_example_of_the_page_runs_with_another_import(comm):
    start = np.array([1.0, 2.0, 3.0])
    ours, theirs = follow_the_page(shardopt.lucid, split(comm)), follow_the_page(optim, slice(None))
    assert comm.allgather(ours.tolist()) == [ours.tolist()] * comm.size
    # The step of NAdam, and lucid's, which is shorter, in the same direction.
    assert (np.sign(ours - start) == np.sign(theirs - start)).all()
    assert (abs(ours - start) > 0.01).all()
    assert (abs(ours - start) < 0.03).all()


@pytest.mark.mpi
def test_training_gives_what_lucid_gives_in_one_process(comm):
    model, reference = Net(), Net()
    with NAdam(model.parameters(), lr=0.01, weight_decay=0.1, variant="lucid", comm=comm) as opt:
        assert isinstance(opt, optim.Optimizer)
        theirs = optim.NAdam(reference.parameters(), lr=0.01, weight_decay=0.1)
        schedulers = [lr_scheduler.StepLR(each, step_size=5, gamma=0.5) for each in (opt, theirs)]
        for step in range(20):
            train(model, opt, [step], split(comm), schedulers[0])
            train(reference, theirs, [step], scheduler=schedulers[1])
            assert_near(comm, values(model), values(reference))
        assert opt.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] < 0.01
        np.testing.assert_array_equal(model.unused.data, Net().unused.data)  # nor decayed
    assert_near(comm, values(model), values(reference))
    theirs = optim.NAdam(model.parameters())  # in memory of their own
    train(model, theirs, [20])


def lambda_lr(opt):
    return lr_scheduler.LambdaLR(lambda epoch: 0.9**epoch, opt)


SCHEDULERS = {
    "LambdaLR": lambda_lr,
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3]),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 5),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 1e-3, 1e-2, 2),
    "NoamScheduler": lambda opt: lr_scheduler.NoamScheduler(opt, 16, 3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    model, reference = Net(), Net()
    with NAdam(model.parameters(), lr=0.01, variant="lucid") as opt:
        theirs = optim.NAdam(reference.parameters(), lr=0.01)
        train(model, opt, range(6), scheduler=SCHEDULERS[name](opt))
        train(reference, theirs, range(6), scheduler=SCHEDULERS[name](theirs))
        assert opt.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] != 0.01
        assert_close(values(model), values(reference), 1)


def test_reduce_lr_on_plateau():
    model = Net()
    with NAdam(model.parameters(), lr=0.01) as opt:
        scheduler = lr_scheduler.ReduceLROnPlateau(opt, "min", patience=1)
        for _ in range(4):
            scheduler.step(1.0)
        assert opt.param_groups[0]["lr"] == pytest.approx(0.001)
        train(model, opt, range(1))


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.mpi
def test_lucid_takes_the_state_over(comm):
    model, reference = Net(), Net()
    with NAdam(model.parameters(), lr=0.01, variant="lucid", comm=comm) as opt:
        train(model, opt, range(4), split(comm))
        saved = comm.bcast(opt.gather_state_dict())
        weights = {name: value.copy() for name, value in model.state_dict().items()}
        train(model, opt, range(4, 8), split(comm))
        reference.load_state_dict(weights)
        theirs = optim.NAdam(reference.parameters())
        theirs.load_state_dict(saved)
        for index, param in enumerate(reference.parameters()):
            for key in ("exp_avg", "exp_avg_sq", "step"):
                np.testing.assert_array_equal(theirs.state[param][key], saved["state"][index][key])
        assert theirs.param_groups[0]["lr"] == 0.01
        train(reference, theirs, range(4, 8))
        assert_near(comm, values(model), values(reference))


@pytest.mark.mpi
@pytest.mark.parametrize("where", ["everywhere", "on rank 0"])
def test_lucids_state_is_taken_over(comm, where):
    reference = Net()
    theirs = optim.NAdam(reference.parameters(), lr=0.01, weight_decay=0.1)
    train(reference, theirs, range(4))
    model = Net()
    model.load_state_dict(reference.state_dict())
    with NAdam(model.parameters(), variant="lucid", max_grad_norm=1e9, comm=comm) as opt:
        saved = theirs.state_dict()
        opt.load_state_dict(saved if where == "everywhere" or comm.rank == 0 else None)
        group, state = opt.param_groups[0], opt.gather_state_dict()
        assert (group["lr"], group["weight_decay"], group["variant"]) == (0.01, 0.1, "lucid")
        if comm.rank == 0:
            for index, entry in saved["state"].items():
                for key, value in entry.items():
                    np.testing.assert_array_equal(state["state"][index][key], value)
        train(model, opt, range(4, 8), split(comm))
        train(reference, theirs, range(4, 8))
        assert_near(comm, values(model), values(reference))


@pytest.mark.mpi
def test_parameters_that_never_stepped_have_no_entry_in_lucids_state(comm):
    reference, model = Net(), Net()
    theirs = optim.NAdam(reference.parameters())
    train(reference, theirs, range(2))
    saved = theirs.state_dict()
    unused = [param is reference.unused for param in reference.parameters()].index(True)
    assert unused not in saved["state"]
    with NAdam(model.parameters(), comm=comm) as opt:
        model.unused.grad = np.ones(4, np.float32)
        opt.step()
        opt.load_state_dict(saved)
        entry = opt.state_dict()["state"][unused]
        assert (entry["step"], entry["mu_product"]) == (0.0, 1.0)
        assert not entry["exp_avg"].any()


@pytest.mark.mpi
@pytest.mark.parametrize("variant", ["torch", "keras", "optax", "lucid"])
def test_mu_product_is_rebuilt_from_the_step(comm, variant):
    model, settings = Net(), {"betas": (0.8, 0.99), "momentum_decay": 0.1}
    with NAdam(model.parameters(), **settings, variant=variant, comm=comm) as opt:
        train(model, opt, range(7), split(comm))
        whole = comm.bcast(opt.gather_state_dict())
        products = [entry.pop("mu_product") for entry in whole["state"].values()]
        opt.load_state_dict(whole)
        state = opt.state_dict()["state"]
        assert [entry["mu_product"] for entry in state.values()] == products


@pytest.mark.mpi
def test_the_state_has_lucids_entries(comm):
    reference, model = Net(), Net()
    theirs = optim.NAdam(reference.parameters(), lr=0.01)
    train(reference, theirs, range(3))
    with NAdam(model.parameters(), lr=0.01, variant="lucid", comm=comm) as opt:
        train(model, opt, range(3), split(comm))
        for ours, param in zip(model.parameters(), reference.parameters(), strict=True):
            entry, expected = opt.state[ours], theirs.state.get(param)
            if not expected:
                assert entry["step"] == 0
                continue
            assert entry["step"] == expected["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                np.testing.assert_allclose(entry[key], expected[key], rtol=1e-4, atol=1e-7)
        opt.reset_state()
        train(model, opt, range(3, 4), split(comm))
        assert {int(entry["step"]) for entry in opt.state.values()} == {0, 1}


def test_a_long_trained_state_is_read_at_once():
    reference, model = Net(), Net()
    theirs = optim.NAdam(reference.parameters())
    train(reference, theirs, range(1))
    saved = theirs.state_dict()
    for entry in saved["state"].values():
        entry["step"] = 10**12
    with NAdam(model.parameters()) as opt:
        opt.load_state_dict(saved)
        assert opt.state_dict()["state"][0]["mu_product"] < 1e-300


# -- gradients -------------------------------------------------------------------------------------


def pair():
    return [nn.Parameter(np.array(start, np.float32)) for start in ([[1, 2, 3], [4, 5, 6]], 0.5)]


def give_grads(rank, how):
    """Gradients as lucid leaves them behind; two arrays that hold the same numbers."""
    grads = [
        np.arange(6, dtype=np.float32).reshape(2, 3) * 0.1 - rank,
        np.array(0.25 + rank, np.float32),
    ]
    if how == "Fortran order":
        given = [np.asfortranarray(grads[0]), grads[1]]
    elif how == "float64":
        given = [grad.astype(np.float64) for grad in grads]
    elif how == "scalar":
        given = [grads[0], grads[1][()]]
        assert isinstance(given[1], np.float32)
    elif how == "float64 scalar":
        given = [grads[0], np.float64(grads[1])]
    else:
        given = [np.broadcast_to(np.float32(0.5 + rank), (2, 3)), grads[1]]
        grads[0] = np.array(given[0])
        assert not given[0].flags.writeable
    return given, grads


HOWS = ["Fortran order", "float64", "scalar", "float64 scalar", "read-only"]


@pytest.mark.mpi
@pytest.mark.parametrize("how", HOWS)
def test_gradients_of_any_form(comm, how):
    params = pair()
    oracle = Oracle([param.data for param in params])
    with NAdam(params, comm=comm) as opt:
        for _ in range(2):
            opt.zero_grad()
            for param, grad in zip(params, give_grads(comm.rank, how)[0], strict=True):
                param.grad = grad
            opt.step()
            oracle.step([give_grads(rank, how)[1] for rank in range(comm.size)])
        for param, expected in zip(params, oracle.params, strict=True):
            np.testing.assert_array_equal(param.data, expected)


@pytest.mark.mpi
def test_two_parameters_with_one_gradient(comm):
    a, b = (nn.Parameter(np.array([1.0, 2.0], np.float32)) for _ in range(2))
    oracle = Oracle([a.data, b.data])
    with NAdam([a, b], comm=comm) as opt:
        for _ in range(3):
            opt.zero_grad()
            (a + b).sum().backward()
            assert a.grad is b.grad
            opt.step()
            oracle.step([[np.ones(2, np.float32)] * 2] * comm.size)
        np.testing.assert_array_equal(a.data, oracle.params[0])
        np.testing.assert_array_equal(b.data, oracle.params[1])


@pytest.mark.mpi
def test_gradients_of_zero_are_added_to_in_place(comm):
    model = Net()
    with NAdam(model.parameters(), comm=comm) as opt:
        train(model, opt, range(1))
        opt.zero_grad(set_to_none=False)
        model.unused.grad = None
        views = [param.grad for param in model.parameters()]
        for step in range(2):
            x, y = batch(step, dtype="float64")
            ((model(x) - y) ** 2).mean().backward()
        assert all(p.grad is view for p, view in zip(model.parameters(), views, strict=True))
        opt.step()
        assert opt.last_step.copied_nbytes == 0


@pytest.mark.mpi
def test_gradients_can_be_averaged_before_the_step(comm):
    weight, scale = pair()
    with NAdam([weight, scale], lr=0.1, comm=comm) as opt:
        for _ in range(2):
            before = np.array(weight.data)
            opt.zero_grad()
            weight.grad = np.full(weight.shape, float(comm.rank))  # float64
            opt.average_grads()
            assert (weight.grad == (comm.size - 1) / 2).all()
            assert scale.grad is None
            weight.grad = weight.grad + 1
            opt.step()
            assert (weight.data < before).all()
            assert opt.last_step.num_updated == 1


@pytest.mark.mpi
def test_scalars_for_values_and_gradients(comm):
    weight, scale = pair()
    scale.data = scale.data * 2
    assert isinstance(scale.data, np.float32)
    with NAdam([weight, scale], comm=comm) as opt:
        x = lucid.Tensor(np.full((2, 3), 2.0 + comm.rank))  # float64
        for set_to_none in (True, False):
            opt.zero_grad(set_to_none)
            (weight * x * scale).sum().backward()
            assert isinstance(scale.grad, np.float64 if set_to_none else np.ndarray)
            before = np.array(scale.data)
            opt.step()
            assert scale.data < before
            assert scale.data.shape == ()
        assert opt.last_step.copied_nbytes == 0


@pytest.mark.mpi
def test_gradients_in_place_are_right_where_lucid_adds_twice(comm):
    def loss(a, b):
        return ((a + b) + a).sum()  # gradients 2 and 1

    alone, other = (nn.Parameter(np.ones(2, np.float32)) for _ in range(2))
    loss(alone, other).backward()
    assert other.grad.tolist() == [2.0, 2.0]  # lucid's own; if it is 1, lucid has been mended
    a, b = (nn.Parameter(np.ones(2, np.float32)) for _ in range(2))
    with NAdam([a, b], comm=comm) as opt:
        loss(a, b).backward()
        opt.zero_grad(set_to_none=False)
        loss(a, b).backward()
        assert (a.grad.tolist(), b.grad.tolist()) == ([2.0, 2.0], [1.0, 1.0])


@pytest.mark.mpi
def test_no_gradient_before_the_first_backward(comm):
    model = Net()
    before = values(model)
    with NAdam(model.parameters(), weight_decay=0.5, comm=comm) as opt:
        assert all(param.grad is None for param in model.parameters())
        model.unused.grad = np.ones(4, np.float32)
        opt.step()
        changed = [bool((new != old).any()) for new, old in zip(values(model), before, strict=True)]
        assert changed == [param is model.unused for param in model.parameters()]
        steps = [entry["step"] for entry in opt.state_dict()["state"].values()]
        assert steps == [float(each) for each in changed]


@pytest.mark.mpi
def test_a_gradient_from_before_construction_counts(comm):
    params = pair()
    oracle = Oracle([param.data for param in params])
    given, grads = give_grads(0, "float64 scalar")
    for param, grad in zip(params, given, strict=True):
        param.grad = grad
    with NAdam(params, comm=comm) as opt:
        opt.step()
        oracle.step([grads] * comm.size)
        for param, expected in zip(params, oracle.params, strict=True):
            np.testing.assert_array_equal(param.data, expected)


@pytest.mark.mpi
def test_skipped_where_no_rank_has_a_gradient(comm):
    params = pair()
    oracle = Oracle([param.data for param in params])
    grad = np.ones((2, 3), np.float32)
    with NAdam(params, weight_decay=0.5, comm=comm) as opt:
        oracle.hyper["weight_decay"] = 0.5
        opt.zero_grad()
        if comm.rank == comm.size - 1:  # elsewhere None counts as zeros
            params[0].grad = grad
        opt.step()
        oracle.step([[None, None]] * (comm.size - 1) + [[grad, None]])
        np.testing.assert_array_equal(params[0].data, oracle.params[0])
        assert params[1].data == np.float32(0.5)
        assert [entry["step"] for entry in opt.state_dict()["state"].values()] == [1.0, 0.0]


# -- parameters ------------------------------------------------------------------------------------


def half(model):
    for param in model.parameters():
        param.data = param.data * 0.5


def minus_one(model):
    model.scale.data = model.scale.data - 1
    assert isinstance(model.scale.data, np.float32)


def load(model):
    saved = model.state_dict()
    model.load_state_dict({name: value + 1 for name, value in saved.items()})


def init(model):
    nn.init.constant(model.weight, 3.0)


def zero(model):
    model.weight.zero()


def put_a_tensor(model):  # as nn.Embedding.reset_parameters() does
    model.weight.data = lucid.Tensor(np.full((2, 3), 7, np.float32))


@pytest.mark.mpi
@pytest.mark.parametrize("change", [half, minus_one, load, init, zero, put_a_tensor])
def test_values_put_in_place_are_adopted(comm, change):
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.scale = pair()

    model, plain = Small(), Small()
    change(plain)
    if isinstance(plain.weight.data, lucid.Tensor):
        plain.weight.data = plain.weight.data.data
    start = values(plain)
    with NAdam(model.parameters(), comm=comm) as opt:
        views = [param.data for param in model.parameters()]
        change(model)
        given = [param.data for param in model.parameters()]
        replaced = [now is not view for now, view in zip(given, views, strict=True)]
        assert any(replaced)
        for param, value in zip(model.parameters(), start, strict=True):
            param.grad = np.zeros_like(value)
        opt.step()
        assert_close(values(model), start, 0)
        for param, grad in zip(model.parameters(), give_grads(0, "scalar")[0], strict=True):
            param.grad = grad
        opt.step()
        for now, value, own in zip(given, start, replaced, strict=True):
            if own:  # what was put there is not written to
                assert np.array_equal(now.data if isinstance(now, lucid.Tensor) else now, value)
        node = [value.tobytes() for value in values(model)]
        assert comm.allgather(node) == [node] * comm.size


@pytest.mark.mpi
def test_groups_are_added_from_generators(comm):
    first, second = Net(0), Net(1)
    reference, more = Net(0), Net(1)
    theirs = optim.NAdam(reference.parameters(), lr=0.01)
    with NAdam(first.parameters(), lr=0.01, variant="lucid", comm=comm) as opt:
        train(first, opt, range(2), split(comm))
        train(reference, theirs, range(2))
        opt.add_param_group({"params": second.parameters(), "lr": 0.1})
        theirs.add_param_group({"params": more.parameters(), "lr": 0.1})
        train(second, opt, range(2, 4), split(comm))
        train(more, theirs, range(2, 4))
        assert_near(comm, values(first), values(reference))
        assert_near(comm, values(second), values(more))


@pytest.mark.mpi
def test_tied_weights_are_one_parameter(comm):
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    params = list({id(param): param for param in model.parameters()}.values())
    assert len(params) == 3
    with NAdam(params, comm=comm) as opt:
        model(batch(0)[0]).sum().backward()
        opt.step()
        assert model[1].weight.data is model[0].weight.data


def test_names_come_from_the_models_state_dict():
    model = Net()
    named = [
        (name, value)
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, nn.Parameter)
    ]
    with NAdam(named) as opt:
        names = [param.spec.name for param in opt.partition.params]
        assert names == [name for name, _ in named]
        assert "hidden.weight" in names


# -- refusals --------------------------------------------------------------------------------------


REFUSED = {
    "tensor": (
        lambda: lucid.Tensor(np.ones(3, np.float32), requires_grad=True),
        "params must hold lucid.nn.Parameter; got Tensor.",
    ),
    "complex": (
        lambda: nn.Parameter(np.ones(3, np.complex64)),
        "data of parameter 'param1' must be real; got dtype complex64.",
    ),
    "integer": (
        lambda: nn.Parameter(np.ones(3, np.int64)),
        "data of parameter 'param1' must be floating point; got dtype int64.",
    ),
}


@pytest.mark.mpi
@BOTH_WAYS
@pytest.mark.parametrize("kind", REFUSED)
def test_parameters_that_cannot_be_trained(comm, kind, alone):
    make, told = REFUSED[kind]
    good = nn.Parameter(np.ones(3, np.float32))
    params = [good, make() if errs(comm, alone) else nn.Parameter(np.ones(3, np.float32))]
    with refused(comm, PartitionError, told, alone=alone):
        NAdam(params, comm=comm, policy=POLICY)
    assert good.data.tolist() == [1.0] * 3


@pytest.mark.mpi
@BOTH_WAYS
@pytest.mark.filterwarnings("ignore:Metal GPU")
def test_a_model_on_the_gpu(comm, alone):
    model = Net()
    told = "data of parameter 'scale' must be a NumPy array; got mlx.core.array."
    if errs(comm, alone):
        model.to("gpu")
    with refused(comm, PartitionError, told, "model.to('cpu')", alone=alone):
        NAdam(model.parameters(), comm=comm, policy=POLICY)
    model.to("cpu")
    with NAdam(model.parameters(), comm=comm, policy=POLICY) as opt:
        if errs(comm, alone):
            model.to("gpu")
        with refused(comm, PartitionError, told, alone=alone):
            opt.step()
        model.to("cpu")
        train(model, opt, range(1))


CHANGED = {
    "dtype": (
        lambda param: param.astype(lucid.Float64),
        "data of parameter 'param0' must keep dtype float32; got float64.",
    ),
    "shape": (
        lambda param: setattr(param, "data", param.data.T),
        "data of parameter 'param0' must keep shape (2, 3); got (3, 2).",
    ),
    "complex gradient": (
        lambda param: setattr(param, "grad", np.ones((2, 3), np.complex64)),
        "grad of parameter 'param0' must be real; got dtype complex64.",
    ),
    "shape of the gradient": (
        lambda param: setattr(param, "grad", np.ones(3, np.float64)),
        "grad of parameter 'param0' must keep shape (2, 3); got (3,).",
    ),
}


@pytest.mark.mpi
@BOTH_WAYS
@pytest.mark.parametrize("kind", CHANGED)
def test_changes_that_do_not_fit(comm, kind, alone):
    change, told = CHANGED[kind]
    params = pair()
    with NAdam(params, comm=comm, policy=POLICY) as opt:
        if errs(comm, alone):
            change(params[0])
        with refused(comm, PartitionError, told, alone=alone):
            opt.step()


@pytest.mark.mpi
def test_complex_betas(comm):
    with refused(comm, HyperparamsError, "betas[0] must be a real number; got (0.9+0j)."):
        NAdam(pair(), betas=(0.9 + 0j, 0.999), comm=comm, policy=POLICY)


@pytest.mark.mpi
def test_edited_param_groups_hold_from_the_next_step_on(comm):
    model, alone = Net(), Net()
    alone_opt = optim.NAdam(alone.parameters(), lr=0.05, weight_decay=0.1)
    with NAdam(
        model.parameters(), lr=0.05, weight_decay=0.1, variant="lucid", comm=comm, policy=POLICY
    ) as opt:
        for step in range(4):
            if step == 2:
                for net, each in ((model, opt), (alone, alone_opt)):
                    params = each.param_groups[0]["params"]
                    params[:] = [p for p in params if p is not net.hidden.weight]
                    with np.errstate(all="ignore"):
                        net.out = nn.Linear(7, 2, bias=False)
                    net.out.weight.data = np.full((2, 7), 0.25, np.float32)
                    params[:] = [p for p in params if p.shape != net.out.weight.shape]
                    params.append(net.out.weight)
            train(model, opt, [step], split(comm))
            train(alone, alone_opt, [step], slice(None))
        assert_near(comm, values(model), values(alone))


# -- stage 2 ---------------------------------------------------------------------------------------


def stage_two(stage=2, **settings):
    return ShardPolicy(stage=stage, bucket_nbytes=1, timeout_s=20, threads=1, **settings)


def two_matrices():
    rng = np.random.default_rng(0)
    return [nn.Parameter(rng.standard_normal((60, 90)).astype(np.float32)) for _ in range(2)]


def put_grads(params, step, rank, missing=()):
    rng = np.random.default_rng([step, rank])
    for index, param in enumerate(params):
        if index not in missing:
            param.grad = rng.standard_normal(param.shape).astype(np.float32)


def forget_all(params, opt):
    for param in params:
        param.grad = None


CLEARING = {
    "zero_grad": lambda params, opt: opt.zero_grad(),
    "model.zero_grad": forget_all,
    "in place": lambda params, opt: opt.zero_grad(set_to_none=False),
}


@pytest.mark.mpi
@pytest.mark.parametrize("share", [True, False], ids=["one node", "nodes"])
@pytest.mark.parametrize("clearing", CLEARING)
@pytest.mark.parametrize("averaged", [False, True], ids=["", "averaged"])
def test_stage_two_has_the_bits_of_stage_one(comm, share, clearing, averaged):
    """In one step the last rank has no gradients, in another a parameter has none anywhere."""

    def train(stage):
        params, norms = two_matrices(), []
        policy = stage_two(stage, share_node=share)
        with NAdam(params, lr=0.1, max_grad_norm=0.5, comm=comm, policy=policy) as opt:
            for step in range(4):
                CLEARING[clearing](params, opt)
                has_none = step == 1 and comm.size > 1 and comm.rank == comm.size - 1
                put_grads(params, step, comm.rank, {0, 1} if has_none else {step - 2})
                if averaged:
                    opt.average_grads()
                opt.step()
                norms.append(opt.last_step.grad_norm)
        return [value.tobytes() for value in map(np.array, (p.data for p in params))], norms

    assert train(2) == train(1)


@pytest.mark.mpi
def test_lucid_trains_in_stage_two(comm):
    def train_one(stage):
        model = Net()
        with NAdam(model, lr=0.01, comm=comm, policy=stage_two(stage)) as opt:
            train(model, opt, range(3), split(comm))
            opt.add_param_group({"params": two_matrices()})
            train(model, opt, range(3, 5), split(comm))
            group = opt.param_groups[1]["params"]
            put_grads(group, 0, comm.rank)
            opt.step()
            group.pop()
            train(model, opt, range(5, 6), split(comm))
            return [value.tobytes() for value in values(model)], group[0].data.tobytes()

    assert train_one(2) == train_one(1)


@pytest.mark.mpi
def test_gradients_in_stage_two_are_averages_after_the_step(comm):
    params = two_matrices()
    with NAdam(params, comm=comm, policy=stage_two()) as opt:
        put_grads(params, 0, comm.rank, {1} if comm.rank else ())
        own = params[0].grad
        assert opt.grad(params[0]) is not own
        np.testing.assert_array_equal(opt.grad(params[0]), own)
        opt.step()
        mean = np.mean(comm.allgather(own), axis=0)
        np.testing.assert_allclose(params[0].grad, mean, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(opt.grad(params[0]), params[0].grad)
        assert opt.grad(params[1]) is not None  # rank 0 had one
        assert not opt.grad(params[1]).flags.writeable
        opt.zero_grad()
        assert params[0].grad is opt.grad(params[1]) is None
    assert params[0].grad is None


@pytest.mark.mpi
def test_a_backward_without_zero_grad_in_stage_two(comm):
    """lucid adds to the average in place, on each rank something else."""
    params = two_matrices()
    with NAdam(params, comm=comm, policy=stage_two()) as opt:
        put_grads(params, 0, comm.rank)
        opt.step()
        (params[0] * float(comm.rank + 1)).sum().backward()
        if comm.size == 1:
            opt.step()
            return
        with pytest.raises(RankMismatchError, match="gradient of 'param0'"):
            opt.step()
        opt.zero_grad()
        put_grads(params, 0, comm.rank)
        opt.step()
        assert opt.last_step.step == 2


@pytest.mark.mpi(min_size=2)
def test_averages_are_hidden_on_nodes(comm):
    params = two_matrices()
    with NAdam(params, comm=comm, policy=stage_two(share_node=False)) as opt:
        put_grads(params, 0, comm.rank)
        own = [param.grad for param in params]
        opt.step()
        uses = [
            lambda grad: grad * 2,
            lambda grad: 2 * grad,
            np.asarray,
            np.linalg.norm,
            lambda grad: grad == 0,
            lambda grad: grad[0],
            lambda grad: grad.shape,
            lambda grad: opt.grad(params[0]),
            lambda grad: bool(grad),
        ]
        for use in uses:
            with pytest.raises(CallOrderError, match="no rank has the whole"):
                use(params[0].grad)
        kept = params[0].grad
        with pytest.raises(lucid.BackwardError):
            (params[0] * 2.0).sum().backward()
        opt.zero_grad()
        for param, grad in zip(params, own, strict=True):
            param.grad = grad
        opt.average_grads()
        mean = np.mean(comm.allgather(own[0]), axis=0)
        np.testing.assert_allclose(params[0].grad, mean, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(opt.grad(params[0]), params[0].grad)
        opt.step()
        opt.zero_grad()
        params[0].grad = kept
        with pytest.raises(CallOrderError, match="an earlier p.grad for 'param0'"):
            opt.step()


@pytest.mark.mpi
def test_updates_in_backward_are_refused(comm):
    policy = ShardPolicy(stage=2, update_in_backward=True)
    with pytest.raises(HyperparamsError, match="with a framework that does not report"):
        NAdam(Net().parameters(), comm=comm, policy=policy)


OF_LUCID = [
    ("Adam", {}),
    ("Adam", {"weight_decay": 0.1, "eps": 1e-3}),
    ("AdamW", {"weight_decay": 0.1, "eps": 1e-3}),
    ("RAdam", {"betas": (0.9, 0.9)}),
    ("RAdam", {"betas": (0.9, 0.9), "weight_decay": 0.1, "eps": 1e-3}),
]


@pytest.mark.parametrize(("name", "settings"), OF_LUCID)
def test_the_other_optimizers_give_lucids_numbers(name, settings):
    models, opts = (Net(), Net()), []
    opts.append(getattr(shardopt.lucid, name)(models[0].parameters(), variant="lucid", **settings))
    opts.append(getattr(optim, name)(models[1].parameters(), **settings))
    for model, opt in zip(models, opts, strict=True):
        train(model, opt, range(9))
    assert_close(*map(values, models), 4)
    for signature in (getattr(shardopt.lucid, name), getattr(optim, name)):
        assert list(inspect.signature(signature).parameters)[:5] == [
            *("params", "lr", "betas", "eps", "weight_decay")
        ]
    opts[0].load_state_dict(opts[1].state_dict())
    for model, opt in zip(models, opts, strict=True):
        train(model, opt, range(9, 12))
    assert_close(*map(values, models), 8)
    opts[0].close()
