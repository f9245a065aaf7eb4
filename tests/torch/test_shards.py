"""Collections without an order, and the shards of other libraries."""

import os

import pytest

pytest.importorskip("torch")

import torch
from mpi4py import MPI
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from shardopt.errors import PartitionError
from shardopt.torch import NAdam
from tests.support.errors import BOTH_WAYS, POLICY, errs, refused
from tests.support.torch_models import loss_of, make_model, params_of

pytestmark = pytest.mark.mpi


UNORDERED = {
    "set": lambda model: set(model.parameters()),
    "frozenset": lambda model: frozenset(model.parameters()),
    "set of pairs": lambda model: set(model.named_parameters()),
    "group": lambda model: [{"params": frozenset(model.parameters())}],
}


@BOTH_WAYS
@pytest.mark.parametrize("kind", UNORDERED)
def test_parameters_without_an_order_are_refused(comm, alone, kind):
    model = make_model()
    params = UNORDERED[kind](model) if errs(comm, alone) else list(model.parameters())
    with refused(comm, PartitionError, "must be in order; got", alone=alone):
        NAdam(params, comm=comm, policy=POLICY)


ORDERED = {
    "keys": lambda params: dict.fromkeys(params).keys(),
    "values": lambda params: dict(enumerate(params)).values(),
    "generator": lambda params: (param for param in params),
    "tuple": tuple,
    "groups": lambda params: ({"params": (each for each in [param])} for param in params),
}


@pytest.mark.parametrize("kind", ORDERED)
def test_parameters_with_an_order_are_taken(comm, kind):
    params = list(make_model().parameters())
    with NAdam(ORDERED[kind](params), comm=comm, policy=POLICY) as opt:
        assert all(one is other for one, other in zip(params_of(opt), params, strict=True))


# -- shards ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gloo():
    """torch.distributed, on the ranks of the run."""
    world = MPI.COMM_WORLD
    store = None
    if world.rank == 0:
        store = distributed.TCPStore("127.0.0.1", 0, world.size, True, wait_for_workers=False)
    port = world.bcast(None if store is None else store.port)
    if store is None:
        store = distributed.TCPStore("127.0.0.1", port, world.size, False)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    yield
    distributed.destroy_process_group()


def wrap(model, use_orig_params):
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, device_id=device, use_orig_params=use_orig_params)


@pytest.mark.mpi(min_size=2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("kind", ["flat", "original", "DTensor"])
def test_shards_of_other_libraries_are_refused(comm, gloo, kind, names):
    if kind == "DTensor":
        mesh = distributed.init_device_mesh("cpu", (comm.size,))
        model = fully_shard(make_model(), mesh=mesh)
        told = "got a DTensor", "Pass the parameters of the plain model"
    else:
        model = wrap(make_model(), use_orig_params=kind == "original")
        told = "got a shard of FullyShardedDataParallel", "Pass comm=MPI.COMM_SELF"
    params = model.named_parameters() if names else model.parameters()
    with refused(comm, PartitionError, "must be a whole tensor", *told):
        NAdam(params, comm=comm, policy=POLICY)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_each_rank_trains_its_own_shards(comm, gloo, use_orig_params):
    sharded, whole = wrap(make_model(), use_orig_params), make_model()
    theirs = torch.optim.NAdam(whole.parameters(), lr=0.05)
    with NAdam(sharded.parameters(), lr=0.05, comm=MPI.COMM_SELF, policy=POLICY) as opt:
        for step in range(4):
            opt.zero_grad()
            loss_of(sharded, step, comm.rank).backward()
            opt.step()
            theirs.zero_grad()
            for rank in range(comm.size):
                (loss_of(whole, step, rank) / comm.size).backward()
            theirs.step()
        with FullyShardedDataParallel.summon_full_params(sharded):
            for one, other in zip(sharded.module.parameters(), whole.parameters(), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
