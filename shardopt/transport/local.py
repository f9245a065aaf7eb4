"""The transport of a single node: there is nobody to send to."""

from collections.abc import Sequence

from shardopt._typing import Array
from shardopt.layout.traffic import Traffic
from shardopt.transport.base import Message


class LocalTransport:
    """A lane of one rank; see ``Transport``.

    Args:
        rank: This rank.
    """

    def __init__(self, rank: int) -> None:
        self.node = 0
        self.ranks = [rank]
        self.others: list[int] = []
        self.sent = Traffic(0, 0)

    def reset(self) -> None:
        """See ``Transport.reset``; nothing is ever sent."""

    def post_send(self, array: Array, node: int, tag: int) -> Message:
        """See ``Transport.post_send``; there is no other node."""
        raise AssertionError(f"no node {node}")

    def post_receive(self, array: Array, node: int, tag: int) -> Message:
        """See ``Transport.post_receive``; there is no other node."""
        raise AssertionError(f"no node {node}")

    def post_note(self, note: Array, node: int) -> Message:
        """See ``Transport.post_note``; there is no other node."""
        raise AssertionError(f"no node {node}")

    def post_receive_note(self, note: Array, node: int) -> Message:
        """See ``Transport.post_receive_note``; there is no other node."""
        raise AssertionError(f"no node {node}")

    def post_broadcast(self, array: Array, root: int) -> Sequence[Message]:
        """Return no messages: all ranks of the node share the array."""
        return []

    def close(self) -> None:
        """See ``Transport.close``; nothing is held."""
