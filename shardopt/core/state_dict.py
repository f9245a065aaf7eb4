"""State dicts as they go out: of the node, without communication, and the whole of it.

[Note: state dicts]
An entry of ``state`` is whole when its arrays have the parameter's shape. It is a *part* when it
has ``slices``: then its arrays are flat and hold those runs of the flattened parameter, end to end.
On a single node every rank addresses the whole state, so that its state dict is whole. On several
nodes it is the node's part, and ``PART_KEY`` tells which node's. Arrays in a state dict are views,
as torch's are: a copy must be taken of what is to stay as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from shardopt._typing import FloatArray
from shardopt.comm.collectives import Collectives
from shardopt.errors import PartialStateWarning
from shardopt.layout.partition import Partition
from shardopt.layout.span import Span
from shardopt.layout.state_spec import state_specs
from shardopt.params.adapter import Adapter
from shardopt.params.groups import Group
from shardopt.rule.nadam import StepCount
from shardopt.store.memory import Memory

StateDict = dict[str, Any]

PART_KEY = "shardopt"
"""Key of a state dict that is a part: its value has the node's number, and how many there are."""


@dataclass(frozen=True)
class NodePart:
    """The part of a parameter's state that a node has; see [Note: the state of a node].

    Attributes:
        runs: Its runs of the flattened parameter, end to end in the arrays; whole parameters on a
            single node.
        local: Its place in the arrays of its region.
        region: Index of that.
    """

    runs: tuple[Span, ...]
    local: Span
    region: int


@dataclass(frozen=True)
class OptimizerState:
    """The state of an optimizer, as this rank has it.

    Attributes:
        partition: Where every element lives.
        memory: The arrays.
        step_counts: One for each parameter.
        groups: The param groups.
        adapter: Knows the framework's arrays.
    """

    partition: Partition
    memory: Memory
    step_counts: Sequence[StepCount]
    groups: list[Group]
    adapter: Adapter[Any]

    @property
    def params(self) -> list[Any]:
        """The framework's parameters."""
        return [param for group in self.groups for param in group["params"]]

    def owned(self) -> Iterator[tuple[int, Span, Mapping[str, FloatArray]]]:
        """Yield the parts of parameters that this rank owns.

        Yields:
            Index of the parameter; the part, a span of the flattened parameter; for each key of
            the state the part of its array.
        """
        for region, buffers in enumerate(self.memory.buffers):
            arrays = self.memory.state.arrays(region)
            for index, span, local in self.partition.owned_params(buffers.shards):
                yield index, span, {key: array[local.slice] for key, array in arrays.items()}

    def new_entry(self, count: StepCount) -> StateDict:
        """Return an entry of a state dict, without arrays."""
        step = np.array(count.step, self.adapter.step_dtype)
        mu_product = np.array(count.mu_product, np.float64)
        numbers = {"step": step, "mu_product": mu_product}
        return {key: self.adapter.from_number(number) for key, number in numbers.items()}


def node_parts(partition: Partition, node: int) -> list[NodePart]:
    """Return the part of each parameter's state that a node has."""
    parts = [NodePart((), Span(0, 0), param.region) for param in partition.params]
    for region in range(len(partition.regions)):
        for index, span, local in partition.owned_params(partition.node_shards(node, region)):
            runs, first = parts[index].runs, parts[index].local.start
            if not runs:
                first = local.start
            elif runs[-1].stop == span.start:
                span, runs = Span(runs[-1].start, span.stop), runs[:-1]
            parts[index] = NodePart((*runs, span), Span(first, local.stop), region)
    return parts


def has_entry(param: Any, count: StepCount) -> bool:
    """Whether a parameter has an entry: a frozen one has none until it has stepped."""
    return count.step > 0 or getattr(param, "requires_grad", True)


def part_warning(node: int, num_nodes: int) -> PartialStateWarning:
    """Return the warning that a state dict is that of one node of several."""
    return PartialStateWarning(
        f"state_dict() is only the part of node {node} of {num_nodes}: a file that one rank saves "
        "of it cannot be resumed from. Save with shardopt.checkpoint, or what "
        "gather_state_dict() returns on rank 0, or a file on every node."
    )


def gather_state(
    state: OptimizerState, collectives: Collectives, root: int, step: int
) -> StateDict | None:
    """Gather the whole state on ``root``; see ``Optimizer.gather_state_dict``. Collective."""
    rank, call = collectives.topology.rank, "gather_state_dict()"
    params = state.partition.params
    wholes: list[dict[str, FloatArray]] = []
    if rank == root:
        wholes = [
            {each.key: np.zeros(param.numel, each.dtype) for each in state_specs(param.spec.dtype)}
            for param in params
        ]
    places = collectives.topology.places
    for node in range(state.partition.num_nodes):
        # Each node's part has a deadline of its own.
        collectives.allreduce(np.zeros(1), MPI.MAX, step, call)
        source = root if places[root][0] == node else places.index((node, 0))
        for region in range(len(state.partition.regions)):
            for key, own in state.memory.state.arrays(region).items():
                if rank == source != root:
                    collectives.send(own, root, step, call)
                if rank != root:
                    continue
                shards, array = state.partition.node_shards(node, region), own
                if source != root:
                    array = np.empty(state.partition.node_numel(node, region), own.dtype)
                    collectives.receive(array, source, step, call)
                for index, span, local in state.partition.owned_params(shards):
                    wholes[index][key][span.slice] = array[local.slice]
    return _whole_state(state, wholes) if rank == root else None


def _whole_state(state: OptimizerState, wholes: Sequence[Mapping[str, FloatArray]]) -> StateDict:
    """Return a state dict with the arrays given, [numel] each, of every parameter."""
    entries = {}
    for index, param in enumerate(state.params):
        count, shape = state.step_counts[index], state.partition.params[index].spec.shape
        if not has_entry(param, count):
            continue
        entries[index] = state.new_entry(count)
        for key, array in wholes[index].items():
            entries[index][key] = state.adapter.from_array(array.reshape(shape), param)
    return {"state": entries, "param_groups": packed_groups(state.groups)}


def packed_groups(groups: Sequence[Group]) -> list[Group]:
    """Return groups with indices in the place of parameters, counted through all groups."""
    packed, first = [], 0
    for group in groups:
        indices = list(range(first, first + len(group["params"])))
        packed.append({**group, "params": indices})
        first += len(indices)
    return packed
