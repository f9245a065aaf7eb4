"""The end of a segment, where all ranks meet with all gradients; see ``GradRing``."""

from collections.abc import Sequence
from functools import partial

from shardopt.comm.consensus import Consensus
from shardopt.comm.topology import Topology
from shardopt.overlap.ring import GradRing, advance_all

PHASE = "gradients"
"""The phase that messages name while ranks wait for gradients."""


def end_segment(
    ring: GradRing, consensus: Consensus, step: int, calls: str, *, has_more: bool
) -> int:
    """End a segment once all that is in it has been dealt with, on one node or several.

    Collective: every rank.

    Args:
        ring: The ring.
        consensus: The ranks.
        step: Number of the step, for messages.
        calls: The user's calls that end segments, for a message.
        has_more: Whether this rank has gradients for another segment.

    Returns:
        The last position of all nodes; 0 on one node.

    Raises:
        OtherCallError: Some ranks make another call.
    """
    awaited = partial(awaited_ranks, ring, consensus.topology)
    ring.end_segment(has_more=has_more)
    if consensus.topology.num_nodes == 1:
        consensus.meet_on_node(ring.is_over, calls, awaited, step=step, phase=PHASE)
        return 0
    total, more = consensus.highest(ring.end(), calls, step=step, phase=PHASE, progress=advance_all)
    ring.extend_to(total, has_more=bool(more))
    consensus.collectives.wait(ring.is_over, step, PHASE, awaited)
    return total


def awaited_ranks(ring: GradRing, topology: Topology) -> Sequence[int]:
    """Return the ranks that the end of a segment waits for."""
    if late := ring.late_ranks:
        return [topology.node_ranks[number] for number in late]
    return [topology.lane_ranks[node] for node in ring.awaited_nodes]
