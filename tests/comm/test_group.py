"""Optimizers on one communicator share what is made for it, and are not mistaken for each other."""

import numpy as np
import pytest
from mpi4py import MPI

from shardopt.comm.consensus import digest_of, make_consensus
from shardopt.comm.failure import Abort
from shardopt.errors import RankMismatchError, ShardoptError, ThreadError
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.policy import ShardPolicy
from shardopt.transport.mpi import NUM_KINDS, MpiTransport
from tests.support.errors import assert_steps, make_optimizer, refused
from tests.support.models import UP_TO_THREE_RANKS

MORE_THAN_MPI_HAS = 2100  # communicators, in MPICH
AGREE = {"step": 1, "phase": "agree"}

pytestmark = pytest.mark.mpi


def join(comm, share_node=True):
    return make_consensus(comm, ShardPolicy(share_node=share_node, timeout_s=60), Abort())


def assert_agree(*consensuses):
    assert all(each.agree(digest_of("same"), **AGREE) for each in consensuses)


# -- what is shared --------------------------------------------------------------------------------


def test_optimizers_of_a_communicator_share_its_group(comm):
    first, second = join(comm), join(comm)
    assert first.group is second.group
    assert [first.collectives.number, second.collectives.number] == [1, 2]
    first.free()
    third = join(comm)
    assert third.group is second.group
    assert third.collectives.number == 3
    assert_agree(second, third)
    second.free()
    third.free()


def test_optimizers_that_share_nodes_otherwise_have_a_group_of_their_own(comm):
    """The lowest limit of all ranks holds."""
    whole = join(comm)
    alone = join(comm, share_node=comm.rank > 0)
    assert alone.topology.num_nodes == comm.size
    assert alone.group is not whole.group
    again = join(comm, share_node=False)
    assert again.group is alone.group
    assert join(comm).group is whole.group
    assert_agree(whole, alone, again)


def test_a_duplicate_has_a_group_of_its_own(comm):
    consensus, duplicate = join(comm), comm.Dup()
    other = join(duplicate)
    assert other.group is not consensus.group
    assert other.collectives.number == 1
    consensus.free()
    other.free()
    duplicate.Free()


@pytest.mark.any_mpi
@UP_TO_THREE_RANKS
def test_more_optimizers_can_be_open_than_mpi_has_communicators(comm):
    consensuses = [join(comm) for _ in range(MORE_THAN_MPI_HAS)]
    assert_agree(*consensuses[::500])
    for each in consensuses:
        each.free()


# -- when it ends ----------------------------------------------------------------------------------


def test_an_optimizer_outlives_its_communicator(comm):
    duplicate = comm.Dup()
    first, second = join(duplicate), join(duplicate)
    duplicate.Free()
    assert_agree(first, second)
    first.free()
    assert_agree(second)
    second.free()
    assert second.topology.comm == MPI.COMM_NULL


def test_a_communicator_takes_its_group_along(comm):
    duplicate = comm.Dup()
    consensus = join(duplicate)
    consensus.free()
    assert consensus.topology.comm != MPI.COMM_NULL
    duplicate.Free()
    topology = consensus.topology
    assert [topology.comm, topology.node_comm, topology.lane_comm] == [MPI.COMM_NULL] * 3


# -- mistaken for each other -----------------------------------------------------------------------


@pytest.mark.mpi(min_size=2)
def test_agreement_on_different_optimizers_is_none(comm):
    consensuses = [join(comm), join(comm)]
    mine = consensuses[comm.rank == 0]
    assert not mine.agree(digest_of("same"), **AGREE)
    match = r"'step\(\) of optimizer 2' on rank 0 and 'step\(\) of optimizer 1' on rank"
    with pytest.raises(RankMismatchError, match=match):
        mine.require_same({"the call": "step()", "lr": mine.collectives.number}, **AGREE)
    assert_agree(*consensuses)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("call", ["step()", "close()", "NAdam()"])
def test_ranks_that_call_different_optimizers_are_told(comm, call):
    opts = [make_optimizer(comm), make_optimizer(comm)]
    others = {
        "step()": (opts[1].step, 2),
        "close()": (opts[1].close, 2),
        "NAdam()": (lambda: make_optimizer(comm), 3),
    }
    other, number = others[call]
    got = f"got 'step() of optimizer 1' on rank 0 and '{call} of optimizer {number}' on rank"
    with refused(comm, RankMismatchError, got, "in the order in which they were built"):
        other() if comm.rank else opts[0].step()
    opts.append(make_optimizer(comm))
    assert [opt.core.parts.collectives.number for opt in opts] == [1, 2, 3]
    for opt in opts:
        assert_steps(opt)
        opt.close()


@pytest.mark.mpi(min_size=2)
def test_messages_of_two_optimizers_may_overtake_each_other(comm):
    """As those of two progress threads do."""
    consensuses = [join(comm, share_node=False) for _ in range(2)]
    topology = consensuses[0].topology
    transports = [MpiTransport(topology, each.collectives.number) for each in consensuses]
    node = 1 - topology.node
    if topology.node < 2:
        sent = [np.full(CHUNK_NUMEL, 10 * topology.node + i, np.float32) for i in range(2)]
        got = [np.empty(CHUNK_NUMEL, np.float32) for _ in range(2)]
        order = (0, 1) if topology.node else (1, 0)
        messages = [transports[i].post_send(sent[i], node, 1) for i in order]
        messages += [transports[i].post_receive(got[i], node, 1) for i in (0, 1)]
        for message in messages:
            consensuses[0].collectives.wait(message.is_done, 1, "test")
        assert [array[0] for array in got] == [10 * node, 10 * node + 1]
    for transport in transports:
        transport.close()


def test_an_optimizer_beyond_the_tags_of_mpi_is_refused(comm):
    topology = join(comm).topology
    highest = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)
    last = (highest + 1) // NUM_KINDS - 1
    MpiTransport(topology, last)
    match = rf"at most {last:,} optimizers .* end at {highest:,} .*; got number {last + 1:,}\. Pass"
    with pytest.raises(ShardoptError, match=match):
        MpiTransport(topology, last + 1)


def test_only_one_thread_may_wait_for_other_ranks(comm):
    first, second = join(comm), join(comm)

    def use_the_other():  # as another thread would do while this one waits
        with pytest.raises(ThreadError, match=r"^optimizers of one communicator must be"):
            second.collectives.wait(lambda: True, 2, "agree")
        return True

    first.collectives.wait(use_the_other, 1, "agree")
    assert_agree(first, second)
