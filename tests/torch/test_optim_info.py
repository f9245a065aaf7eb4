"""The expectations of torch's own tests of optimizers: its entries, run against ours.

An entry is read from the source of torch.testing._internal.common_optimizers, as importing it
takes seconds and packages of its own.

What applies:

    optim_inputs, all for CPU           trained against torch's optimizer
    optim_inputs with capturable        refused, as torch's optimizers do on a CPU (in step);
                                        trained without the flag
    optim_inputs with amsgrad           refused; trained without the flag
    optim_error_inputs, all             same type; our words for hyperparameters. Those of Adam that
                                        only torch's foreach cannot do are trained
    scheduler_inputs, all of NAdam's    trained against torch.optim.NAdam
    supported_impls: fused              accepted, changes nothing
    supported_impls: foreach            accepted, changes nothing (test_interface.py)
    supported_impls: differentiable     refused: the update is not made of torch's operations
    not_og_supported_flags: maximize    trained against torch.optim.NAdam
    supports_complex, param_groups      test_params.py, test_interface.py
    supports_sparse = False             refused, unless autograd can add it (test_params.py)
    supports_multiple_devices           a rank trains on one: tests/torch/test_devices.py

Of torch's test_optim.py, which wheels do not have: forloop goes right direction, step hooks, state
dict hooks, state dict deterministic, state dict from an older version, numbers for tensors in it,
grads stay None, deepcopy (refused) are here or in the files above; foreach and fused against the
loop, CUDA graphs and peak memory have no counterpart.
"""

import ast
import importlib.util
import inspect
import itertools
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch.nn import Parameter

import shardopt.torch
from shardopt.errors import CheckpointError, HyperparamsError, RankMismatchError
from shardopt.torch import NAdam
from tests.support.errors import BOTH_WAYS, POLICY, errs, refused
from tests.support.torch_models import Twins, assert_same, params_of, raised_everywhere

pytestmark = pytest.mark.mpi


NAMES = ["NAdam", "Adam", "AdamW", "RAdam"]
WORKS_HERE = (
    "lr as Tensor doesn't work with foreach & not capturable",
    "betas must be either both floats or both Tensors",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
)
"""What torch refuses as its foreach cannot read such values."""


def load_entries():
    """The OptimizerInfo of each optimizer, without what says which of torch's tests to skip."""
    folder = Path(importlib.util.find_spec("torch").origin).parent
    path = folder / "testing/_internal/common_optimizers.py"
    if not path.exists():
        pytest.skip(f"this torch has no {path.name}", allow_module_level=True)
    wanted = {
        *("OptimizerInput", "OptimizerErrorEnum", "ErrorOptimizerInput", "OptimizerInfo"),
        *("get_error_inputs_for_all_optims", "_get_device_type", "CUDA_CONFIG_GPUS"),
        *(f"optim_inputs_func_{name.lower()}" for name in NAMES),
        *(f"optim_error_inputs_func_{name.lower()}" for name in NAMES),
    }
    tree, parts = ast.parse(path.read_text(encoding="utf-8")), []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        names = {getattr(target, "id", getattr(target, "name", None)) for target in targets}
        if names & wanted:
            parts.append(node)
    schedulers = vars(torch.optim.lr_scheduler)
    namespace = {"torch": torch, "Any": Any, "Enum": Enum, "Parameter": Parameter}
    namespace |= {"Optimizer": torch.optim.Optimizer, "Tensor": torch.Tensor}
    namespace |= {"DecorateInfo": object, **schedulers}
    namespace |= {name: getattr(torch.optim, name) for name in NAMES}
    exec(compile(ast.Module(parts, []), path, "exec"), namespace)
    infos = {}
    for name in NAMES:
        entry = next(node for node in ast.walk(tree) if is_entry(node, name))
        words = [word for word in entry.keywords if word.arg not in ("skips", "decorators")]
        entry.keywords = words
        infos[name] = eval(compile(ast.Expression(entry), path, "eval"), namespace)
    return infos, namespace


def is_entry(node, name):
    """Whether a node of the syntax tree reads OptimizerInfo(name, ...)."""
    return (
        isinstance(node, ast.Call)
        and getattr(node.func, "id", None) == "OptimizerInfo"
        and getattr(node.args[0], "id", None) == name
    )


INFOS, NAMESPACE = load_entries()
INFO = INFOS["NAdam"]
INPUTS = INFO.optim_inputs_func(device="cpu")


NUM_ERRORS_OF_ALL = len(NAMESPACE["get_error_inputs_for_all_optims"]("cpu", torch.float64))


def is_refused(kwargs):
    return bool(kwargs.get("capturable") or kwargs.get("amsgrad"))


ALL_INPUTS = [
    (name, each)
    for name, info in INFOS.items()
    for each in info.optim_inputs_func(device="cpu")
    if not is_refused(each.kwargs)
]
REFUSED_INPUTS = [
    (name, each)
    for name, info in INFOS.items()
    for each in info.optim_inputs_func(device="cuda")
    if is_refused(each.kwargs)
]
ERRORS = [
    (name, each)
    for name, info in INFOS.items()
    for number, each in enumerate(info.optim_error_inputs_func(device="cpu", dtype=torch.float64))
    if name == "NAdam" or number >= NUM_ERRORS_OF_ALL
]


def names_of(pairs):
    inputs = [(name, getattr(each, "optimizer_error_input", each)) for name, each in pairs]
    return [f"{name} {number} {given.desc}" for number, (name, given) in enumerate(inputs)]


def labels(inputs):
    return [f"{index} {each.desc}" for index, each in enumerate(inputs)]


def linear_twins(comm, **settings):
    def model():
        torch.manual_seed(0)
        return torch.nn.Linear(5, 3)

    return Twins(comm, model, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_the_entries_are_as_the_table_says(name):
    info = INFOS[name]
    is_adam = name in ("Adam", "AdamW")
    assert sum(each == name for each, _ in ALL_INPUTS) >= (4 if is_adam else 6)
    assert sum(each == name for each, _ in REFUSED_INPUTS) >= 4
    assert sum(each == name for each, _ in ERRORS) >= {"NAdam": 8, "RAdam": 2}.get(name, 6)
    assert set(info.supported_impls) - {"fused"} == {"foreach", "differentiable"}
    assert ("fused" in info.supported_impls) == is_adam
    assert info.supports_complex
    assert info.supports_param_groups
    assert info.has_capturable_arg
    assert not info.supports_sparse
    assert not info.step_requires_closure


@pytest.mark.parametrize("name", NAMES)
def test_the_signature_is_torchs_and_more(name):
    ours, theirs = (
        inspect.signature(getattr(module, name)).parameters
        for module in (shardopt.torch, torch.optim)
    )
    assert set(theirs) <= set(ours)
    for key, param in theirs.items():
        assert (ours[key].default, ours[key].kind) == (param.default, param.kind)
    positional = [key for key, param in ours.items() if param.kind == param.POSITIONAL_OR_KEYWORD]
    assert positional == list(theirs)[: len(positional)]


@pytest.mark.parametrize(("name", "given"), ALL_INPUTS, ids=names_of(ALL_INPUTS))
def test_twenty_steps_with_every_set_of_options(comm, name, given):
    with linear_twins(comm, name=name, **given.kwargs) as twins:
        for _ in range(20):
            twins.step()
        twins.assert_same()


@pytest.mark.parametrize(("name", "given"), REFUSED_INPUTS, ids=names_of(REFUSED_INPUTS))
def test_options_that_a_step_does_not_have_are_refused_and_the_rest_trains(comm, name, given):
    settings = dict(given.kwargs)
    flag = "amsgrad" if settings.get("amsgrad") else "capturable"
    with refused(comm, HyperparamsError, f"{flag} must be False; got True."):
        make = getattr(shardopt.torch, name)
        make([Parameter(torch.ones(3))], comm=comm, policy=POLICY, **given.kwargs)
    settings.pop("amsgrad", None)
    settings["capturable"] = False
    if "lr" not in settings:
        return  # the others have trained
    settings["lr"] = settings["lr"].double()  # torch computes 1 - lr * weight_decay in its dtype
    if "betas" in settings:
        settings["betas"] = tuple(beta.item() for beta in settings["betas"])
    with linear_twins(comm, name=name, **settings) as twins:
        for _ in range(20):
            twins.step()
        twins.assert_same()


@pytest.mark.parametrize(("name", "given"), ERRORS, ids=names_of(ERRORS))
@BOTH_WAYS
def test_every_error_is_of_torchs_type_on_all_ranks(comm, name, given, alone):
    assert given.error_on is NAMESPACE["OptimizerErrorEnum"].CONSTRUCTION_ERROR
    bad, make = given.optimizer_error_input, getattr(shardopt.torch, name)
    params = bad.params
    if params is None:
        params = [Parameter(torch.ones(3, 2)), Parameter(torch.ones(2))]
    with pytest.raises(given.error_type):
        getattr(torch.optim, name)(params, **bad.kwargs)
    if bad.desc in WORKS_HERE:
        with make(params, comm=comm, policy=POLICY, **bad.kwargs) as opt:
            sum(param.sum() for param in params).backward()
            opt.step()
        return
    params, settings = (
        (params, bad.kwargs) if errs(comm, alone) else ([Parameter(torch.ones(3, 2))], {})
    )
    with pytest.raises(given.error_type) as caught:
        make(params, comm=comm, policy=POLICY, **settings)
    assert comm.allgather(str(caught.value)) == [str(caught.value)] * comm.size


@pytest.mark.parametrize("given", INPUTS, ids=labels(INPUTS))
@pytest.mark.parametrize("number", range(1 + len(INFO.scheduler_inputs[0])))
def test_the_loss_goes_down_under_every_scheduler(comm, given, number):
    def model():
        return torch.nn.ParameterDict(
            {
                "weight": torch.linspace(-1, 1, 50).reshape(10, 5),
                "bias": torch.linspace(0, 1, 10),
                "input": torch.linspace(-2, 2, 5),
            }
        )

    def loss(model, step, rank):
        return (model["weight"] @ model["input"] + model["bias"]).square().sum()

    with Twins(comm, model, loss=loss, **given.kwargs) as twins:
        makers = INFO.scheduler_inputs[0]
        makers = makers[number : number + 1] or makers  # one of them, at last all together
        schedulers = [[make(opt) for make in makers] for opt in twins.both]
        first = loss(twins.ours, 0, 0).item()
        for _ in range(20):
            twins.step()
            for scheduler in itertools.chain(*schedulers):
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(1.0) if plateau else scheduler.step()
        twins.assert_same()
        change = loss(twins.ours, 0, 0).item() - first
        assert change > 0 if given.kwargs.get("maximize") else change < 0
        lrs = [opt.param_groups[0]["lr"] for opt in twins.both]
        assert lrs[0] == lrs[1] < twins.opt.defaults["lr"]


def test_defaults_reach_groups_that_leave_them_out(comm):
    with linear_twins(comm, lr=0.5) as twins:
        for opt in twins.both:
            opt.add_param_group({"params": Parameter(torch.ones(3)), "eps": 0.1})
        assert [(group["lr"], group["eps"]) for group in twins.opt.param_groups] == [
            (group["lr"], group["eps"]) for group in twins.whole_opt.param_groups
        ]
        assert_same(*map(params_of, twins.both))


def test_an_unknown_argument_is_a_type_error(comm):
    raised_everywhere(
        comm, TypeError, "amsgrad", lambda: NAdam([Parameter(torch.ones(3))], amsgrad=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_to_torch_and_back(comm, name):
    with linear_twins(comm, name=name, lr=0.01) as twins, linear_twins(comm, name=name) as others:
        for _ in range(3):
            twins.step()
        ours, theirs = twins.opt.gather_state_dict(), twins.whole_opt.state_dict()
        if ours is not None:
            keys = [list(entry) for entry in theirs["state"].values()]
            assert [sorted(entry) for entry in ours["state"].values()] == list(map(sorted, keys))
            assert set(theirs["param_groups"][0]) <= set(ours["param_groups"][0])
        others.whole_opt.load_state_dict(comm.bcast(ours))
        others.opt.load_state_dict(theirs)
        for model, source in zip(others.models, twins.models, strict=True):
            model.load_state_dict(source.state_dict())
        others.steps = twins.steps
        for _ in range(3):
            step = next(twins.steps)
            for each in (twins, others):
                for opt in each.both:
                    opt.zero_grad()
                each.backward(step)
                for opt in each.both:
                    opt.step()
        twins.assert_same()
        others.assert_same()
        assert_same(params_of(twins.opt), params_of(others.opt))
        assert others.opt.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize(
    ("name", "other", "told"),
    [
        ("NAdam", "AdamW", "param_groups[0] must be NAdam's, which has no amsgrad"),
        ("RAdam", "Adam", "param_groups[0] must be RAdam's, which has no amsgrad"),
        ("AdamW", "NAdam", "the state must be AdamW's, which has no mu_product"),
        ("AdamW", "Adam", "decoupled_weight_decay must be True in AdamW; got False"),
    ],
)
def test_the_state_dict_of_another_optimizer_is_refused(comm, name, other, told):
    with linear_twins(comm, name=name) as twins:
        model = torch.nn.Linear(5, 3)
        theirs = getattr(torch.optim, other)(model.parameters())
        model(torch.ones(5)).sum().backward()
        theirs.step()
        with refused(comm, CheckpointError, told):
            twins.opt.load_state_dict(theirs.state_dict())
        with refused(comm, CheckpointError, "keys exp_avg"):
            twins.opt.load_state_dict(with_amsgrad(twins.whole_opt))
        twins.step()
        twins.assert_same()


def with_amsgrad(opt):
    """A state dict with the third moment of torch's amsgrad."""
    state_dict = opt.state_dict()
    for index, param in enumerate(params_of(opt)):
        entry = dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), torch.zeros_like(param))
        state_dict["state"][index] = {"step": torch.tensor(1.0), **entry}
    return state_dict


@pytest.mark.parametrize(
    ("name", "key", "value"), [("AdamW", "momentum_decay", 0.1), ("RAdam", "amsgrad", True)]
)
def test_a_hyperparameter_of_another_optimizer_is_refused(comm, name, key, value):
    told = f"{key} must be left out of the param groups of {name}"
    with linear_twins(comm, name=name) as twins:
        group = {"params": [Parameter(torch.ones(3))], key: value}
        with refused(comm, HyperparamsError, told, f"got {value}"):
            twins.opt.add_param_group(group)
        twins.opt.param_groups[0][key] = value
        with refused(comm, HyperparamsError, f"in param_groups[0], {told}"):
            twins.opt.step()
        twins.opt.param_groups[0][key] = 0  # asks for nothing
        twins.step()
        twins.assert_same()


def test_ranks_that_build_other_optimizers_are_told(comm):
    if comm.size == 1:
        return
    make = shardopt.torch.AdamW if comm.rank else shardopt.torch.NAdam
    raised_everywhere(
        comm,
        RankMismatchError,
        "AdamW()",
        lambda: make([Parameter(torch.ones(3))], comm=comm, policy=POLICY),
    )
