"""The expectations of torch's own tests of optimizers: its entry for NAdam, run against ours.

The entry is read from the source of torch.testing._internal.common_optimizers, as importing it
takes seconds and packages of its own.

What applies:

    optim_inputs, all for CPU           trained against torch.optim.NAdam
    optim_inputs with capturable        refused, as torch.optim.NAdam does on a CPU (in step);
                                        trained without the flag
    optim_error_inputs, all             same type; our words for hyperparameters
    scheduler_inputs, all               trained against torch.optim.NAdam
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
import itertools
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch.nn import Parameter

from shardopt.errors import HyperparamsError
from shardopt.torch import NAdam
from tests.support.errors import BOTH_WAYS, POLICY, errs, refused
from tests.support.torch_models import Twins, assert_same, params_of, raised_everywhere

pytestmark = pytest.mark.mpi


def load_entry():
    """The OptimizerInfo of NAdam, without what says which of torch's tests to skip."""
    folder = Path(importlib.util.find_spec("torch").origin).parent
    path = folder / "testing/_internal/common_optimizers.py"
    if not path.exists():
        pytest.skip(f"this torch has no {path.name}", allow_module_level=True)
    wanted = {
        *("OptimizerInput", "OptimizerErrorEnum", "ErrorOptimizerInput", "OptimizerInfo"),
        *("get_error_inputs_for_all_optims", "_get_device_type", "CUDA_CONFIG_GPUS"),
        *("optim_inputs_func_nadam", "optim_error_inputs_func_nadam"),
    }
    tree, parts = ast.parse(path.read_text(encoding="utf-8")), []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        names = {getattr(target, "id", getattr(target, "name", None)) for target in targets}
        if names & wanted:
            parts.append(node)
    entry = next(node for node in ast.walk(tree) if is_entry(node))
    entry.keywords = [word for word in entry.keywords if word.arg not in ("skips", "decorators")]
    schedulers = vars(torch.optim.lr_scheduler)
    namespace = {"torch": torch, "Any": Any, "Enum": Enum, "Parameter": Parameter}
    namespace |= {"Optimizer": torch.optim.Optimizer, "Tensor": torch.Tensor}
    namespace |= {"DecorateInfo": object, "NAdam": torch.optim.NAdam, **schedulers}
    exec(compile(ast.Module(parts, []), path, "exec"), namespace)
    info = eval(compile(ast.Expression(entry), path, "eval"), namespace)
    return info, namespace


def is_entry(node):
    """Whether a node of the syntax tree reads OptimizerInfo(NAdam, ...)."""
    return (
        isinstance(node, ast.Call)
        and getattr(node.func, "id", None) == "OptimizerInfo"
        and getattr(node.args[0], "id", None) == "NAdam"
    )


INFO, NAMESPACE = load_entry()
INPUTS = INFO.optim_inputs_func(device="cpu")
CUDA_INPUTS = [
    each for each in INFO.optim_inputs_func(device="cuda") if each.kwargs.get("capturable")
]
ERRORS = INFO.optim_error_inputs_func(device="cpu", dtype=torch.float64)


def labels(inputs):
    return [f"{index} {each.desc}" for index, each in enumerate(inputs)]


def linear_twins(comm, **settings):
    def model():
        torch.manual_seed(0)
        return torch.nn.Linear(5, 3)

    return Twins(comm, model, **settings)


def test_the_entry_is_as_the_table_says():
    assert len(INPUTS) >= 7
    assert len(CUDA_INPUTS) >= 4
    assert len(ERRORS) >= 8
    assert set(INFO.supported_impls) == {"foreach", "differentiable"}
    assert INFO.supports_complex
    assert INFO.supports_param_groups
    assert INFO.has_capturable_arg
    assert not INFO.supports_sparse
    assert not INFO.step_requires_closure
    assert not INFO.supports_fused_on


@pytest.mark.parametrize("given", INPUTS, ids=labels(INPUTS))
def test_twenty_steps_with_every_set_of_options(comm, given):
    with linear_twins(comm, **given.kwargs) as twins:
        for _ in range(20):
            twins.step()
        twins.assert_same()


@pytest.mark.parametrize("given", CUDA_INPUTS, ids=labels(CUDA_INPUTS))
def test_options_for_cuda_graphs_are_refused_and_the_rest_of_them_trains(comm, given):
    with refused(comm, HyperparamsError, "capturable must be False; got True."):
        NAdam([Parameter(torch.ones(3))], comm=comm, policy=POLICY, **given.kwargs)
    settings = {**given.kwargs, "capturable": False}
    if "lr" in settings:  # torch computes 1 - lr * weight_decay in the dtype of lr
        settings["lr"] = settings["lr"].double()
    with linear_twins(comm, **settings) as twins:
        for _ in range(20):
            twins.step()
        twins.assert_same()


@pytest.mark.parametrize(
    "given", ERRORS, ids=labels([each.optimizer_error_input for each in ERRORS])
)
@BOTH_WAYS
def test_every_error_is_of_torchs_type_on_all_ranks(comm, given, alone):
    assert given.error_on is NAMESPACE["OptimizerErrorEnum"].CONSTRUCTION_ERROR
    bad = given.optimizer_error_input
    params = bad.params
    if params is None:
        params = [Parameter(torch.ones(3, 2)), Parameter(torch.ones(2))]
    with pytest.raises(given.error_type):
        torch.optim.NAdam(params, **bad.kwargs)
    params, settings = (
        (params, bad.kwargs) if errs(comm, alone) else ([Parameter(torch.ones(3, 2))], {})
    )
    with pytest.raises(given.error_type) as caught:
        NAdam(params, comm=comm, policy=POLICY, **settings)
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
