"""The way that gradients take to the kernel."""

from typing import Any

from shardopt.comm.consensus import Consensus
from shardopt.overlap.averaged import AveragedGradients
from shardopt.overlap.updated import UpdatedGradients
from shardopt.params.gradients import Gradients, RowGradients
from shardopt.params.registry import Registry
from shardopt.store.memory import Memory
from shardopt.transport.ring import RingReduction
from shardopt.transport.sync import BucketSync
from shardopt.transport.updating_exchange import Updating


def make_gradients(
    registry: Registry[Any],
    memory: Memory,
    sync: BucketSync,
    consensus: Consensus,
    ring_nbytes: int | None,
) -> Gradients:
    """Return the way that gradients take to the kernel: by rows, or averaged or used in backward.

    Args:
        registry: The parameters of this rank.
        memory: Their memory.
        sync: Sums them.
        consensus: The ranks.
        ring_nbytes: As in ``ShardPolicy``.
    """
    reduction = sync.reduction
    if isinstance(reduction, Updating):
        return UpdatedGradients(registry, memory, sync, consensus, ring_nbytes)
    if isinstance(reduction, RingReduction):
        return AveragedGradients(registry, memory, sync, consensus, ring_nbytes)
    return RowGradients(registry)
