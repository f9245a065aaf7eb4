"""State dicts as they go out: of the node, without communication, and the whole of it.

[Note: state dicts]
An entry of ``state`` is whole when its arrays have the parameter's shape. It is a *part* when it
has ``slices``: then its arrays are flat and hold those runs of the flattened parameter, end to end.
On a single node every rank addresses the whole state, so that its state dict is whole. On several
nodes it is the node's part, and ``PART_KEY`` tells which node's. Where the state is on devices that
other ranks cannot address, each rank counts as a node here. Arrays in a state dict are views, as
torch's are: a copy must be taken of what is to stay as it is. A rank's own part is a copy.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from shardopt._typing import FloatArray
from shardopt.backends.base import Backend, is_on_device
from shardopt.backends.codes import part_of, shaped, values_of
from shardopt.comm.collectives import Collectives
from shardopt.errors import PartialStateWarning
from shardopt.layout.partition import Partition, Shard
from shardopt.layout.span import Span
from shardopt.params.adapter import Adapter
from shardopt.params.groups import Group
from shardopt.rule.coefficients import StepCount
from shardopt.rule.hyperparams import Hyperparams, Rule
from shardopt.store.memory import Memory

StateDict = dict[str, Any]

PART_KEY = "shardopt"
"""Key of a state dict that is a part: its value has the node's number, and how many there are."""


@dataclass(frozen=True)
class StatePart:
    """The part of a parameter's state that a node or a rank has.

    Attributes:
        runs: Its runs of the flattened parameter; whole parameters on a single node.
        places: Where they are in the arrays of its region, end to end; a single place for the part
            of a node, see [Note: the state of a node].
        region: Index of that.
    """

    runs: tuple[Span, ...]
    places: tuple[Span, ...]
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
        holder: Holds what the framework holds.
        rule: The update rule.
    """

    partition: Partition
    memory: Memory
    step_counts: Sequence[StepCount]
    groups: list[Group]
    adapter: Adapter[Any]
    holder: Backend
    rule: Rule

    @property
    def params(self) -> list[Any]:
        """The framework's parameters."""
        return [param for group in self.groups for param in group["params"]]

    def owned(self) -> Iterator[tuple[int, Span, Mapping[str, FloatArray]]]:
        """Yield the parts of parameters that this rank owns.

        Yields:
            Index of the parameter; the part, a span of the flattened parameter; for each key of
            the state the part of its array, which may have codes.
        """
        for region, buffers in enumerate(self.memory.buffers):
            arrays = self.memory.state.arrays(region)
            for index, span, local in self.partition.owned_params(buffers.shards):
                yield index, span, {key: part_of(array, local) for key, array in arrays.items()}

    def read_entry(self, entry: Mapping[str, Any], hyper: Hyperparams) -> Mapping[str, Any]:
        """Return an entry that a user has, as arrays on the host; see ``Adapter.read_entry``."""
        return {
            key: self.holder.host(value) if is_on_device(value) else value
            for key, value in self.adapter.read_entry(entry, hyper).items()
        }

    def new_entry(self, count: StepCount) -> StateDict:
        """Return an entry of a state dict, without arrays."""
        step = np.array(count.step, self.adapter.step_dtype)
        mu_product = np.array(count.mu_product, np.float64)
        numbers = {"step": step, "mu_product": mu_product}
        return {key: self.adapter.from_number(numbers[key]) for key in self.rule.count_keys}


def state_parts(
    partition: Partition, shards_in: Callable[[int], Sequence[Shard]]
) -> list[StatePart]:
    """Return the part of each parameter's state that lies in some shards.

    Args:
        partition: Where every element lives.
        shards_in: Returns the shards in a region, in flat order.
    """
    parts = [StatePart((), (), param.region) for param in partition.params]
    for region in range(len(partition.regions)):
        for index, span, local in partition.owned_params(shards_in(region)):
            so_far = parts[index]
            runs, places = _joined(so_far.runs, span), _joined(so_far.places, local)
            parts[index] = StatePart(runs, places, region)
    return parts


def _joined(runs: tuple[Span, ...], span: Span) -> tuple[Span, ...]:
    """Add a span behind the last of several."""
    if runs and runs[-1].stop == span.start:
        return (*runs[:-1], Span(runs[-1].start, span.stop))
    return (*runs, span)


def has_entry(param: Any, count: StepCount) -> bool:
    """Whether a parameter has an entry: a frozen one has none until it has stepped."""
    return count.step > 0 or getattr(param, "requires_grad", True)


def part_warning(what: str, number: int, count: int) -> PartialStateWarning:
    """Return the warning that a state dict is that of one node, or one rank, of several."""
    return PartialStateWarning(
        f"state_dict() is only the part of {what} {number} of {count}: a file that one rank saves "
        "of it cannot be resumed from. Save with shardopt.checkpoint, or what "
        f"gather_state_dict() returns on rank 0, or a file on every {what}."
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
            {each.key: np.zeros(param.numel, each.value_dtype) for each in param.spec.state}
            for param in params
        ]
    places = collectives.topology.places
    for node in range(state.partition.num_nodes):
        # Each node's part has a deadline of its own.
        collectives.allreduce(np.zeros(1), MPI.MAX, step, call)
        source = root if places[root][0] == node else places.index((node, 0))
        for region in range(len(state.partition.regions)):
            specs = {spec.key: spec for spec in state.partition.regions[region].state}
            for key, own in state.memory.state.arrays(region).items():
                if rank == source != root:
                    collectives.send(own.reshape(-1), root, step, call)
                if rank != root:
                    continue
                shards, array = state.partition.node_shards(node, region), own
                if source != root:
                    numel = state.partition.node_numel(node, region)
                    flat = np.empty(specs[key].nbytes(numel), np.uint8).view(own.dtype)
                    collectives.receive(flat, source, step, call)
                    array = shaped(flat, specs[key])
                for index, span, local in state.partition.owned_params(shards):
                    values = values_of(part_of(array, local), specs[key], span.numel)
                    wholes[index][key][span.slice] = values
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
