"""The least memory, traffic and time of other ways to train the same model, by formula.

None of it is measured. Times are lower bounds: bytes over bandwidth, with no latency and no cost
per message. Each rank has gradients and parameters of its own, and within a node collectives are
counted with the least that they must read and write of these, while the link works at the same
time. Moments and, for 16-bit parameters, float32 masters are counted as the product has them, since
a run that is to be as accurate needs them, whatever a peer's default is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from shardopt.layout.partition import ParamSpec
from shardopt.layout.state_spec import state_specs
from shardopt.planner.estimate import Layout
from shardopt.planner.machine import Machine
from shardopt.planner.model import Model

_SOURCES = {
    "replicated NAdam": "ring all-reduce (Patarasuk, Yuan 2009), torch.optim.NAdam on every rank",
    "torch ZeRO-1": "torch.distributed.optim.ZeroRedundancyOptimizer: whole tensors, greedily",
    "FSDP2": "ZeRO stage 3 (Rajbhandari et al. 2020), torch.distributed.fsdp.fully_shard",
}


@dataclass(frozen=True, slots=True)
class Peer:
    """Another way to train the same model.

    Attributes:
        name: Its name.
        rank_nbytes: Memory of the rank that needs most.
        node_nbytes: Memory of a node of such ranks.
        sent_nbytes: Sent by a node in a step, those for forward and backward included.
        step_s: The least time of communication and update.
        source: Where the formula comes from.
    """

    name: str
    rank_nbytes: int
    node_nbytes: int
    sent_nbytes: int
    step_s: float
    source: str


class _Work(NamedTuple):
    """The bytes that a node moves in a step.

    Attributes:
        sent_nbytes: To other nodes.
        within_nbytes: Read and written by collectives of its ranks.
        updated_nbytes: Read and written by updates.
    """

    sent_nbytes: int
    within_nbytes: int
    updated_nbytes: int


def plan_peers(model: Model, layout: Layout, machine: Machine, num_modules: int = 32) -> list[Peer]:
    """Compute what peers take for the same model, ranks and machine.

    Args:
        model: The parameters.
        layout: The job.
        machine: Its speeds.
        num_modules: Equal parts in which FSDP2 gathers the model.
    """
    return [
        _replicated(model, layout, machine),
        _zero_1(model, layout, machine),
        _fsdp2(model, layout, machine, num_modules),
    ]


def _replicated(model: Model, layout: Layout, machine: Machine) -> Peer:
    """NAdam on every rank, gradients averaged by an all-reduce.

    Memory: parameters, gradients and state on every rank. Traffic: a ring all-reduce sends
    2 (W-1)/W of the gradients over each edge of the ring, of which one leaves a node; P. Patarasuk
    and X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.
    Within a node it reads every rank's gradients and writes averages in their places.
    """
    params, grads, state = _nbytes(model)
    rank_nbytes = params + grads + state
    updated = layout.node_size * _update_nbytes(model.trained_specs)
    work = _Work(_ring_nbytes(2 * grads, layout), _averaging_nbytes(grads, layout), updated)
    return _peer("replicated NAdam", rank_nbytes, work, layout, machine)


def _zero_1(model: Model, layout: Layout, machine: Machine) -> Peer:
    """``torch.distributed.optim.ZeroRedundancyOptimizer`` behind DDP.

    Memory: parameters and gradients on every rank, and the state of the tensors that the rank
    owns: whole tensors, the largest first, each to the rank with the fewest elements so far, as
    ``_partition_parameters`` in torch/distributed/optim/zero_redundancy_optimizer.py does. Traffic:
    DDP's all-reduce, and a broadcast of every rank's tensors, which each other rank writes.
    """
    params, grads, state = _nbytes(model)
    specs = model.trained_specs
    most = _largest_share([spec.numel for spec in specs], layout.world_size)
    numel = sum(spec.numel for spec in specs)
    share = most / numel if numel else 0.0
    sent = _ring_nbytes(2 * grads, layout) + (grads if layout.num_nodes > 1 else 0)
    rank_nbytes = params + grads + int(state * share)
    updated = int(layout.node_size * share * _update_nbytes(specs))
    within = _averaging_nbytes(grads, layout) + _gathering_nbytes(grads, layout)
    work = _Work(sent, within, updated)
    return _peer("torch ZeRO-1", rank_nbytes, work, layout, machine)


def _fsdp2(model: Model, layout: Layout, machine: Machine, num_modules: int) -> Peer:
    """``torch.distributed.fsdp.fully_shard`` with its default ``reshard_after_forward=True``.

    Memory: 1/W of parameters, gradients and state, beside the parameters of two modules, one in use
    and one on its way, and the gradients of one. Traffic: two all-gathers of parameters and a
    reduce-scatter of gradients, each of which sends (W-1)/W over an edge of the ring. S.
    Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models",
    2020, section 7. Within a node each rank writes all that it gathers, and the reduce-scatter
    reads every rank's gradients and writes their averages once.
    """
    params, grads, state = _nbytes(model)
    gathered = (2 * params + grads) // num_modules if layout.world_size > 1 else 0
    rank_nbytes = -(-(params + grads + state) // layout.world_size) + gathered
    updated = _update_nbytes(model.trained_specs) // layout.num_nodes
    scattered = (layout.node_size + 1) * grads if layout.node_size > 1 else 0
    within = 2 * _gathering_nbytes(params, layout) + scattered
    work = _Work(_ring_nbytes(2 * params + grads, layout), within, updated)
    return _peer("FSDP2", rank_nbytes, work, layout, machine)


def _peer(name: str, rank_nbytes: int, work: _Work, layout: Layout, machine: Machine) -> Peer:
    bandwidth, link = machine.memory_nbytes_per_s, machine.link_nbytes_per_s
    if machine.gpu is not None:
        bandwidth = layout.node_size * machine.gpu.nbytes_per_s
    sending_s = work.sent_nbytes / link if link else 0.0
    communication_s = max(sending_s, work.within_nbytes / bandwidth)
    step_s = communication_s + work.updated_nbytes / bandwidth
    node_nbytes = rank_nbytes * layout.node_size
    return Peer(name, rank_nbytes, node_nbytes, work.sent_nbytes, step_s, _SOURCES[name])


def _nbytes(model: Model) -> tuple[int, int, int]:
    """Return the bytes of parameters, gradients and state of a rank that shards nothing."""
    params = sum(spec.numel * np.dtype(spec.dtype).itemsize for spec in model.specs)
    specs = model.trained_specs
    grads = sum(spec.numel * np.dtype(spec.dtype).itemsize for spec in specs)
    return params, grads, sum(_state_nbytes(spec) for spec in specs)


def _state_nbytes(spec: ParamSpec) -> int:
    return sum(each.nbytes(spec.numel) for each in state_specs(spec.dtype))


def _update_nbytes(specs: Sequence[ParamSpec]) -> int:
    """Return the bytes of an update: gradients read; state and parameters read and written."""
    nbytes = sum(3 * spec.numel * np.dtype(spec.dtype).itemsize for spec in specs)
    return nbytes + 2 * sum(map(_state_nbytes, specs))


def _averaging_nbytes(nbytes: int, layout: Layout) -> int:
    """Return the bytes that a node's memory moves if ``nbytes`` of each rank become the average."""
    return 2 * layout.node_size * nbytes if layout.node_size > 1 else 0


def _gathering_nbytes(nbytes: int, layout: Layout) -> int:
    """Return the bytes that a node's memory moves if each rank gets the ``nbytes`` of all ranks.

    They are read once, and every rank writes those of others.
    """
    if layout.node_size == 1:
        return 0
    return nbytes + layout.node_size * nbytes * (layout.world_size - 1) // layout.world_size


def _ring_nbytes(nbytes: int, layout: Layout) -> int:
    """Return the bytes that leave a node if ``nbytes`` go round a ring of all ranks."""
    return nbytes * (layout.world_size - 1) // layout.world_size if layout.num_nodes > 1 else 0


def _largest_share(sizes: Sequence[int], num_ranks: int) -> int:
    """Return the elements of the rank that has most; ranks without tensors are not looked at."""
    ranks: list[int] = [0] * min(num_ranks, len(sizes))
    for size in sorted(sizes, reverse=True):
        heappush(ranks, heappop(ranks) + size)
    return max(ranks, default=0)
