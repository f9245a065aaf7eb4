"""The parameters in every node's memory, and how new values get there."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from shardopt._typing import FloatArray
from shardopt.core.parts import Parts
from shardopt.core.state_edits import EDIT_KEYS, RESET_KEY, agree_on_edits
from shardopt.core.state_view import StateView
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from shardopt.layout.state_spec import PARAM_KEY
from shardopt.params.binding import Binding
from shardopt.params.inputs import mask_of
from shardopt.params.writes import MASTER_KEY, UserWrites, Written, agree_on_writes, describe


@dataclass(frozen=True)
class UserChanges:
    """Changes that the user of this rank has made to parameters and state since the last step.

    Attributes:
        replaced: Arrays that were assigned in place of parameters' views, by parameter index.
        written: What was written in place, with hashes of the values; and edits of the state.
    """

    replaced: Mapping[int, FloatArray] = field(default_factory=dict)
    written: Mapping[Written, int] = field(default_factory=dict)

    def without_edits(self) -> "UserChanges":
        """Return the changes without edits of the state, which another state is to replace."""
        written = {key: value for key, value in self.written.items() if key.key not in EDIT_KEYS}
        return UserChanges(self.replaced, written)


@dataclass(frozen=True)
class AgreedChanges:
    """Changes that users have made to parameters and state; the same on every rank.

    Attributes:
        winners: The lowest rank that has replaced a parameter, by parameter index.
        written: What was written in place on all ranks, and replaced on none.
        diverged: The part of it in which the values of ranks differ, as text.
        edits: Step counts and entries of the state that were changed on all ranks.
    """

    winners: Mapping[int, int]
    written: frozenset[Written]
    diverged: Sequence[str] = ()
    edits: Mapping[Written, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.winners or self.written or self.edits)

    @property
    def of_params(self) -> set[int]:
        """The parameters that users have written to in place; a master writes its parameter."""
        return {each.param for each in self.written if each.key in (PARAM_KEY, MASTER_KEY)}

    @property
    def mask(self) -> int:
        """The bit mask of all parameters whose value or state has changed."""
        return mask_of({*self.params, *(each.param for each in self.edits)}) if self else 0

    @property
    def params(self) -> set[int]:
        """The parameters that have new values."""
        return {*self.winners, *self.of_params}


class SharedParams:
    """Brings values that did not come from an update to all nodes.

    Args:
        parts: The optimizer's.
        state: What users see of the optimizer state.
        writes: Finds what this rank's user writes into arrays.
    """

    def __init__(self, parts: Parts, state: StateView, writes: UserWrites) -> None:
        self._parts = parts
        self._state = state
        self._writes = writes

    def initialize(
        self, bindings: Sequence[Binding], first_region: int, step: int, *, none_is_zero: bool
    ) -> None:
        """Copy rank 0's values of new parameters to every node, and bind the parameters.

        Collective: every rank.

        Args:
            bindings: The parameters.
            first_region: The first of their regions; no other parameters are in it or behind it.
            step: The last one.
            none_is_zero: See ``Binding.bind``.
        """
        parts = self._parts
        parts.meet(step, "allocate")  # every owner has touched its pages
        if parts.topology.rank == 0:
            for binding in bindings:
                binding.fill()
            parts.residence.holder.wait()
        self._broadcast(0, step, first_region)
        buffers = parts.memory.buffers
        parts.residence.send_params_out(
            [
                [Span(0, each.region.numel)] if number >= first_region else []
                for number, each in enumerate(buffers)
            ]
        )
        for binding in bindings:
            binding.bind(none_is_zero=none_is_zero)
        parts.registry.note_values(bindings)  # others may have been written to

    # -- what users have done ----------------------------------------------------------------------

    def find_changes(self) -> UserChanges:
        """Find what this rank's user has done to parameters and state since the last step.

        Raises:
            PartitionError: A parameter was replaced by one of another shape or dtype.
            CheckpointError: State was replaced by something that does not fit, or written to in
                arrays that show it before the last step.
        """
        registry = self._parts.registry
        replaced, edits = registry.find_replaced(), self._state.find_edits()
        written = self._writes.find(registry.partition)
        self._state.home.refuse_stale(written)
        if not self._parts.residence.is_home:
            written |= {Written(index, PARAM_KEY): 0 for index in registry.find_written()}
        return UserChanges(replaced, {**written, **edits})

    def agree(
        self, replaced: Sequence[int], written: Sequence[Mapping[Written, int]]
    ) -> AgreedChanges:
        """Merge what all ranks have done; nothing changes.

        Args:
            replaced: For each rank a bit mask of the parameters it has replaced; empty if no rank
                has.
            written: For each rank what it has written in place; one entry if all are equal.

        Raises:
            RankMismatchError: Ranks have written to different parameters; on every rank.
        """
        if not any(written) and not any(replaced):
            return AgreedChanges({}, frozenset())
        names = [binding.name for binding in self._parts.registry.bindings]
        winners, edits = _lowest_ranks(replaced), agree_on_edits(written, names)
        resets = {index for index, key in edits if key == RESET_KEY}
        others = [
            {
                each: value
                for each, value in found.items()
                if each.key not in EDIT_KEYS
                and each.param not in (winners if each.key == PARAM_KEY else resets)
            }
            for found in written
        ]
        topology = self._parts.topology
        nodes = [node for node, _ in topology.places]
        agreed, diverged = agree_on_writes(others, nodes, names)
        return AgreedChanges(winners, agreed, [describe(each, names) for each in diverged], edits)

    def adopt(self, mine: UserChanges, agreed: AgreedChanges) -> int:
        """Copy new values to the memory of nodes.

        A replaced parameter gets the value of the lowest rank that has replaced it, on every node.
        Of what was written in place each owner adopts its shards, on its own node only.

        Collective: every rank. Other ranks may read the values after the next ``Parts.meet``.

        Returns:
            Bytes that this rank copied.
        """
        parts, winners = self._parts, agreed.winners
        self._state.adopt(agreed.edits)
        parts.residence.bring_params_home(self._spans(agreed.of_params), is_updated=False)
        copied_nbytes = self._writes.adopt(agreed.written, parts.registry.partition)
        own = {index for index, rank in winners.items() if rank == parts.topology.rank}
        copied_nbytes += parts.registry.adopt(mine.replaced, own)
        for index, rank in sorted(winners.items()):
            node, node_rank = parts.topology.places[rank]
            if node_rank == parts.topology.node_rank:
                parts.sync.broadcast(parts.registry.bindings[index].data, node)
        return copied_nbytes

    def show(self, params: Collection[int]) -> None:
        """Copy parameters from node memory to where this rank's framework has them.

        They may be read there once all ranks have met.
        """
        if params:
            self._parts.residence.send_params_out(self._spans(params))

    def show_kernel(self, params: Collection[int]) -> None:
        """Have the kernel read parameters that are in node memory; see ``Residence.adopt_params``.

        All ranks must have met since.
        """
        if params:
            self._parts.residence.adopt_params(self._spans(params))

    def refresh(self) -> None:
        """See the node's values in all parameters and state; to be called once all are there."""
        self._writes.refresh()
        if not self._parts.residence.is_home:
            self._parts.registry.note_values()

    def settle(self, step: int, changes: UserChanges) -> AgreedChanges:
        """Adopt what users have done on all nodes now, rather than in the next step.

        Collective: every rank.

        Returns:
            What has changed.
        """
        parts = self._parts
        everyone = parts.collectives.allgather(
            (mask_of(changes.replaced), changes.written), step, "adopt"
        )
        masks, written = [mask for mask, _ in everyone], [each for _, each in everyone]
        agreed = self.agree(masks, written)
        if agreed:
            self.adopt(changes, agreed)
            self.publish_written(agreed, step)
            self.show(agreed.params)
            parts.meet(step, "adopt")  # owners may write there from now on
            parts.start_step(step + 1)  # what backward has sent so far is sent again
        self.refresh()
        return agreed

    def publish_written(
        self, agreed: AgreedChanges, step: int, *, updated: int | None = None
    ) -> None:
        """Send what was written in place from its owners to all nodes.

        Collective: every rank.

        Args:
            agreed: What was written.
            step: The last one.
            updated: Bit mask of the parameters that an update has just written everywhere, and all
                buckets that have gradients with them; None if there was none.
        """
        sync, partition = self._parts.sync, self._parts.registry.partition
        left = [index for index in agreed.of_params if not (updated or 0) >> index & 1]
        mask = sum(1 << index for index in agreed.params)
        buckets = set(partition.buckets_of(mask)) if agreed.written else set()
        self._parts.residence.bring_params_home(self._spans(left), is_updated=True)
        plans = [plan for plan in sync.reduction.plans if plan.bucket in buckets]
        if updated is not None:
            plans = [plan for plan in plans if not sync.reduction.is_active(plan)]
        elif plans:
            self._parts.overlap.settle(step)
        sync.publish_plans(plans)
        if updated is None:
            self._parts.meet(step, "adopt")

    def adopt_from(self, root: int, changes: UserChanges, step: int) -> None:
        """Set all parameters to the values that they have on one rank.

        Collective: every rank.

        Args:
            root: The rank.
            changes: What this rank's user has done.
            step: The last one.
        """
        parts = self._parts
        edits = {key: value for key, value in changes.written.items() if key.key in EDIT_KEYS}
        writes_state = any(key.key not in (PARAM_KEY, *EDIT_KEYS) for key in changes.written)
        everyone = parts.collectives.allgather((edits, writes_state), step, "adopt")
        edits, writes_state = everyone[root][0], any(writes for _, writes in everyone)
        parts.residence.bring_home(params=False, state=writes_state)
        self._writes.find(parts.registry.partition)  # changes may be empty for a reason
        parts.meet(step, "adopt")  # all have compared their views with what is about to change
        topology, is_root = parts.topology, parts.topology.rank == root
        is_like_root = topology.node_rank == topology.places[root][1]  # each node has own state
        self._writes.adopt_all(params=is_root, state=is_like_root)
        if is_root:  # an array in the place of a view wins over what was written to the view
            parts.residence.bring_home(params=True, state=False, of_node=True)
            parts.registry.adopt(changes.replaced, changes.replaced)
        else:
            self._state.forget()
        parts.meet(step, "adopt")  # a reset of the state wins over what was written to it before
        parts.residence.send_out(params=False, state=writes_state)
        self._state.adopt(edits)
        self._broadcast(root, step)
        parts.residence.send_out(params=True, state=False)
        parts.registry.rebind()
        self._writes.discard(params=True, state=True)
        if not parts.residence.is_home:
            parts.registry.note_values()

    def load(self, arrays: Mapping[int, FloatArray], step: int) -> None:
        """Write values into all parameters, each owner its shards. Collective: every rank."""
        parts = self._parts
        for buffers in parts.memory.buffers:
            for index, span, _ in parts.registry.partition.owned_params(buffers.shards):
                start = parts.registry.partition.params[index].start
                own = buffers.params[buffers.local(span.shift(start)).slice]
                own[...] = arrays[index].reshape(-1)[span.slice]
        self.publish_all(step, state=False)

    def show_loaded(self, step: int, *, params: bool, state: bool) -> None:
        """See what owners have loaded, whatever users had written there. Collective."""
        self._parts.meet(step, "load")
        self._writes.discard(params=params, state=state)
        self._parts.residence.send_out(params=params, state=state)
        if params:
            self._parts.registry.note_values()
        if state:
            self._state.forget()

    def _spans(self, params: Collection[int]) -> list[list[Span]]:
        """Return the spans of some parameters for each region."""
        mask = sum(1 << index for index in params)
        return self._parts.memory.local_runs(self._parts.registry.partition, mask)

    def _broadcast(self, root: int, step: int, first_region: int = 0) -> None:
        """Copy the parameters of regions from the node of a rank to the others. Collective."""
        parts = self._parts
        parts.meet(step, "fill")
        for buffers in parts.memory.buffers[first_region:]:
            lane = buffers.local(buffers.region).cut(
                parts.topology.node_rank, parts.topology.node_size, CHUNK_NUMEL
            )
            parts.sync.broadcast(buffers.params[lane.slice], parts.topology.places[root][0])
        parts.meet(step, "publish")

    def publish_all(self, step: int, *, state: bool = True) -> None:
        """Send what each owner has written into its shards to all nodes.

        What users had written to parameters is gone.

        Collective: every rank.

        Args:
            step: The last one.
            state: Whether owners have written into the optimizer state, too.
        """
        parts = self._parts
        parts.overlap.settle(step)
        parts.sync.publish_all()
        self.show_loaded(step, params=True, state=state)
        parts.registry.rebind()
        parts.start_step(step + 1)


def _lowest_ranks(masks: Sequence[int]) -> dict[int, int]:
    """Return the lowest rank whose mask has a bit, by the number of the bit."""
    lowest: dict[int, int] = {}
    for rank, mask in enumerate(masks):
        for index in range(mask.bit_length()):
            if mask >> index & 1:
                lowest.setdefault(index, rank)
    return lowest
