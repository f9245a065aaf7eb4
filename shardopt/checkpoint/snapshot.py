"""What of an optimizer goes into a checkpoint, and under which names."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from shardopt._typing import FloatArray
from shardopt.checkpoint.format.image import FileLayout, Item
from shardopt.checkpoint.format.manifest import PARAM_KEY, ParamEntry, Slice
from shardopt.checkpoint.format.values import Array
from shardopt.layout.partition import Partition, owned_runs
from shardopt.rule.nadam import StepCount
from shardopt.store.buffers import ShardBuffers


class Part(NamedTuple):
    """A run of one parameter, or of an array of its state, that this rank owns.

    Attributes:
        param: Index of the parameter.
        key: ``param`` or a key of its state.
        start: Its first element in the flattened parameter.
        stop: One past its last.
        region: Index of the storage that it lives in.
        local: Where it is there.
        bucket: [start, stop) of the parameter's part in one bucket, which the run is within.
    """

    param: int
    key: str
    start: int
    stop: int
    region: int
    local: slice
    bucket: tuple[int, int]


def owned_parts(partition: Partition, buffers: Sequence[ShardBuffers]) -> Iterator[Part]:
    """Give everything that this rank owns, an array of the state after the other."""
    for index, storage in enumerate(buffers):
        buckets = [bucket for bucket in partition.buckets if bucket.region == index]
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
                shift = param.start - storage.region.start
                shared = slice(run.start + shift, run.stop + shift)
                local = shared if key == PARAM_KEY else run.local
                yield Part(run.param, key, run.start, run.stop, index, local, within)


def part_arrays(parts: Iterable[Part], buffers: Sequence[ShardBuffers]) -> list[FloatArray]:
    """Give the elements of each part, where they live."""
    wholes = [{PARAM_KEY: storage.params, **storage.state} for storage in buffers]
    return [wholes[part.region][part.key][part.local] for part in parts]


class Layout(NamedTuple):
    """What a rank's file holds, and where; the same in every checkpoint until parameters are added.

    Attributes:
        partition: Of the parameters.
        arrays: (dtype, elements) of each array beside the parts.
        parts: What this rank owns.
        places: (param, key, start, stop, offset in the file) of each of the parts.
        file: All of it.
    """

    partition: Partition
    arrays: list[tuple[str, int]]
    parts: list[Part]
    places: list[tuple[int, str, int, int, int]]
    file: FileLayout


def lay_out(
    partition: Partition,
    buffers: Sequence[ShardBuffers],
    rank: int,
    arrays: Sequence[Array],
    before: Layout | None = None,
) -> Layout:
    """Lay out a rank's file: many small parts take longer than to copy what is in them.

    Args:
        partition: Of the parameters.
        buffers: This rank's.
        rank: Of those that save.
        arrays: That are saved, too.
        before: What this gave before, on the same rank; it is given again if it still holds.
    """
    forms = [(array.dtype.name, array.size) for array in arrays]
    if before is not None and before.partition is partition and before.arrays == forms:
        return before
    parts = list(owned_parts(partition, buffers))
    dtypes = [{key: array.dtype.name for key, array in each.state.items()} for each in buffers]
    items = []
    for part in parts:
        spec = partition.params[part.param].spec
        name = spec.name if part.key == PARAM_KEY else f"{spec.name}::{part.key}"
        dtype = spec.dtype if part.key == PARAM_KEY else dtypes[part.region][part.key]
        first, last = part.bucket
        if (first, last) != (0, spec.numel):  # a file has each name once, and a rank may own
            name = f"{name}[{first}:{last}]"  # several parts of what is larger than a bucket
        items.append(Item(name, dtype, part.start - first, part.stop - part.start))
    for index, form in enumerate(forms):
        items.append(Item(f"extra/rank-{rank:05d}/{index}", form[0], 0, form[1]))
    file = FileLayout(items)
    places = [
        (part.param, part.key, part.start, part.stop, offset)
        for part, offset in zip(parts, file.offsets[: len(parts)], strict=True)
    ]
    return Layout(partition, forms, parts, places, file)


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


def param_entries(partition: Partition, step_counts: Sequence[StepCount]) -> tuple[ParamEntry, ...]:
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
        for param, clock in zip(partition.params, step_counts, strict=True)
    )
