"""All ranks raise, or none does."""

import json

import numpy as np
import pytest
from mpi4py import MPI

from shardopt.comm.consensus import (
    attempt,
    digest_of,
    first_difference,
    make_consensus,
    portable,
    raise_first,
)
from shardopt.comm.failure import Abort
from shardopt.errors import (
    CheckpointError,
    PartitionError,
    RankFailureError,
    RankMismatchError,
)
from shardopt.policy import ShardPolicy

TEST = {"step": 0, "phase": "test"}


@pytest.fixture
def consensus(comm):
    consensus = make_consensus(comm, ShardPolicy(timeout_s=60), Abort())
    yield consensus
    consensus.free()


# -- agreement -------------------------------------------------------------------------------------


@pytest.mark.mpi
def test_equal_digests_agree_with_one_collective(consensus, monkeypatch):
    monkeypatch.setattr(consensus.collectives, "allgather", pytest.fail)
    assert consensus.agree(digest_of("a", 1), **TEST)


@pytest.mark.mpi(min_size=2)
def test_every_rank_raises_the_lowest_error(comm, consensus):
    error = None
    if comm.rank > 0:
        error = (PartitionError if comm.rank == 1 else CheckpointError)(f"from {comm.rank}")
    with pytest.raises(PartitionError, match="^rank 1: from 1$") as raised:
        consensus.agree(0, error, **TEST)
    assert raised.value.__cause__ is error
    assert consensus.agree(0, **TEST)  # and can go on


@pytest.mark.mpi
def test_an_error_on_all_ranks_names_none(consensus):
    with pytest.raises(PartitionError, match="^the same$"):
        consensus.agree(0, PartitionError("the same"), **TEST)


@pytest.mark.mpi(min_size=2)
def test_differing_digests_are_an_answer_and_no_error(comm, consensus):
    assert not consensus.agree(comm.rank, **TEST)
    consensus.require_same({"depth": 1}, **TEST)
    assert consensus.collectives.allgather(comm.rank, 0, "test") == list(range(comm.size))


@pytest.mark.mpi(min_size=2)
def test_a_difference_is_named_with_ranks_and_values(comm, consensus):
    value = 3 if comm.rank == comm.size - 1 else 2
    match = rf"^width must be the same .*; got 2 on rank.* 0.* and 3 on rank {comm.size - 1}\. "
    with pytest.raises(RankMismatchError, match=match):
        consensus.require_same({"depth": 1, "width": value}, **TEST)


@pytest.mark.mpi(min_size=2)
def test_a_call_must_be_the_same_on_every_rank(comm, consensus):
    call = "save()" if comm.rank else "load()"
    with pytest.raises(
        RankMismatchError, match=r"^the call must be the same .*'load\(\)' on rank 0"
    ):
        consensus.enter_call(call, {}, step=0)
    consensus.enter_call("save()", {"path": "x"}, step=0)
    error = CheckpointError("no such folder") if comm.rank == 0 else None
    with pytest.raises(CheckpointError, match="^rank 0: no such folder$"):
        consensus.enter_call("save()", {"path": "x"}, error, step=0)


@pytest.mark.mpi
def test_allreduce_reduces_over_all_ranks(comm, consensus):
    ranks = np.array([comm.rank, -comm.rank])
    highest = consensus.collectives.allreduce(ranks, MPI.MAX, 0, "test")
    assert highest.tolist() == [comm.size - 1, 0]
    parts = np.eye(comm.size)[comm.rank] / 3
    total = consensus.collectives.allreduce(parts, MPI.SUM, 0, "test")
    assert total.tolist() == [1 / 3] * comm.size  # adding zeros rounds nothing


@pytest.mark.mpi
def test_barrier_and_bcast_reach_every_rank(comm, consensus):
    array = np.full(5, comm.rank, np.float32)
    consensus.barrier(0, "test")
    consensus.collectives.bcast(array, comm.size - 1, 0, "test")
    assert (array == comm.size - 1).all()


# -- tracebacks ------------------------------------------------------------------------------------


def open_the_cupboard(bare):
    if bare:
        raise CheckpointError("the cupboard is bare")
    return "bone"


def read_broken_json():
    json.loads("{")  # the error takes three arguments, so it cannot be raised again by its words


class Unreadable(ValueError):
    def __reduce__(self):
        raise TypeError("stays at home")


def raise_unreadable():
    raise Unreadable("words")


@pytest.mark.mpi(min_size=2)
def test_the_traceback_of_the_culprit_reaches_the_other_ranks(comm, consensus):
    culprit = comm.size - 1
    value, error = attempt(open_the_cupboard, bare=comm.rank == culprit)
    assert value == (None if comm.rank == culprit else "bone")
    with pytest.raises(CheckpointError) as raised:
        consensus.agree(0, error, **TEST)
    assert str(raised.value) == f"rank {culprit}: the cupboard is bare"
    if comm.rank == culprit:  # its own error is chained
        assert raised.value.__cause__ is error
        assert not hasattr(raised.value, "__notes__")
        return
    (note,) = raised.value.__notes__
    first, *_, last = note.splitlines()
    assert first == f"Traceback on rank {culprit}:"
    assert "in open_the_cupboard" in note
    assert 'raise CheckpointError("the cupboard is bare")' in note
    assert last == "shardopt.errors.CheckpointError: the cupboard is bare"


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("function", [read_broken_json, raise_unreadable])
def test_an_error_that_others_cannot_read_keeps_its_words_and_traceback(comm, consensus, function):
    error = attempt(function).error if comm.rank == 0 else None
    kind = {read_broken_json: "JSONDecodeError", raise_unreadable: "Unreadable"}[function]
    with pytest.raises(RuntimeError, match=f"^rank 0: {kind}: ") as raised:
        consensus.agree(0, error, **TEST)
    if comm.rank == 0:
        assert raised.value.__cause__ is error
        assert type(error).__name__ == kind
    else:
        assert f"in {function.__name__}" in raised.value.__notes__[0]


@pytest.mark.mpi(min_size=2)
def test_a_rank_with_another_error_also_gets_the_first_traceback(comm, consensus):
    def fail():
        raise PartitionError(f"from {comm.rank}")

    error = attempt(fail).error
    with pytest.raises(PartitionError) as raised:
        consensus.agree(0, error, **TEST)
    assert str(raised.value) == "rank 0: from 0"
    assert raised.value.__cause__ is error
    assert hasattr(raised.value, "__notes__") == (comm.rank > 0)


def test_an_error_without_a_traceback_gets_no_note():
    with pytest.raises(PartitionError, match="^rank 1: words$") as raised:
        raise_first([None, portable(PartitionError("words"))], None)
    assert not hasattr(raised.value, "__notes__")


def test_attempt_returns_errors_but_for_those_of_missing_ranks():
    assert attempt(max, 1, 2) == (2, None)
    value, error = attempt(int, "x")
    assert value is None
    assert isinstance(error, ValueError)

    def lose_a_rank():
        raise RankFailureError("lost rank 1")

    with pytest.raises(RankFailureError):
        attempt(lose_a_rank)


# -- descriptions ----------------------------------------------------------------------------------


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
