"""All ranks raise or none does."""

import numpy as np
import pytest
from mpi4py import MPI

from shardopt.comm.consensus import Consensus, digest_of, first_difference, raise_first
from shardopt.comm.topology import make_topology
from shardopt.errors import CheckpointError, PartitionError, RankMismatchError


@pytest.fixture
def agreement(comm):
    agreement = Consensus(make_topology(comm, True, 60), timeout_s=60)
    yield agreement
    agreement.free()


@pytest.mark.mpi
def test_equal_digests_call_nothing(agreement):
    assert agreement.agree(pytest.fail, digest=digest_of("a", 1), phase="test")


@pytest.mark.mpi(min_size=2)
def test_every_rank_raises_the_lowest_error(comm, agreement):
    error = None
    if comm.rank > 0:
        error = (PartitionError if comm.rank == 1 else CheckpointError)(f"from {comm.rank}")
    with pytest.raises(PartitionError, match="^rank 1: from 1$") as raised:
        agreement.agree(dict, error, digest=0, phase="test")
    assert raised.value.__cause__ is error
    assert agreement.agree(dict, digest=0, phase="test")  # and can go on


@pytest.mark.mpi
def test_an_error_on_all_ranks_names_none(agreement):
    with pytest.raises(PartitionError, match="^the same$"):
        agreement.agree(dict, PartitionError("the same"), digest=0, phase="test")


@pytest.mark.mpi(min_size=2)
def test_a_difference_is_named_with_ranks_and_values(comm, agreement):
    value = 3 if comm.rank == comm.size - 1 else 2
    match = rf"^width must be the same .*; got 2 on rank.* 0.* and 3 on rank {comm.size - 1}\. "
    with pytest.raises(RankMismatchError, match=match):
        agreement.agree(lambda: {"depth": 1, "width": value}, digest=digest_of(value), phase="test")


@pytest.mark.mpi(min_size=2)
def test_differing_digests_of_equal_descriptions_are_told(comm, agreement):
    assert not agreement.agree(dict, digest=comm.rank, phase="test")
    assert agreement.collectives.gather(comm.rank, 0, "test") == list(range(comm.size))


@pytest.mark.mpi
def test_allreduce_reduces_over_all_ranks(comm, agreement):
    ranks = np.array([comm.rank, -comm.rank])
    highest = agreement.collectives.allreduce(ranks, MPI.MAX, 0, "test")
    assert highest.tolist() == [comm.size - 1, 0]
    parts = np.eye(comm.size)[comm.rank] / 3
    total = agreement.collectives.allreduce(parts, MPI.SUM, 0, "test")
    assert total.tolist() == [1 / 3] * comm.size  # adding zeros rounds nothing


def test_first_difference_is_the_first():
    same = {"a": 1, "b": (2, 3)}
    assert first_difference([same, dict(same)]) is None
    text = first_difference([same, same, {"a": 1, "b": (2, 4), "c": 0}, same])
    assert text is not None
    assert text.startswith(
        "b must be the same on every rank; got (2, 3) on ranks 0-1, 3 and (2, 4)"
    )
    text = first_difference([same, {"a": 1}])
    assert text is not None
    assert "nothing on rank 1" in text


def test_raise_first_without_errors():
    raise_first([None, None], None)


def test_digests_are_equal_for_what_prints_alike():
    assert digest_of("a", [1.5]) == digest_of("a", [1.5])
    assert digest_of("a", [1.5]) != digest_of("a", [2.5])
    assert 0 <= digest_of("x") < 1 << 62
