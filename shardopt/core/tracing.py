"""The trace of an optimizer, from the meeting of its ranks at construction to its end."""

import os
import secrets
from dataclasses import dataclass

from mpi4py import MPI

from shardopt.backends.devices import make_annotate
from shardopt.comm.clocks import compare_clocks, name_clock
from shardopt.comm.consensus import Consensus, attempt, portable, raise_first
from shardopt.errors import RankFailureError
from shardopt.trace import OFF, Annotate, AnnotatedTrace, Trace, open_trace
from shardopt.trace_file import CLOCK, OPTIMIZER


@dataclass(frozen=True)
class Tracing:
    """The trace of an optimizer on this rank, with what all of its ranks know about the others'.

    Attributes:
        trace: The trace.
        clocks: The name of each rank's clock; empty if no rank traces.
    """

    trace: Trace
    clocks: tuple[str, ...]

    def align(self, consensus: Consensus, step: int, call: str) -> None:
        """Write how far this rank's clock is from that of rank 0.

        Collective: every rank.
        """
        if self.clocks:
            offset = compare_clocks(consensus.collectives, self.clocks, step, call)
            self.trace.describe(CLOCK, offset.trace_args())
            self.trace.flush()


def start_trace(
    given: str | os.PathLike[str] | None, device: str | None, annotate: Annotate | None
) -> tuple[Trace, Exception | None]:
    """Open this rank's trace, or return what is wrong with it for ``agree_on_trace``.

    Args:
        given: ``ShardPolicy.trace``.
        device: Where the parameters are, or None.
        annotate: Shows spans to the framework's profiler, or None.
    """
    opened, error = attempt(open_trace, given, MPI.COMM_WORLD.rank)
    trace = opened or OFF
    for each in (make_annotate(device, wanted=trace.is_on), annotate):
        if each is not None:
            trace = AnnotatedTrace(trace, each)
    return trace, error


def agree_on_trace(
    consensus: Consensus, trace: Trace, error: Exception | None, call: str
) -> Tracing:
    """Raise on every rank if one cannot trace; else compare clocks if any does.

    Collective: every rank.

    Raises:
        TraceError: A rank cannot write where it is to.
    """
    shares = portable(error), trace.is_on, name_clock(), secrets.token_hex(8)
    errors, traces, clocks, keys = zip(
        *consensus.collectives.allgather(shares, 0, call), strict=True
    )
    try:
        raise_first(errors, error)
        tracing = Tracing(trace, clocks if any(traces) else ())
        tracing.align(consensus, 0, call)
    except RankFailureError:
        raise
    except Exception:
        trace.close()
        consensus.free()
        raise
    if trace.is_on:
        comm = consensus.topology.comm
        place = {"rank": comm.rank, "world_size": comm.size, "ranks": _world_ranks(comm)}
        trace.describe(OPTIMIZER, {"key": keys[0], **place})
    return tracing


def _world_ranks(comm: MPI.Intracomm) -> list[int] | None:
    """Return the ranks in MPI_COMM_WORLD of the ranks of a communicator; None if they are equal."""
    mine, world = comm.Get_group(), MPI.COMM_WORLD.Get_group()
    ranks = MPI.Group.Translate_ranks(mine, None, world)
    mine.Free()
    world.Free()
    return None if list(ranks) == list(range(comm.size)) else list(ranks)
