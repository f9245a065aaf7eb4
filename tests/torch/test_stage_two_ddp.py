"""Stage 2 under DistributedDataParallel: what its reducer leaves is averaged as in stage 1."""

import warnings

import pytest

pytest.importorskip("torch")

import torch
from torch.nn.parallel import DistributedDataParallel

from shardopt.errors import CallOrderError, StageWarning
from shardopt.policy import ShardPolicy
from shardopt.torch import NAdam
from tests.support.errors import warned
from tests.support.torch_models import bytes_of, loss_of, make_model

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.filterwarnings("ignore:.*deprecated"),  # of torch, about itself
    pytest.mark.filterwarnings("ignore::shardopt.errors.StageWarning"),
]

RING = {"bucket_nbytes": 1, "ring_nbytes": 1}


@pytest.fixture(autouse=True)
def gloo(comm, mpi_tmp_path):
    """torch.distributed, on the ranks of the run."""
    store = torch.distributed.FileStore(str(mpi_tmp_path / "store"), comm.size)
    torch.distributed.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    yield
    torch.distributed.destroy_process_group()


def optimizer(model, comm, stage, **settings):
    chosen = ShardPolicy(stage=stage, timeout_s=20, threads=1, **(RING if stage == 2 else {}))
    return NAdam(model, lr=0.1, comm=comm, policy=chosen, **settings)


def wrapped_before(comm, stage):
    model = make_model()
    wrapped = DistributedDataParallel(model)
    return model, wrapped, optimizer(model, comm, stage)


def wrapped_after(comm, stage):
    model = make_model()
    opt = optimizer(model, comm, stage)
    return model, DistributedDataParallel(model), opt


def wrapped_after_a_step(comm, stage):
    """The first backward is averaged in the ring."""
    model = make_model()
    opt = optimizer(model, comm, stage)
    loss_of(model, 9, comm.rank).backward()
    opt.step()
    opt.zero_grad()
    return model, DistributedDataParallel(model, gradient_as_bucket_view=True), opt


def wrapped_in_part(comm, stage):
    """A layer of which the reducer knows nothing goes through the ring."""
    model = make_model()
    opt = optimizer(model, comm, stage, max_grad_norm=0.1)
    model[2] = DistributedDataParallel(model[2])
    return model, model, opt


def train(comm, stage, make, clip=False):
    """Train with two backwards in a step, of which the first is not averaged by the reducer."""
    model, wrapped, opt = make(comm, stage)
    for step in range(3):
        opt.zero_grad()
        if isinstance(wrapped, DistributedDataParallel):
            with wrapped.no_sync():
                loss_of(wrapped, step, comm.rank).backward()
        loss_of(wrapped, step + 10, comm.rank).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()
        assert opt.last_step.num_updated == 6
        loss_of(wrapped, step + 20, comm.rank).backward()  # for nothing, as that of a GAN
    opt.close()
    return [bytes_of(param) for param in model.parameters()]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    "make", [wrapped_before, wrapped_after, wrapped_after_a_step, wrapped_in_part]
)
def test_bits_are_those_of_stage_one(comm, make, clip):
    if clip and make is wrapped_in_part:
        pytest.skip("in stage 1 one layer has gradients of this rank")
    ours, theirs = (train(comm, stage, make, clip) for stage in (2, 1))
    assert ours == theirs
    assert len(set(comm.allgather(tuple(ours)))) == 1


def test_gradients_are_those_of_ddp(comm):
    alone = DistributedDataParallel(make_model())
    _, wrapped, opt = wrapped_after(comm, 2)
    with opt:
        for model in alone, wrapped:
            loss_of(model, 0, comm.rank).backward()
        for theirs, ours in zip(alone.parameters(), wrapped.parameters(), strict=True):
            assert type(ours.grad) is torch.Tensor
            assert bytes_of(theirs.grad) == bytes_of(ours.grad) != bytes(ours.grad.nbytes)


def test_it_is_said_once(comm):
    _, wrapped, opt = wrapped_before(comm, 2)
    with opt:
        with warned(comm, StageWarning, "policy.stage=2 does what stage 1 does"):
            loss_of(wrapped, 0, comm.rank).backward()
        opt.step()
        opt.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss_of(wrapped, 1, comm.rank).backward()


def test_averages_are_not_averaged_once_more(comm):
    """A reducer would add to them, and average what other ranks have not summed yet."""
    model = make_model()
    with optimizer(model, comm, 2) as opt:
        loss_of(model, 0, comm.rank).backward()
        wrapped = DistributedDataParallel(model)
        with pytest.raises(CallOrderError, match="must be None before the backward of a module"):
            loss_of(wrapped, 1, comm.rank).backward()
        opt.zero_grad()
        del wrapped
        again = DistributedDataParallel(model)
        loss_of(again, 1, comm.rank).backward()
        opt.step()
        assert opt.last_step.num_updated == 6


def test_averages_that_no_rank_has_are_not_added_to(comm):
    """On several nodes, where a step leaves what cannot be read."""
    model = make_model()
    wrapped = DistributedDataParallel(model)
    chosen = ShardPolicy(stage=2, share_node=False, timeout_s=20, threads=1, **RING)
    with NAdam(model, comm=comm, policy=chosen) as opt:
        loss_of(wrapped, 0, comm.rank).backward()
        opt.step()
        with pytest.raises(CallOrderError, match="of which no rank has the whole. Call zero_grad"):
            loss_of(wrapped, 1, comm.rank).backward()
        opt.zero_grad()
        del wrapped  # its reducer waits for the rest of that backward
        again = DistributedDataParallel(model)
        loss_of(again, 1, comm.rank).backward()
        opt.step()
        assert opt.last_step.num_updated == 6
