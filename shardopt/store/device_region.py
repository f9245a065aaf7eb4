"""A region of parameters, gradients and state on this rank's device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardopt.store.residence import LocatedRegion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardopt._typing import FloatArray
    from shardopt.layout.partition import Shard
    from shardopt.layout.span import Span
    from shardopt.store.buffers import ShardArrays
    from shardopt.store.residence import HomeArrays


@dataclass(frozen=True, slots=True, eq=False)
class DeviceRegion(LocatedRegion):
    """A region on the device; spans count from its start.

    Attributes:
        home: Its arrays in node memory.
        row: [region_numel], this rank's gradients at home; None if they do not pass through there.
        start: Where the region begins, as ``shards`` count.
        shards: What each rank of the node owns.
        node_state: The state on the device of each rank of the node.
        owned: The spans that this rank owns.
        leaving: The spans of gradients that are copied home before a step.
        arriving: The spans of parameters that come from home after a step.
    """

    home: HomeArrays
    row: FloatArray | None
    start: int
    shards: Sequence[Sequence[Shard]]
    node_state: Sequence[ShardArrays]
    owned: Sequence[Span]
    leaving: Sequence[Span]
    arriving: Sequence[Span]

    @property
    def updates_home(self) -> bool:
        """Whether the kernel writes parameters at home."""
        return any(target is self.home.params for target in self.arrays.targets)
