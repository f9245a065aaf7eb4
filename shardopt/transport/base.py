"""Transports: how bytes get from one node to another."""

from collections.abc import Sequence
from typing import Protocol

from shardopt._typing import Array
from shardopt.layout.traffic import Traffic


class Message(Protocol):
    """A send or a receive that has been posted."""

    def is_done(self) -> bool:
        """Whether it is complete; makes progress. Its array may be reused then, or read."""
        ...

    @property
    def is_empty(self) -> bool:
        """Whether a receive that is done got no elements: its array is what it was before."""
        ...


class Transport(Protocol):
    """Moves bytes between the ranks of a lane, one per node.

    [Note: messages of a lane]
    The sums of a bucket go from each rank of a lane straight to the owners of its shards, and
    updated shards from their owner to all others. So each rank sends (M-1)/M of its lane part each
    way, which is the least possible, and every rank knows at any time whom it waits for. Messages
    of one tag between two ranks are posted in the same order on both sides, and a transport keeps
    it. One thread may post messages of one tag while another posts those of another.

    Arrays are contiguous and hold whole chunks of ``CHUNK_NUMEL`` elements; of empty shards nothing
    is sent or received, so nobody posts them. A rank that has only zeros for a shard that is not
    empty may send no elements instead; see ``RingExchange``.

    Attributes:
        node: The node of this rank.
    """

    node: int

    @property
    def ranks(self) -> Sequence[int]:
        """The ranks of the lane, by node."""
        ...

    @property
    def others(self) -> Sequence[int]:
        """The other nodes, starting after this one, so that not all send to one at a time."""
        ...

    @property
    def sent(self) -> Traffic:
        """Sent by this rank since ``reset``."""
        ...

    def reset(self) -> None:
        """Count ``sent`` from zero."""
        ...

    def post_send(self, array: Array, node: int, tag: int) -> Message:
        """Send an array, which must not change until the message is done.

        Args:
            array: [n], contiguous.
            node: The node it goes to.
            tag: Kind of the message; the receiver names the same.
        """
        ...

    def post_receive(self, array: Array, node: int, tag: int) -> Message:
        """Receive what ``node`` sends with ``tag`` into an array of the same size, or nothing."""
        ...

    def post_note(self, note: Array, node: int) -> Message:
        """Send a few bytes to a node, which are not counted in ``sent``.

        Args:
            note: [n] bytes, n > 0; they must not change until the message is done.
            node: The node they go to, which posts a receive for as many.
        """
        ...

    def post_receive_note(self, note: Array, node: int) -> Message:
        """Receive the next note of a node."""
        ...

    def post_broadcast(self, array: Array, root: int) -> Sequence[Message]:
        """Copy an array, contiguous, from node ``root`` to all others. Collective over the lane."""
        ...

    def close(self) -> None:
        """Release everything; no message may be in transit."""
        ...


class Transfer:
    """The messages of one bucket.

    Args:
        sends: Messages by the node they go to.
        receives: Messages by the node they come from.
    """

    def __init__(
        self, sends: Sequence[tuple[int, Message]], receives: Sequence[tuple[int, Message]]
    ) -> None:
        self._sends = list(sends)
        self._receives = list(receives)

    def add_send(self, node: int, message: Message) -> None:
        """Count one more message that is sent."""
        self._sends.append((node, message))

    def has_arrived(self) -> bool:
        """Whether everything has been received; makes progress."""
        self._receives = [(n, message) for n, message in self._receives if not message.is_done()]
        return not self._receives

    def is_done(self) -> bool:
        """Whether everything has been received and sent; makes progress."""
        self._sends = [(n, message) for n, message in self._sends if not message.is_done()]
        return self.has_arrived() and not self._sends

    @property
    def awaited_nodes(self) -> list[int]:
        """The nodes whose messages are missing; else those that have not taken ours."""
        return sorted({node for node, _ in self._receives} or {node for node, _ in self._sends})
