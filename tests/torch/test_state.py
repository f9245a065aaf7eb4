"""State: files that torch.save wrote, torch.optim.NAdam's own, and back, with the run going on."""

import copy
import io

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from shardopt.errors import CheckpointError
from shardopt.torch import NAdam
from tests.support.errors import BOTH_WAYS, POLICY, errs, is_last, refused
from tests.support.torch_models import Twins, everything, params_of

pytestmark = pytest.mark.mpi


class Mixed(torch.nn.Module):
    """Parameters of several shapes and dtypes, one of which no loss reaches."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        self.matrix = self.parameter(rng.standard_normal((40, 30)))
        self.scalar = self.parameter(rng.standard_normal(()))
        self.empty = self.parameter(np.zeros((0, 3)))
        self.wave = self.parameter(rng.standard_normal(9) + 1j * rng.standard_normal(9))
        self.unused = self.parameter(rng.standard_normal(5))
        self.number = self.parameter(np.array(0.5 - 0.25j))

    @staticmethod
    def parameter(value):
        return torch.nn.Parameter(torch.tensor(value))


def mixed_loss(model, step, rank):
    factor = 1.0 + 0.1 * step + 0.01 * rank
    real = (model.matrix.square().sum() + model.scalar.exp()) * factor + model.empty.sum()
    return real + ((model.wave - 1j).abs().square().sum() + model.number.abs()) * factor


PARAMS = {
    "plain": lambda model: model.parameters(),
    "named": lambda model: model.named_parameters(),
    "named groups": lambda model: [
        {"params": [("matrix", model.matrix), ("wave", model.wave)], "lr": 0.02},
        {"params": [("scalar", model.scalar), ("unused", model.unused)], "betas": (0.8, 0.9)},
        {"params": [("empty", model.empty), ("number", model.number)], "weight_decay": 0.1},
    ],
}
FORMS = pytest.mark.parametrize("form", PARAMS)


def mixed_twins(comm, form="plain", **settings):
    return Twins(comm, Mixed, PARAMS[form], mixed_loss, lr=0.05, **settings)


def through_file(value):
    """Return an object after torch.save and torch.load with weights_only=True."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@FORMS
def test_torch_takes_over_in_the_middle_of_a_run(comm, form):
    with mixed_twins(comm, form) as twins:
        for _ in range(3):
            twins.step()
        saved = through_file(comm.bcast(twins.opt.gather_state_dict()))
        model = copy.deepcopy(twins.ours)
        opt = torch.optim.NAdam(PARAMS[form](model))
        opt.load_state_dict(saved)
        assert opt.param_groups[0]["lr"] == twins.opt.param_groups[0]["lr"]
        twins.whole, twins.whole_opt = model, opt
        for _ in range(3):
            twins.step()
        twins.assert_same()
        assert {int(opt.state[param]["step"]) for param in params_of(opt)} == {0, 6}
        names = [group.get("param_names") for group in opt.param_groups]
        assert names == [group.get("param_names") for group in twins.opt.param_groups]


@FORMS
@pytest.mark.parametrize("where", ["rank 0", "last rank", "every rank"])
def test_the_run_of_torch_goes_on_sharded(comm, form, where):
    model = Mixed()
    whole_opt = torch.optim.NAdam(PARAMS[form](model), lr=0.03)
    for step in range(3):
        whole_opt.zero_grad()
        mixed_loss(model, step, 0).backward()
        whole_opt.step()
    saved = through_file(whole_opt.state_dict())
    assert len(saved["state"]) == 5  # nothing for the parameter that never stepped
    here = {"rank 0": comm.rank == 0, "last rank": is_last(comm), "every rank": True}[where]
    with mixed_twins(comm, form) as twins:
        twins.ours.load_state_dict(model.state_dict())
        twins.whole, twins.whole_opt = model, whole_opt
        twins.opt.load_state_dict(saved if here else None)
        assert twins.opt.param_groups[0]["lr"] == whole_opt.param_groups[0]["lr"]
        for _ in range(3):
            twins.step()
        twins.assert_same()


@pytest.mark.parametrize("form", ["plain", "named groups"])
def test_the_gathered_state_is_what_torch_itself_would_have(comm, form):
    with mixed_twins(comm, form) as twins:
        for _ in range(3):
            twins.step()
        state = comm.bcast(twins.opt.gather_state_dict())
        expected = twins.whole_opt.state_dict()
        for index, theirs in expected["state"].items():
            ours = state["state"][index]
            assert list(ours) == list(theirs)
            for key, value in theirs.items():
                dtype = torch.float64 if key == "mu_product" else ours[key].dtype
                assert ours[key].dtype == (torch.float32 if key == "step" else dtype)
                assert ours[key].shape == value.shape
                torch.testing.assert_close(ours[key].to(value.dtype), value, rtol=1e-11, atol=1e-13)
        assert state["param_groups"] == [
            {**group, "variant": "torch"} for group in expected["param_groups"]
        ]


@pytest.mark.parametrize("how", ["views", "gathered"])
@pytest.mark.parametrize("form", ["plain", "named groups"])
def test_a_run_from_a_file_is_the_uninterrupted_run_bit_for_bit(comm, how, form):
    with mixed_twins(comm, form, weight_decay=0.1) as twins:
        for _ in range(3):
            twins.step()
        opt = twins.opt
        saved = opt.state_dict() if how == "views" else comm.bcast(opt.gather_state_dict())
        saved, weights = through_file(saved), through_file(twins.ours.state_dict())
        for _ in range(3):
            twins.step()
        expected = everything(opt)
    model = Mixed()
    model.load_state_dict(weights)
    with NAdam(PARAMS[form](model), comm=comm, policy=POLICY) as opt:
        opt.load_state_dict(saved)
        for step in range(3, 6):
            opt.zero_grad()
            mixed_loss(model, step, comm.rank).backward()
            opt.step()
        assert everything(opt) == expected


def test_gathered_state_dicts_and_deep_copies_are_the_callers_own(comm):
    with mixed_twins(comm) as twins:
        twins.step()
        saved = copy.deepcopy(twins.opt.state_dict()), comm.bcast(twins.opt.gather_state_dict())
        before = copy.deepcopy(saved)
        twins.step()
        for ours, theirs in zip(saved, before, strict=True):
            assert repr(ours) == repr(theirs)
            assert repr(ours["state"]) != repr(twins.opt.state_dict()["state"])


def test_loading_shares_nothing_with_what_was_loaded(comm):
    with mixed_twins(comm) as twins:
        twins.step()
        lr = torch.tensor(0.25)
        twins.opt.param_groups[0]["lr"] = lr
        saved = comm.bcast(twins.opt.gather_state_dict())
        before = copy.deepcopy(saved)
        twins.opt.load_state_dict(saved)
        twins.opt.param_groups[0]["lr"].fill_(0.125)
        twins.step()
        assert repr(saved) == repr(before)
        assert lr == 0.25


def test_gathering_twice_gives_the_same(comm):
    with mixed_twins(comm) as twins:
        for _ in range(2):
            twins.step()
        first, second = twins.opt.gather_state_dict(), twins.opt.gather_state_dict()
        assert repr(first) == repr(second)
        last = comm.size - 1
        third = twins.opt.gather_state_dict(root=last)
        assert (third is not None) == is_last(comm)
        assert repr(comm.bcast(first)) == repr(comm.bcast(third, last))


OLDER = ["maximize", "foreach", "capturable", "differentiable", "decoupled_weight_decay"]


def test_an_older_state_dict_with_numbers_for_tensors(comm):
    with mixed_twins(comm) as twins:
        for _ in range(2):
            twins.step()
        saved = copy.deepcopy(twins.whole_opt.state_dict())
        for entry in saved["state"].values():
            for key in ("step", "mu_product"):
                entry[key] = float(entry[key])
        for group in saved["param_groups"]:
            for key in OLDER:
                del group[key]
        twins.opt.load_state_dict(saved)
        twins.step()
        twins.assert_same()
        assert twins.opt.param_groups[0]["maximize"] is False


def test_moments_in_any_memory_layout(comm):
    def model():
        torch.manual_seed(0)
        return torch.nn.Conv2d(3, 4, 3)

    def loss(model, step, rank):
        return model(torch.full((1, 3, 4, 4), 1.0 + step)).square().sum()

    twin = model().to(memory_format=torch.channels_last)
    opt = torch.optim.NAdam(twin.parameters())
    loss(twin, 0, 0).backward()
    opt.step()
    moment = opt.state[twin.weight]["exp_avg"]
    assert not moment.is_contiguous()
    with NAdam(model().parameters(), comm=comm, policy=POLICY) as ours:
        ours.load_state_dict(opt.state_dict())
        gathered = comm.bcast(ours.gather_state_dict())
    assert torch.equal(gathered["state"][0]["exp_avg"], moment)


def test_float32_hands_over_too(comm):
    torch.set_default_dtype(torch.float32)
    with Twins(comm, lr=0.01) as twins:
        for _ in range(3):
            twins.step()
        model = copy.deepcopy(twins.ours)
        opt = torch.optim.NAdam(model.parameters())
        opt.load_state_dict(through_file(comm.bcast(twins.opt.gather_state_dict())))
        assert opt.state[model[0].weight]["mu_product"].dtype == torch.float32
        twins.whole, twins.whole_opt = model, opt
        for _ in range(3):
            twins.step()
        twins.assert_same(rtol=1e-5, atol=1e-6)


def change(state, key, value):
    state["state"][0][key] = value
    return state


MISFITS = {
    "shape": (lambda state: change(state, "exp_avg", torch.ones(3)), "exp_avg of 'matrix'"),
    "int": (lambda state: change(state, "exp_avg", torch.ones(2, dtype=int)), "be floating point"),
    "step": (lambda state: change(state, "step", torch.tensor(0.5)), "be a whole number"),
    "sparse": (
        lambda state: change(state, "exp_avg", torch.ones(40, 30).to_sparse()),
        "state_dict must have the form of torch's",
    ),
    "groups": (lambda state: {**state, "param_groups": []}, "param_groups must be 1; got 0"),
    "other keys": (lambda state: {"model": state}, "have the key 'state'"),
    "no dict": (lambda state: [state], "have the form of torch's; got list. Pass what"),
}


@pytest.mark.parametrize("case", MISFITS)
@BOTH_WAYS
def test_what_does_not_fit_is_loaded_on_no_rank(comm, case, alone):
    spoil, told = MISFITS[case]
    with mixed_twins(comm) as twins:
        twins.step()
        before = everything(twins.opt)
        saved = comm.bcast(twins.opt.gather_state_dict())
        with refused(comm, CheckpointError, told, alone=alone):
            twins.opt.load_state_dict(spoil(saved) if errs(comm, alone) else saved)
        assert everything(twins.opt) == before


def test_a_state_from_cuda_graphs_loads(comm):
    with mixed_twins(comm) as twins:
        twins.step()
        saved = comm.bcast(twins.opt.gather_state_dict())
        saved["param_groups"][0]["capturable"] = True
        twins.opt.load_state_dict(saved)
        twins.step()
        twins.assert_same()
