"""The ring of buffers through which gradients pass into the one row of a node."""

from dataclasses import dataclass

import numpy as np

from shardopt.layout.padding import PAGE_NBYTES, STEP_NBYTES, round_up
from shardopt.layout.partition import Partition
from shardopt.layout.traffic import MIB

MIN_DEPTH = 2
"""Buffers of a rank: one is filled while the others of the node sum another."""

_LEAST_NBYTES = 16 * MIB
_SHARE = 0.05


def ring_bucket_nbytes(node_size: int) -> int:
    """Return the bytes of parameters in a bucket of stage 2 where the policy does not say.

    Four buffers of each rank are to fit into the smallest ring.
    """
    return min(2 * MIB, _LEAST_NBYTES // (4 * node_size))


def default_ring_nbytes(params_nbytes: int) -> int:
    """Return the bytes of a node's ring where the policy does not say.

    Args:
        params_nbytes: Of all parameters.
    """
    return max(_LEAST_NBYTES, int(_SHARE * params_nbytes))


@dataclass(frozen=True, slots=True)
class RingPlan:
    """The ring of a node: as many buffers for each rank, of one bucket each.

    Attributes:
        node_size: Ranks of the node.
        depth: Buffers of each.
        slot_nbytes: Bytes of a buffer: the largest bucket.
    """

    node_size: int
    depth: int
    slot_nbytes: int

    @property
    def rank_nbytes(self) -> int:
        """Distance between the buffers of two ranks; see [Note: padding between arrays]."""
        return self.depth * self.slot_nbytes + STEP_NBYTES

    @property
    def nbytes(self) -> int:
        """Bytes of the node."""
        return self.node_size * self.rank_nbytes


def plan_ring(partition: Partition, ring_nbytes: int | None = None) -> RingPlan:
    """Lay out the ring of a node.

    Args:
        partition: The layout.
        ring_nbytes: As in ``ShardPolicy``.
    """
    sizes = [np.dtype(region.dtype).itemsize for region in partition.regions]
    slots = [bucket.numel * sizes[bucket.region] for bucket in partition.buckets]
    slot_nbytes = round_up(max(slots, default=1), PAGE_NBYTES)
    if ring_nbytes is None:
        ring_nbytes = default_ring_nbytes(sum(slots))
    depth = ring_nbytes // (partition.node_size * slot_nbytes)
    most = max(MIN_DEPTH, len(slots))  # more would never be used
    return RingPlan(partition.node_size, min(max(MIN_DEPTH, depth), most), slot_nbytes)
