"""Where the arrays are that frameworks hold and steps compute on: in node memory, or on a device.

[Note: node memory and devices]
The home of parameters and optimizer state is node memory, in the layout that state dicts,
checkpoints and the search for users' writes know. On CPUs frameworks and steps use that very
memory. A device has copies: each rank its own of all parameters and gradients, and of the state of
its shards. What a step has updated there is at home only after ``bring_home``, and what has been
written at home is on devices only after ``send_out``. Nothing is copied home that nobody asks for,
and pages at home that were never touched take no memory. So whoever reads parameters or state at
home has it brought home before, and whoever writes there has it sent out after; and before part of
a shard is written and the whole is sent out, the rest must have been brought home.

There are three ways, which differ only in which addresses the kernel is given and in which spans
are copied around a step:

``direct``: the ranks of a node address each other's devices; the kernel reads the gradients of all
of them and writes all their copies of the parameters. Only what comes from other nodes is copied.

``staged``: they do not. Each rank copies the gradients that others sum into its row in node memory,
which their devices address, and copies the parameters that others have updated from there.

``offload``: the kernel runs on the CPU, at home; devices hold parameters and gradients only.

Between nodes everything travels through memory of the host. Sums of gradients pass through staging
buffers that the kernel addresses; updated shards are sent from home, where the kernel writes them
as it writes other copies, and what arrives there is copied to devices after the step. Nobody waits
for a device in between: what it computes is sent once an event says that it is there, and memory is
used again once an event says that it has been read.

What users write to parameters in place holds, in all three: the kernel reads what the owner of a
shard holds. Frameworks that count writes, as torch does, have writes on some ranks only refused.
Others do not: there the owners' values reach all ranks when the parameter is next updated, and a
parameter that is not updated keeps on each rank what was written there.

Home is written to by hosts and by devices while devices may still copy from it. So whoever writes
there does so after a meeting, before which each rank has waited for such copies (``publish``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from shardopt.store.buffers import RegionArrays, ShardArrays

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from shardopt._typing import FloatArray
    from shardopt.backends.base import Backend, Device
    from shardopt.layout.footprint import Placement
    from shardopt.layout.partition import Partition
    from shardopt.layout.span import Span


@dataclass(frozen=True, slots=True, eq=False)
class HomeArrays:
    """The arrays of a region in node memory.

    Attributes:
        params: [region_numel].
        own_params: [region_numel] the same, as this rank may write to it.
        rows: [region_numel] each, the gradients of all ranks of the node; empty where they are on
            devices and nobody reads them here.
        own_grads: [region_numel] this rank's gradients, as its framework has them; None where they
            are on devices.
        sums: ``sum`` [node_numel], if sums of gradients have an array of their own.
        state: [node_numel] each, by key.
    """

    params: FloatArray
    own_params: FloatArray
    rows: Sequence[FloatArray]
    own_grads: FloatArray | None
    sums: Mapping[str, FloatArray]
    state: Mapping[str, FloatArray]


@dataclass(frozen=True, slots=True, eq=False)
class LocatedRegion:
    """A region where frameworks and steps use it.

    Attributes:
        arrays: Its parameters and gradients.
        state: The optimizer state that the kernel computes on.
    """

    arrays: RegionArrays
    state: ShardArrays


class Residence(Protocol):
    """Where the arrays are that frameworks hold and steps compute on; see the note above.

    Regions are numbered as in the partition, and spans within a region count from its start.

    Attributes:
        backend: Computes.
        holder: Holds what frameworks hold; the same, unless the kernel runs elsewhere.
        placement: Where arrays are, for reports of memory.
        is_home: Whether frameworks hold node memory itself; all copies are done at once then.
        updates_home: Whether steps update parameters and state at home.
        needs_rows: Whether gradients are in node memory, or pass through it.
        offloaded: The device that holds parameters and gradients while the kernel runs at home;
            None if they are in the same place.
        reaches_state: Whether this rank reads the state of all ranks of its node.
    """

    backend: Backend
    holder: Backend
    placement: Placement
    is_home: bool
    updates_home: bool
    needs_rows: bool
    offloaded: Device | None
    reaches_state: bool

    @property
    def is_state_home(self) -> bool:
        """Whether the state that this rank reads is at home as the last step has left it."""
        ...

    def locate(
        self, partition: Partition, index: int, place: tuple[int, int], home: HomeArrays
    ) -> LocatedRegion:
        """Allocate what a region needs elsewhere; not in use before ``extend``. Collective.

        Args:
            partition: The layout.
            index: Number of the region.
            place: The node and node rank of this rank.
            home: Its arrays in node memory, as long as the optimizer lives.
        """
        ...

    def enter(self, queue: int) -> None:
        """Do all work from now on in a queue of the framework; see ``Device.enter``."""
        ...

    def extend(self, regions: Sequence[LocatedRegion]) -> None:
        """Add regions behind the present ones."""
        ...

    def select(self, kept: Sequence[int]) -> None:
        """Release all regions but some."""
        ...

    def publish(self) -> None:
        """Show this rank's work to others once they have met; see [Note: order of devices]."""
        ...

    def acquire(self) -> None:
        """See the work of other ranks."""
        ...

    # -- around a step -----------------------------------------------------------------------------

    def send_grads(self, spans: Sequence[Sequence[Span]]) -> None:
        """Copy this rank's gradients to where others read them once they have met this rank.

        Args:
            spans: For each region the spans with gradients that are in use.
        """
        ...

    def show_grads(self, spans: Sequence[Sequence[Span]]) -> None:
        """Copy averaged gradients to where this rank's framework has them.

        Args:
            spans: For each region the spans that have been averaged.
        """
        ...

    def adopt_unseen(self, spans: Sequence[Sequence[Span]]) -> None:
        """Have the kernel read what users have written to parameters, even if nobody counts writes.

        Of each parameter it reads what the copies of the owners of its shards hold.

        Args:
            spans: For each region those that have not been replaced.
        """
        ...

    def adopt_params(self, spans: Sequence[Sequence[Span]]) -> None:
        """Have the kernel read spans of parameters that have new values at home.

        It reads what this rank owns; the rest other ranks may be about to write.
        """
        ...

    def show_params(self, spans: Sequence[Sequence[Span]]) -> None:
        """Copy what other ranks have updated to this rank's own copy of the parameters.

        Args:
            spans: For each region what has been updated.
        """
        ...

    def note_shown(self) -> None:
        """Have ``publish`` wait for the device's work so far, which reads parameters at home."""
        ...

    def note_update(self, spans: Sequence[Sequence[Span]]) -> None:
        """Note that a step has updated parameters and state: what is at home is old.

        Args:
            spans: For each region what it has updated.
        """
        ...

    # -- between home and the device ---------------------------------------------------------------

    def bring_home(self, *, params: bool, state: bool, of_node: bool = False) -> None:
        """Copy what this rank owns home; waits until it is there.

        Args:
            params: Whether to copy parameters, which their users may have written to.
            state: Whether to copy the optimizer state, where steps have updated it.
            of_node: Also what the other ranks of the node own: their state, if it can be reached,
                and this rank's copy of their parameters.
        """
        ...

    def send_out(self, *, params: bool, state: bool) -> None:
        """Copy all parameters, or the state that this rank owns, from home to the device.

        All of the node must be at home: all ranks have brought there what they own, or written it,
        and met since.
        """
        ...

    def bring_params_home(self, spans: Sequence[Sequence[Span]], *, is_updated: bool) -> None:
        """Copy spans of parameters home that this rank owns and its user has written to.

        Args:
            spans: For each region.
            is_updated: Whether it is after an update, rather than before it.
        """
        ...

    def send_params_out(self, spans: Sequence[Sequence[Span]]) -> None:
        """Copy spans of parameters from home to this rank's own copy."""
        ...

    def send_state_out(self, key: str, region: int, spans: Collection[Span]) -> None:
        """Copy spans of an array of the state, of what this rank owns, from home to the device."""
        ...

    def free(self) -> None:
        """Release everything but the parameters that users hold. Collective over the node."""
        ...


class InNodeMemory:
    """Everything is at home; see ``Residence``.

    Args:
        backend: Computes on this rank's cores.
    """

    placement: Placement = "cpu"
    is_home = True
    updates_home = True
    needs_rows = True
    offloaded: Device | None = None
    reaches_state = True
    is_state_home = True

    def __init__(self, backend: Backend) -> None:
        self.backend = self.holder = backend

    def locate(
        self, partition: Partition, index: int, place: tuple[int, int], home: HomeArrays
    ) -> LocatedRegion:
        """See ``Residence.locate``."""
        assert home.own_grads is not None
        arrays = RegionArrays(
            params=home.params,
            own_params=home.own_params,
            own_grads=home.own_grads,
            rows=home.rows,
            targets=[home.params],
            sums=ShardArrays(home.sums, None) if home.sums else None,
        )
        return LocatedRegion(arrays, ShardArrays(home.state, None))

    def enter(self, queue: int) -> None:
        """See ``Residence.enter``."""

    def extend(self, regions: Sequence[LocatedRegion]) -> None:
        """See ``Residence.extend``."""

    def select(self, kept: Sequence[int]) -> None:
        """See ``Residence.select``."""

    def publish(self) -> None:
        """See ``Residence.publish``; the fences of ``Memory`` do."""

    def acquire(self) -> None:
        """See ``Residence.acquire``; likewise."""

    def send_grads(self, spans: Sequence[Sequence[Span]]) -> None:
        """See ``Residence.send_grads``."""

    def show_grads(self, spans: Sequence[Sequence[Span]]) -> None:
        """See ``Residence.show_grads``."""

    def adopt_unseen(self, spans: Sequence[Sequence[Span]]) -> None:
        """See ``Residence.adopt_unseen``."""

    def adopt_params(self, spans: Sequence[Sequence[Span]]) -> None:
        """See ``Residence.adopt_params``."""

    def show_params(self, spans: Sequence[Sequence[Span]]) -> None:
        """See ``Residence.show_params``."""

    def note_shown(self) -> None:
        """See ``Residence.note_shown``."""

    def note_update(self, spans: Sequence[Sequence[Span]]) -> None:
        """See ``Residence.note_update``."""

    def bring_home(self, *, params: bool, state: bool, of_node: bool = False) -> None:
        """See ``Residence.bring_home``."""

    def send_out(self, *, params: bool, state: bool) -> None:
        """See ``Residence.send_out``."""

    def bring_params_home(self, spans: Sequence[Sequence[Span]], *, is_updated: bool) -> None:
        """See ``Residence.bring_params_home``."""

    def send_params_out(self, spans: Sequence[Sequence[Span]]) -> None:
        """See ``Residence.send_params_out``."""

    def send_state_out(self, key: str, region: int, spans: Collection[Span]) -> None:
        """See ``Residence.send_state_out``."""

    def free(self) -> None:
        """See ``Residence.free``."""
