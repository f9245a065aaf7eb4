"""State dicts: what goes out comes back, on every number of ranks."""

import copy
import pickle

import numpy as np
import pytest

from shardopt import NAdam, Parameter, ShardPolicy
from shardopt.errors import PartialStateWarning
from tests.support.errors import everything
from tests.support.oracle import (
    SHAPES,
    Oracle,
    all_grads,
    assert_same,
    gradient,
    initial,
    make_params,
    write,
)

pytestmark = pytest.mark.mpi


def train(opt, params, comm, steps, oracle=None):
    for step in steps:
        opt.zero_grad()
        grads = all_grads(step, comm)
        write(params, grads[comm.rank])
        opt.step()
        if oracle is not None:
            oracle.step(grads)


@pytest.mark.parametrize("how", ["from state_dict()", "gathered", "gathered on all ranks"])
def test_a_resumed_run_continues_bit_for_bit(comm, how):
    values = initial()
    params, oracle = make_params(values), Oracle(values)
    policy = ShardPolicy(bucket_nbytes=30_000)
    with NAdam(params, comm=comm, lr=0.1, policy=policy) as opt:
        oracle.hyper["lr"] = 0.1
        train(opt, params, comm, range(4), oracle)
        saved = opt.gather_state_dict(root=comm.size - 1)
        if how == "from state_dict()":
            saved = copy.deepcopy(opt.state_dict())
        if how == "gathered on all ranks":
            saved = comm.bcast(saved, root=comm.size - 1)
        weights = [param.data.copy() for param in params]
        train(opt, params, comm, range(10, 13))  # must not reach into what was saved
    resumed = make_params(weights)
    policy = ShardPolicy(bucket_nbytes=1)
    with NAdam(resumed, comm=comm, policy=policy) as opt:
        opt.load_state_dict(saved)
        assert opt.param_groups[0]["lr"] == 0.1
        train(opt, resumed, comm, range(4, 8), oracle)
        assert_same(resumed, oracle)


def test_a_loaded_dict_stays_as_it_was(comm):
    params = make_params(initial())
    with NAdam(params, comm=comm) as opt:
        train(opt, params, comm, range(2))
        saved = opt.gather_state_dict()
        before = copy.deepcopy(saved)
        opt.load_state_dict(saved)
        train(opt, params, comm, range(2))
    if comm.rank == 0:
        for index, entry in before["state"].items():
            for key, value in entry.items():
                np.testing.assert_array_equal(saved["state"][index][key], value)
        assert saved["param_groups"] == before["param_groups"]


def test_the_state_of_an_optimizer_that_never_stepped(comm):
    params = make_params(initial())
    with NAdam(params, comm=comm) as opt:
        fresh = opt.state_dict()
        train(opt, params, comm, range(2))
        opt.load_state_dict({"state": {}, "param_groups": fresh["param_groups"]})
        state = opt.state_dict()["state"]
        assert all(entry["step"] == 0 and entry["mu_product"] == 1 for entry in state.values())
        assert not any(entry["exp_avg"].any() for entry in state.values())


@pytest.mark.mpi(min_size=2)
def test_slices_of_nodes_tile_every_parameter(comm):
    params = make_params(initial())
    policy = ShardPolicy(bucket_nbytes=20_000, share_node=False)
    with NAdam(params, comm=comm, policy=policy) as opt:
        saved = opt.state_dict()
    assert saved["shardopt"] == {"node": comm.rank, "num_nodes": comm.size}
    everyone = comm.allgather([saved["state"][index]["slices"] for index in range(len(SHAPES))])
    for index, value in enumerate(initial()):
        position = 0
        for start, stop in sorted(run for rank in everyone for run in rank[index]):
            assert start == position
            position = stop
        assert position == value.size


def test_the_state_dict_of_one_node_is_whole_and_takes_no_copy(comm):
    params = make_params(initial())
    with NAdam(params, comm=comm, policy=ShardPolicy(bucket_nbytes=20_000)) as opt:
        train(opt, params, comm, range(2))
        saved, gathered = opt.state_dict(), comm.bcast(opt.gather_state_dict())
        assert repr(saved) == repr(gathered)
        assert pickle.dumps(saved) == pickle.dumps(opt.state_dict())
        for index, entry in saved["state"].items():
            for key in ("exp_avg", "exp_avg_sq"):
                assert entry[key].shape == SHAPES[index]
                view = opt.state[params[index]][key]
                assert entry[key].size == 0 or np.shares_memory(entry[key], view)
        train(opt, params, comm, range(2, 3))
        assert all(
            entry["exp_avg"].tobytes() == opt.state_dict()["state"][index]["exp_avg"].tobytes()
            for index, entry in saved["state"].items()
        )


@pytest.mark.mpi(min_size=2)
@pytest.mark.filterwarnings("ignore::shardopt.errors.PartialStateWarning")
@pytest.mark.parametrize("how", ["own", "exchanged", "another number of nodes", "old"])
def test_parts_of_nodes_are_loaded_by_what_they_are(comm, how):
    values = initial()
    params, oracle = make_params(values), Oracle(values)
    oracle.hyper["lr"] = 0.1
    policy = ShardPolicy(bucket_nbytes=30_000, share_node=False, timeout_s=30)
    with NAdam(params, comm=comm, lr=0.1, policy=policy) as opt:
        train(opt, params, comm, range(4), oracle)
        saved = copy.deepcopy(opt.state_dict())
        weights = [param.data.copy() for param in params]
    if how != "own":
        saved = comm.allgather(saved)[comm.rank - 1]
    if how == "old":  # ranks of one node had parts, too, and nothing told whose they were
        del saved["shardopt"]
    share = how in ("another number of nodes", "old")
    resumed = make_params(weights)
    policy = ShardPolicy(bucket_nbytes=20_000, share_node=share, timeout_s=30)
    with NAdam(resumed, comm=comm, policy=policy) as opt:
        opt.load_state_dict(saved)
        assert opt.param_groups[0]["lr"] == 0.1
        train(opt, resumed, comm, range(4, 8), oracle)
        assert_same(resumed, oracle)


@pytest.mark.mpi(min_size=4)
@pytest.mark.filterwarnings("ignore::shardopt.errors.PartialStateWarning")
def test_one_rank_of_each_node_is_enough(comm):
    if comm.size % 2:
        pytest.skip("nodes of two ranks")
    policy = ShardPolicy(bucket_nbytes=20_000, share_node=2, timeout_s=30)
    params = make_params(initial())
    with NAdam(params, comm=comm, policy=policy) as opt:
        train(opt, params, comm, range(2))
        saved, before = copy.deepcopy(opt.state_dict()), everything(opt)
        assert saved["shardopt"] == {"node": comm.rank // 2, "num_nodes": comm.size // 2}
        both = comm.allgather(repr(saved))
        assert both[comm.rank] == both[comm.rank ^ 1]
        train(opt, params, comm, range(2))
        opt.load_state_dict(saved if comm.rank % 2 else None)
        assert everything(opt)[len(params) :] == before[len(params) :]


@pytest.mark.mpi(min_size=2)
def test_a_part_warns_on_every_rank_after_the_first_step(comm):
    params = make_params(initial())
    with NAdam(params, comm=comm, policy=ShardPolicy(share_node=False)) as opt:
        opt.state_dict()
        train(opt, params, comm, range(1))
        for _ in range(2):
            with pytest.warns(
                PartialStateWarning, match=f"part of node {comm.rank} of {comm.size}"
            ):
                opt.state_dict()


def test_parameters_may_be_called_anything(comm):
    params = make_params(initial())
    with NAdam(params, comm=comm) as opt:
        train(opt, params, comm, range(2))
        saved, before = comm.bcast(opt.gather_state_dict()), everything(opt)
        names = {index: ("layer", index * 7) for index in saved["state"]}
        saved["state"] = {names[index]: entry for index, entry in reversed(saved["state"].items())}
        for group in saved["param_groups"]:
            group["params"] = [names[index] for index in group["params"]]
        train(opt, params, comm, range(2))
        opt.load_state_dict(saved)
        assert everything(opt)[len(params) :] == before[len(params) :]


def test_torch_takes_over_and_hands_back(comm):
    torch = pytest.importorskip("torch")
    values = initial(shapes=[(3, 4), (5000,), ()])
    params = make_params(values)
    shapes = [value.shape for value in values]

    def mean_grad(step, index):
        return (
            sum(gradient(step, rank, index, shapes[index]) for rank in range(comm.size)) / comm.size
        )

    with NAdam(params, comm=comm, lr=0.01) as opt:
        for step in range(3):
            write(params, all_grads(step, comm, shapes=shapes)[comm.rank])
            opt.step()
        saved = comm.bcast(opt.gather_state_dict())
        tensors = [torch.nn.Parameter(torch.from_numpy(np.array(param.data))) for param in params]
        theirs = torch.optim.NAdam(tensors)
        theirs.load_state_dict(
            {
                "state": {
                    index: {key: torch.as_tensor(value) for key, value in entry.items()}
                    for index, entry in saved["state"].items()
                },
                "param_groups": [
                    {**theirs.state_dict()["param_groups"][0], **saved["param_groups"][0]}
                ],
            }
        )
        for step in range(3, 6):
            write(params, all_grads(step, comm, shapes=shapes)[comm.rank])
            opt.step()
            for index, tensor in enumerate(tensors):
                tensor.grad = torch.from_numpy(np.asarray(mean_grad(step, index), np.float32))
            theirs.step()
        for param, tensor in zip(params, tensors, strict=True):
            np.testing.assert_allclose(param.data, tensor.detach().numpy(), atol=1e-6)
        opt.load_state_dict(
            {
                "state": theirs.state_dict()["state"],
                "param_groups": theirs.state_dict()["param_groups"],
            }
        )
        assert opt.state_dict()["state"][0]["step"] == 6
        assert opt.state_dict()["state"][0]["mu_product"] == pytest.approx(
            float(theirs.state_dict()["state"][0]["mu_product"])
        )


def test_parameters_may_be_named_by_pairs(comm):
    values = initial(shapes=[(2,), (3,)])
    pairs = [("encoder", Parameter(values[0])), ("decoder", Parameter(values[1]))]
    with NAdam(pairs, comm=comm) as opt:
        assert [param.spec.name for param in opt.partition.params] == ["encoder", "decoder"]


def test_a_parameter_without_an_entry_has_never_stepped(comm):
    params = make_params(initial())
    with NAdam(params, comm=comm) as opt:
        write(params, all_grads(1, comm)[comm.rank])
        opt.step()
        state = opt.gather_state_dict()
        if state is not None:
            del state["state"][3]
        opt.load_state_dict(state)
        loaded = comm.bcast(opt.gather_state_dict())["state"]
    assert [entry["step"] for entry in loaded.values()] == [1, 1, 1, 0, 1, 1, 1, 1, 1]
    assert loaded[3]["mu_product"] == 1.0
    assert not loaded[3]["exp_avg"].any()
    assert loaded[4]["exp_avg"].any()
