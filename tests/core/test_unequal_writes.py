"""Ranks that write different parameters, or different values: an error, a warning, and repairs."""

import warnings

import numpy as np
import pytest

from shardopt import NAdam, Parameter, ShardPolicy
from shardopt.checkpoint import save
from shardopt.errors import (
    DivergedWarning,
    HyperparamsError,
    PartialStateWarning,
    PartitionError,
    RankMismatchError,
)
from tests.support.errors import name_ranks, warned
from tests.support.replicas import (
    Replicas,
    assert_equal_on_all_ranks,
    share,
    tracking,
    values_of,
    way,
)

__all__ = ["share", "way"]  # fixtures

pytestmark = pytest.mark.mpi(min_size=2)


def mismatch(comm, call):
    """The error that a call must raise on all ranks, in the same words."""
    with pytest.raises(RankMismatchError) as caught:
        call()
    text = str(caught.value)
    assert comm.allgather(text) == [text] * comm.size
    return text


def values(model):
    return [param.data.copy() for param in model.params]


def assert_holds(model, expected):
    for param, value in zip(model.params, expected, strict=True):
        np.testing.assert_array_equal(param.data, value, err_msg=param.name)


def write_4(array, index):
    if index == 4:
        array[5:] = 3


# -- different parameters --------------------------------------------------------------------------


def reload_state(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PartialStateWarning)
        part = model.opt.state_dict()
    model.opt.load_state_dict(part)


CALLS = {
    "step": lambda model, folder: model.opt.step(),
    "gather_state_dict": lambda model, folder: model.opt.gather_state_dict(),
    "load_state_dict": lambda model, folder: reload_state(model),
    "save": lambda model, folder: save(folder / "saved", model.opt),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("writer", ["first", "last", "all but the first"])
def test_a_write_on_some_ranks_only_is_refused(comm, share, call, writer, mpi_tmp_path):
    last = comm.size - 1
    writers = {"first": [0], "last": [last], "all but the first": range(1, comm.size)}[writer]
    others = [rank for rank in range(comm.size) if rank not in writers]
    with Replicas(comm, share, values_of()) as model:
        model.step()
        if comm.rank in writers:
            write_4(model.params[4].data, 4)
        before = values(model)
        told = mismatch(comm, lambda: CALLS[call](model, mpi_tmp_path))
        assert f"got a write to parameter 'p4' on {name_ranks(writers)}" in told
        assert f"and none on {name_ranks(others)}." in told
        assert "Nothing has changed" in told
        assert_holds(model, before)
        if comm.rank in others:
            write_4(model.params[4].data, 4)
        model.expect(write_4)
        model.step()
        model.step()


@pytest.mark.parametrize("repair", ["write", "adopt", "undo"])
def test_repairs_after_a_mismatch(comm, share, way, repair):
    with Replicas(comm, share, values_of()) as model:
        model.step()
        before = values(model)
        if comm.rank == 0:
            model.params[0].data[...] = 2
            model.params[5].data[4000:] = 2
        for _ in range(2):  # it stays as it is
            told = mismatch(comm, model.opt.step)
            assert "'p0'" in told
            assert model.opt.last_step.step == 1
        assert (model.params[0].data == 2).all() == (comm.rank == 0)
        if repair == "undo":
            for param, value in zip(model.params, before, strict=True):
                param.data[...] = value
        elif repair == "adopt":
            model.opt.adopt(0)
        else:
            model.params[0].data[...] = 2
            model.params[5].data[4000:] = 2
        if repair != "undo":
            model.expect(
                lambda array, index: (
                    array[4000:].fill(2) if index == 5 else array.fill(2) if index == 0 else None
                )
            )
        model.step()
        model.step()


@pytest.mark.parametrize("root", [0, -1])
def test_adopting_the_values_of_one_rank(comm, share, way, root):
    root %= comm.size
    with Replicas(comm, share, values_of()) as model:
        model.step()
        for index, param in enumerate(model.params):
            if index == 3:
                param.data = np.full_like(param.data, comm.rank)
            elif index % 2:
                param.data[...] = comm.rank + 1
        model.params[4].data[comm.rank] = 9
        model.opt.adopt(root)

        def expected(array, index):
            if index % 2 and index != 3:
                array[...] = root + 1
            elif index == 4:
                array[root] = 9

        model.expect(expected)
        model.assert_same()
        model.step()


def test_a_rank_that_does_not_exist_cannot_be_adopted(comm):
    with Replicas(comm, True, values_of()) as model:
        with pytest.raises(HyperparamsError, match=f"0 to {comm.size - 1}; got {comm.size}"):
            model.opt.adopt(comm.size)
        model.step()


def test_two_small_parameters_on_a_page_are_told_apart(comm, share, way):
    with Replicas(comm, share, values_of(shapes=[(3,), (5,), (2, 2)])) as model:
        model.step()
        model.params[1].data[...] = 1
        if comm.rank == 0:
            model.params[2].data[1, 1] = 7
        told = mismatch(comm, model.opt.step)
        assert "'p2' on rank 0" in told
        assert "'p1'" not in told
        assert "'p0'" not in told


def test_values_swapped_in_and_out_on_one_rank_are_no_write(comm, share, way):
    """As for an evaluation with averaged weights, on rank 0 only."""
    with Replicas(comm, share, values_of()) as model:
        for number in range(14):
            model.step()
            if comm.rank == 0 and number < 5:
                kept = values(model)
                for param in model.params:
                    param.data[...] = 1
                assert_holds(model, [np.ones_like(value) for value in kept])
                for param, value in zip(model.params, kept, strict=True):
                    param.data[...] = value
        if comm.rank > 0 or not tracking(way).sees_writes:
            assert model.kept_nbytes == 0


def test_written_state_is_compared_within_a_node(comm, share):
    with Replicas(comm, share, values_of()) as model:
        model.step()
        topology, memory = model.opt.core.topology, model.opt.core.parts.memory
        own = memory.state.own_arrays(0)["exp_avg"]
        if topology.node_size > 1:
            writer = topology.places.index((topology.num_nodes - 1, 0))  # the last node has some
            if comm.rank == writer:
                own[:3] += 1
            told = mismatch(comm, model.opt.step)
            assert f"exp_avg of parameter 'p0' on rank {writer} and none on rank" in told
            own[...] = memory.state.arrays(0)["exp_avg"]
        model.step()


# -- different values ------------------------------------------------------------------------------


def owned(model, comm, written):
    """What every rank must read: each shard as its owner has written it."""
    opt, everyone = model.opt, comm.allgather([value.reshape(-1) for value in written])
    expected = [value.reshape(-1).copy() for value in written]
    topology, partition = opt.core.topology, opt.partition
    for rank, place in enumerate(topology.places):
        for index, span, _ in partition.owned_params(partition.shards(*place, 0)):
            expected[index][span.slice] = everyone[rank][index][span.slice]
    return [new.reshape(value.shape) for new, value in zip(expected, written, strict=True)]


def test_different_values_are_a_warning_and_shards_keep_their_owners(comm, share, way):
    with Replicas(comm, share, values_of(), lr=0.0) as model:
        model.step()
        for number in range(3):
            for index in (4, 5):
                noise = np.random.default_rng([number, comm.rank, index])
                model.params[index].data[...] = noise.standard_normal(
                    model.params[index].data.shape
                )
            expected = owned(model, comm, values(model))
            model.expect(lambda array, index: np.copyto(array, expected[index]))  # noqa: B023
            if number:  # of consecutive ones only the first is compared
                with warnings.catch_warnings():
                    warnings.simplefilter("error", DivergedWarning)
                    model.step()
                assert not model.opt.last_step.diverged
            else:
                with warned(comm, DivergedWarning, match="'p4', parameter 'p5': each part"):
                    model.step()
                assert model.opt.last_step.diverged == ["parameter 'p4'", "parameter 'p5'"]
        model.step()  # writes nothing
        model.params[4].data[:3] = comm.rank
        expected = owned(model, comm, values(model))
        model.expect(lambda array, index: np.copyto(array, expected[index]))
        with warned(comm, DivergedWarning, match="'p4': each part"):
            model.step()


def test_different_values_are_a_warning_where_they_are_gathered(comm, share):
    with Replicas(comm, share, values_of()) as model:
        model.params[0].data[...] = comm.rank
        with warned(comm, DivergedWarning, match="'p0'"):
            model.opt.gather_state_dict()
        assert_equal_on_all_ranks(comm, [param.data for param in model.params])


def test_a_warning_names_three_and_counts_the_others(comm):
    params = [Parameter(np.ones(3, np.float32)) for _ in range(6)]
    with NAdam(params, comm=comm, policy=ShardPolicy(timeout_s=20)) as opt:
        for param in params:
            param.data[...] = comm.rank + 2
            param.grad[...] = 1
        with warned(comm, DivergedWarning, match="'param2' and 3 more: each part"):
            opt.step()
        assert len(opt.last_step.diverged) == 6
        assert_equal_on_all_ranks(comm, [param.data for param in params])


def test_adopting_drops_what_other_ranks_have_made_wrong(comm, share):
    with Replicas(comm, share, values_of()) as model:
        model.step()
        if comm.rank == comm.size - 1:
            model.params[0].data = np.zeros((2, 5, 7), np.float32)
            model.opt.state[model.params[1]] = "nonsense"
        model.opt.adopt(0)
        model.step()
        right = model.params[0].data.copy()
        if comm.rank == 0:
            model.params[0].data = np.zeros((2, 5, 7), np.float32)
        with pytest.raises(PartitionError, match="shape"):
            model.opt.adopt(0)
        if comm.rank == 0:
            model.params[0].data = right
        model.step()
