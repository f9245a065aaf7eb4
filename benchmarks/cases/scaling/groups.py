"""The ranks that are at work together: 1, 2, 4 ... of a job, and whole nodes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BY_RANK, BY_NODE = "rank", "node"


@dataclass(frozen=True)
class Group:
    """Some ranks of a job.

    Attributes:
        ranks: Of the job, in ascending order.
        num_nodes: Nodes that they are on.
        by: How they were chosen: ``BY_RANK``, ``BY_NODE`` or both.
    """

    ranks: tuple[int, ...]
    num_nodes: int
    by: tuple[str, ...]


def plan_groups(places: Sequence[tuple[int, int]], sizes: Sequence[int] = ()) -> list[Group]:
    """Choose the groups of a job, the smallest first.

    By rank they are the first 1, 2, 4 ... and all ranks, a node filled before the next one is
    begun. By node they are all ranks of the first 1, 2, 4 ... and of all nodes.

    Args:
        places: The (node, node_rank) of each rank; nodes are counted from 0.
        sizes: Numbers of ranks to choose instead; whole nodes only if they have as many.

    Raises:
        ValueError: There are not as many ranks.
    """
    ordered = sorted(range(len(places)), key=places.__getitem__)
    if sizes and not all(1 <= size <= len(places) for size in sizes):
        raise ValueError(
            f"--ranks must be between 1 and the {len(places)} ranks of the job; got "
            f"{' '.join(map(str, sizes))}. Start more ranks, or leave it out."
        )
    found: dict[tuple[int, ...], list[str]] = {}
    for size in sorted(set(sizes)) or doubled(len(places)):
        found.setdefault(tuple(sorted(ordered[:size])), []).append(BY_RANK)
    for num_nodes in doubled(1 + max(node for node, _ in places)):
        ranks = tuple(rank for rank, (node, _) in enumerate(places) if node < num_nodes)
        if not sizes or len(ranks) in sizes:
            found.setdefault(ranks, []).append(BY_NODE)
    return [
        Group(ranks, len({places[rank][0] for rank in ranks}), tuple(found[ranks]))
        for ranks in sorted(found, key=len)
    ]


def doubled(last: int) -> list[int]:
    """Return 1, 2, 4 ... and ``last``."""
    return list(_doubled(last))


def _doubled(last: int) -> Iterator[int]:
    number = 1
    while number < last:
        yield number
        number *= 2
    yield last
