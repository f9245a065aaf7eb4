"""torch.distributed.checkpoint, which asks for the state by the names of the model."""

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from tests.support.clients import (
    NUM_STEPS,
    assert_same_weights,
    loss_of,
    make_net,
    make_opt,
    make_whole_opt,
    rows_of,
)

pytestmark = pytest.mark.mpi

HALF = NUM_STEPS // 2


def train(model, opt, steps, rows=slice(None)):
    for step in steps:
        opt.zero_grad()
        loss_of(model, step, rows).backward()
        opt.step()


@pytest.fixture(scope="module")
def whole():
    model = make_net()
    train(model, make_whole_opt(model.parameters()), range(NUM_STEPS))
    return model


def save(model, opt, folder, options):
    weights, state = get_state_dict(model, opt, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(model, opt, folder, options):
    weights, state = get_state_dict(model, opt, options=options)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=folder)  # in place
    set_state_dict(
        model,
        opt,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=options,
    )


@pytest.mark.parametrize("flat", [False, True])
def test_what_all_ranks_save_resumes(comm, mpi_tmp_path, whole, process_group, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = make_net()
    opt = make_opt(model.parameters(), comm)
    train(model, opt, range(HALF), rows_of(comm))
    save(model, opt, mpi_tmp_path / "checkpoint", options)
    train(model, opt, range(HALF, NUM_STEPS), rows_of(comm))

    resumed = make_net(seed=1)
    opt = make_opt(resumed.parameters(), comm)
    load(resumed, opt, mpi_tmp_path / "checkpoint", options)
    train(resumed, opt, range(HALF, NUM_STEPS), rows_of(comm))
    assert_same_weights(resumed, model, rtol=0, atol=0)
    assert_same_weights(resumed, whole)


def test_torchs_own_optimizer_goes_on_with_it(comm, mpi_tmp_path, whole, process_group):
    options = StateDictOptions()
    model = make_net()
    opt = make_opt(model.parameters(), comm)
    train(model, opt, range(HALF), rows_of(comm))
    save(model, opt, mpi_tmp_path / "checkpoint", options)
    resumed = make_net(seed=1)
    opt = make_whole_opt(resumed.parameters())
    load(resumed, opt, mpi_tmp_path / "checkpoint", options)
    train(resumed, opt, range(HALF, NUM_STEPS))
    assert_same_weights(resumed, whole)
