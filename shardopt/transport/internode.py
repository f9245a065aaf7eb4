"""Everything that travels between nodes in a step, with a deadline on every wait."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import FloatArray
from shardopt.backends.base import Kernel
from shardopt.comm.collectives import Collectives
from shardopt.comm.topology import Topology
from shardopt.layout.partition import Partition
from shardopt.layout.traffic import Traffic, plan_slot
from shardopt.store.buffers import ShardBuffers
from shardopt.transport.all_gather import AllGather
from shardopt.transport.lane import Lane
from shardopt.transport.reduce_scatter import BucketPlan, ReduceScatter, plan_buckets


class InterNode:
    """Moves gradients and parameters along this rank's lane while the kernel works.

    Args:
        topology: The ranks.
        collectives: For waits.
        kernel: What sums.
        wire_dtype: As in ``ShardPolicy``.

    Attributes:
        exchange: The way of the gradients.
        waited_s: Time that this rank has waited for other nodes since ``reset``.
    """

    def __init__(
        self, topology: Topology, collectives: Collectives, kernel: Kernel, wire_dtype: str | None
    ) -> None:
        self._lane = Lane(topology)
        self._place = topology.node, topology.node_rank
        self._rollcall = collectives
        self._wire_dtype = wire_dtype
        self._publishing = AllGather(self._lane)
        self.exchange = ReduceScatter(self._lane, kernel)
        self.waited_s = 0.0

    def lay_out(self, partition: Partition, buffers: Sequence[ShardBuffers]) -> None:
        """Prepare for the buckets of a partition; nothing may be under way."""
        routes = plan_buckets(partition, buffers, self._lane, self._wire_dtype)
        slot = plan_slot(partition, *self._place, self._wire_dtype)
        self.exchange.lay_out(partition, routes, slot)

    def reset(self) -> None:
        """Get ready for the next step, when all of this one is over."""
        self.exchange.reset()
        self._lane.reset()
        self.waited_s = 0.0

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent to other nodes since ``reset``."""
        return Traffic(self._lane.sent_nbytes, self._lane.sent_messages)

    def advance(self, step: int) -> None:
        """Make progress, and start what can be started."""
        with self.translate_mpi_errors(step):
            self._publishing.advance()
            self.exchange.advance()

    def translate_mpi_errors(self, step: int) -> AbstractContextManager[None]:
        """See ``Collectives``; for what does not wait."""
        return self._rollcall.translate_mpi_errors(step, "exchange", self._awaited_ranks)

    def collect(self, step: int) -> Iterator[BucketPlan]:
        """Yield each bucket when this rank's shard of it is summed."""
        exchange = self.exchange

        def late() -> tuple[str, list[int]]:
            bucket, nodes = exchange.awaited
            return f"exchange of bucket {bucket}", nodes

        for place, route in exchange.final_places():

            def is_summed(place: int = place) -> bool:
                self._publishing.advance()
                return exchange.advance() > place

            self._wait(is_summed, step, late)
            yield route

    def collect_all(self, step: int) -> NDArray[np.float64]:
        """Sum all buckets and give the sums of squares of the chunks that this rank owns."""
        for _ in self.collect(step):
            pass
        self.finish(step)
        return self.exchange.square_sums

    def publish(self, route: BucketPlan, step: int) -> None:
        """Send an updated shard to the other nodes and take theirs."""
        self._wait(lambda: self._publishing.has_room, step, self._late_publishing)
        with self.translate_mpi_errors(step):
            self._publishing.start(route)

    def finish(self, step: int) -> None:
        """Wait until everything that is under way has arrived."""

        def is_over() -> bool:
            self.exchange.advance(limit=0)
            return self._publishing.advance() == 0

        self._wait(is_over, step, self._late_publishing)

        def is_sent() -> bool:
            self.exchange.advance(limit=0)
            return self.exchange.is_idle

        self._wait(is_sent, step, lambda: ("exchange", self.exchange.awaited[1]))

    def publish_all(self, step: int) -> None:
        """Let every node's windows show the shards of all others, as they are now."""
        for route in self.exchange.routes:
            self.publish(route, step)
        self.finish(step)

    def broadcast(self, array: FloatArray, root: int, step: int) -> None:
        """Bring an array from node ``root`` to the others. Collective over the lane."""
        with self.translate_mpi_errors(step):
            requests = self._lane.broadcast(array, root)
        for request in requests:
            self._rollcall.wait(request.Test, step, "broadcast")

    def free(self) -> None:
        """Release what MPI keeps."""
        self._lane.free()

    def _late_publishing(self) -> tuple[str, list[int]]:
        bucket, nodes = self._publishing.awaited
        return f"publishing of bucket {bucket}", nodes

    def _wait(
        self, test: Callable[[], bool], step: int, late: Callable[[], tuple[str, list[int]]]
    ) -> None:
        with self.translate_mpi_errors(step):
            if test():
                return
        start = time.perf_counter()
        phase, _ = late()
        self._rollcall.wait(test, step, phase, lambda: [self._lane.ranks[n] for n in late()[1]])
        self.waited_s += time.perf_counter() - start

    def _awaited_ranks(self) -> list[int]:
        nodes = {*self.exchange.awaited[1], *self._publishing.awaited_nodes}
        return [self._lane.ranks[node] for node in sorted(nodes)]
