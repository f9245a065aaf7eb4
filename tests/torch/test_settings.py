"""Settings that are changed on the way, and what users and tools attach to an optimizer."""

import copy
import io

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from shardopt.checkpoint import load, save
from shardopt.errors import CheckpointWarning
from shardopt.torch import NAdam
from tests.support.errors import POLICY, warned
from tests.support.torch_models import Twins, make_model, params_of

pytestmark = pytest.mark.mpi


def test_a_warm_up_of_the_clip(comm):
    norms = [0.001, 0.01, 0.1, None, 0.01]
    with Twins(comm, lr=0.05) as twins:
        for norm in norms:
            twins.opt.max_grad_norm = norm
            for opt in twins.both:
                opt.zero_grad()
            twins.backward()
            if norm is not None:
                torch.nn.utils.clip_grad_norm_(twins.whole.parameters(), norm)
            for opt in twins.both:
                opt.step()
            twins.assert_same()


def test_defaults_are_one_dict_that_can_be_edited_and_set(comm):
    with Twins(comm, params=lambda model: model[0].parameters(), lr=0.05) as twins:
        opt, others = twins.opt, [(model[2], model[3]) for model in twins.models]
        assert opt.defaults is opt.core.defaults
        for each in twins.both:
            each.defaults["lr"] = 0.25
        for each, layers in zip(twins.both, others, strict=True):
            each.add_param_group({"params": layers[0].parameters()})
            each.defaults = {**each.defaults, "lr": 0.125, "eps": 1e-3}
            each.add_param_group({"params": layers[1].parameters()})
        assert opt.defaults is opt.core.defaults
        for _ in range(2):
            twins.step()
        twins.assert_same()
        assert [group["lr"] for group in opt.param_groups] == [0.05, 0.25, 0.125]


def test_tools_may_attach_what_they_like(comm):
    with NAdam(make_model().parameters(), comm=comm, policy=POLICY) as opt:
        torch.optim.lr_scheduler.StepLR(opt, 1)  # wraps step, too
        steps, step = [], opt.step
        opt.step = lambda *args: steps.append(step(*args))
        for name in ("_step_count", "_opt_called", "grad_scale", "found_inf", "foo", "count"):
            setattr(opt, name, None)
        params_of(opt)[0].grad.fill_(1.0)
        opt.step()
        assert len(steps) == 1
        for name in ("lr", "betas", "foreach", "comm", "policy", "last_step", "partition", "core"):
            with pytest.raises(AttributeError, match=f"{name} of an optimizer must not be assign"):
                setattr(opt, name, None)
        for name, meant in ("max_grad_nrm", "max_grad_norm"), ("beta", "betas"):
            with pytest.raises(AttributeError, match=f"Did you mean {meant}"):
                setattr(opt, name, None)


# -- learning rates that are tensors ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "requires_grad"), [((), False), ((1,), True)])
def test_a_tensor_is_read_at_every_step_and_saved_as_a_number(
    comm, mpi_tmp_path, dtype, shape, requires_grad
):
    lr = torch.full(shape, 0.25, dtype=dtype, requires_grad=requires_grad)
    betas = torch.tensor(0.5), 0.9
    settings = iter([{"lr": lr, "betas": betas}, {"lr": 0.25, "betas": (0.5, 0.9)}])

    def set_rate(value):
        with torch.no_grad():
            lr.fill_(value)
        twins.whole_opt.param_groups[0]["lr"] = value

    def params(model):
        return [{"params": list(model.named_parameters()), **next(settings)}]

    with Twins(comm, params=params) as twins:
        opt = twins.opt
        group = opt.param_groups[0]
        assert group["lr"] is lr
        assert group["betas"][0] is betas[0]
        twins.step()
        set_rate(0.125)
        twins.step()
        twins.assert_same()
        assert opt.state_dict()["param_groups"][0]["lr"] is lr  # as in torch
        torch.save(copy.deepcopy(opt.state_dict()), io.BytesIO())
        save(mpi_tmp_path / "a", opt)
        set_rate(4.0)
        load(mpi_tmp_path / "a", opt)
        assert group["lr"] is lr
        assert lr == 0.125
        set_rate(0.5)
        twins.step()
        twins.assert_same()


def test_what_cannot_be_saved_is_named_and_left_alone(comm, mpi_tmp_path):
    with NAdam(make_model().parameters(), comm=comm, policy=POLICY) as opt:
        group = opt.param_groups[0]
        schedule = group["schedule"] = object()
        group["factors"] = torch.ones(2, dtype=torch.bfloat16)
        group["label"] = np.str_("wide")
        with warned(comm, CheckpointWarning, r"leaves out param_groups\[0\]\['schedule'\], a obje"):
            save(mpi_tmp_path / "a", opt)
        group["label"] = "narrow"
        load(mpi_tmp_path / "a", opt)
        assert group["schedule"] is schedule
        assert group["label"] == "wide"
        assert list(group["factors"]) == [1, 1]


def test_a_load_does_not_compare_what_only_this_process_knows(comm):
    with NAdam(make_model().parameters(), comm=comm, policy=POLICY) as opt:
        opt.param_groups[0]["schedule"] = object()  # at another address on every rank
        opt.load_state_dict(opt.state_dict())
        parts = opt.state_dict() if comm.rank == 0 else None
        opt.load_state_dict(parts)
