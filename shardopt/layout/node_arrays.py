"""The arrays of a region in the memory of a node, and where each of them begins."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from shardopt.layout.dtypes import compute_dtype, has_master
from shardopt.layout.padding import place_arrays
from shardopt.layout.partition import Partition
from shardopt.layout.span import Span
from shardopt.layout.state_spec import PARAM_KEY, StateSpec

GRAD_KEY = "grad"
"""The key of averaged gradients, where a node has one row of them."""


@dataclass(frozen=True, slots=True)
class NodeArray:
    """An array that all ranks of a node address.

    Attributes:
        region: Index of the region.
        number: Its number among the arrays that are walked side by side; see
            [Note: padding between arrays].
        spec: Its name (``PARAM_KEY``, that of an array of the state, ``grad<node_rank>``,
            ``GRAD_KEY`` or ``sum``), and how its elements are kept.
        numel: Their number.
        start: Where it begins in its piece of memory, in bytes.
    """

    region: int
    number: int
    spec: StateSpec
    numel: int
    start: int = 0

    @property
    def key(self) -> str:
        """Its name."""
        return self.spec.key

    @property
    def itemsize(self) -> int:
        """Bytes of an element, or of a code."""
        return np.dtype(self.spec.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Its length in bytes."""
        return self.spec.nbytes(self.numel)

    def bytes_of(self, span: Span) -> Span:
        """Return where some elements are in its piece of memory, in bytes."""
        return self.spec.bytes_of(span).shift(self.start)

    @property
    def slice(self) -> slice:
        """Its bytes, for indexing a piece of memory."""
        return slice(self.start, self.start + self.nbytes)


@dataclass(frozen=True, slots=True)
class NodeArrays:
    """Arrays in one piece of memory, ``nbytes`` long."""

    arrays: tuple[NodeArray, ...]
    nbytes: int

    def of_region(self, index: int) -> "NodeArrays":
        """Return the same of one region whose number is another now."""
        return NodeArrays(tuple(replace(a, region=index) for a in self.arrays), self.nbytes)


def plan_param_arrays(partition: Partition, regions: Iterable[int]) -> NodeArrays:
    """Lay out the parameters of some regions."""
    arrays = []
    for index in regions:
        region = partition.regions[index]
        arrays.append(NodeArray(index, 0, StateSpec(PARAM_KEY, region.dtype), region.numel))
    return _placed(arrays)


def plan_state_arrays(partition: Partition, node: int, regions: Iterable[int]) -> NodeArrays:
    """Lay out the optimizer state of the shards of a node; see [Note: the state of a node]."""
    arrays = []
    for index in regions:
        region = partition.regions[index]
        numel, first = partition.node_numel(node, index), 1 + partition.node_size
        arrays += [NodeArray(index, first + i, spec, numel) for i, spec in enumerate(region.state)]
    return _placed(arrays)


def plan_grad_arrays(partition: Partition, node: int, regions: Iterable[int]) -> NodeArrays:
    """Lay out the gradients of all ranks, and the sums of those of the node's shards.

    See [Note: where sums of gradients are kept].
    """
    arrays = []
    for index in regions:
        region, node_size = partition.regions[index], partition.node_size
        arrays += [
            NodeArray(index, 1 + rank, StateSpec(f"grad{rank}", region.dtype), region.numel)
            for rank in range(node_size)
        ]
        if keeps_sums_apart(partition, index):
            behind = 1 + node_size + len(region.state)
            spec = StateSpec("sum", compute_dtype(region.dtype))
            arrays.append(NodeArray(index, behind, spec, partition.node_numel(node, index)))
    return _placed(arrays)


def plan_average_arrays(partition: Partition, regions: Iterable[int]) -> NodeArrays:
    """Lay out the one row of averages that a node has in the place of its ranks' gradients.

    It is in the ``compute_dtype`` of the parameters: 16 bits cannot hold an average.
    """
    arrays = []
    for index in regions:
        region = partition.regions[index]
        spec = StateSpec(GRAD_KEY, compute_dtype(region.dtype))
        arrays.append(NodeArray(index, 1, spec, region.numel))
    return _placed(arrays)


def plan_sum_arrays(partition: Partition, node: int, regions: Iterable[int]) -> NodeArrays:
    """Lay out the averages of a node's shards; see [Note: averages between nodes]."""
    arrays = []
    for index in regions:
        spec = StateSpec("sum", compute_dtype(partition.regions[index].dtype))
        arrays.append(NodeArray(index, 2, spec, partition.node_numel(node, index)))
    return _placed(arrays)


def keeps_sums_apart(partition: Partition, region: int) -> bool:
    """Whether the sums of a region's gradients over all ranks have an array of their own.

    [Note: where sums of gradients are kept]
    With several nodes the sums of a shard arrive in an array of its owner's node, in the
    ``compute_dtype`` of the parameters. On one node sums and update are one pass, and there are no
    sums, unless the norm of the gradient must be known before the update. Then a pass of its own
    computes the sums and keeps them, so that the update reads one source instead of those of all
    ranks once more: in the row of the shard's owner, or, as 16 bits cannot hold a sum, in the same
    array as with several nodes. It takes no memory before the first such pass. A single rank's
    gradients are the sum, and are read where they are.
    """
    if partition.num_nodes > 1:
        return True
    return partition.node_size > 1 and has_master(partition.regions[region].dtype)


def _placed(arrays: list[NodeArray]) -> NodeArrays:
    starts, nbytes = place_arrays((array.number, array.nbytes) for array in arrays)
    placed = [replace(array, start=start) for array, start in zip(arrays, starts, strict=True)]
    return NodeArrays(tuple(placed), nbytes)
