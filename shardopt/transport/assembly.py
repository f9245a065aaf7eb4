"""The choice of what moves gradients and parameters, by the nodes of a job and its policy."""

from shardopt.backends.base import Backend
from shardopt.comm.collectives import Collectives
from shardopt.comm.topology import Topology
from shardopt.trace import OFF, Trace
from shardopt.transport.all_gather import AllGather
from shardopt.transport.averaging import AveragedGrads
from shardopt.transport.copies import Copies
from shardopt.transport.local import LocalTransport
from shardopt.transport.mpi import MpiTransport
from shardopt.transport.node_sums import NodeSums
from shardopt.transport.reduce_scatter import ReduceScatter
from shardopt.transport.reduction import InPlaceReduction
from shardopt.transport.ring import RingReduction
from shardopt.transport.ring_exchange import RingExchange
from shardopt.transport.sync import BucketSync
from shardopt.transport.updating import Updates, UpdatingReduction
from shardopt.transport.updating_exchange import UpdatingExchange


def make_sync(
    topology: Topology,
    backend: Backend,
    copies: Copies,
    collectives: Collectives,
    wire_dtype: str | None,
    trace: Trace = OFF,
    *,
    has_one_row: bool = False,
    sums_by_node: bool = False,
    updates: Updates | None = None,
) -> BucketSync:
    """Set up synchronisation for the ranks of a job, over MPI if there are several nodes.

    Args:
        topology: The ranks.
        backend: Computes.
        copies: To and from the devices of this node.
        collectives: For waits.
        wire_dtype: As ``layout.dtypes.wire_of`` returns it.
        trace: Shows buckets on their way.
        has_one_row: See ``Memory``.
        sums_by_node: Whether nodes exchange once in a step, as ``ShardPolicy.accumulate`` says.
        updates: Updates shards if backward does; else None.
    """
    place, piece_numel = (topology.node, topology.node_rank), backend.kernel.piece_numel
    averages = AveragedGrads(backend, *place)
    if topology.num_nodes == 1:
        all_gather = AllGather(LocalTransport(topology.rank), backend)
        in_place = _reduce_on_node(backend, place[1], trace, updates, has_one_row=has_one_row)
        pieces = piece_numel if copies.are_beside else None
        return BucketSync(all_gather, in_place, averages, copies, collectives, pieces)
    all_gather = AllGather(MpiTransport(topology, collectives.number), backend, trace)
    reduction: RingExchange | ReduceScatter
    if updates is not None:
        reduction = UpdatingExchange(all_gather, backend, place, wire_dtype, updates, trace)
    else:
        kind = (NodeSums if sums_by_node else RingExchange) if has_one_row else ReduceScatter
        reduction = kind(all_gather.transport, backend, place, wire_dtype, trace)
    return BucketSync(all_gather, reduction, averages, copies, collectives, piece_numel)


def _reduce_on_node(
    backend: Backend, node_rank: int, trace: Trace, updates: Updates | None, *, has_one_row: bool
) -> InPlaceReduction:
    """Make the reduction of a job on one node; see ``make_sync``."""
    if updates is not None:
        return UpdatingReduction(backend, node_rank, updates, trace)
    kind = RingReduction if has_one_row else InPlaceReduction
    return kind(backend, node_rank, trace)
