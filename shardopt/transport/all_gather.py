"""All-gather between nodes: the shards of an array to the memory of every node."""

from collections import deque

from shardopt._typing import FloatArray
from shardopt.transport.base import Transfer, Transport
from shardopt.transport.buckets import BucketPlan

_MAX_IN_TRANSIT = 4  # buckets
_SHARDS = 2  # tag


class AllGather:
    """Sends shards to all other nodes, and receives theirs.

    Args:
        transport: To the other nodes.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._in_transit: deque[tuple[BucketPlan, Transfer]] = deque()

    def start(self, plan: BucketPlan, array: FloatArray) -> None:
        """Send this rank's shard, which must not change now, and receive the others'.

        Args:
            plan: The bucket.
            array: [region_numel], which the shards are parts of: parameters or gradients.
        """
        transport = self._transport
        receives = [
            (node, transport.post_receive(plan.part(array, node), node, _SHARDS))
            for node in transport.others
            if plan.node_shards[node]
        ]
        sends = [
            (node, transport.post_send(plan.part(array, transport.node), node, _SHARDS))
            for node in transport.others
            if plan.shard
        ]
        self._in_transit.append((plan, Transfer(sends, receives)))

    def advance(self) -> int:
        """Make progress without waiting.

        Returns:
            How many buckets are in transit.
        """
        while self._in_transit and self._in_transit[0][1].is_done():
            self._in_transit.popleft()
        return len(self._in_transit)

    def has_room(self) -> bool:
        """Whether another bucket may start; makes progress."""
        return self.advance() < _MAX_IN_TRANSIT

    @property
    def awaited(self) -> tuple[int, list[int]]:
        """The bucket that is complete next, and the nodes it waits for; (0, []) for none."""
        if not self._in_transit:
            return 0, []
        plan, transfer = self._in_transit[0]
        return plan.bucket, transfer.awaited_nodes
