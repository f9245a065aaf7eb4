"""What users may do wrong between steps: refused on all ranks, nothing changed, and then on."""

import numpy as np
import pytest
from mpi4py import MPI

from shardopt.errors import (
    CheckpointError,
    ClosedError,
    HyperparamsError,
    NoGradientWarning,
    PartitionError,
    RankMismatchError,
)
from shardopt.numpy import NAdam, Parameter
from tests.support.errors import (
    BOTH_WAYS,
    Sparse,
    assert_steps,
    differing,
    errs,
    everything,
    is_last,
    make_optimizer,
    make_params,
    params_of,
    refused,
    take_step,
    warned,
)

pytestmark = pytest.mark.mpi


# -- hyperparameters -------------------------------------------------------------------------------


WRONG_VALUES = [
    ("lr", -1.0, "in param_groups[0], lr must be a finite number >= 0; got -1.0"),
    ("lr", float("nan"), "in param_groups[0], lr must be a finite number >= 0; got nan"),
    ("betas", (0.9, 1.0), "in param_groups[0], betas[1] must lie in [0, 1); got 1.0"),
    ("variant", "adam", "in param_groups[0], variant must be one of"),
]


@BOTH_WAYS
@pytest.mark.parametrize(("key", "value", "told"), WRONG_VALUES)
def test_a_wrong_value_in_param_groups_is_refused(comm, opt, alone, key, value, told):
    before, usual = everything(opt), opt.param_groups[0][key]
    if errs(comm, alone):
        opt.param_groups[0][key] = value
    with refused(comm, HyperparamsError, told, alone=alone):
        opt.step()
    opt.param_groups[0][key] = usual
    assert everything(opt) == before


@BOTH_WAYS
def test_a_value_removed_from_param_groups_is_refused(comm, opt, alone):
    if errs(comm, alone):
        del opt.param_groups[0]["eps"]
    with refused(comm, HyperparamsError, "param_groups[0], eps must", "got None", alone=alone):
        opt.step()
    opt.param_groups[0]["eps"] = 1e-8


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("key", "odd"), [("lr", 0.5), ("weight_decay", 0.25), ("maximize", True)])
def test_a_value_changed_on_one_rank_is_refused(comm, opt, key, odd):
    before, usual = everything(opt), opt.param_groups[0][key]
    if is_last(comm):
        opt.param_groups[0][key] = odd
    told = differing(comm, f"{key} of param group 0", repr(usual), repr(odd))
    with refused(comm, RankMismatchError, told):
        opt.step()
    opt.param_groups[0][key] = usual
    assert everything(opt) == before


# -- replaced parameters and gradients -------------------------------------------------------------


MISFITS = {
    "shape": (np.ones((3, 2), np.float32), "must keep shape (2, 3); got (3, 2)"),
    "flat": (np.ones(6, np.float32), "must keep shape (2, 3); got (6,)"),
    "dtype": (np.ones((2, 3)), "must keep dtype float32; got float64"),
    "int": (np.ones((2, 3), int), "must be floating point; got dtype int64"),
    "sparse": (Sparse(), "must be dense; got Sparse. Call .toarray()"),
}


@BOTH_WAYS
@pytest.mark.parametrize("what", ["data", "grad"])
@pytest.mark.parametrize("case", MISFITS)
def test_a_replacement_that_does_not_fit_is_refused(comm, opt, alone, what, case):
    misfit, told = MISFITS[case]
    param, before = params_of(opt)[0], everything(opt)
    usual = getattr(param, what)
    if errs(comm, alone):
        setattr(param, what, misfit)
    told = f"{what} of parameter 'w' {told}"
    with refused(comm, PartitionError, told, alone=alone):
        opt.step()
    setattr(param, what, usual)
    assert everything(opt) == before


@BOTH_WAYS
def test_a_removed_value_is_refused(comm, opt, alone):
    param = params_of(opt)[0]
    usual = param.data
    if errs(comm, alone):
        param.data = None
    with refused(comm, PartitionError, "data of parameter 'w'", alone=alone):
        opt.step()
    param.data = usual


@pytest.mark.parametrize("replacing", ["all", "last", "all but rank 0"])
def test_a_replaced_value_is_copied_in_from_the_lowest_rank(comm, opt, replacing):
    lowest = {"all": 0, "last": comm.size - 1, "all but rank 0": min(1, comm.size - 1)}[replacing]
    first, *others = params_of(opt)
    window = first.data
    first.grad = None  # on every rank: the step leaves the value alone
    if comm.rank >= lowest:
        first.data = np.asfortranarray(np.full((2, 3), comm.rank, np.float32))
    opt.step()
    assert (first.data == lowest).all()
    assert np.shares_memory(first.data, window)
    assert opt.last_step.copied_nbytes == (window.nbytes if comm.rank == lowest else 0)
    assert len(others) == 2
    opt.zero_grad()
    opt.step()
    assert opt.last_step.copied_nbytes == 0


def test_values_may_be_exchanged(comm):
    params = [Parameter(np.full(3, i, np.float32), f"p{i}") for i in range(3)]
    with make_optimizer(comm, params) as opt:
        opt.zero_grad(set_to_none=True)
        params[0].data, params[1].data = params[1].data, params[0].data
        with warned(comm, NoGradientWarning):
            opt.step()
        assert [param.data[0] for param in params] == [1, 0, 2]


@pytest.mark.parametrize("replacing", ["all", "last"])
def test_a_replaced_gradient_is_copied_in(comm, replacing):
    here = replacing == "all" or is_last(comm)
    grad = np.arange(6, dtype=np.float32).reshape(2, 3) + comm.rank
    usual, replaced = (Parameter(np.ones((2, 3), np.float32), name) for name in "ab")
    with make_optimizer(comm, [usual, replaced]) as opt:
        window = replaced.grad
        usual.grad[...] = grad
        if here:
            replaced.grad = grad
        else:
            replaced.grad[...] = grad
        opt.step()
        assert opt.last_step.copied_nbytes == (grad.nbytes if here else 0)
        assert replaced.grad is window
        assert replaced.data.tobytes() == usual.data.tobytes()


# -- calls -----------------------------------------------------------------------------------------


CALLS = {
    "close()": lambda opt: opt.close(),
    "gather_state_dict()": lambda opt: opt.gather_state_dict(),
    "load_state_dict()": lambda opt: opt.load_state_dict(opt.state_dict()),
    "add_param_group()": lambda opt: opt.add_param_group({"params": Parameter(np.ones(3))}),
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("call", CALLS)
def test_another_call_on_one_rank_is_refused(comm, opt, call):
    before = everything(opt)
    with refused(comm, RankMismatchError, differing(comm, "the call", "'step()'", repr(call))):
        CALLS[call](opt) if is_last(comm) else opt.step()
    assert everything(opt) == before


@pytest.mark.mpi(min_size=2)
def test_leaving_the_with_block_early_on_one_rank_is_refused(comm):
    told = differing(comm, "the call", "'step()'", "'close()'")
    opt = make_optimizer(comm)
    with refused(comm, RankMismatchError, told), opt:
        if not is_last(comm):
            opt.step()
    assert_steps(opt)
    opt.close()


@pytest.mark.mpi(min_size=2)
def test_different_roots_are_refused(comm, opt):
    told = differing(comm, "root", "0", str(comm.size - 1))
    with refused(comm, RankMismatchError, told):
        opt.gather_state_dict(comm.size - 1 if is_last(comm) else 0)


@pytest.mark.parametrize("root", [-1, 4096, 0.5, None])
def test_a_root_that_is_no_rank_is_refused(comm, opt, root):
    told = f"root must be a rank, 0 to {comm.size - 1}; got {root}"
    with refused(comm, CheckpointError, told):
        opt.gather_state_dict(root)


def test_an_exception_of_the_closure_passes_through(comm, opt):
    def closure():
        raise LookupError("no more text")

    before, report = everything(opt), opt.last_step
    with pytest.raises(LookupError, match="no more text"):
        opt.step(closure)
    assert everything(opt) == before
    assert opt.last_step is report


# -- add_param_group -------------------------------------------------------------------------------


def extra(name="extra", shape=(4,), **settings):
    return {"params": [Parameter(np.ones(shape, np.float32), name)], **settings}


WRONG_GROUPS = {
    "no dict": (
        lambda opt: [Parameter(np.ones(3))],
        PartitionError,
        "must be a dict with 'params'",
    ),
    "known parameter": (
        lambda opt: {"params": params_of(opt)[1]},
        PartitionError,
        "each parameter must be listed once; got 'b' again as 'b'",
    ),
    "known name": (
        lambda opt: extra("b"),
        PartitionError,
        "names must be unique; got 'b' for parameters 1 and 3",
    ),
    "view of a parameter": (
        lambda opt: {"params": [Parameter(params_of(opt)[1].data[1:3], "part")]},
        PartitionError,
        "parameters must not share memory; got 'b' and 'part' overlapping",
    ),
    "dtype": (
        lambda opt: {"params": [Parameter(np.arange(3), "extra")]},
        PartitionError,
        "data of parameter 'extra' must be floating point; got dtype int64",
    ),
    "lr": (lambda opt: extra(lr=-1), HyperparamsError, "lr must be a finite number >= 0; got -1.0"),
}


@BOTH_WAYS
@pytest.mark.parametrize("case", WRONG_GROUPS)
def test_a_wrong_group_is_not_added(comm, opt, alone, case):
    make, error, told = WRONG_GROUPS[case]
    before = everything(opt)
    with refused(comm, error, told, alone=alone):
        opt.add_param_group(make(opt) if errs(comm, alone) else extra())
    assert everything(opt) == before
    assert len(opt.partition.params) == 3


@pytest.mark.mpi(min_size=2)
def test_a_different_group_on_one_rank_is_not_added(comm):
    told = differing(comm, "the shape of parameter 'extra'", "(4,)", "(2, 2)")
    with make_optimizer(comm) as opt:
        before = everything(opt)
        with refused(comm, RankMismatchError, told):
            opt.add_param_group(extra(shape=(2, 2) if is_last(comm) else (4,)))
        assert everything(opt) == before
        opt.add_param_group(extra())
        assert_steps(opt)


# -- after close() ---------------------------------------------------------------------------------


AFTER_CLOSE = {
    "step": lambda opt: opt.step(),
    "zero_grad": lambda opt: opt.zero_grad(),
    "state_dict": lambda opt: opt.state_dict(),
    "gather_state_dict": lambda opt: opt.gather_state_dict(),
    "load_state_dict": lambda opt: opt.load_state_dict(None),
    "add_param_group": lambda opt: opt.add_param_group(extra()),
}


@pytest.fixture(scope="module")
def closed():
    opt = make_optimizer(MPI.COMM_WORLD)
    take_step(opt)
    opt.close()
    return opt


@pytest.mark.parametrize("call", AFTER_CLOSE)
def test_a_call_after_close_is_refused(comm, closed, call):
    with refused(comm, ClosedError, "the optimizer must be open; got a call after close()"):
        AFTER_CLOSE[call](closed)


def test_close_may_be_called_again(closed):
    closed.close()


def test_parameters_are_each_ranks_own_after_close(comm):
    params = make_params()
    make_optimizer(comm, params).close()
    for param in params:
        assert param.grad is None
        param.data[...] = comm.rank
        comm.barrier()
        assert (param.data == comm.rank).all()
    with make_optimizer(comm, params) as opt:
        assert_steps(opt)


def test_views_that_are_still_held_stay_readable_after_close(comm):
    opt = make_optimizer(comm)
    take_step(opt)
    first = params_of(opt)[0]
    first.grad[...] = comm.rank
    held = [first.data[1:], first.grad.T] if is_last(comm) else []
    values = [view.copy() for view in held]
    opt.close()
    make_optimizer(comm).close()  # would take the addresses if they had been given up
    for view, value in zip(held, values, strict=True):
        assert (view == value).all()


@pytest.mark.parametrize("drop", [False, True])
def test_gradients_may_be_exchanged(comm, drop):
    first, second = (Parameter(np.ones(50, np.float32), name) for name in "ab")
    with NAdam([first, second], comm=comm, betas=(0.0, 0.0), eps=1.0, lr=1.0) as opt:
        first.grad[...], second.grad[...] = 1.0, 2.0
        first.grad, second.grad = (None if drop else second.grad), first.grad
        opt.step()
        moments = [entry["exp_avg"] for entry in opt.state_dict()["state"].values()]
        assert (moments[0] == (0.0 if drop else 2.0)).all()
        assert (moments[1] == 1.0).all()


@pytest.mark.parametrize("later", [False, True])
def test_values_may_be_exchanged_between_windows(comm, later):
    first, second = (Parameter(np.full(50, i, np.float32), name) for i, name in enumerate("ab"))
    with NAdam([first] if later else [first, second], comm=comm, lr=0.0) as opt:
        if later:
            opt.add_param_group({"params": [second], "lr": 0.0})
        comm.Barrier()
        if comm.rank == 0:
            first.data, second.data = second.data, first.data
        opt.step()
        assert (first.data == 1).all()
        assert (second.data == 0).all()


@pytest.mark.mpi(min_size=2)
def test_a_value_shown_by_one_rank_and_replaced_by_another(comm):
    for _ in range(10):
        first, second = (Parameter(np.full(500_000, i, np.float32), str(i)) for i in (1, 2))
        with NAdam([first, second], comm=comm, lr=0.0) as opt:
            comm.Barrier()
            if comm.rank == 0:
                first.data = np.full(500_000, 7, np.float32)
            if comm.rank == 1:
                second.data = first.data
            opt.step()
            assert (first.data == 7).all()
            assert (second.data == 1).all()  # what rank 1 saw when it called step()


@pytest.mark.mpi(min_size=2)
def test_a_difference_in_an_added_group_names_that_group(comm, opt):
    param = Parameter(np.ones(3, np.float32), "added")
    number = len(opt.param_groups)
    lr = 0.1 if is_last(comm) else 0.2
    with refused(comm, RankMismatchError, f"lr of param group {number} must be the same"):
        opt.add_param_group({"params": [param], "lr": lr})
