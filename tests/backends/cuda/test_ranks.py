"""Ranks that own shards read all ranks' gradients and write all ranks' parameters, by address.

What a rank writes lies in memory that the ranks of a node share, as memory of a GPU does that other
processes have opened; only the addresses differ from rank to rank.
"""

import numpy as np
import pytest

from shardopt.backends.base import ALL_FINITE, Rows, UpdatePlan
from shardopt.backends.cuda.kernel import CudaKernel
from shardopt.comm.node_memory.arena import Arena
from shardopt.comm.node_memory.fence import full_fence
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from tests.support.cuda import nvrtc
from tests.support.cuda.cases import CPU, hard_arena, hard_coefficients, hard_segments
from tests.support.cuda.devices import PtxDevice
from tests.support.cuda.memory import Memory
from tests.support.kernel_arrays import assert_same_bits

PART_NBYTES = 1 << 20

pytestmark = pytest.mark.any_mpi  # it is memory that they share


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_rank_has_the_bits_of_the_kernel_for_cpus(comm, dtype):
    nvrtc.require()
    room = Arena(comm).allocate(PART_NBYTES * comm.size).memory
    memory = Memory(room, start=PART_NBYTES * comm.rank)
    device = PtxDevice(memory=memory)
    case = _Case(comm.size, dtype)
    own = [memory.array(array) for array in (case.params, case.grads[comm.rank])]
    span = case.whole.cut(comm.rank, comm.size, CHUNK_NUMEL)
    state = {key: memory.array(values[span.slice]) for key, values in case.state.items()}
    offsets = comm.allgather([array.ctypes.data - memory.base for array in own])
    memory.add_runs([run for runs in comm.allgather(memory.runs) for run in runs])
    _meet(comm)

    params, grads = np.array(offsets).T + memory.base
    sources = Rows(own[1].dtype, case.whole.numel, grads)
    mine_first = Rows(own[0].dtype, case.whole.numel, np.roll(params, -comm.rank))
    kernel = CudaKernel(device, comm.size)
    plan = UpdatePlan(Span(0, span.numel), case.segments_of(span), case.coefficients, span.start)
    kernel.update(sources.part(span), mine_first.part(span), state, plan)
    found = kernel.take_poisoned()
    _meet(comm)

    poisoned = case.update_by_cpu()
    assert_same_bits(own[0], case.params)
    for key, values in state.items():
        assert_same_bits(values, case.state[key][span.slice])
    assert found == next((chunk for chunk in poisoned if chunk in span), ALL_FINITE)
    _meet(comm)


class _Case:
    """A region of four chunks; the same on every rank."""

    def __init__(self, num_ranks, dtype):
        halves = [hard_arena(num_ranks, dtype, poison=np.inf) for _ in range(2)]
        self.grads = [
            np.concatenate(rows) for rows in zip(*(half.grads for half in halves), strict=True)
        ]
        self.params = np.concatenate([half.param for half in halves])
        self.state = {
            key: np.concatenate([half.state[key] for half in halves]) for key in halves[0].state
        }
        self.whole = Span(0, self.params.size)
        self.coefficients = hard_coefficients(dtype)
        self._segments = np.array(hard_segments(self.params.size, len(self.coefficients)))

    def segments_of(self, span):
        """Return the segments of a shard, counted from its start."""
        clipped = self._segments.copy()
        clipped[:, :2] = clipped[:, :2].clip(span.start, span.stop) - span.start
        return clipped[clipped[:, 0] < clipped[:, 1]]

    def update_by_cpu(self):
        """Update everything and return the chunks that are poisoned."""
        plan = UpdatePlan(self.whole, self._segments, self.coefficients)
        CPU.update(self.grads, [self.params], self.state, plan)
        chunks = np.isfinite(self.params).reshape(-1, CHUNK_NUMEL).all(1)
        return [CHUNK_NUMEL * int(chunk) for chunk in np.flatnonzero(~chunks)]


def _meet(comm):
    full_fence()
    comm.Barrier()
    full_fence()
