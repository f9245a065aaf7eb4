"""Gradient and parameter synchronisation between nodes, with a deadline on every wait."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from shardopt._typing import FloatArray
from shardopt.backends.base import Rows
from shardopt.comm.collectives import Collectives
from shardopt.layout.partition import Partition, Shard
from shardopt.layout.span import Span
from shardopt.layout.traffic import Traffic
from shardopt.store.buffers import ShardBuffers
from shardopt.transport.all_gather import AllGather
from shardopt.transport.averaging import AveragedGrads
from shardopt.transport.buckets import BucketPlan
from shardopt.transport.copies import Copies
from shardopt.transport.reduction import Reduction

T = TypeVar("T")

_ALL = -1  # the bit mask of all buckets


@dataclass(frozen=True, slots=True)
class ReducedShard:
    """A piece of this rank's shard of a bucket, ready to be updated.

    Attributes:
        plan: The bucket.
        span: The piece, in whole chunks from the start of the shard; the whole shard on one node.
        sources: The rows whose sum, times ``Reduction.mean_scale``, is the average over all ranks,
            from the start of the shard.
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

    def trace_args(self) -> Mapping[str, object]:
        """Return what a trace shows of it: the bucket, and the bytes of parameters."""
        itemsize = np.dtype(self.plan.buffers.region.dtype).itemsize
        return {"bucket": self.plan.bucket, "bytes": self.span.numel * itemsize}

    @property
    def is_last(self) -> bool:
        """Whether the shard is updated once this piece is."""
        return self.span.stop == self.shard.numel


class BucketSync:
    """Moves gradients and parameters along this rank's lane while the kernel works.

    Args:
        all_gather: Sends shards to other nodes.
        reduction: Sums gradients.
        averages: Averages them before the step, if users want to see them so.
        copies: To and from the devices of this node.
        collectives: For waits.
        piece_numel: The update of a shard is cut into pieces of this many elements, between which
            messages and copies make progress; None leaves shards whole.

    Attributes:
        reduction: As given.
        copies: As given.
        step: The step that is being taken, for messages.
        waited_s: Time this rank has waited for other nodes since ``reset``, in seconds.
    """

    def __init__(
        self,
        all_gather: AllGather,
        reduction: Reduction,
        averages: AveragedGrads,
        copies: Copies,
        collectives: Collectives,
        piece_numel: int | None,
    ) -> None:
        self.reduction = reduction
        self.copies = copies
        self._averages = averages
        self._is_spent = False  # all gradients have been reduced for an average
        self.step = 0
        self.waited_s = 0.0
        self._transport = all_gather.transport
        self._all_gather = all_gather
        self._unsent_before = Traffic(0, 0)
        self._collectives = collectives
        self._piece_numel = piece_numel

    def extend(self, partition: Partition, buffers: Sequence[ShardBuffers]) -> None:
        """Prepare for the buckets of a larger partition; nothing may be in transit."""
        self.reduction.extend(partition, buffers)
        self._averages.extend(partition)
        self.copies.extend(partition, buffers)

    def lay_out(self, partition: Partition, buffers: Sequence[ShardBuffers]) -> None:
        """Prepare for the buckets of another partition; nothing may be in transit."""
        self.reduction.free()
        self.extend(partition, buffers)

    def reset(self, step: int) -> None:
        """Get ready for step ``step``; of the one before only parameters may be on their way."""
        self.step = step
        self.reduction.reset()
        self._transport.reset()
        self._unsent_before = self._all_gather.unsent
        self.waited_s = 0.0
        self._is_spent = False

    @property
    def traffic(self) -> Traffic:
        """Sent to other nodes since ``reset``, and what ``publish_later`` has yet to send."""
        sent, unsent, before = self._transport.sent, self._all_gather.unsent, self._unsent_before
        return Traffic(
            sent.nbytes + unsent.nbytes - before.nbytes,
            sent.messages + unsent.messages - before.messages,
        )

    def translate_mpi_errors(self) -> AbstractContextManager[None]:
        """See ``Collectives``; for progress made without waiting."""
        return self._collectives.translate_mpi_errors(self.step, "exchange", self._awaited_ranks)

    # -- gradients ---------------------------------------------------------------------------------

    def resend(self, changed: int) -> None:
        """Reduce what has changed since it was reduced; see ``Reduction.resend``."""
        self.reduction.resend(_ALL if self._is_spent else changed)

    def reduced(self) -> Iterator[ReducedShard]:
        """Yield this rank's shards as soon as their gradients are summed over all ranks.

        Collective: every rank iterates to the end.
        """
        for plan in self._reduced_plans():
            yield from self._pieces(plan, self.reduction.sources(plan))

    def square_sums(self, present: int, *, averaged: bool = False) -> NDArray[np.float64]:
        """Reduce all gradients and return the sums of squares; see ``Reduction.square_sums``.

        Collective: every rank.

        Args:
            present: Bit mask of the parameters that have a gradient on some rank.
            averaged: Whether gradients are averaged already: there is nothing to reduce then.
        """
        if averaged:
            return self._averages.square_sums(list(self._plans_at_home()), present)
        for _ in self._reduced_plans():
            pass
        self.drain()
        return self.reduction.square_sums(present)

    def average(self, present: int, factor: float) -> None:
        """Write the average over all ranks into every rank's gradients.

        Collective: every rank. Other ranks of the node may look once all ranks are done; see
        [Note: averaged gradients].

        Args:
            present: Bit mask of the parameters that have a gradient on some rank.
            factor: On the average.
        """
        factor *= self.reduction.mean_scale
        for shard in self.reduced():
            self._averages.write(shard.plan, shard.span, shard.sources, present, factor)
        self.drain()  # from here on nothing is sent from the rows that shards are received into
        plans = [plan for plan in self.reduction.plans if self.reduction.is_active(plan)]
        for plan in plans:
            self._gather(plan, self._averages.depart(plan))
        self.drain()
        for plan in plans:
            self._averages.spread(plan, present)
        self._is_spent = True

    def averaged(self) -> Iterator[ReducedShard]:
        """Yield this rank's shards of gradients that are averaged already."""
        for plan in self._plans_at_home():
            yield from self._pieces(plan, self._averages.sources(plan))

    # -- parameters --------------------------------------------------------------------------------

    def publish(self, updated: ReducedShard) -> None:
        """Send a shard to the other nodes once its last piece is updated, and receive theirs."""
        if updated.is_last and self.reduction.is_active(updated.plan):
            self._gather_params(updated.plan)
            self.copies.note_updated(updated.plan.bucket)

    def complete(self) -> None:
        """Wait until all shards are published, those of the node's other ranks included."""
        self.copies.note_all_updated()
        self.drain()
        copies = self.copies
        self._wait(copies.advance, "parameters", lambda: copies.not_updated, copies.ranks)

    def publish_later(self, plans: Sequence[BucketPlan]) -> None:
        """Send the shards of buckets from now on, while others compute; ``complete`` waits not.

        They arrive as ``advance_params`` is called. Gradients have all been sent afterwards.
        Collective: every rank, with the same buckets in the same order; nothing may be in transit.
        """
        self._wait_sent()
        buckets = [(plan, plan.parts(plan.buffers.params)) for plan in plans]
        self._translated(self._all_gather.enqueue, buckets)

    def advance_params(self) -> int:
        """Make progress with ``publish_later``, and return how many buckets are left."""
        return self._all_gather.advance()

    @property
    def num_published(self) -> int:
        """How many of the buckets of ``publish_later`` are complete on this rank."""
        return self._all_gather.num_landed

    def params_awaited(self) -> list[int]:
        """Return the ranks that the next bucket of parameters waits for."""
        return [self._transport.ranks[node] for node in self._all_gather.awaited[1]]

    def publish_all(self) -> None:
        """Send every shard as it is now, so that all nodes have the same parameters. Collective."""
        self.publish_plans(self.reduction.plans)

    def publish_plans(self, plans: Sequence[BucketPlan]) -> None:
        """Send the shards of some buckets as they are now. Collective: every rank."""
        for plan in plans:
            self._gather_params(plan)
        self.drain()

    def drain(self) -> None:
        """Wait until everything in transit has arrived."""
        reduction, all_gather = self.reduction, self._all_gather

        def is_published() -> bool:
            reduction.advance(limit=0)
            return all_gather.advance() == 0

        self._wait(is_published, "publishing", lambda: all_gather.awaited)
        self._wait_sent()

    def broadcast(self, array: FloatArray, root: int) -> None:
        """Copy an array in node ``root``'s memory to the others. Collective over the lane."""
        for message in self._translated(self._transport.post_broadcast, array, root):
            self._collectives.wait(message.is_done, self.step, "broadcast")

    def close(self) -> None:
        """Release all memory, and what the transport holds."""
        self.copies.free()
        self.reduction.free()
        self._transport.close()

    # -- inside ------------------------------------------------------------------------------------

    def _wait_sent(self) -> None:
        """Wait until no gradients are in transit."""
        reduction = self.reduction

        def is_sent() -> bool:
            reduction.advance(limit=0)
            return reduction.is_idle

        self._wait(is_sent, "exchange", lambda: reduction.awaited)

    def _reduced_plans(self) -> Iterator[BucketPlan]:
        """Yield each bucket once this rank's shard of it is summed."""
        reduction = self.reduction
        for place, plan in reduction.final_places():
            self._wait_home(plan)

            def is_reduced(place: int = place) -> bool:
                self._all_gather.advance()
                return reduction.advance() > place

            self._wait(is_reduced, "exchange", lambda: reduction.awaited)
            yield plan
        self._wait_landed()

    def _plans_at_home(self) -> Iterator[BucketPlan]:
        """Yield each bucket once the gradients of the node's ranks are at home."""
        for plan in self.reduction.plans:
            self._wait_home(plan)
            yield plan
        self._wait_landed()

    def _wait_home(self, plan: BucketPlan) -> None:
        """Wait until the gradients of all ranks of the node in a bucket can be read."""
        copies, bucket = self.copies, plan.bucket
        if copies.is_home(bucket):
            return
        self._wait_landed(bucket)
        self._wait(lambda: copies.is_home(bucket), "gradients", lambda: copies.late, copies.ranks)

    def _wait_landed(self, bucket: int | None = None) -> None:
        """Wait for this rank's own gradients of a bucket, or of all, even those that others sum.

        Whoever waits for its own device says so, which tells the others whom they wait for.
        """
        copies = self.copies

        def has_landed() -> bool:
            return copies.have_all_landed() if bucket is None else copies.has_landed(bucket)

        self._wait(has_landed, "copies from the device", lambda: (copies.late[0], []))

    def _pieces(self, plan: BucketPlan, sources: Rows) -> Iterator[ReducedShard]:
        """Yield this rank's shard of a bucket in pieces, between which messages make progress."""
        whole = Span(0, plan.shard.numel)
        pieces = [whole]
        if self._piece_numel is not None and whole:
            pieces = list(whole.chunks(self._piece_numel))
        for piece in pieces:
            yield ReducedShard(plan, piece, sources, plan.targets)
            self._translated(self._advance)

    def _gather_params(self, plan: BucketPlan) -> None:
        """Send this rank's shard of the parameters, and receive those of other nodes."""
        if self._transport.others:
            self._gather(plan, plan.parts(plan.buffers.params))

    def _gather(self, plan: BucketPlan, shards: Sequence[FloatArray]) -> None:
        """Send this rank's shard of a bucket, and receive those of other nodes."""
        reduction, all_gather = self.reduction, self._all_gather

        def has_room() -> bool:
            reduction.advance(limit=0)
            return all_gather.has_room()

        self._wait(has_room, "publishing", lambda: all_gather.awaited)
        self._translated(all_gather.start, plan, shards)

    def _advance(self) -> None:
        self._all_gather.advance()
        self.reduction.advance()
        self.copies.advance()

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
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Wait until ``test`` holds.

        Args:
            test: Whether the wait is over.
            phase: What is being done, for messages.
            late: Names the bucket and what it depends on: nodes, or places in ``ranks``.
            ranks: Those that it depends on; None takes the lane's, one on each node.
        """
        if self._translated(test):
            return
        start = time.perf_counter()
        where = f"{phase} of bucket {late()[0]}"
        named = self._transport.ranks if ranks is None else ranks
        self._collectives.wait(test, self.step, where, lambda: [named[i] for i in late()[1]])
        self.waited_s += time.perf_counter() - start

    def _awaited_ranks(self) -> list[int]:
        nodes = {*self.reduction.awaited[1], *self._all_gather.awaited[1]}
        return [self._transport.ranks[node] for node in sorted(nodes)]
