"""``opt.state`` and ``state_dict()`` are as torch's, so that any trainer saves and resumes."""

import copy
import io

import pytest

pytest.importorskip("torch")

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from shardopt.errors import CheckpointError
from shardopt.torch import NAdam
from tests.support.errors import POLICY, refused
from tests.support.torch_models import Twins, everything, loss_of, make_model, params_of
from tests.torch.test_state import Mixed, mixed_loss, mixed_twins, through_file

pytestmark = pytest.mark.mpi


def assert_same_entries(ours, theirs):
    """Entries must be as torch's; it has none for parameters that have never stepped."""
    for our_param, their_param in zip(params_of(ours), params_of(theirs), strict=True):
        entry, expected = ours.state[our_param], theirs.state.get(their_param)
        if not expected:
            assert float(entry["step"]) == 0
            continue
        assert list(entry) == list(expected)
        for key, value in expected.items():
            assert entry[key].dtype == (torch.float32 if key == "step" else value.dtype)
            assert entry[key].shape == value.shape
            torch.testing.assert_close(entry[key].to(value.dtype), value, rtol=1e-11, atol=1e-13)


def test_the_state_is_what_torch_has(comm):
    with mixed_twins(comm) as twins:
        entries = dict(twins.opt.state)
        assert isinstance(twins.opt.state, dict)
        assert len(entries) == 6
        for _ in range(3):
            twins.step()
            assert_same_entries(*twins.both)
        assert entries[twins.ours.wave]["exp_avg"].is_complex()
        assert entries[twins.ours.wave]["step"] == 3


def test_frozen_parameters_have_an_entry_once_they_step(comm):
    model = make_model()
    model[0].weight.requires_grad_(False)
    with NAdam(model.parameters(), comm=comm, policy=POLICY) as opt:
        assert model[0].weight not in opt.state
        assert opt.state.get(model[0].weight) is None
        assert 0 not in opt.state_dict()["state"]
        gathered = comm.bcast(opt.gather_state_dict())
        assert sorted(gathered["state"]) == [1, 2, 3, 4, 5]
        opt.load_state_dict(gathered)
        model[0].weight.requires_grad_(True)
        loss_of(model, 0, comm.rank).backward()
        opt.step()
        model[0].weight.requires_grad_(False)
        assert opt.state[model[0].weight]["step"] == 1
        assert sorted(opt.state_dict()["state"]) == [0, 1, 2, 3, 4, 5]


def test_a_file_is_as_large_as_torchs(comm):
    sizes = []
    with Twins(comm) as twins:
        twins.step()
        for opt in twins.both:
            file = io.BytesIO()
            torch.save(opt.state_dict(), file)
            sizes.append(len(file.getvalue()))
    assert sizes[0] <= sizes[1] + 1000


def resume(comm, load, num_steps=3):
    """Return what a run has in the end that goes on from what ``load`` puts into its optimizer."""
    model = Mixed()
    with NAdam(model.parameters(), comm=comm, policy=POLICY) as opt:
        load(model, opt)
        for step in range(num_steps, 2 * num_steps):
            opt.zero_grad()
            mixed_loss(model, step, comm.rank).backward()
            opt.step()
        return everything(opt)


def save_on_rank_0(comm, twins):
    """As HF's Trainer and nanoGPT do; every rank then reads the file."""
    saved = None
    if comm.rank == 0:
        saved = through_file({"model": twins.ours.state_dict(), "opt": twins.opt.state_dict()})
    saved = comm.bcast(saved)

    def load(model, opt):
        opt.load_state_dict(opt.state_dict())  # as accelerate does, to move it to a device
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])

    return load


def save_with_lightning(comm, twins):
    """Its state is moved to a device after loading, with dicts of the same class."""
    load = save_on_rank_0(comm, twins)

    def load_and_move(model, opt):
        load(model, opt)
        for param, entry in opt.state.items():
            moved = {key: value.to("cpu") for key, value in entry.items()}
            opt.state[param] = type(entry)(moved)

    return load_and_move


def save_with_dcp(comm, twins):
    """Its functions call parameters by names."""
    saved = copy.deepcopy(get_optimizer_state_dict(twins.ours, twins.opt))
    weights = copy.deepcopy(twins.ours.state_dict())

    def load(model, opt):
        model.load_state_dict(weights)
        set_optimizer_state_dict(model, opt, saved)

    return load


def save_with_dcp_as_full(comm, twins):
    """The same with its options for whole states."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = copy.deepcopy(get_optimizer_state_dict(twins.ours, twins.opt, options=options))
    weights = copy.deepcopy(twins.ours.state_dict())

    def load(model, opt):
        model.load_state_dict(weights)
        set_optimizer_state_dict(model, opt, saved)

    return load


HOWS = [save_on_rank_0, save_with_lightning, save_with_dcp, save_with_dcp_as_full]


@pytest.mark.parametrize("save", HOWS)
def test_trainers_resume_bit_for_bit(comm, save):
    with mixed_twins(comm) as twins:
        for _ in range(3):
            twins.step()
        load = save(comm, twins)
        for _ in range(3):
            twins.step()
        expected = everything(twins.opt)
    assert resume(comm, load) == expected


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_files_of_dcp_are_loaded_in_place(comm, mpi_tmp_path):
    with mixed_twins(comm) as twins:
        for _ in range(3):
            twins.step()
        weights = copy.deepcopy(twins.ours.state_dict())
        if comm.rank == 0:
            saved = get_optimizer_state_dict(twins.ours, twins.opt)
            dcp.save({"opt": saved}, checkpoint_id=mpi_tmp_path / "a", no_dist=True)
        comm.Barrier()
        for _ in range(3):
            twins.step()
        expected = everything(twins.opt)

    def load(model, opt):
        model.load_state_dict(weights)
        shown = get_optimizer_state_dict(model, opt)
        dcp.load({"opt": shown}, checkpoint_id=mpi_tmp_path / "a", no_dist=True)
        set_optimizer_state_dict(model, opt, shown)

    assert resume(comm, load) == expected


def test_what_is_written_holds(comm):
    with Twins(comm, lr=0.1) as twins:
        twins.step()
        for opt in twins.both:
            params = params_of(opt)
            opt.state[params[0]]["exp_avg"].mul_(0.5)
            opt.state[params[1]]["exp_avg_sq"] = torch.full_like(params[1], 0.25)
            opt.state[params[2]]["step"].fill_(5)
            opt.state[params[3]]["mu_product"] = torch.tensor(0.5)
            del opt.state[params[4]]
        for _ in range(2):
            twins.step()
            twins.assert_same()
            assert_same_entries(*twins.both)


def test_a_state_dict_shows_later_steps(comm):
    with Twins(comm) as twins:
        twins.step()
        shown = twins.opt.state_dict()
        twins.step()
        weight = params_of(twins.opt)[0]
        assert torch.equal(shown["state"][0]["exp_avg"], twins.opt.state[weight]["exp_avg"])
        assert shown["state"][0]["step"] == 1
        with refused(comm, CheckpointError, "Take a deepcopy when you save it"):
            twins.opt.load_state_dict(shown)
        with refused(comm, CheckpointError, "Take a deepcopy when you save it"):
            set_optimizer_state_dict(twins.ours, twins.opt, shown)
        twins.step()
        twins.assert_same()


@pytest.mark.mpi
def test_entries_of_parameters_that_begin_to_train_appear(comm):
    first, late = (torch.nn.Parameter(torch.ones(8)) for _ in range(2))
    late.requires_grad_(False)
    with NAdam([first, late]) as opt:
        if comm.rank == 0:
            assert list(opt.state) == [first]  # logged by one rank alone
        late.requires_grad_(True)
        (first + late).sum().backward()
        opt.step()
        state = opt.state
        assert len(state) == 2
        assert late in state
        assert [entry["step"] for entry in state.values()] == [1, 1]
        held = state[late]
    assert held["exp_avg"].shape == (8,)
    assert set(state) == {first, late}
