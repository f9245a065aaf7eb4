"""The class is used as torch.optim.NAdam is: arguments, groups, hooks, closure."""

import copy
import inspect
import io
import pickle

import pytest

pytest.importorskip("torch")

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from shardopt.errors import HyperparamsError, PartitionError, RankMismatchError, ShardoptError
from shardopt.torch import NAdam
from tests.support.errors import BOTH_WAYS, POLICY, errs, is_last, refused
from tests.support.torch_models import Twins, everything, make_model, params_of, raised_everywhere


def test_arguments_and_defaults_are_torchs_in_order():
    ours = list(inspect.signature(NAdam).parameters.values())
    theirs = list(inspect.signature(torch.optim.NAdam).parameters.values())
    for one, other in zip(ours, theirs, strict=False):
        assert (one.name, one.default, one.kind) == (other.name, other.default, other.kind)
    extra = ours[len(theirs) :]
    assert [param.name for param in extra] == ["variant", "max_grad_norm", "comm", "policy"]
    assert all(param.kind is param.KEYWORD_ONLY for param in extra)


def test_it_is_a_torch_optimizer():
    assert issubclass(NAdam, torch.optim.Optimizer)
    for name in ("step", "zero_grad", "add_param_group", "load_state_dict", "state_dict"):
        ours = inspect.signature(getattr(NAdam, name)).parameters
        theirs = inspect.signature(getattr(torch.optim.NAdam, name)).parameters
        assert [(p.name, p.default) for p in ours.values()] == [
            (p.name, p.default) for p in theirs.values()
        ]


PARAMS = {
    "iterator": lambda model: model.parameters(),
    "list": lambda model: list(model.parameters()),
    "named": lambda model: model.named_parameters(),
    "groups": lambda model: [
        {"params": model[0].parameters(), "lr": 0.1, "betas": (0.5, 0.9)},
        {"params": model[2].weight, "weight_decay": 0.1, "maximize": True},
        {"params": [model[3].weight, model[3].bias], "momentum_decay": 0.1, "eps": 1e-3},
    ],
    "named groups": lambda model: [
        {"params": model[0].named_parameters(), "lr": 0.1},
        {"params": list(model[3].named_parameters("last")), "decoupled_weight_decay": True},
    ],
}


@pytest.mark.mpi
@pytest.mark.parametrize("form", PARAMS)
def test_params_in_every_form(comm, form):
    with Twins(comm, params=PARAMS[form], lr=0.01, weight_decay=0.02) as twins:
        for _ in range(5):
            twins.step()
        twins.assert_same()
        for ours, theirs in zip(*(opt.param_groups for opt in twins.both), strict=True):
            ours = {key: value for key, value in ours.items() if key != "params"}
            theirs = {key: value for key, value in theirs.items() if key != "params"}
            assert ours == {**theirs, "variant": "torch"}
        if form.startswith("named"):
            names = [name for group in twins.opt.param_groups for name in group["param_names"]]
            assert [param.spec.name for param in twins.opt.partition.params] == names
        assert twins.opt.defaults == {**twins.whole_opt.defaults, "variant": "torch"}
        assert repr(twins.opt).startswith("NAdam (\nParameter Group 0")


@pytest.mark.mpi
@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
@BOTH_WAYS
def test_flags_for_graphs_are_refused(comm, flag, alone):
    settings = {flag: True} if errs(comm, alone) else {}
    with refused(comm, HyperparamsError, f"{flag} must be False; got True.", alone=alone):
        NAdam(make_model().parameters(), comm=comm, policy=POLICY, **settings)


@pytest.mark.mpi
@pytest.mark.parametrize("foreach", [False, True])
def test_foreach_changes_nothing(comm, foreach):
    with Twins(comm, foreach=foreach) as twins:
        for _ in range(3):
            twins.step()
        twins.assert_same()


# -- param_groups ----------------------------------------------------------------------------------


EDITS = {
    "lr": 0.5,
    "betas": (0.5, 0.75),
    "eps": 0.1,
    "weight_decay": 0.3,
    "momentum_decay": 0.5,
    "decoupled_weight_decay": True,
    "maximize": True,
}


@pytest.mark.mpi
@pytest.mark.parametrize("key", EDITS)
def test_what_is_written_into_param_groups_holds_from_the_next_step(comm, key):
    with Twins(comm, weight_decay=0.1) as twins:
        twins.step()
        for opt in twins.both:
            opt.param_groups[0][key] = EDITS[key]
        before = params_of(twins.opt)[0].detach().clone()
        for _ in range(3):
            twins.step()
        twins.assert_same()
        assert not torch.equal(params_of(twins.opt)[0], before)


@pytest.mark.mpi
def test_a_tensor_lr_changed_in_place_is_seen(comm):
    lrs = torch.tensor(0.1), torch.tensor(0.1)
    with Twins(comm) as twins:
        for opt, lr in zip(twins.both, lrs, strict=True):
            opt.param_groups[0]["lr"] = lr
        for step in range(4):
            for lr in lrs:
                lr.fill_(0.1 / (1 + step))
            twins.step()
            twins.assert_same()


# -- add_param_group -------------------------------------------------------------------------------


@pytest.mark.mpi
def test_an_added_group_trains_with_its_own_settings(comm):
    with Twins(comm, params=lambda model: model[0].parameters(), lr=0.1) as twins:
        twins.step()
        for opt, model in zip(twins.both, twins.models, strict=True):
            opt.add_param_group({"params": model[3].parameters(), "lr": 0.01})
            opt.add_param_group({"params": model[2].weight, "weight_decay": 0.1})
        for _ in range(3):
            twins.step()
        twins.assert_same()
        assert [group["lr"] for group in twins.opt.param_groups] == [0.1, 0.01, 0.1]
        assert twins.opt.param_groups is twins.opt.core.param_groups


WRONG_GROUPS = {
    "no dict": (lambda model: [model[3].weight], TypeError, "param_group must be a dict"),
    "no params": (lambda model: {"lr": 0.1}, KeyError, "params"),
    "no tensor": (lambda model: {"params": [3.0]}, TypeError, "can only optimize Tensors"),
    "a set": (lambda model: {"params": {model[3].weight}}, TypeError, "ordered collections"),
    "known": (lambda model: {"params": model[0].weight}, ValueError, "more than one parameter"),
    "non-leaf": (lambda model: {"params": model[3].weight * 2}, ValueError, "non-leaf"),
    "int": (lambda model: {"params": torch.arange(3)}, PartitionError, "must be floating point"),
    "lr": (lambda model: {"params": model[3].weight, "lr": -1}, HyperparamsError, "lr must be"),
    "flag": (
        lambda model: {"params": model[3].weight, "capturable": True},
        HyperparamsError,
        "cap",
    ),
    "names": (lambda model: {"params": [("a", model[3].weight)]}, ValueError, "without names"),
}


@pytest.mark.mpi
@pytest.mark.parametrize("case", WRONG_GROUPS)
@BOTH_WAYS
def test_a_wrong_group_is_added_on_no_rank(comm, case, alone):
    make, error, text = WRONG_GROUPS[case]
    model = make_model()
    with NAdam(model[0].parameters(), comm=comm, policy=POLICY) as opt:
        before = everything(opt)
        group = make(model) if errs(comm, alone) else {"params": model[3].weight}
        raised_everywhere(comm, error, text, lambda: opt.add_param_group(group))
        assert everything(opt) == before
        opt.add_param_group({"params": model[3].weight, "lr": 0.5})
        assert len(opt.param_groups) == len(opt.core.param_groups) == 2


@pytest.mark.mpi(min_size=2)
def test_groups_that_differ_between_ranks_are_not_added(comm):
    model = make_model()
    with NAdam(model[0].parameters(), comm=comm, policy=POLICY) as opt:
        before = everything(opt)
        with refused(comm, RankMismatchError, "lr of param group 1 must be the same"):
            opt.add_param_group({"params": model[3].weight, "lr": 0.5 if is_last(comm) else 0.1})
        assert everything(opt) == before


# -- hooks and closure -----------------------------------------------------------------------------


@pytest.mark.mpi
def test_step_hooks_are_called_around_the_step(comm):
    calls = []
    with Twins(comm) as twins:
        opt = twins.opt

        def note(name):
            return lambda opt, args, kwargs: calls.append((name, opt.last_step.step))

        handles = [
            register_optimizer_step_pre_hook(note("global pre")),
            opt.register_step_pre_hook(note("pre")),
            opt.register_step_post_hook(note("post")),
            register_optimizer_step_post_hook(note("global post")),
        ]
        twins.backward()
        opt.step()
        for handle in handles:
            handle.remove()
        opt.step()
    assert calls == [("global pre", 0), ("pre", 0), ("post", 1), ("global post", 1)]


@pytest.mark.mpi
@pytest.mark.filterwarnings("ignore::shardopt.errors.NoGradientWarning")
def test_a_step_pre_hook_may_replace_the_arguments(comm):
    with Twins(comm) as twins:

        def hook(opt, args, kwargs):
            return ((opt,), {"closure": lambda: "replaced"})

        with_hook = twins.opt.register_step_pre_hook(hook)
        assert twins.opt.step(lambda: "given") == "replaced"
        with_hook.remove()
        assert twins.opt.step(lambda: "given") == "given"


@pytest.mark.mpi
def test_a_step_post_hook_sees_the_new_values(comm):
    with Twins(comm, lr=0.1) as twins:
        before = twins.ours[0].weight.detach().clone()
        seen = []
        twins.opt.register_step_post_hook(
            lambda opt, args, kwargs: seen.append(torch.equal(params_of(opt)[0], before))
        )
        twins.step()
    assert seen == [False]


@pytest.mark.mpi
def test_state_dict_hooks(comm):
    model, calls = make_model(), []
    with NAdam(model.parameters(), comm=comm, policy=POLICY) as opt:
        opt.register_state_dict_pre_hook(lambda opt: calls.append("pre"))
        opt.register_state_dict_post_hook(lambda opt, state: state.update(note=1))
        replace = opt.register_state_dict_post_hook(lambda opt, state: {"all": state})
        assert opt.state_dict()["all"]["note"] == 1
        replace.remove()
        assert opt.state_dict()["note"] == 1
        assert calls == ["pre", "pre"]


@pytest.mark.mpi
def test_load_state_dict_hooks(comm):
    model, calls = make_model(), []
    with NAdam(model.parameters(), comm=comm, policy=POLICY, lr=0.5) as opt:
        saved = opt.state_dict()
        wrapped = {"all": saved}
        opt.register_load_state_dict_pre_hook(lambda opt, state: calls.append(sorted(state)))
        opt.register_load_state_dict_pre_hook(lambda opt, state: state.pop("all"))
        opt.register_load_state_dict_post_hook(lambda opt: calls.append(opt.param_groups[0]["lr"]))
        opt.param_groups[0]["lr"] = 0.1
        opt.load_state_dict(wrapped)
        assert calls == [["all"], 0.5]
        assert wrapped == {"all": saved}  # a hook changes a copy, as with torch


@pytest.mark.mpi
def test_the_closure_runs_with_gradients_on_and_its_value_is_returned(comm):
    with Twins(comm) as twins:

        def closure():
            assert torch.is_grad_enabled()
            twins.opt.zero_grad()
            twins.backward(step=3)
            return "loss"

        assert twins.opt.step(closure) == "loss"
        twins.whole_opt.step()
        twins.assert_same()
        assert twins.opt.step(closure=lambda: 2.5) == 2.5
        assert twins.opt.step() is None
        assert torch.is_grad_enabled()


@pytest.mark.mpi
def test_an_error_of_the_closure_passes_through(comm):
    with Twins(comm) as twins:
        before = everything(twins.opt)
        with pytest.raises(ZeroDivisionError):
            twins.opt.step(lambda: 1 / 0)
        assert everything(twins.opt) == before
        assert torch.is_grad_enabled()


# -- copies ----------------------------------------------------------------------------------------


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "torch.save": lambda opt: torch.save(opt, io.BytesIO()),
}


@pytest.mark.mpi
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_refused(comm, how):
    with Twins(comm) as twins:
        with refused(comm, ShardoptError, "an optimizer must not be copied or pickled"):
            COPIES[how](twins.opt)
        twins.step()
        twins.assert_same()


@pytest.mark.mpi
def test_a_copied_model_has_memory_of_its_own(comm):
    with Twins(comm) as twins:
        twins.step()
        twin = copy.deepcopy(twins.ours)
        for param, original in zip(twin.parameters(), twins.ours.parameters(), strict=True):
            assert param.data_ptr() != original.data_ptr()
            assert torch.equal(param, original)
            assert param.requires_grad
            assert not param._post_accumulate_grad_hooks
        values = [param.detach().clone() for param in twin.parameters()]
        twins.step()
        twins.assert_same()
        assert all(map(torch.equal, twin.parameters(), values))


@pytest.mark.mpi
def test_a_saved_model_holds_its_own_elements_only(comm):
    with Twins(comm) as twins:
        twins.step()
        file = io.BytesIO()
        torch.save(twins.ours.state_dict(), file)
        plain = io.BytesIO()
        torch.save(twins.whole.state_dict(), plain)
        assert len(file.getvalue()) == len(
            plain.getvalue()
        )  # not all shared memory for each tensor
        file.seek(0)
        for name, tensor in torch.load(file, weights_only=True).items():
            assert torch.equal(tensor, twins.ours.state_dict()[name])
