"""Updated shards to the other nodes."""

from collections import deque

from shardopt.transport.lane import Lane, Transfer
from shardopt.transport.reduce_scatter import BucketPlan

_MOST_PUBLISHED = 4  # buckets of parameters under way at a time
_PARAMS = 2  # tag


class AllGather:
    """Brings updated shards to the windows of all other nodes.

    Args:
        lane: The ranks to exchange with.
    """

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._under_way: deque[tuple[BucketPlan, Transfer]] = deque()

    def start(self, route: BucketPlan) -> None:
        """Send this rank's shard, which must stay as it is, and take the others' in."""
        lane, params = self._lane, route.storage.params
        receives = lane.receive(((n, params[route.part(n)]) for n in lane.others), _PARAMS)
        own = params[route.part(lane.node)]
        sends = [request for n in lane.others for request in lane.send(own, n, _PARAMS)]
        self._under_way.append((route, Transfer(sends, receives)))

    def advance(self) -> int:
        """Make progress; gives how many buckets are under way."""
        while self._under_way and self._under_way[0][1].is_over():
            self._under_way.popleft()
        return len(self._under_way)

    @property
    def has_room(self) -> bool:
        """Whether another bucket may start; makes progress."""
        return self.advance() < _MOST_PUBLISHED

    @property
    def awaited(self) -> tuple[int, list[int]]:
        """The bucket that is to be over next, and the nodes it waits for."""
        return self._under_way[0][0].bucket, self.awaited_nodes

    @property
    def awaited_nodes(self) -> list[int]:
        """Those nodes; none where nothing is under way."""
        return self._under_way[0][1].awaited_nodes if self._under_way else []
