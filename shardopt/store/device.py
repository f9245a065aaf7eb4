"""The copies of parameters, gradients and state on this rank's device; see ``store.residence``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from shardopt.layout.dtypes import compute_dtype
from shardopt.layout.node_arrays import keeps_sums_apart
from shardopt.layout.padding import place_arrays
from shardopt.layout.span import Span, intersections, merged, without
from shardopt.store.buffers import RegionArrays, ShardArrays
from shardopt.store.device_region import DeviceRegion
from shardopt.store.staging import PinnedStaging

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardopt._typing import Array, FloatArray
    from shardopt.backends.base import Backend, Device, Event
    from shardopt.comm.node_memory.arena import Arena
    from shardopt.layout.footprint import Placement
    from shardopt.layout.partition import Partition, Shard
    from shardopt.store.residence import HomeArrays, LocatedRegion
    from shardopt.store.staging import Pair

_Spans = Sequence[Span]


class OnDevice:
    """Parameters and gradients are on a device; see ``Residence``.

    Args:
        device: Holds them.
        arena: The memory of the node.
        host: Computes at home, to offload the state; None to compute on the device.
    """

    is_home = False

    def __init__(self, device: Device, arena: Arena, host: Backend | None = None) -> None:
        self.holder: Backend = device
        self._device = device
        self._arena = arena
        self._is_offloaded = host is not None
        self.placement: Placement = "cuda" if host is None else "offload"
        self.backend: Backend = device if host is None else host
        self.offloaded = None if host is None else device
        self.updates_home = self._is_offloaded
        self.needs_rows = self._is_offloaded or not device.has_peers
        self._regions: list[DeviceRegion] = []
        self.reaches_state = self._is_offloaded or device.has_peers or arena.comm.size == 1
        # For each region what steps have updated since the state was home: this rank's, the node's.
        self._old: dict[bool, list[_Spans]] = {False: [], True: []}
        self._staging = PinnedStaging(device)
        self._shown: Event | None = None  # parameters are being copied from home until then

    def locate(
        self, partition: Partition, index: int, place: tuple[int, int], home: HomeArrays
    ) -> DeviceRegion:
        """See ``Residence.locate``."""
        region, node_rank = partition.regions[index], place[1]
        shards = [partition.shards(place[0], rank, index) for rank in range(partition.node_size)]
        params = self._arrays({"param": (region.dtype, [region.numel] * partition.node_size)})
        grads = self._arrays({"grad": (region.dtype, [region.numel] * partition.node_size)})
        own_params, own_grads = params[node_rank]["param"], grads[node_rank]["grad"]
        node_state, sums = self._locate_shards(partition, index, shards)
        if self._is_offloaded:
            rows, targets = list(home.rows), [home.params]
            sums = ShardArrays(home.sums, None) if home.sums else None
            state = ShardArrays(home.state, None)
        else:
            rows = self._rows(home, [each.get("grad") for each in grads])
            targets = self._targets(home, [each.get("param") for each in params], partition)
            state = node_state[node_rank]
        lanes = [
            bucket.lane_part(node_rank, partition.node_size).shift(-region.start)
            for bucket in partition.buckets
            if bucket.region == index
        ]
        return DeviceRegion(
            RegionArrays(home.params, own_params, own_grads, rows, targets, sums),
            state,
            home=home,
            row=home.rows[node_rank] if home.rows else None,
            start=region.start,
            shards=shards,
            node_state=node_state,
            owned=[shard.shift(-region.start) for shard in shards[node_rank] if shard],
            leaving=self._leaving(region.numel, lanes),
            arriving=self._arriving(partition, index, place, shards),
        )

    def enter(self, queue: int) -> None:
        """See ``Residence.enter``."""
        self._device.enter(queue)

    def extend(self, regions: Sequence[LocatedRegion]) -> None:
        """See ``Residence.extend``."""
        for region in regions:
            assert isinstance(region, DeviceRegion)
            self._regions.append(region)
            if region.row is not None and self._is_offloaded:  # copies run beside the kernel
                self._device.pin(region.home.params)
                self._device.pin(region.row)
            for old in self._old.values():
                old.append([])  # zeros there and here

    def select(self, kept: Sequence[int]) -> None:
        """See ``Residence.select``."""
        self._regions = [self._regions[index] for index in kept]
        self._old = {of_node: [old[i] for i in kept] for of_node, old in self._old.items()}

    def publish(self) -> None:
        """See ``Residence.publish``; others may write to parameters at home from then on."""
        if self._shown is not None:
            self._shown.wait()
            self._shown = None
        self._device.publish()

    def acquire(self) -> None:
        """See ``Residence.acquire``."""
        self._device.acquire()

    # -- around a step -----------------------------------------------------------------------------

    def send_grads(self, spans: Sequence[_Spans]) -> None:
        """See ``Residence.send_grads``."""
        if not self.needs_rows:
            return
        for region, used in zip(self._regions, spans, strict=True):
            assert region.row is not None
            for span in intersections(region.leaving, used):
                self._device.copy(region.row[span.slice], region.arrays.own_grads[span.slice])
        if self._is_offloaded:  # hosts read them; devices wait for what others publish
            self._device.wait()

    def show_grads(self, spans: Sequence[_Spans]) -> None:
        """See ``Residence.show_grads``."""
        if not self.needs_rows:
            return
        for region, averaged in zip(self._regions, spans, strict=True):
            assert region.row is not None
            for span in intersections(region.leaving, averaged):
                self._device.copy(region.arrays.own_grads[span.slice], region.row[span.slice])

    def adopt_unseen(self, spans: Sequence[_Spans]) -> None:
        """See ``Residence.adopt_unseen``.

        On a device the kernel reads this rank's own copy. For offloaded updates each rank copies
        its shards home in every step: 4N/W bytes of float32 beside 8N for gradients and parameters.
        To compare them with home would move as much, and no framework counts all writes: torch
        misses those through ``p.data``.
        """
        if self._is_offloaded:
            self._bring_owned_home(spans)
            self._device.wait()

    def adopt_params(self, spans: Sequence[_Spans]) -> None:
        """See ``Residence.adopt_params``."""
        if not self._is_offloaded:
            pairs = zip(self._regions, spans, strict=True)
            self.send_params_out([intersections(region.owned, wanted) for region, wanted in pairs])

    def show_params(self, spans: Sequence[_Spans]) -> None:
        """See ``Residence.show_params``."""
        pairs = zip(self._regions, spans, strict=True)
        self.send_params_out([intersections(region.arriving, updated) for region, updated in pairs])

    def note_shown(self) -> None:
        """See ``Residence.note_shown``."""
        self._shown = self._device.event()

    @property
    def is_state_home(self) -> bool:
        """See ``Residence.is_state_home``."""
        return not any(self._old[self.reaches_state])

    def note_update(self, spans: Sequence[_Spans]) -> None:
        """See ``Residence.note_update``."""
        if self._is_offloaded:
            return
        for old in self._old.values():
            for number, updated in enumerate(spans):
                if old[number] != updated:
                    old[number] = merged([*old[number], *updated])

    # -- between home and the device ---------------------------------------------------------------

    def bring_home(self, *, params: bool, state: bool, of_node: bool = False) -> None:
        """See ``Residence.bring_home``."""
        pairs: list[Pair] = []
        if params:
            for region in self._regions:
                here = [Span(0, region.home.params.size)] if of_node else region.owned
                own = region.arrays.own_params
                pairs += [(region.home.params[span.slice], own[span.slice]) for span in here]
        if state:
            for region, old in zip(self._regions, self._old[of_node], strict=True):
                pairs += self._state_pairs(region, old, of_node=of_node)
        self._staging.bring(pairs)
        if state:
            self._note_home(of_node=of_node)

    def send_out(self, *, params: bool, state: bool) -> None:
        """See ``Residence.send_out``."""
        if params:
            wholes = [[Span(0, region.home.params.size)] for region in self._regions]
            self.send_params_out(wholes)
        for index, region in enumerate(self._regions if state else ()):
            for key in region.home.state:
                whole = Span(0, region.home.state[key].size)
                self.send_state_out(key, index, [whole])
        if state:
            self._note_home(of_node=True)

    def bring_params_home(self, spans: Sequence[_Spans], *, is_updated: bool) -> None:
        """See ``Residence.bring_params_home``; what an update writes there is the newest."""
        pairs = zip(self._regions, spans, strict=True)
        self._bring_owned_home(
            [[] if region.updates_home is is_updated else written for region, written in pairs]
        )
        self._device.wait()

    def send_params_out(self, spans: Sequence[_Spans]) -> None:
        """See ``Residence.send_params_out``."""
        for region, arriving in zip(self._regions, spans, strict=True):
            for span in arriving:
                self._device.copy(
                    region.arrays.own_params[span.slice], region.home.params[span.slice]
                )
        if any(spans):
            self.note_shown()

    def send_state_out(self, key: str, region: int, spans: Collection[Span]) -> None:
        """See ``Residence.send_state_out``."""
        if self._is_offloaded:
            return
        copies, rank = self._regions[region], self._arena.comm.rank
        of_device, home = copies.node_state[rank], copies.home.state[key]
        self._staging.send(
            (of_device.arrays[key][of_device.place(shard, span).slice], home[span.slice])
            for shard in copies.shards[rank]
            for span in intersections([shard.local], list(spans))
        )

    def free(self) -> None:
        """See ``Residence.free``."""
        self._regions.clear()
        self._old = {False: [], True: []}

    # -- inside ------------------------------------------------------------------------------------

    def _bring_owned_home(self, spans: Sequence[_Spans]) -> None:
        """Copy what this rank owns of some spans of parameters home, as its framework has them."""
        for region, wanted in zip(self._regions, spans, strict=True):
            for span in intersections(region.owned, wanted):
                self._device.copy(
                    region.home.params[span.slice], region.arrays.own_params[span.slice]
                )

    def _note_home(self, *, of_node: bool) -> None:
        for each in (False, True) if of_node else (False,):
            self._old[each] = [[] for _ in self._regions]

    def _state_pairs(self, region: DeviceRegion, spans: _Spans, *, of_node: bool) -> Iterator[Pair]:
        """Yield where spans of the state belong at home, and where they are on devices."""
        assert self.reaches_state or not of_node
        for owner in range(self._arena.comm.size) if of_node else (self._arena.comm.rank,):
            for shard in region.shards[owner]:
                for span in intersections([shard.shift(-region.start)], spans):
                    local = span.shift(region.start - shard.start + shard.local_start)
                    arrays = region.node_state[owner]
                    for key, array in arrays.arrays.items():
                        there = arrays.place(shard, local).slice
                        yield region.home.state[key][local.slice], array[there]

    def _rows(self, home: HomeArrays, of_node: Sequence[FloatArray | None]) -> list[FloatArray]:
        """Return the gradients of all ranks where the kernel addresses them.

        Args:
            home: The arrays in node memory.
            of_node: Those on devices, by rank; None where this device does not address them.
        """
        if not home.rows:
            return [row for row in of_node if row is not None]
        for row in home.rows:
            self._device.pin(row)
        pairs = zip(home.rows, of_node, strict=True)
        return [row if of_device is None else of_device for row, of_device in pairs]

    def _targets(
        self, home: HomeArrays, of_node: Sequence[FloatArray | None], partition: Partition
    ) -> list[FloatArray]:
        """Return the copies of the parameters that the kernel writes, this rank's own first.

        Args:
            home: As for ``_rows``.
            of_node: Likewise.
            partition: The layout.
        """
        rank = self._arena.comm.rank
        order = [rank, *(other for other in range(len(of_node)) if other != rank)]
        copies = [copy for each in order if (copy := of_node[each]) is not None]
        if partition.num_nodes > 1 or len(copies) < len(of_node):  # others have it from there
            self._device.pin(home.params)
            copies.append(home.params)
        return copies

    def _locate_shards(
        self, partition: Partition, index: int, shards: Sequence[Sequence[Shard]]
    ) -> tuple[list[ShardArrays], ShardArrays | None]:
        """Allocate the state of shards, and their sums if they have an array of their own."""
        if self._is_offloaded:
            return [], None
        region = partition.regions[index]
        numels = [sum(shard.numel for shard in each) for each in shards]
        wanted = {spec.key: (spec.dtype, numels) for spec in region.state}
        arrays = self._arrays(wanted)
        state = [ShardArrays(each, of) for each, of in zip(arrays, shards, strict=True)]
        if not keeps_sums_apart(partition, index):
            return state, None
        rank, device, full = (
            self._arena.comm.rank,
            self._device,
            np.dtype(compute_dtype(region.dtype)),
        )

        def allocate() -> dict[str, FloatArray]:  # no other rank needs them, and no step may
            return {"sum": device.zeros(numels[rank] * full.itemsize).view(full)}

        return state, ShardArrays(allocate, shards[rank])

    def _arrays(
        self, wanted: Mapping[str, tuple[str, Sequence[int]]]
    ) -> list[dict[str, FloatArray]]:
        """Allocate arrays for each rank of the node, in one block of each device.

        Args:
            wanted: For each key the dtype, and the elements for each rank.
        """
        layouts = []
        for rank in range(self._arena.comm.size):
            nbytes = [n[rank] * np.dtype(dtype).itemsize for dtype, n in wanted.values()]
            layouts.append((nbytes, place_arrays(enumerate(nbytes))))
        longest = max(total for _, (_, total) in layouts)
        blocks = self._device.blocks(self._arena, max(1, longest))  # a node may own nothing
        return [
            {
                key: _view(block[start : start + length], dtype)
                for (key, (dtype, _)), start, length in zip(
                    wanted.items(), starts, nbytes, strict=True
                )
            }
            if block.size or rank == self._arena.comm.rank
            else {}
            for rank, (block, (nbytes, (starts, _))) in enumerate(zip(blocks, layouts, strict=True))
        ]

    def _leaving(self, numel: int, lanes: _Spans) -> list[Span]:
        whole = Span(0, numel)
        if self._is_offloaded:
            return [whole]
        return [] if self._device.has_peers else without(whole, lanes)

    def _arriving(
        self,
        partition: Partition,
        index: int,
        place: tuple[int, int],
        shards: Sequence[Sequence[Shard]],
    ) -> list[Span]:
        region = partition.regions[index]
        whole = Span(0, region.numel)
        if self._is_offloaded:
            return [whole]
        written = shards if self._device.has_peers else [shards[place[1]]]
        return without(whole, [s.shift(-region.start) for each in written for s in each])


def _view(block: Array, dtype: str) -> FloatArray:
    return block.view(np.dtype(dtype))
