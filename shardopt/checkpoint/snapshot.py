"""What of an optimizer goes into a checkpoint, and under which names."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from shardopt.checkpoint.image import Item
from shardopt.checkpoint.manifest import PARAM_KEY, ParamEntry, Slice
from shardopt.checkpoint.values import Array
from shardopt.kernels.base import FloatArray
from shardopt.nadam import Clock
from shardopt.partition import Partition
from shardopt.state import Run, owned_runs
from shardopt.storage import SectionStorage


class Part(NamedTuple):
    """A run of one parameter, or of an array of its state, that this rank owns.

    Attributes:
        param: Index of the parameter.
        key: ``param`` or a key of its state.
        start: Its first element in the flattened parameter.
        stop: One past its last.
        array: [stop - start], where it lives.
        bucket: [start, stop) of the parameter's part in one bucket; ``array`` is within it.
    """

    param: int
    key: str
    start: int
    stop: int
    array: FloatArray
    bucket: tuple[int, int]


def owned_parts(partition: Partition, storages: Sequence[SectionStorage]) -> Iterator[Part]:
    """Give everything that this rank owns, an array of the state after the other."""
    for index, storage in enumerate(storages):
        buckets = [bucket for bucket in partition.buckets if bucket.section == index]
        runs = [
            (run, (bucket.start, bucket.stop))
            for bucket, shard in zip(buckets, storage.shards, strict=True)
            for run in owned_runs(partition, [shard])
        ]
        for key in (PARAM_KEY, *storage.state):
            for run, bucket in runs:
                param = partition.params[run.param]
                within = (
                    max(0, bucket[0] - param.start),
                    min(param.spec.numel, bucket[1] - param.start),
                )
                array = _array(partition, storage, key, run)
                yield Part(run.param, key, run.start, run.stop, array, within)


def _array(partition: Partition, storage: SectionStorage, key: str, run: Run) -> FloatArray:
    if key != PARAM_KEY:
        return storage.state[key][run.local]
    shift = partition.params[run.param].start - storage.section.start
    return storage.params[run.start + shift : run.stop + shift]


def make_items(
    partition: Partition, parts: Sequence[Part], rank: int, arrays: Sequence[Array]
) -> list[Item]:
    """Name parts and arrays for their file.

    A file has each name once. A rank may own several parts of a parameter larger than a bucket, so
    those are named after the bucket's elements as well.
    """
    items = []
    for part in parts:
        spec = partition.params[part.param].spec
        name = spec.name if part.key == PARAM_KEY else f"{spec.name}::{part.key}"
        first, last = part.bucket
        if (first, last) != (0, spec.numel):
            name = f"{name}[{first}:{last}]"
        items.append(Item(name, part.array.dtype.name, part.start - first, part.array))
    for index, array in enumerate(arrays):
        items.append(Item(f"extra/rank-{rank:05d}/{index}", array.dtype.name, 0, array))
    return items


def merge_slices(
    params: Sequence[ParamEntry], found: Sequence[Sequence[tuple[int, str, int, int, int]]]
) -> tuple[dict[str, list[Slice]], ...]:
    """Arrange all ranks' parts by parameter and key.

    Args:
        params: The parameters.
        found: For each file (param, key, start, stop, offset) of each part in it.
    """
    slices: tuple[dict[str, list[Slice]], ...] = tuple(
        {key: [] for key in param.tensors} for param in params
    )
    for file, parts in enumerate(found):
        for param, key, start, stop, offset in parts:
            slices[param][key].append(Slice(start, stop, file, offset))
    for tensors in slices:
        for parts_of_one in tensors.values():
            parts_of_one.sort()
    return slices


def param_entries(partition: Partition, clocks: Sequence[Clock]) -> tuple[ParamEntry, ...]:
    """Describe the parameters."""
    return tuple(
        ParamEntry(
            param.spec.name,
            param.spec.dtype,
            param.spec.shape,
            param.spec.group,
            clock.step,
            clock.mu_product,
        )
        for param, clock in zip(partition.params, clocks, strict=True)
    )
