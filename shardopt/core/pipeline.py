"""The stages of a step on this rank, over all regions: reduce, update."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from shardopt._typing import FloatArray
from shardopt.backends.base import ALL_FINITE, Kernel, UpdatePlan
from shardopt.comm.collectives import Collectives
from shardopt.comm.topology import Topology
from shardopt.layout.dtypes import compute_dtype
from shardopt.layout.partition import CHUNK_NUMEL, Partition, Shard, cut
from shardopt.layout.traffic import Traffic
from shardopt.policy import ShardPolicy
from shardopt.rule.cohorts import Cohorts
from shardopt.rule.nadam import NUM_COEFFICIENTS, StepCoefficients
from shardopt.store.buffers import ShardBuffers
from shardopt.transport.internode import InterNode

_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_


class GradNorm(NamedTuple):
    """What is known of the gradients before the update.

    Attributes:
        grad_norm: The L2 norm of their average, or None where nothing asked for it.
        clip_factor: What to multiply them by.
        skipped: Whether to update nothing, as one of them is not finite.
    """

    grad_norm: float | None = None
    clip_factor: float = 1.0
    skipped: bool = False


class Pipeline:
    """Runs a kernel over this rank's shards.

    On one node the sum over ranks and the update are one pass: the kernel reads every rank's
    gradients where they are and writes the parameters where every rank reads them. ``reduce`` is
    an extra pass in front, for what must be known before the update; it leaves the sum in this
    rank's own gradients, unless those have 16 bits, which cannot hold it.

    Between nodes a bucket's gradients travel while others are updated, and its parameters after
    its own update. The owner of a shard sums what arrives, so that the update reads one source.

    Args:
        topology: The ranks.
        collectives: The same.
        kernel: What computes.
        max_grad_norm: Clip to this, as ``torch.nn.utils.clip_grad_norm_`` does, or None.
        policy: How to shard.

    Attributes:
        buffers: One for each region.
        courier: What travels between nodes; None where there is but one.
    """

    def __init__(
        self,
        topology: Topology,
        collectives: Collectives,
        kernel: Kernel,
        max_grad_norm: float | None,
        policy: ShardPolicy,
    ) -> None:
        self.buffers: list[ShardBuffers] = []
        self.courier: InterNode | None = None
        if topology.num_nodes > 1:
            self.courier = InterNode(topology, collectives, kernel, policy.wire_dtype)
        self._topology = topology
        self._rollcall = collectives
        self._kernel = kernel
        self._max_grad_norm = max_grad_norm
        self._policy = policy

    def extend(self, partition: Partition) -> None:
        """Allocate the regions that are new in a partition. Collective over the node."""
        for index in range(len(self.buffers), len(partition.regions)):
            self.buffers.append(ShardBuffers(partition, index, self._topology))
        if self.courier is not None:
            self.courier.lay_out(partition, self.buffers)

    def sync(self) -> None:
        """See [Note: when stores become visible]."""
        for storage in self.buffers:
            storage.sync()

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent to other nodes in this step."""
        return Traffic(0, 0) if self.courier is None else self.courier.traffic

    @property
    def waited_s(self) -> float:
        """Time of this step in which this rank has waited for other nodes."""
        return 0.0 if self.courier is None else self.courier.waited_s

    def publish_all(self, step: int) -> None:
        """Let every node's windows show what the owners have in theirs. Collective."""
        if self.courier is not None:
            self.courier.publish_all(step)

    def spread(self, root: int) -> None:
        """Bring the parameters in node ``root``'s windows to all others. Collective."""
        for storage in self.buffers:
            part = cut(0, storage.region.numel, storage.node_rank, self._topology.node_size)
            self.broadcast(storage.params[slice(*part)], root, 0)

    def broadcast(self, array: FloatArray, root: int, step: int) -> None:
        """Bring an array in node ``root``'s windows to the others. Collective over the lane."""
        if self.courier is not None:
            self.courier.broadcast(array, root, step)

    def zero_grads(self) -> None:
        """Zero this rank's gradients."""
        for storage in self.buffers:
            storage.zero_grads()

    def scale_grads(self, factor: float) -> None:
        """Multiply this rank's gradients."""
        for storage in self.buffers:
            grads = storage.grads[storage.node_rank, : storage.region.numel]
            grads *= grads.dtype.type(factor)

    def reduce(self, partition: Partition, step: int) -> float:
        """Sum the gradients over ranks and give the sum of their squares, the same on every rank.

        The squares of a chunk are added up by its owner and the chunks in flat order, so that
        the bits do not depend on how chunks are shared out; the allreduce only adds zeros to
        each of them.

        Collective: every rank.
        """
        if partition.numel == 0:
            return 0.0
        if self.courier is not None:
            square_sums = self.courier.collect_all(step)
        else:
            square_sums = self._reduce_node(partition)
        square_sums = self._rollcall.allreduce(square_sums, MPI.SUM, step, "reduce")
        return float(np.cumsum(square_sums)[-1:].sum())  # one after the other, if there are any

    def measure(self, partition: Partition, step: int, grad_scale: float) -> GradNorm:
        """Reduce first where something must be known before the update.

        Collective: every rank.

        Args:
            partition: The layout.
            step: For messages.
            grad_scale: Factor on the sum of gradients that makes it the average.
        """
        max_grad_norm, check_finite = self._max_grad_norm, self._policy.check_finite
        if check_finite is None and self._overflows_easily():
            check_finite = True
        if max_grad_norm is None and not check_finite:
            return GradNorm()
        grad_norm = math.sqrt(self.reduce(partition, step)) * grad_scale
        if not math.isfinite(grad_norm) and check_finite is not False:
            return GradNorm(grad_norm, skipped=True)
        if max_grad_norm is None:
            return GradNorm(grad_norm)
        clip_factor = max_grad_norm / (grad_norm + _CLIP_EPS)
        return GradNorm(grad_norm, 1.0 if clip_factor > 1.0 else clip_factor)

    def update(
        self,
        schedule: Cohorts,
        coefficients: Sequence[StepCoefficients],
        step: int,
        *,
        reduced: bool,
    ) -> int | None:
        """Apply a step to this rank's shards, and see to it that every node has the result.

        Collective: every rank.

        Args:
            schedule: Regrouped for this step.
            coefficients: One for each of its cohorts.
            step: For messages.
            reduced: Whether ``reduce`` has summed the gradients already.

        Returns:
            Index of the first parameter in which this rank saw inf or NaN, or None.
        """
        poisoned = []
        tables = {
            dtype: np.array(coefficients, dtype).reshape(-1, NUM_COEFFICIENTS)
            for dtype in {compute_dtype(storage.region.dtype) for storage in self.buffers}
        }
        for storage, shard, sources, sources_start in self._collect(reduced, step):
            table = tables[compute_dtype(storage.region.dtype)]
            segments = schedule.segments(shard)
            for start, stop in self._pieces(*storage.positions(shard), step):
                plan = UpdatePlan(start, stop, segments, table, sources_start)
                flag = self._update_piece(storage, shard, sources, plan)
                if flag != ALL_FINITE:
                    first = self._first_poisoned(schedule.partition, storage, shard, flag)
                    poisoned += [] if first is None else [first]
        return min(poisoned, default=None)

    def _collect(
        self, reduced: bool, step: int
    ) -> Iterator[tuple[ShardBuffers, Shard, FloatArray, int]]:
        """Yield each of this rank's shards, with its sources and the position they begin at.

        When the next is asked for, other nodes get what has become of the one before.
        """
        if self.courier is None:
            for storage in self.buffers:
                row = storage.node_rank
                one_source = reduced and storage.holds_sums
                sources = storage.grads[row : row + 1] if one_source else storage.grads
                for shard in filter(None, storage.shards):
                    yield storage, shard, sources, 0
            return
        for route in self.courier.collect(step):
            storage, shard = route.storage, route.shard
            yield (
                storage,
                shard,
                storage.sums[None],
                storage.positions(shard)[0] - shard.local_start,
            )
            self.courier.publish(route, step)
        self.courier.finish(step)

    def _pieces(self, start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
        """Cut [start, stop) so that messages between nodes do not wait for the whole of it."""
        if self.courier is None:
            yield start, stop
            return
        for begin in range(start, stop, self._kernel.piece_numel):
            yield begin, min(stop, begin + self._kernel.piece_numel)
            self.courier.advance(step)

    def _update_piece(
        self, storage: ShardBuffers, shard: Shard, sources: FloatArray, plan: UpdatePlan
    ) -> int:
        shift = shard.local_start - storage.positions(shard)[0]
        local = slice(plan.start + shift, plan.stop + shift)
        state = {key: array[local] for key, array in storage.state.items()}
        return self._kernel.update(
            sources,
            storage.params,
            state.get("master"),
            state["exp_avg"],
            state["exp_avg_sq"],
            plan,
        )

    def _reduce_node(self, partition: Partition) -> NDArray[np.float64]:
        """Sum over the ranks of the only node, in place."""
        square_sums = np.zeros(partition.numel // CHUNK_NUMEL)
        for storage in self.buffers:
            row = storage.grads[storage.node_rank]
            writes = storage.holds_sums and len(storage.grads) > 1
            for shard in filter(None, storage.shards):
                start, stop = storage.positions(shard)
                chunks = slice(shard.start // CHUNK_NUMEL, shard.stop // CHUNK_NUMEL)
                out = row[start:stop] if writes else None
                self._kernel.reduce(storage.grads, out, start, stop, square_sums[chunks])
        return square_sums

    def _overflows_easily(self) -> bool:
        """Whether gradients have float16's range, or are 16-bit ones, whose losses are scaled."""
        narrow = self.courier is not None and self._policy.wire_dtype == "float16"
        return narrow or not all(storage.holds_sums for storage in self.buffers)

    @staticmethod
    def _first_poisoned(
        partition: Partition, storage: ShardBuffers, shard: Shard, position: int
    ) -> int | None:
        zero = storage.region.start
        for index, start, stop in partition.params_in(shard.region, position + zero, shard.stop):
            if not np.isfinite(storage.params[start - zero : stop - zero]).all():
                return index
        return None

    def free(self) -> None:
        """Release all memory. Collective over the node."""
        for storage in self.buffers:
            storage.free()
        self.buffers.clear()
        if self.courier is not None:
            self.courier.free()
