"""Hooks that wait for parameters in forward, on one node, where none is ever on its way."""

import copy

import pytest

import shardopt.numpy
from shardopt import ShardPolicy
from shardopt.errors import HyperparamsError
from tests.support.frameworks import require

torch = require("torch")

from torch import nn  # noqa: E402

from shardopt.torch import NAdam  # noqa: E402
from shardopt.torch.forward import ForwardHooks  # noqa: E402

POLICY = ShardPolicy(prefetch_params=True)


def test_it_changes_nothing_on_one_node(comm):
    model = nn.Linear(3, 3)
    with NAdam(model, comm=comm, policy=POLICY) as opt:
        before = model.weight.detach().clone()
        nn.functional.linear(torch.ones(1, 3), model.weight).sum().backward()
        opt.step()
        opt.wait_params()
        assert not torch.equal(model.weight, before)
        assert not model._forward_pre_hooks


UNHOOKED = {
    "list": (lambda model: list(model.parameters()), "params is a module, .*; got a list"),
    "generator": (lambda model: model.parameters(), "params is a module, .*; got a generator"),
    "wrapper": (lambda model: torch.compile(model, backend="eager"), "compiled model"),
    "part": (lambda model: nn.Sequential(torch.compile(model, backend="eager")), "compiled model"),
    "in place": (lambda model: model.compile(backend="eager") or model, "compiled model"),
    "script": (lambda model: torch.jit.script(model), "compiled model"),
}


@pytest.mark.parametrize("kind", UNHOOKED)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
def test_what_has_no_hooks_is_refused(comm, kind):
    make, rule = UNHOOKED[kind]
    with pytest.raises(HyperparamsError, match=rf"policy.prefetch_params must be False .*{rule}"):
        NAdam(make(nn.Linear(3, 3)), comm=comm, policy=POLICY)


def test_numpy_is_refused(comm):
    param = shardopt.numpy.Parameter(torch.ones(3).numpy())
    with pytest.raises(HyperparamsError, match="does not report what forward needs"):
        shardopt.numpy.NAdam([param], comm=comm, policy=POLICY)


def test_it_needs_the_thread_of_overlap():
    with pytest.raises(HyperparamsError, match="prefetch_params must be False with overlap=False"):
        ShardPolicy(prefetch_params=True, overlap=False)


class Listener:
    """Notes who has waited for what."""

    def __init__(self):
        self.calls = []

    def need(self, params):
        self.calls.append(len(params))

    def finish(self):
        self.calls.append("all")


def listen(model):
    hooks, listener = ForwardHooks(model), Listener()
    hooks.attach(listener)
    return hooks, listener


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_a_model_that_is_compiled_later_is_refused_when_it_runs():
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.ones(1, 3)
    kept = listen(model)
    for run in (
        lambda: torch.compile(model, backend="eager")(x),
        lambda: torch.jit.trace(model, x),
    ):
        with pytest.raises(HyperparamsError, match="False with a compiled model"):
            run()
    assert kept[1].calls == []


def test_copies_wait_for_nothing_and_hooks_can_be_removed():
    model = nn.Sequential(nn.Linear(3, 3))
    hooks, listener = listen(model)
    twin = copy.deepcopy(model)
    assert set(listener.calls) == {"all"}
    listener.calls.clear()
    twin(torch.ones(1, 3))
    twin.state_dict()
    assert listener.calls == []
    model(torch.ones(1, 3))
    assert listener.calls == [2]
    listener.calls.clear()
    attributes = list(vars(model))
    hooks.attach(None)
    model(torch.ones(1, 3))
    copy.deepcopy(model).load_state_dict(model.state_dict())
    assert listener.calls == []
    assert list(vars(model)) == attributes[1:] == list(vars(nn.Sequential()))
