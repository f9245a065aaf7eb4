"""FSDP shards the model and averages gradients; each rank's optimizer then has its shards only.

That is ``comm=MPI.COMM_SELF``: what there is to update is each rank's own.
"""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from mpi4py import MPI
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from shardopt.errors import PartitionError
from tests.support.clients import (
    MAX_GRAD_NORM,
    NUM_STEPS,
    assert_same_losses,
    loss_of,
    make_net,
    make_opt,
    make_whole_opt,
    rows_of,
)

pytestmark = pytest.mark.mpi(min_size=2)

HALF = NUM_STEPS // 2


def train(model, opt, steps, rows=slice(None), clip=None):
    losses = []
    for step in steps:
        opt.zero_grad()
        loss = loss_of(model, step, rows)
        loss.backward()
        (clip or model.clip_grad_norm_)(MAX_GRAD_NORM)  # FSDP's, as it knows all shards
        opt.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def whole():
    """The losses of one process."""
    model = make_net()

    def clip(limit):
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)

    return train(model, make_whole_opt(model.parameters()), range(NUM_STEPS), clip=clip)


def sharded(seed=0, use_orig_params=False):
    model = FullyShardedDataParallel(
        make_net(seed), device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    return model, make_opt(model.parameters(), MPI.COMM_SELF)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_the_shards_of_fsdp_are_trained_as_in_one_process(
    comm, whole, process_group, use_orig_params
):
    def run():
        model, opt = sharded(use_orig_params=use_orig_params)
        return train(model, opt, range(NUM_STEPS), rows_of(comm))

    assert_same_losses(comm, run(), whole)


def test_dcp_saves_and_resumes_the_shards(comm, mpi_tmp_path, whole, process_group):
    if comm.size > 2:
        pytest.skip("shards so uneven cannot be loaded with torch's own optimizers, either")

    def run(seed, steps, resume):
        model, opt = sharded(seed)
        if resume:
            weights, state = get_state_dict(model, opt)
            saved = {"model": weights, "optimizer": state}
            dcp.load(saved, checkpoint_id=mpi_tmp_path)
            set_state_dict(
                model, opt, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
            )
        losses = train(model, opt, steps, rows_of(comm))
        if not resume:
            weights, state = get_state_dict(model, opt)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=mpi_tmp_path)
        return losses

    run(0, range(HALF), resume=False)
    assert_same_losses(comm, run(1, range(HALF, NUM_STEPS), resume=True), whole[HALF:])


def test_the_shards_of_fsdp2_are_refused(comm, process_group):
    model = make_net()
    fully_shard(model)
    with pytest.raises(PartitionError, match="DTensor"):
        make_opt(model.parameters(), MPI.COMM_SELF)
