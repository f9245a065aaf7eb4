"""Gradient and parameter synchronisation between nodes, with a deadline on every wait."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from shardopt._typing import FloatArray
from shardopt.backends.base import Backend, Rows
from shardopt.comm.collectives import Collectives
from shardopt.comm.topology import Topology
from shardopt.layout.partition import Partition, Shard
from shardopt.layout.span import Span
from shardopt.layout.traffic import Traffic
from shardopt.store.buffers import ShardBuffers
from shardopt.transport.all_gather import AllGather
from shardopt.transport.base import Transport
from shardopt.transport.buckets import BucketPlan
from shardopt.transport.local import LocalTransport
from shardopt.transport.mpi import MpiTransport
from shardopt.transport.reduce_scatter import ReduceScatter
from shardopt.transport.reduction import InPlaceReduction, Reduction

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ReducedShard:
    """A piece of this rank's shard of a bucket, ready to be updated.

    Attributes:
        plan: The bucket.
        span: The piece, in whole chunks from the start of the shard; the whole shard on one node.
        sources: The rows of gradients whose sum over all ranks it is, from the start of the shard.
        targets: The copies of the parameters, likewise.
    """

    plan: BucketPlan
    span: Span
    sources: Rows
    targets: Rows

    @property
    def shard(self) -> Shard:
        """The shard that it is a piece of."""
        return self.plan.shard

    @property
    def is_last(self) -> bool:
        """Whether the shard is updated once this piece is."""
        return self.span.stop == self.shard.numel


class BucketSync:
    """Moves gradients and parameters along this rank's lane while the kernel works.

    Args:
        transport: To the other nodes.
        reduction: Sums gradients.
        collectives: For waits.
        piece_numel: The update of a shard is cut into pieces of this many elements, between which
            messages make progress; None leaves shards whole.

    Attributes:
        reduction: As given.
        step: The step that is being taken, for messages.
        waited_s: Time this rank has waited for other nodes since ``reset``, in seconds.
    """

    def __init__(
        self,
        transport: Transport,
        reduction: Reduction,
        collectives: Collectives,
        piece_numel: int | None,
    ) -> None:
        self.reduction = reduction
        self.step = 0
        self.waited_s = 0.0
        self._transport = transport
        self._all_gather = AllGather(transport)
        self._collectives = collectives
        self._piece_numel = piece_numel

    def extend(self, partition: Partition, buffers: Sequence[ShardBuffers]) -> None:
        """Prepare for the buckets of a larger partition; nothing may be in transit."""
        self.reduction.extend(partition, buffers)

    def reset(self, step: int) -> None:
        """Get ready for step ``step``; everything of the one before is complete."""
        self.step = step
        self.reduction.reset()
        self._transport.reset()
        self.waited_s = 0.0

    @property
    def traffic(self) -> Traffic:
        """Sent to other nodes since ``reset``."""
        return self._transport.sent

    def translate_mpi_errors(self) -> AbstractContextManager[None]:
        """See ``Collectives``; for progress made without waiting."""
        return self._collectives.translate_mpi_errors(self.step, "exchange", self._awaited_ranks)

    # -- gradients ---------------------------------------------------------------------------------

    def reduced(self) -> Iterator[ReducedShard]:
        """Yield this rank's shards as soon as their gradients are summed over all ranks.

        Collective: every rank iterates to the end.
        """
        for plan in self._reduced_plans():
            sources, whole = self.reduction.sources(plan), Span(0, plan.shard.numel)
            pieces = [whole]
            if self._piece_numel is not None and whole:
                pieces = list(whole.chunks(self._piece_numel))
            for piece in pieces:
                yield ReducedShard(plan, piece, sources, plan.targets)
                self._translated(self._advance)

    def square_sums(self, present: int) -> NDArray[np.float64]:
        """Reduce all gradients and return the sums of squares; see ``Reduction.square_sums``.

        Collective: every rank.
        """
        for _ in self._reduced_plans():
            pass
        self.drain()
        return self.reduction.square_sums(present)

    # -- parameters --------------------------------------------------------------------------------

    def publish(self, updated: ReducedShard) -> None:
        """Send a shard to the other nodes once its last piece is updated, and receive theirs."""
        if updated.is_last and self.reduction.is_active(updated.plan):
            self._publish(updated.plan)

    def publish_all(self) -> None:
        """Send every shard as it is now, so that all nodes have the same parameters. Collective."""
        self.publish_plans(self.reduction.plans)

    def publish_plans(self, plans: Sequence[BucketPlan]) -> None:
        """Send the shards of some buckets as they are now. Collective: every rank."""
        for plan in plans:
            self._publish(plan)
        self.drain()

    def drain(self) -> None:
        """Wait until everything in transit has arrived."""
        reduction, all_gather = self.reduction, self._all_gather

        def is_published() -> bool:
            reduction.advance(limit=0)
            return all_gather.advance() == 0

        def is_sent() -> bool:
            reduction.advance(limit=0)
            return reduction.is_idle

        self._wait(is_published, "publishing", lambda: all_gather.awaited)
        self._wait(is_sent, "exchange", lambda: reduction.awaited)

    def broadcast(self, array: FloatArray, root: int) -> None:
        """Copy an array in node ``root``'s memory to the others. Collective over the lane."""
        for message in self._translated(self._transport.post_broadcast, array, root):
            self._collectives.wait(message.is_done, self.step, "broadcast")

    def close(self) -> None:
        """Release all memory, and what the transport holds."""
        self.reduction.free()
        self._transport.close()

    # -- inside ------------------------------------------------------------------------------------

    def _reduced_plans(self) -> Iterator[BucketPlan]:
        """Yield each bucket once this rank's shard of it is summed."""
        reduction = self.reduction
        for place, plan in reduction.final_places():

            def is_reduced(place: int = place) -> bool:
                self._all_gather.advance()
                return reduction.advance() > place

            self._wait(is_reduced, "exchange", lambda: reduction.awaited)
            yield plan

    def _publish(self, plan: BucketPlan) -> None:
        all_gather = self._all_gather
        self._wait(all_gather.has_room, "publishing", lambda: all_gather.awaited)
        self._translated(all_gather.start, plan)

    def _advance(self) -> None:
        self._all_gather.advance()
        self.reduction.advance()

    def _translated(self, function: Callable[..., T], *args: Any) -> T:
        """Call ``function``; an error of MPI is raised as one that names who is lost."""
        try:
            return function(*args)
        except MPI.Exception:
            with self.translate_mpi_errors():
                raise

    def _wait(
        self,
        test: Callable[[], bool],
        phase: str,
        late: Callable[[], tuple[int, list[int]]],
    ) -> None:
        """Wait until ``test`` holds; ``late`` names the bucket and the nodes it depends on."""
        if self._translated(test):
            return
        start = time.perf_counter()
        where = f"{phase} of bucket {late()[0]}"
        self._collectives.wait(
            test, self.step, where, lambda: [self._transport.ranks[node] for node in late()[1]]
        )
        self.waited_s += time.perf_counter() - start

    def _awaited_ranks(self) -> list[int]:
        nodes = {*self.reduction.awaited[1], *self._all_gather.awaited[1]}
        return [self._transport.ranks[node] for node in sorted(nodes)]


def make_sync(
    topology: Topology, backend: Backend, collectives: Collectives, wire_dtype: str | None
) -> BucketSync:
    """Set up synchronisation for the ranks of a job, over MPI if there are several nodes.

    Args:
        topology: The ranks.
        backend: Computes.
        collectives: For waits.
        wire_dtype: As in ``ShardPolicy``.
    """
    kernel, place = backend.kernel, (topology.node, topology.node_rank)
    if topology.num_nodes == 1:
        local = LocalTransport(topology.rank)
        return BucketSync(local, InPlaceReduction(kernel, topology.node_rank), collectives, None)
    transport = MpiTransport(topology, collectives.number)
    reduction = ReduceScatter(transport, backend, place, wire_dtype)
    return BucketSync(transport, reduction, collectives, kernel.piece_numel)
