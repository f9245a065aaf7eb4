"""Where every element lives: the flat index space, its regions, buckets and shards.

Pure integers: nothing here allocates, and nothing depends on the rank that asks.

[Note: the flat index space]
All parameters stand end to end in one index space that is the same for every world size. Parameters
of one dtype that were added together form a *region*, the unit of memory; regions start on a
multiple of ``CHUNK_NUMEL`` and parameters on a multiple of ``ALIGNMENT_NUMEL``. A region is cut
into *buckets*, what one exchange carries; a bucket into ``node_size`` lane parts; a lane part
into ``num_nodes`` *shards*, what one rank owns. All these cuts fall on multiples of
``CHUNK_NUMEL``, so a chunk has one owner however many ranks there are: sums kept by chunk are
the same for every world size and bucket size, and no two ranks write to one cache line or page.

[Note: padding stays zero]
Elements between parameters belong to nobody. Segments cover parameters only, so that no kernel
writes to padding, gradients are zeroed as a whole, and sums over a chunk may include it.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardopt.errors import PartitionError

ALIGNMENT_NUMEL = 32  # 64 bytes in a 16-bit dtype, more in the others
CHUNK_NUMEL = 4096


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """What the layout must know of a parameter; equal on every rank.

    Attributes:
        name: Unique in the optimizer.
        shape: As the framework sees it; () and empty shapes are fine.
        dtype: NumPy's name of it, for example ``float32``.
        group: Index into ``param_groups``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class PlacedParam:
    """A parameter and its run [start, stop) of the flat index space."""

    spec: ParamSpec
    region: int
    start: int

    @property
    def stop(self) -> int:
        """One past its last element."""
        return self.start + self.spec.numel


@dataclass(frozen=True, slots=True)
class DtypeRegion:
    """A run of the flat index space in one dtype that lives in one pair of windows."""

    dtype: str
    start: int
    stop: int
    param_indices: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements, padding included."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Bucket:
    """The run of one region that one exchange carries."""

    region: int
    start: int
    stop: int

    def lane_part(self, node_rank: int, node_size: int) -> tuple[int, int]:
        """The run [start, stop) that the ranks of one lane own together."""
        return cut(self.start, self.stop, node_rank, node_size)


@dataclass(frozen=True, slots=True)
class Shard:
    """The run [start, stop) of a bucket that one rank owns.

    ``local_start`` is where it begins in the rank's own arrays of its region.
    """

    region: int
    start: int
    stop: int
    local_start: int

    @property
    def numel(self) -> int:
        """Number of elements, padding included."""
        return self.stop - self.start

    def __bool__(self) -> bool:
        return self.stop > self.start

    @property
    def local_stop(self) -> int:
        """One past its last element in the rank's own arrays."""
        return self.local_start + self.numel


@dataclass(frozen=True, slots=True)
class Segment:
    """A run [start, stop) of a shard, all in parameters that share one set of coefficients."""

    start: int
    stop: int
    cohort: int


@dataclass(frozen=True)
class Partition:
    """The layout of all parameters over ``num_nodes`` nodes of ``node_size`` ranks each."""

    params: tuple[PlacedParam, ...]
    regions: tuple[DtypeRegion, ...]
    buckets: tuple[Bucket, ...]
    num_nodes: int
    node_size: int
    bucket_nbytes: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.num_nodes * self.node_size

    @property
    def numel(self) -> int:
        """Length of the flat index space, padding included."""
        return self.regions[-1].stop if self.regions else 0

    @property
    def param_numel(self) -> int:
        """Elements of parameters, padding left out."""
        return sum(param.spec.numel for param in self.params)

    def shards(self, node: int, node_rank: int, region: int) -> tuple[Shard, ...]:
        """The shards of a region that a rank owns, one for each bucket; some may be empty."""
        shards = []
        local_start = 0
        for bucket in self.buckets:
            if bucket.region == region:
                lane = bucket.lane_part(node_rank, self.node_size)
                start, stop = cut(*lane, node, self.num_nodes)
                shards.append(Shard(region, start, stop, local_start))
                local_start += stop - start
        return tuple(shards)

    def lane_cuts(self, bucket: Bucket, node_rank: int) -> tuple[int, ...]:
        """Where the shards of one lane begin, by node, and where the last of them ends."""
        lane = bucket.lane_part(node_rank, self.node_size)
        starts = [cut(*lane, node, self.num_nodes)[0] for node in range(self.num_nodes)]
        return *starts, lane[1]

    def params_in(self, region: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (param index, start, stop) of each parameter's part of [start, stop)."""
        indices = self.regions[region].param_indices
        first = bisect_right(indices, start, key=lambda index: self.params[index].stop)
        last = bisect_left(indices, stop, key=lambda index: self.params[index].start)
        for index in indices[first:last]:
            param = self.params[index]
            run = max(start, param.start), min(stop, param.stop)
            if run[0] < run[1]:
                yield index, *run

    def segments(self, shard: Shard, cohort_of: Sequence[int]) -> list[Segment]:
        """Cut a shard into the fewest runs of one cohort; padding is in none of them.

        Args:
            shard: A shard of this partition.
            cohort_of: For each parameter the index of its set of coefficients; negative to leave
                the parameter out.
        """
        segments: list[Segment] = []
        for index, start, stop in self.params_in(shard.region, shard.start, shard.stop):
            cohort = cohort_of[index]
            if cohort < 0:
                continue
            if segments and segments[-1].stop == start and segments[-1].cohort == cohort:
                segments[-1] = replace(segments[-1], stop=stop)
            else:
                segments.append(Segment(start, stop, cohort))
        return segments

    def extend(self, specs: Sequence[ParamSpec]) -> "Partition":
        """Append parameters at the end of the flat index space; all others stay where they are.

        Raises:
            PartitionError: Two parameters have one name.
        """
        _require_unique_names([param.spec for param in self.params] + list(specs))
        params, regions, buckets = list(self.params), list(self.regions), list(self.buckets)
        placed: dict[int, PlacedParam] = {}
        for dtype in dict.fromkeys(spec.dtype for spec in specs):
            number = len(regions)
            start = position = regions[-1].stop if regions else 0
            for offset, spec in enumerate(specs):
                if spec.dtype == dtype:
                    placed[offset] = PlacedParam(spec, number, position)
                    position = _round_up(placed[offset].stop, ALIGNMENT_NUMEL)
            stop = _round_up(position, CHUNK_NUMEL)
            indices = tuple(
                len(self.params) + o for o in sorted(placed) if placed[o].region == number
            )
            regions.append(DtypeRegion(dtype, start, stop, indices))
            step = _bucket_numel(self.bucket_nbytes, dtype)
            buckets += [Bucket(number, b, min(b + step, stop)) for b in range(start, stop, step)]
        params += [placed[offset] for offset in range(len(specs))]
        return replace(self, params=tuple(params), regions=tuple(regions), buckets=tuple(buckets))


def plan_partition(
    specs: Sequence[ParamSpec], num_nodes: int, node_size: int, bucket_nbytes: int
) -> Partition:
    """Lay out parameters over ranks.

    Args:
        specs: The parameters, in the order of ``param_groups``; equal on every rank.
        num_nodes: Nodes in the job.
        node_size: Ranks on each node.
        bucket_nbytes: Upper bound of a bucket's size in bytes; at least one chunk is taken.

    Raises:
        PartitionError: Two parameters have one name.
    """
    return Partition((), (), (), num_nodes, node_size, bucket_nbytes).extend(specs)


def _require_unique_names(specs: Sequence[ParamSpec]) -> None:
    first_with: dict[str, int] = {}
    for index, spec in enumerate(specs):
        first = first_with.setdefault(spec.name, index)
        if first != index:
            raise PartitionError(
                f"parameter names must be unique; got {spec.name!r} for parameters {first} and "
                f"{index}. Name each parameter differently."
            )


def cut(start: int, stop: int, index: int, parts: int) -> tuple[int, int]:
    """Part ``index`` of ``parts`` of [start, stop), in whole chunks that are shared out evenly."""
    chunks = (stop - start) // CHUNK_NUMEL
    first, last = chunks * index // parts, chunks * (index + 1) // parts
    return start + first * CHUNK_NUMEL, start + last * CHUNK_NUMEL


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _bucket_numel(bucket_nbytes: int, dtype: str) -> int:
    chunk_nbytes = CHUNK_NUMEL * np.dtype(dtype).itemsize
    return max(1, bucket_nbytes // chunk_nbytes) * CHUNK_NUMEL


@dataclass(frozen=True)
class Run:
    """A rank's part of one parameter: where it is in the parameter, and in the rank's arrays."""

    param: int
    start: int
    stop: int
    local: slice


def owned_runs(partition: Partition, shards: Sequence[Shard]) -> Iterator[Run]:
    """Give the parts of parameters in some shards, in flat order."""
    for shard in shards:
        for index, start, stop in partition.params_in(shard.region, shard.start, shard.stop):
            zero, shift = partition.params[index].start, shard.local_start - shard.start
            yield Run(index, start - zero, stop - zero, slice(start + shift, stop + shift))
