"""The optimizer state in node memory, as this rank reads and writes it for its user."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from shardopt._typing import FloatArray
from shardopt.backends.codes import part_of, values_of
from shardopt.core.parts import Parts
from shardopt.core.state_dict import OptimizerState, StatePart, state_parts
from shardopt.core.state_edits import EDIT_KEYS
from shardopt.errors import CheckpointError
from shardopt.layout.partition import Shard
from shardopt.layout.span import Span
from shardopt.layout.state_spec import PARAM_KEY
from shardopt.params.writes import UserWrites, Written, describe


class StateAtHome:
    """The part of the state that this rank has at home; see [Note: node memory and devices].

    Args:
        parts: The optimizer's.
        writes: Finds what this rank's user writes into arrays.
    """

    def __init__(self, parts: Parts, writes: UserWrites) -> None:
        self._parts = parts
        self._writes = writes
        self._places: tuple[object, list[StatePart]] = None, []  # of a partition

    def bring(self) -> None:
        """Have the arrays show the state as the last step has left it.

        Raises:
            CheckpointError: This rank's user has written to arrays that showed an older one.
        """
        residence = self._parts.residence
        if residence.is_state_home:
            return
        self.refuse_stale(self._writes.find(self._parts.registry.partition))
        self._writes.discard(params=False, state=True)  # copies of pages would look written
        residence.bring_home(params=False, state=True, of_node=residence.reaches_state)

    def refuse_stale(self, written: Iterable[Written]) -> None:
        """Refuse writes to arrays that show the state before the last step, and drop them.

        Args:
            written: What ``UserWrites.find`` has found.

        Raises:
            CheckpointError: There are such writes.
        """
        if self._parts.residence.is_state_home:
            return
        stale = [each for each in written if each.key != PARAM_KEY and each.key not in EDIT_KEYS]
        if not stale:
            return
        self._writes.discard(params=False, state=True)
        what = describe(min(stale), [binding.name for binding in self._parts.registry.bindings])
        raise CheckpointError(
            "writes to opt.state must go to arrays that were looked up after the last step, as the "
            f"state is on a device; got one to {what} in an array from before. It is dropped: look "
            "the array up in opt.state once more, and write there."
        )

    @property
    def is_whole(self) -> bool:
        """Whether this rank shows the whole state; see [Note: state dicts]."""
        return self._parts.topology.num_nodes == 1 and self._parts.residence.reaches_state

    @property
    def part(self) -> tuple[str, int, int]:
        """The part of the state that this rank shows: of what, its number, how many there are."""
        topology = self._parts.topology
        if self._parts.residence.reaches_state:
            return "node", topology.places[topology.rank][0], topology.num_nodes
        return "rank", topology.rank, topology.world_size

    def arrays(self, index: int) -> dict[str, FloatArray]:
        """Return what this rank shows of the state of a parameter, flat.

        These are new views of the node's part; copies where each rank has a part of its own. Of
        what has codes they are copies of its values; see [Note: states of 8 bits].
        """
        part, state = self.places()[index], self._parts.memory.state
        if self._parts.residence.reaches_state:
            specs = self._parts.registry.partition.regions[part.region].state
            numel = sum(run.numel for run in part.runs)
            arrays = self.kept(index)
            return {spec.key: values_of(arrays[spec.key], spec, numel) for spec in specs}
        return {  # on devices, where nothing has codes
            key: np.concatenate([array[:0], *(array[place.slice] for place in part.places)])
            for key, array in state.arrays(part.region).items()
        }

    def kept(self, index: int) -> dict[str, FloatArray]:
        """Return views of the node's part of the state of a parameter, as it is kept."""
        part, state = self.places()[index], self._parts.memory.state
        place = part.places[0] if part.places else Span(0, 0)
        own = state.own_arrays(part.region)
        return {key: part_of(array, place) for key, array in own.items()}

    def places(self) -> list[StatePart]:
        """Return what this rank shows of the state of each parameter."""
        parts, partition = self._parts, self._parts.registry.partition
        if self._places[0] is not partition:
            node, node_rank = parts.topology.places[parts.topology.rank]

            def shards_in(region: int) -> Sequence[Shard]:
                if parts.residence.reaches_state:
                    return partition.node_shards(node, region)
                return partition.shards(node, node_rank, region)

            self._places = partition, state_parts(partition, shards_in)
        return self._places[1]

    def owned(self, indices: set[int]) -> Iterator[tuple[int, Mapping[str, FloatArray]]]:
        """Yield the state that this rank owns of some parameters."""
        for index, _, arrays in self.state.owned():
            if index in indices:
                yield index, arrays

    def send_out(self, indices: set[int]) -> None:
        """Copy what this rank owns of the state of some parameters from home to where steps are."""
        parts = self._parts
        if parts.residence.is_home or not indices:
            return
        for region, buffers in enumerate(parts.memory.buffers):
            owned = parts.registry.partition.owned_params(buffers.shards)
            spans = [local for index, _, local in owned if index in indices]
            for key in parts.memory.state.arrays(region):
                parts.residence.send_state_out(key, region, spans)

    @property
    def state(self) -> OptimizerState:
        """The state without what users know of it."""
        parts, registry = self._parts, self._parts.registry
        adapter, holder = registry.adapter, parts.residence.holder
        return OptimizerState(
            registry.partition, parts.memory, (), [], adapter, holder, registry.rule
        )
