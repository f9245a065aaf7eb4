"""Copies between node memory and a device, by way of pinned memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardopt.layout.span import Span

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shardopt._typing import Array
    from shardopt.backends.base import Device, Event

_BUFFER_NBYTES = 8 << 20
_NUM_BUFFERS = 2

Pair = tuple["Array", "Array"]
"""Where something goes, and where it is: flat, and of the same dtype and length."""


class PinnedStaging:
    """Copies what few calls ask for, such as a save, between node memory and a device.

    A device copies to pinned memory several times as fast as to other memory. Two small buffers
    take turns: while one is copied by the device, the host empties or fills the other. Node memory
    itself is not pinned for that. Pinned pages take memory even where nobody has ever written, as
    in the state of frozen parameters, and cannot be given back while the device knows them; and to
    pin them takes as long as to copy them.

    Args:
        device: Copies.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: list[Array] = []

    def bring(self, pairs: Iterable[Pair]) -> None:
        """Copy from the device to node memory; waits until it is there."""
        before: tuple[Event, Array, Array] | None = None
        for turn, (target, source) in enumerate(_pieces(pairs)):
            buffer = self._buffer(turn, target)
            self._device.copy(buffer, source)
            now = self._device.event(), target, buffer
            if before is not None:
                _land(*before)
            before = now
        if before is not None:
            _land(*before)

    def send(self, pairs: Iterable[Pair]) -> None:
        """Copy from node memory to the device; waits until it is there."""
        events: list[Event] = []
        for turn, (target, source) in enumerate(_pieces(pairs)):
            if turn >= _NUM_BUFFERS:
                events[turn - _NUM_BUFFERS].wait()
            buffer = self._buffer(turn, source)
            buffer[...] = source
            self._device.copy(target, buffer)
            events.append(self._device.event())
        for event in events[-_NUM_BUFFERS:]:
            event.wait()

    def _buffer(self, turn: int, like: Array) -> Array:
        """Return the buffer whose turn it is, as an array like another."""
        if not self._buffers:
            make = self._device.host_zeros
            self._buffers = [make(_BUFFER_NBYTES, "uint8") for _ in range(_NUM_BUFFERS)]
        return self._buffers[turn % _NUM_BUFFERS][: like.nbytes].view(like.dtype)


def _pieces(pairs: Iterable[Pair]) -> Iterator[Pair]:
    for target, source in pairs:
        for span in Span(0, target.size).chunks(_BUFFER_NBYTES // target.itemsize):
            yield target[span.slice], source[span.slice]


def _land(event: Event, target: Array, buffer: Array) -> None:
    event.wait()
    target[...] = buffer
