"""The exchange between nodes whose owners update parameters in backward, and send them at once."""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import FloatArray
from shardopt.backends.base import Backend, Rows
from shardopt.layout.dtypes import compute_dtype
from shardopt.layout.partition import Partition
from shardopt.layout.span import Span
from shardopt.trace import OFF, Trace
from shardopt.transport.all_gather import AllGather
from shardopt.transport.base import Transfer
from shardopt.transport.buckets import BucketPlan
from shardopt.transport.ring_exchange import InTransit, RingExchange
from shardopt.transport.updating import Updates, UpdatingReduction


@dataclass
class _NoteExchange:
    """The exchange of notes about a bucket between nodes.

    Attributes:
        known: The bits of this node.
        theirs: [nbytes] the note of each other node, once it has arrived.
        transfer: The messages.
    """

    known: int
    theirs: list[NDArray[np.uint8]]
    transfer: Transfer


class UpdatingExchange(RingExchange):
    """Updates this rank's shards once all nodes have sent their sums, and sends the parameters.

    [Note: updated between nodes]
    Sums travel as in [Note: averages between nodes]. Ahead of those of a bucket each rank sends the
    others of its lane a *note* of what its node knows of the gradients in it. Once it has the notes
    of all nodes a rank knows what all ranks of the job have announced, and the bucket is *settled*:
    all decide alike what to update, and the buffers of the ring are free again. Once the sums have
    arrived, too, the owner of a shard updates it and sends it to the other nodes right away. Those
    receive it when they have settled the bucket themselves, so that nobody there reads these
    weights any more. A node keeps nothing of gradients but what is in the ring and in transit.

    The average is rounded before it is used, as in the other stages on several nodes, so that the
    bits are the same. It overwrites this node's sum or, if that has 16 bits, takes other memory
    until the update is done.

    Args:
        all_gather: Sends shards to other nodes, over its transport.
        backend: Computes.
        place: The node and node rank of this rank.
        wire_dtype: As ``layout.dtypes.wire_of`` returns it.
        updates: Updates shards.
        trace: Shows buckets on their way, sums and updates.

    Attributes:
        updates: As given.
    """

    def __init__(
        self,
        all_gather: AllGather,
        backend: Backend,
        place: tuple[int, int],
        wire_dtype: str | None,
        updates: Updates,
        trace: Trace = OFF,
    ) -> None:
        super().__init__(all_gather.transport, backend, place, wire_dtype, trace)
        self.updates, self._all_gather = updates, all_gather
        self._noting: deque[_NoteExchange] = deque()  # about buckets that are not settled
        self._leaving_notes: list[Transfer] = []  # about settled buckets
        self._settled: deque[int] = deque()  # what to update in the buckets that are coming

    def lay_out(self, partition: Partition) -> None:
        """See ``RingReduction.lay_out``."""
        super().lay_out(partition)
        self.updates.lay_out(partition, 1.0)

    def activate(self, params: int) -> int:
        """See ``Reduction.activate``; nothing is left to be reduced."""
        return 0

    def start(self, bucket: int, rows: Rows | None, known: int, nbytes: int) -> None:
        """Send a note about a bucket, and its sums; see ``UpdatingReduction.start``."""
        transport = self._transport
        theirs = [np.zeros(nbytes, np.uint8) for _ in transport.others]
        nodes = list(zip(transport.others, theirs, strict=True))
        receives = [(node, transport.post_receive_note(note, node)) for node, note in nodes]
        mine = np.frombuffer(known.to_bytes(nbytes, "little"), np.uint8)
        sends = [(node, transport.post_note(mine, node)) for node in transport.others]
        self._noting.append(_NoteExchange(known, theirs, Transfer(sends, receives)))
        self.average(bucket, rows)

    def gathered_known(self) -> int | None:
        """See ``UpdatingReduction.gathered_known``."""
        first = self._noting[0]
        if not first.transfer.has_arrived():
            return None
        known = first.known
        for note in first.theirs:
            known |= int.from_bytes(note.tobytes(), "little")
        return known

    def settle(self, present: int) -> None:
        """Have a bucket updated as its sums arrive; see ``UpdatingReduction.settle``."""
        self._leaving_notes.append(self._noting.popleft().transfer)
        self._settled.append(present)
        self.progress()

    def progress(self) -> None:
        """See ``RingReduction.progress``."""
        super().progress()
        self._leaving_notes = [
            transfer for transfer in self._leaving_notes if not transfer.is_done()
        ]
        self._all_gather.advance()

    @property
    def is_idle(self) -> bool:
        """See ``Reduction.is_idle``: nor are parameters on their way."""
        are_told = not self._noting and not self._leaving_notes
        return are_told and super().is_idle and self._all_gather.is_idle

    def is_quiet(self) -> bool:
        """See ``Reduction.is_quiet``."""
        transfers = [*(each.transfer for each in self._noting), *self._leaving_notes]
        are_done = [transfer.is_done() for transfer in transfers]  # look at all
        return all([*are_done, super().is_quiet(), self._all_gather.is_quiet()])

    @property
    def awaited(self) -> tuple[int, list[int]]:
        """See ``Reduction.awaited``."""
        bucket, nodes = super().awaited
        return (bucket, nodes) if nodes else self._all_gather.awaited

    def free(self) -> None:
        """See ``Reduction.free``; after an error messages may be in transit, and keep theirs."""
        super().free()
        self._noting.clear()
        self._settled.clear()
        self._leaving_notes.clear()

    def _may_add(self, first: InTransit) -> bool:
        return bool(self._settled) and super()._may_add(first)

    def _add(self, arrived: InTransit) -> None:
        """Update this rank's shard with what the nodes have sent, and send it to them."""
        present, plan = self._settled.popleft(), arrived.plan
        if not present:
            return
        if partials := self._partials(arrived):
            self._update(plan, partials, present)
        self._all_gather.start(plan, plan.parts(plan.buffers.params))

    def _update(self, plan: BucketPlan, partials: list[FloatArray], present: int) -> None:
        """Update parameters with the average of what the nodes have sent, in the order of nodes."""
        average, dtype = partials[self._transport.node], compute_dtype(plan.buffers.region.dtype)
        if average.dtype != dtype:
            average = np.empty(plan.shard.numel, dtype)
        whole = Span(0, plan.shard.numel)
        self._backend.kernel.reduce(Rows.of(*partials), average, whole, None, plan.mean_scale)
        self.updates.update(plan, Rows.of(average), present)


Updating = UpdatingReduction | UpdatingExchange
"""The reductions that update parameters in backward."""
