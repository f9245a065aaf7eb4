"""Helpers for tests of errors: a small model, and a check that all ranks raise the same."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from shardopt.errors import PartialStateWarning, ShardoptError
from shardopt.numpy import NAdam, Parameter
from shardopt.policy import ShardPolicy

POLICY = ShardPolicy(timeout_s=20)  # so that a test fails rather than waits much longer
BOTH_WAYS = pytest.mark.parametrize("alone", [False, True], ids=["every rank", "last rank"])
"""The mistake of the test is made by every rank, and again by the last one ``alone``."""

FORM = re.compile(r"(.+ must .+; got .+|(.+: )?could not .+: .+)\. .+\.", re.DOTALL)


class Sparse:
    """An object that looks like a matrix of scipy.sparse."""

    shape, dtype = (2, 3), np.dtype(np.float32)

    def toarray(self):
        return np.zeros(self.shape, self.dtype)


def make_params() -> list[Parameter]:
    """Return two parameters in fp32 and one in fp64."""
    weight = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    bias, scale = np.arange(5, dtype=np.float32), np.array(2.0)
    return [Parameter(weight, "w"), Parameter(bias, "b"), Parameter(scale, "s")]


def make_optimizer(comm: MPI.Intracomm, params: Any = None, **settings: Any) -> NAdam:
    """Return an optimizer of ``make_params()``, with a policy of short waits."""
    settings.setdefault("policy", POLICY)
    return NAdam(make_params() if params is None else params, comm=comm, **settings)


def params_of(opt: NAdam) -> list[Parameter]:
    """Return all parameters in order."""
    return [param for group in opt.param_groups for param in group["params"]]


def is_last(comm: MPI.Intracomm) -> bool:
    """Return whether this is the rank that does something else in tests of one odd rank."""
    return comm.rank == comm.size - 1


def errs(comm: MPI.Intracomm, alone: bool) -> bool:
    """Return whether this rank makes the mistake; see ``BOTH_WAYS``."""
    return is_last(comm) or not alone


def name_ranks(ranks: Sequence[int]) -> str:
    """Return consecutive ranks in the words of messages."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"


def differing(comm: MPI.Intracomm, name: str, usual: str, odd: str) -> str:
    """Return the message for a ``name`` that is ``odd`` on the last rank alone."""
    others, last = name_ranks(range(comm.size - 1)), name_ranks([comm.size - 1])
    return f"{name} must be the same on every rank; got {usual} on {others} and {odd} on {last}."


@contextmanager
def refused(
    comm: MPI.Intracomm, error: type[ShardoptError], *told: str, alone: bool = False
) -> Iterator[None]:
    """Check that every rank raises ``error`` in the same words, each of ``told`` among them.

    Args:
        comm: The ranks.
        error: Exactly this class.
        *told: Parts of the message.
        alone: Whether only the last rank has made the mistake: the message must begin with it.
    """
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    text = str(caught.value)
    assert comm.allgather(text) == [text] * comm.size
    assert FORM.fullmatch(text), text
    assert not [words for words in told if words not in text], text
    assert text.startswith(f"rank {comm.size - 1}: ") == (alone and comm.size > 1), text


@contextmanager
def warned(comm: MPI.Intracomm, warning: type[Warning], match: str | None = None) -> Iterator[None]:
    """Check that the warning is seen on rank 0 and on no other."""
    if comm.rank == 0:
        with pytest.warns(warning, match=match):
            yield
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    assert not seen


def take_step(opt: NAdam, value: float = 1.0) -> None:
    """Take a step in which every gradient is ``value``."""
    opt.zero_grad()
    for param in params_of(opt):
        param.grad += value
    opt.step()


def assert_steps(opt: NAdam) -> None:
    """Check that a step still updates every parameter, to the same bits on all ranks."""
    number = opt.last_step.step
    before = [param.data.copy() for param in params_of(opt)]
    take_step(opt)
    assert opt.last_step.step == number + 1
    for param, old in zip(params_of(opt), before, strict=True):
        assert (param.data < old).all()
    after = [param.data.tobytes() for param in params_of(opt)]
    assert opt.comm.allgather(after) == [after] * opt.comm.size


def everything(opt: NAdam) -> list[bytes]:
    """Return parameters, moments, step_counts and groups, to be compared bit by bit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PartialStateWarning)
        state = opt.state_dict()
    entries = [
        value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
        for entry in state["state"].values()
        for value in entry.values()
    ]
    params = [param.data.tobytes() for param in params_of(opt)]
    return [*params, *entries, repr(state["param_groups"]).encode()]
