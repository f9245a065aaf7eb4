"""The work of a step, bucket by bucket, on the node that has most of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np

from shardopt.layout.dtypes import compute_dtype, wire_of
from shardopt.layout.footprint import Placement
from shardopt.layout.partition import ParamSpec, Partition, plan_partition
from shardopt.layout.state_spec import StateForm, StateSpec
from shardopt.layout.traffic import LanePart, lane_parts, sends_grads
from shardopt.planner.machine import Machine
from shardopt.policy import ShardPolicy


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes that the ranks of a node move together, by the way they take.

    Attributes:
        memory_nbytes: Read from memory and written to it: that of the node, or of its GPUs.
        peer_nbytes: Between the GPUs of the node.
        host_nbytes: Between GPUs and the memory of the node.
    """

    memory_nbytes: int = 0
    peer_nbytes: int = 0
    host_nbytes: int = 0

    def seconds(self, machine: Machine, node_size: int, placement: Placement) -> float:
        """Return the time it takes, if all ways are used at once and the slowest one counts."""
        gpu, memory_nbytes_per_s = machine.gpu, machine.memory_nbytes_per_s
        if gpu is None:
            return self.memory_nbytes / memory_nbytes_per_s
        if placement == "cuda":
            memory_nbytes_per_s = node_size * gpu.nbytes_per_s
        return max(
            self.memory_nbytes / memory_nbytes_per_s,
            self.peer_nbytes / (node_size * gpu.peer_nbytes_per_s),
            self.host_nbytes / (node_size * gpu.host_nbytes_per_s),
        )


@dataclass(frozen=True, slots=True)
class BucketWork:
    """The work for one bucket on one node.

    Copies that an MPI library makes are not counted.

    Attributes:
        numel: Elements of the bucket.
        reduced: Moved to sum the gradients of the node's ranks for the other nodes.
        summed: Moved to add up what the nodes have sent.
        updated: Moved to update the node's shards.
        grads_nbytes: Gradients that the node sends.
        params_nbytes: Parameters that the node sends.
        grads_messages: Messages with gradients of the rank that sends most.
        params_messages: Messages with parameters, likewise.
    """

    numel: int
    reduced: Moved
    summed: Moved
    updated: Moved
    grads_nbytes: int
    params_nbytes: int
    grads_messages: int
    params_messages: int


def plan_work(
    partition: Partition, policy: ShardPolicy | None = None, placement: Placement = "cpu"
) -> list[BucketWork]:
    """Compute the work of a step in the order in which buckets are sent, the last ones first.

    It is the work of the last node, whose shards are the largest. Buckets of one size are alike,
    so it takes time for each size only.

    Args:
        partition: The layout of parameters that all have gradients.
        policy: How it is sharded; None takes the defaults. What backward does in stage 2 beside an
            exchange is not in it; see ``averaging_nbytes``.
        placement: Where arrays are.
    """
    sharding = policy or ShardPolicy()

    @cache
    def work_of(numel: int, dtype: str, form: StateForm) -> BucketWork:
        spec = ParamSpec("", (numel,), dtype, 0, form)
        nbytes = numel * np.dtype(dtype).itemsize
        alone = plan_partition([spec], partition.num_nodes, partition.node_size, nbytes)
        lanes = range(partition.node_size)
        parts = [part for lane in lanes for part in lane_parts(alone, lane, wire_of(sharding))]
        return _work_of(parts, spec.state, partition, placement, sharding)

    found = []
    for bucket in reversed(partition.buckets):
        region = partition.regions[bucket.region]
        found.append(work_of(bucket.numel, region.dtype, region.form))
    return found


def averaging_nbytes(partition: Partition, policy: ShardPolicy) -> int:
    """Return the bytes that a node moves in backward in stage 2, beside an exchange, at most.

    Each rank writes its gradients to the ring and all of them are read there, as far as caches do
    not hold them. Their sums or averages are written to one row, or used for updates. Gradients
    themselves are in cache when backward hands them over. If each backward is exchanged, all of
    that belongs to the exchange.

    Args:
        partition: The layout of parameters that all have gradients.
        policy: How it is sharded.
    """
    if policy.stage == 1 or (partition.num_nodes > 1 and policy.accumulate == "exact"):
        return 0
    moved = 0
    for bucket in partition.buckets:
        region, numel = partition.regions[bucket.region], bucket.numel
        item = np.dtype(region.dtype).itemsize
        moved += 2 * partition.node_size * item * numel
        if policy.update_in_backward:
            moved += _written_nbytes(region.dtype, region.state, numel)
        else:
            moved += np.dtype(compute_dtype(region.dtype)).itemsize * numel
    return moved


def _written_nbytes(dtype: str, state: Sequence[StateSpec], numel: int) -> int:
    """Return the bytes of parameters and state that updates read and write."""
    return 2 * (np.dtype(dtype).itemsize * numel + sum(spec.nbytes(numel) for spec in state))


def _work_of(
    parts: list[LanePart],
    state: Sequence[StateSpec],
    partition: Partition,
    placement: Placement,
    policy: ShardPolicy,
) -> BucketWork:
    num_nodes, node_size, others = partition.num_nodes, partition.node_size, partition.num_nodes - 1
    numel, own = sum(p.numel for p in parts), [p.shard(others).numel for p in parts]
    dtype, wire_dtype, own_numel = parts[0].dtype, parts[0].wire_dtype, sum(own)
    item, wire, full = (
        np.dtype(name).itemsize for name in (dtype, wire_dtype, compute_dtype(dtype))
    )
    add_gpus = partial(_with_gpus, node_size=node_size, placement=placement)
    written = _written_nbytes(dtype, state, own_numel)
    if num_nodes == 1 and policy.update_in_backward:
        return BucketWork(numel, Moved(), Moved(), Moved(), 0, 0, 0, 0)
    if num_nodes == 1:
        source = full if policy.stage == 2 else node_size * item
        updated = add_gpus(Moved(source * own_numel + written), shared_nbytes=2 * item * own_numel)
        return BucketWork(numel, Moved(), Moved(), updated, 0, 0, 0, 0)
    reduced_numel, read = numel, node_size * item
    if policy.stage == 1 and sends_grads(dtype, node_size, wire_dtype):
        reduced_numel = own_numel
    if policy.stage == 2:  # through the ring, or from sums in the row
        read = full if policy.accumulate == "node" else 2 * read
    kept = 0 if policy.update_in_backward else full  # averages that are used at once stay in cache
    return BucketWork(
        numel=numel,
        reduced=add_gpus(
            Moved((read + wire) * reduced_numel),
            shared_nbytes=item * reduced_numel,
            sent_nbytes=wire * (numel - own_numel),
        ),
        summed=add_gpus(
            Moved((num_nodes * wire + kept) * own_numel), sent_nbytes=wire * others * own_numel
        ),
        updated=add_gpus(
            Moved(kept * own_numel + written),
            shared_nbytes=item * own_numel,
            sent_nbytes=item * (own_numel + node_size * (numel - own_numel)),
        ),
        grads_nbytes=wire * (numel - own_numel),
        params_nbytes=item * own_numel * others,
        grads_messages=max(p.num_shards - bool(n) for p, n in zip(parts, own, strict=True)),
        params_messages=max(bool(n) * others for n in own),
    )


def _with_gpus(
    moved: Moved,
    *,
    node_size: int,
    placement: Placement,
    shared_nbytes: int = 0,
    sent_nbytes: int = 0,
) -> Moved:
    """Add what moves between GPUs, and between them and the host.

    Args:
        moved: What moves in memory.
        node_size: Ranks, each with a GPU.
        placement: Where arrays are.
        shared_nbytes: Gradients of one rank that are read, and one copy of what is written to the
            parameters of all.
        sent_nbytes: To other nodes or from them, which passes through the memory of the node.
    """
    if placement == "cuda":
        return replace(moved, peer_nbytes=shared_nbytes * (node_size - 1), host_nbytes=sent_nbytes)
    if placement == "offload":  # all gradients down, parameters up to every GPU
        return replace(moved, host_nbytes=shared_nbytes * node_size)
    return moved
