"""All-gather between nodes: the shards of an array to the memory of every node."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shardopt._typing import FloatArray
from shardopt.backends.base import Backend, Event
from shardopt.layout.traffic import Traffic
from shardopt.trace import OFF, Flight, Trace
from shardopt.transport.base import Transfer, Transport
from shardopt.transport.buckets import BucketPlan

_MAX_IN_TRANSIT = 4  # buckets
_SHARDS = 2  # tag


@dataclass
class _InTransit:
    """A bucket whose shards are on their way.

    Attributes:
        plan: The bucket.
        shard: That of this rank.
        computed: The end of the work on it, after which it is sent; None once it has been posted,
            or if there is nothing to send.
        transfer: Its messages.
        flight: Shows it in a trace.
    """

    plan: BucketPlan
    shard: FloatArray
    computed: Event | None
    transfer: Transfer
    flight: Flight


class AllGather:
    """Sends shards to all other nodes, and receives theirs.

    Args:
        transport: To the other nodes.
        backend: Computes the shards.
        trace: Shows buckets on their way.

    Attributes:
        transport: As given.
        num_landed: Buckets that are complete since ``enqueue``.
    """

    def __init__(self, transport: Transport, backend: Backend, trace: Trace = OFF) -> None:
        self.transport = transport
        self._backend = backend
        self._trace = trace
        self._in_transit: deque[_InTransit] = deque()
        self._queue: deque[tuple[BucketPlan, Sequence[FloatArray]]] = deque()
        self.num_landed = 0

    def enqueue(self, buckets: Iterable[tuple[BucketPlan, Sequence[FloatArray]]]) -> None:
        """Start buckets as ``advance`` finds room for them; nothing else may be in transit.

        Args:
            buckets: Each with its shards, as for ``start``, in the same order on all nodes.
        """
        self.num_landed = 0
        self._queue.extend(buckets)
        self.advance()

    @property
    def unsent(self) -> Traffic:
        """The traffic that this rank has yet to cause, of buckets that wait for room."""
        own = self.transport.node
        shards = [shards[own] for plan, shards in self._queue if plan.shard]
        num_others = len(self.transport.others)
        nbytes = sum(shard.nbytes for shard in shards)
        return Traffic(nbytes * num_others, len(shards) * num_others)

    def start(self, plan: BucketPlan, shards: Sequence[FloatArray]) -> None:
        """Send this rank's shard once it is computed, and receive the others'.

        Args:
            plan: The bucket.
            shards: In node memory, by node, such as ``BucketPlan.parts`` returns them. That of this
                rank must not change any more.
        """
        transport = self.transport
        receives = [
            (node, transport.post_receive(shards[node], node, _SHARDS))
            for node in transport.others
            if plan.node_shards[node]
        ]
        computed = self._backend.event() if transport.others and plan.shard else None
        started = Transfer([], receives), self._trace.flight("all_gather", plan)
        self._in_transit.append(_InTransit(plan, shards[transport.node], computed, *started))
        self._send_computed()

    def advance(self) -> int:
        """Make progress without waiting.

        Returns:
            How many buckets are in transit, or wait for room.
        """
        self._send_computed()
        while self._in_transit:
            first = self._in_transit[0]
            if first.computed is not None or not first.transfer.is_done():
                break
            self._in_transit.popleft().flight.land()
            self.num_landed += 1
        while self._queue and len(self._in_transit) < _MAX_IN_TRANSIT:
            self.start(*self._queue.popleft())
        return len(self._in_transit) + len(self._queue)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in transit, or waits for room."""
        return not self._in_transit and not self._queue

    def is_quiet(self) -> bool:
        """Whether all messages that have been posted are done; makes progress."""
        are_done = [each.transfer.is_done() for each in self._in_transit]  # look at all
        return all(are_done)

    def has_room(self) -> bool:
        """Whether another bucket may start; makes progress."""
        return self.advance() < _MAX_IN_TRANSIT

    @property
    def awaited(self) -> tuple[int, list[int]]:
        """The bucket that is complete next, and the nodes it waits for; (0, []) for none."""
        if not self._in_transit:
            return 0, []
        first = self._in_transit[0]
        return first.plan.bucket, first.transfer.awaited_nodes

    def _send_computed(self) -> None:
        """Send the shards whose computation is over."""
        for each in self._in_transit:
            if each.computed is None:
                continue
            if not each.computed.is_done():
                return  # messages keep the order of buckets
            for node in self.transport.others:
                message = self.transport.post_send(each.shard, node, _SHARDS)
                each.transfer.add_send(node, message)
            each.computed = None
