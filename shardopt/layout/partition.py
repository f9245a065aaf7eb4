"""Where every element lives: the flat index space, its regions, buckets and shards.

Pure integers: nothing here allocates, and nothing depends on the rank that asks.

[Note: the flat index space]
All parameters stand end to end in one index space that is the same for every world size. Parameters
of one dtype that were added together form a *region*, the unit of memory, if their state is of one
form, too; regions start on a multiple of ``CHUNK_NUMEL`` and parameters on a multiple of
``ALIGNMENT_NUMEL``. A region is cut into *buckets*, the unit of communication; a bucket into
``node_size`` lane parts; a lane part into ``num_nodes`` *shards*, each owned by one rank. All these
cuts fall on multiples of ``CHUNK_NUMEL``, so a chunk has one owner however many ranks there are:
sums kept by chunk are the same for every world size and bucket size, and no two ranks write to one
cache line.

Parameters are numbered in the order of the param groups. That is the order of their positions
until groups are edited: then each stays at its place within its region, whatever its number is now.

[Note: the state of a node]
The optimizer state of all shards of a node stands end to end, in flat order, in arrays that the
ranks of the node share. So the part of a parameter's state that a node has is one piece, and on a
single node that piece is the whole.

[Note: padding stays zero]
Elements between parameters belong to nobody, and neither do those of a parameter that was removed
from a region. Segments cover parameters only, so that no kernel writes to padding, gradients are
zeroed as a whole, and sums over a chunk may include it.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardopt.errors import PartitionError
from shardopt.layout.span import Span
from shardopt.layout.state_spec import BLOCK_NUMEL, FULL, StateForm, StateSpec, state_specs

ALIGNMENT_NUMEL = BLOCK_NUMEL
"""Parameters start on multiples of this; see [Note: states of 8 bits]."""

CHUNK_NUMEL = 4096


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """The shape and place of a parameter as its user gives them; equal on every rank.

    Attributes:
        name: Unique in the optimizer.
        shape: As the framework sees it; () and empty shapes are fine.
        dtype: NumPy's name of it, for example ``float32``.
        group: Index into ``param_groups``.
        form: How its state is kept.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int
    form: StateForm = FULL

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def state(self) -> tuple[StateSpec, ...]:
        """The arrays of its state."""
        return state_specs(self.dtype, self.form)


@dataclass(frozen=True, slots=True)
class PlacedParam(Span):
    """A parameter and its span of the flat index space."""

    spec: ParamSpec
    region: int


@dataclass(frozen=True, slots=True)
class DtypeRegion(Span):
    """The parameters of one dtype that were added together; they share one piece of memory.

    Attributes:
        dtype: NumPy's name of it.
        param_indices: Numbers of the parameters, in the order of their positions.
        form: How the state of all of them is kept.
    """

    dtype: str
    param_indices: tuple[int, ...]
    form: StateForm = FULL

    @property
    def state(self) -> tuple[StateSpec, ...]:
        """The arrays of their state."""
        return state_specs(self.dtype, self.form)


@dataclass(frozen=True, slots=True)
class Bucket(Span):
    """The span of one region that is communicated at once."""

    region: int

    def lane_part(self, node_rank: int, node_size: int) -> Span:
        """Return the span that the ranks of one lane own together."""
        return self.cut(node_rank, node_size, CHUNK_NUMEL)


@dataclass(frozen=True, slots=True)
class Shard(Span):
    """The span of a bucket that one rank owns.

    ``local_start`` is where it begins in its node's arrays of optimizer state; see
    [Note: the state of a node].
    """

    region: int
    local_start: int

    @property
    def local(self) -> Span:
        """The shard in the node's arrays of optimizer state."""
        return self.shift(self.local_start - self.start)


@dataclass(frozen=True, slots=True)
class Segment(Span):
    """A span of parameters that share one set of coefficients."""

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
    names: frozenset[str] = frozenset()

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
        return sum(param.numel for param in self.params)

    def removed_numel(self, region: DtypeRegion) -> int:
        """Return the elements of a region whose parameters are gone, in whole chunks."""
        params = [self.params[index] for index in region.param_indices]
        used = sum(_round_up(param.numel, ALIGNMENT_NUMEL) for param in params)
        return region.numel - _round_up(used, CHUNK_NUMEL)

    def shards(self, node: int, node_rank: int, region: int) -> tuple[Shard, ...]:
        """Return the shards of a region that a rank owns, one per bucket; some may be empty."""
        return self.node_shards(node, region)[node_rank :: self.node_size]

    def node_shards(self, node: int, region: int) -> tuple[Shard, ...]:
        """Return the shards of a region that the ranks of a node own, in flat order."""
        shards = []
        local_start = 0
        first = bisect_left(self.buckets, region, key=lambda bucket: bucket.region)
        for bucket in self.buckets[first:]:
            if bucket.region != region:
                break
            for node_rank in range(self.node_size):
                lane = bucket.lane_part(node_rank, self.node_size)
                span = lane.cut(node, self.num_nodes, CHUNK_NUMEL)
                shards.append(Shard(span.start, span.stop, region, local_start))
                local_start += span.numel
        return tuple(shards)

    def node_numel(self, node: int, region: int) -> int:
        """Return the elements of a region that the ranks of a node own."""
        return sum(shard.numel for shard in self.node_shards(node, region))

    def bucket_of(self, shard: Shard) -> Bucket:
        """Return the bucket that a shard is part of."""
        last = bisect_right(self.buckets, shard.start, key=lambda bucket: bucket.start)
        return self.buckets[last - 1]

    def buckets_of(self, mask: int) -> list[int]:
        """Return the buckets with elements of some parameters, by number.

        Args:
            mask: Bit mask of the parameters.
        """
        numbers: set[int] = set()
        starts = [bucket.start for bucket in self.buckets]
        stops = [bucket.stop for bucket in self.buckets]
        for index, param in enumerate(self.params):
            if mask >> index & 1 and param:
                first = bisect_right(stops, param.start)
                numbers.update(range(first, bisect_left(starts, param.stop)))
        return sorted(numbers)

    def params_in(self, region: int, span: Span) -> Iterator[tuple[int, Span]]:
        """Yield the index of each parameter in ``span``, and which part of it that is.

        Both spans are of the flat index space.
        """
        indices = self.regions[region].param_indices
        first = bisect_right(indices, span.start, key=lambda index: self.params[index].stop)
        last = bisect_left(indices, span.stop, key=lambda index: self.params[index].start)
        for index in indices[first:last]:
            if part := span.intersect(self.params[index]):
                yield index, part

    def params_at(self, region: int, positions: Iterable[int]) -> list[PlacedParam]:
        """Return the parameters that have the elements at some positions."""
        found = [next(self.params_in(region, Span(each, each + 1)))[0] for each in positions]
        return [self.params[index] for index in found]

    def runs(self, region: int, mask: int, unit: int = ALIGNMENT_NUMEL) -> list[Span]:
        """Return the fewest spans in whole units that cover some parameters of a region.

        Args:
            region: Index of the region.
            mask: Bit mask of the parameters.
            unit: A divisor of ``CHUNK_NUMEL`` and a multiple of ``ALIGNMENT_NUMEL``.
        """
        runs: list[Span] = []
        for index in self.regions[region].param_indices:
            param = self.params[index]
            if not (mask >> index & 1 and param):
                continue
            start, stop = param.start // unit * unit, _round_up(param.stop, unit)
            if runs and start <= runs[-1].stop:
                runs[-1] = Span(runs[-1].start, stop)
            else:
                runs.append(Span(start, stop))
        return runs

    def owned_params(self, shards: Sequence[Shard]) -> Iterator[tuple[int, Span, Span]]:
        """Yield the parts of parameters in some shards, in flat order.

        Yields:
            Index of the parameter; the part within the flattened parameter; the same part within
            the arrays of optimizer state of the owner's node.
        """
        for shard in shards:
            for index, span in self.params_in(shard.region, shard):
                local = span.shift(shard.local_start - shard.start)
                yield index, span.shift(-self.params[index].start), local

    def segments(self, shard: Shard, cohort_of: Sequence[int]) -> list[Segment]:
        """Cut a shard into the fewest spans of one cohort; padding is in none of them.

        Where updates round by chance, each parameter has a span of its own.

        Args:
            shard: A shard of this partition.
            cohort_of: For each parameter the index of its set of coefficients; negative to leave
                the parameter out.
        """
        segments: list[Segment] = []
        joins = not self.regions[shard.region].form.rounds_by_chance
        for index, span in self.params_in(shard.region, shard):
            cohort = cohort_of[index]
            if cohort < 0:
                continue
            is_next = bool(segments) and segments[-1].stop == span.start
            if joins and is_next and segments[-1].cohort == cohort:
                segments[-1] = replace(segments[-1], stop=span.stop)
            else:
                segments.append(Segment(span.start, span.stop, cohort))
        return segments

    def regions_with(self, indices: Iterable[int]) -> list[int]:
        """Return the regions with some of the parameters ``indices``, in order."""
        return sorted({self.params[index].region for index in indices})

    def extend(self, specs: Sequence[ParamSpec]) -> "Partition":
        """Append parameters at the end of the flat index space; all others stay where they are.

        Raises:
            PartitionError: Two parameters have one name.
        """
        names = self.names.union(spec.name for spec in specs)
        if len(names) < len(self.params) + len(specs):
            _require_unique_names([param.spec for param in self.params] + list(specs))
        regions, buckets = list(self.regions), list(self.buckets)
        placed: dict[int, PlacedParam] = {}
        for dtype, form in dict.fromkeys((spec.dtype, spec.form) for spec in specs):
            number = len(regions)
            start = position = regions[-1].stop if regions else 0
            for offset, spec in enumerate(specs):
                if (spec.dtype, spec.form) == (dtype, form):
                    placed[offset] = PlacedParam(position, position + spec.numel, spec, number)
                    position = _round_up(placed[offset].stop, ALIGNMENT_NUMEL)
            stop = _round_up(position, CHUNK_NUMEL)
            indices = tuple(
                len(self.params) + o for o in sorted(placed) if placed[o].region == number
            )
            regions.append(DtypeRegion(start, stop, dtype, indices, form))
            step = _bucket_numel(self.bucket_nbytes, dtype)
            buckets += [Bucket(b.start, b.stop, number) for b in regions[-1].chunks(step)]
        params = (*self.params, *(placed[offset] for offset in range(len(specs))))
        return replace(
            self, params=params, regions=tuple(regions), buckets=tuple(buckets), names=names
        )


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


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _bucket_numel(bucket_nbytes: int, dtype: str) -> int:
    chunk_nbytes = CHUNK_NUMEL * np.dtype(dtype).itemsize
    return max(1, bucket_nbytes // chunk_nbytes) * CHUNK_NUMEL
