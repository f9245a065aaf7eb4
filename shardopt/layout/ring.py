"""The ring of buffers through which gradients pass into the one row of a node."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from shardopt.layout.padding import PAGE_NBYTES, STEP_NBYTES, round_up
from shardopt.layout.partition import CHUNK_NUMEL, Partition
from shardopt.layout.traffic import MIB, NUM_STAGING_BUFFERS, staging_node_nbytes

MIN_DEPTH = 2
"""Buffers of a rank: one is filled while the others of the node sum another."""

_LEAST_NBYTES = 16 * MIB
_LEAST_STAGING_BUFFERS = 2  # one is sent while the other is filled
_SHARE = 0.05
_LEAST_STAGING_NBYTES = 64 * MIB
_PART_NBYTES = 64 << 10  # of a bucket, for each rank of a job with several nodes
_MOST_FOR_PARTS = 8 * MIB
_CHUNK_NBYTES = 4 * CHUNK_NUMEL


def ring_bucket_nbytes(num_nodes: int, node_size: int) -> int:
    """Return the bytes of parameters in a bucket of stage 2 where the policy does not say.

    Four buffers of each rank are to fit into the smallest ring. On several nodes each rank's part
    should be worth a message, but the ring and the staging buffers are to stay small in large jobs.
    """
    of_ring = min(2 * MIB, _LEAST_NBYTES // (4 * node_size))
    if num_nodes == 1:
        return of_ring
    world_size = num_nodes * node_size
    worth_a_message = min(_PART_NBYTES * world_size, _MOST_FOR_PARTS)
    return max(of_ring, worth_a_message, _CHUNK_NBYTES * world_size)


def default_ring_nbytes(params_nbytes: int) -> int:
    """Return the bytes of a node's ring where the policy does not say.

    Args:
        params_nbytes: Of all parameters.
    """
    return max(_LEAST_NBYTES, int(_SHARE * params_nbytes))


def num_ring_staging_buffers(partition: Partition, wire_dtype: str | None) -> int:
    """Return how many buckets of stage 2 a rank has in transit between nodes at a time.

    Args:
        partition: The layout, of several nodes.
        wire_dtype: As ``layout.dtypes.wire_of`` returns it.
    """
    sizes = [region.numel * np.dtype(region.dtype).itemsize for region in partition.regions]
    most_nbytes = max(_LEAST_STAGING_NBYTES, int(_SHARE * sum(sizes)))
    one_nbytes = staging_node_nbytes(partition, wire_dtype, from_device=True)
    fitting = most_nbytes // max(1, one_nbytes)
    return min(max(_LEAST_STAGING_BUFFERS, fitting), NUM_STAGING_BUFFERS)


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


def most_waiting_nbytes(partition: Partition, trained: Iterable[int]) -> int:
    """Return the bytes of gradients that a rank keeps in private memory while its ring is full.

    It waits for other ranks rather than keep more than the largest gradient, which is in private
    memory in any case when it comes.

    Args:
        partition: The layout.
        trained: The parameters that get gradients.
    """
    itemsizes = [np.dtype(region.dtype).itemsize for region in partition.regions]
    params = (partition.params[index] for index in trained)
    return max((param.numel * itemsizes[param.region] for param in params), default=0)
