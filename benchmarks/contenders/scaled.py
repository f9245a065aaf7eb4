"""The contenders of a step on more and more ranks, what each needs, and the rule it follows."""

import importlib
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from mpi4py import MPI

from benchmarks.contenders.names import (
    BEHIND_BACKWARD,
    DDP,
    DEEPSPEED,
    FSDP2,
    OPTAX,
    REDUCE_SCATTER,
    REPLICATED,
    SHARDOPT,
    SHARDOPT_OPTAX,
    ZERO_REDUNDANCY,
)
from benchmarks.contenders.oracle import Judged, Rule, adam, optax_nadam, torch_nadam
from benchmarks.contenders.ours import Shardopt
from benchmarks.contenders.peers import ReduceScatter, TorchAllReduce, replicated, zero_redundancy
from benchmarks.contenders.problem import LR, Contender, Problem
from shardopt import ShardPolicy

Make = Callable[[Problem, ShardPolicy], Contender]


@dataclass(frozen=True)
class Entry:
    """A contender that may be in a run.

    Attributes:
        make: Makes it from the model, and from the policy if it is this project.
        needs: Modules without which it is left out.
        rule: What its steps must do.
    """

    make: Make
    needs: tuple[str, ...] = ()
    rule: Rule = torch_nadam


def _peer(make: Callable[[Problem], Contender]) -> Make:
    return lambda problem, policy: make(problem)


def _from(module: str, name: str) -> Make:
    """Return a maker from a module that is imported only where it is wanted."""
    return lambda problem, policy: getattr(importlib.import_module(module), name)(problem)


def _shardopt_behind(problem: Problem, policy: ShardPolicy) -> Contender:
    made: Contender = importlib.import_module(_BEHIND).shardopt_behind(problem, policy)
    return made


def deepspeed_adam(problem: Problem) -> TorchAllReduce:
    """Make DeepSpeed's Adam for CPUs on every rank."""

    def make(torch: Any, params: list[Any]) -> Any:
        return importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam(params, lr=LR)

    return TorchAllReduce(problem, make)


_BEHIND, _JITTED = "benchmarks.contenders.behind", "benchmarks.contenders.jitted"

ENTRIES: dict[str, Entry] = {
    SHARDOPT: Entry(Shardopt),
    REDUCE_SCATTER: Entry(_peer(ReduceScatter)),
    ZERO_REDUNDANCY: Entry(_peer(zero_redundancy), ("torch",)),
    REPLICATED: Entry(_peer(replicated), ("torch",)),
    BEHIND_BACKWARD: Entry(_shardopt_behind, ("torch",)),
    DDP: Entry(_from(_BEHIND, "ddp"), ("torch",)),
    FSDP2: Entry(_from(_BEHIND, "fsdp2"), ("torch", "torch.distributed.fsdp")),
    SHARDOPT_OPTAX: Entry(
        lambda problem, policy: Shardopt(problem, policy, variant="optax"), rule=optax_nadam
    ),
    OPTAX: Entry(_from(_JITTED, "OptaxReplica"), ("jax", "optax"), optax_nadam),
    DEEPSPEED: Entry(_peer(deepspeed_adam), ("torch", "deepspeed.ops.adam"), adam),
}


def find_missing(comm: MPI.Intracomm, skip: Collection[str], threads: int) -> dict[str, str]:
    """Return the contenders that cannot be in a run, and why. Collective: every rank.

    Args:
        comm: The ranks of the job.
        skip: Contenders that are not wanted.
        threads: Cores for each rank.
    """
    os.environ.setdefault("NPROC", str(threads))  # which JAX reads as it starts
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    missing = {}
    for name, entry in ENTRIES.items():
        reason = "" if name in skip else _why_missing(entry.needs)
        found = [each for each in comm.allgather(reason) if each]
        if found:
            missing[name] = found[0]
    return missing


def _why_missing(modules: tuple[str, ...]) -> str:
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            return f"{module.split('.')[0]} is not installed"
        except Exception as error:  # of any kind: extensions are built at import
            said = str(error) or type(error).__name__
            return f"{module} cannot be imported: {said.splitlines()[0]}"
    return ""


def make_contenders(
    problem: Problem, policy: ShardPolicy, left_out: Collection[str]
) -> dict[str, Judged]:
    """Make all contenders but some. Collective: every rank of the problem."""
    return {
        name: Judged(entry.make(problem, policy), entry.rule)
        for name, entry in ENTRIES.items()
        if name not in left_out
    }
