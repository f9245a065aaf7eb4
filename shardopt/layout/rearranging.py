"""Layouts after users have edited param groups."""

from collections.abc import Sequence
from dataclasses import replace

from shardopt.layout.partition import Bucket, DtypeRegion, ParamSpec, Partition, PlacedParam


def rearrange(
    partition: Partition, specs: Sequence[ParamSpec], sources: Sequence[int | None]
) -> Partition:
    """Lay out other parameters, of which those that are there already stay where they are.

    They keep their places within their regions, and regions keep their cuts, so that neither they
    nor their state move. The place of a parameter that is gone becomes padding; a region without
    parameters is dropped, and those behind it close up. New parameters come last.

    Args:
        partition: The layout so far.
        specs: The parameters, in the order of ``param_groups``.
        sources: For each of them its number in ``partition``; None for a new one.

    Raises:
        PartitionError: Two parameters have one name.
    """
    pairs = list(zip(specs, sources, strict=True))
    order = [i for i, source in enumerate(sources) if source is not None]
    order += [i for i, source in enumerate(sources) if source is None]
    kept = _select(partition, [(source, spec) for spec, source in pairs if source is not None])
    full = kept.extend([spec for spec, source in pairs if source is None])
    place_of = {index: place for place, index in enumerate(order)}
    return _select(full, [(place_of[index], spec) for index, spec in enumerate(specs)])


def _select(partition: Partition, chosen: Sequence[tuple[int, ParamSpec]]) -> Partition:
    """Leave out all parameters but some.

    Args:
        partition: The layout so far.
        chosen: Their numbers there, and what they are called now, in their new order.
    """
    new_index = {old: new for new, (old, _) in enumerate(chosen)}
    regions: list[DtypeRegion] = []
    moved: dict[int, tuple[int, int]] = {}  # new number of each region, and how far it moves
    for number, region in enumerate(partition.regions):
        indices = tuple(new_index[i] for i in region.param_indices if i in new_index)
        if indices:
            start = regions[-1].stop if regions else 0
            stop = start + region.numel
            moved[number] = len(regions), start - region.start
            regions.append(replace(region, start=start, stop=stop, param_indices=indices))
    buckets = [
        Bucket(bucket.start + shift, bucket.stop + shift, number)
        for bucket in partition.buckets
        if bucket.region in moved
        for number, shift in [moved[bucket.region]]
    ]
    params = []
    for old, spec in chosen:
        param = partition.params[old]
        number, shift = moved[param.region]
        params.append(PlacedParam(param.start + shift, param.stop + shift, spec, number))
    return replace(
        partition,
        params=tuple(params),
        regions=tuple(regions),
        buckets=tuple(buckets),
        names=frozenset(spec.name for _, spec in chosen),
    )
