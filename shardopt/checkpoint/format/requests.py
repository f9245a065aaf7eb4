"""Which bytes are wanted of a checkpoint's files, and in which order they are read.

[Note: verified while it lands]
Digests are of whole chunks; requests are for arbitrary bytes. A chunk that lies within one request
is read directly into its target piece by piece, and each piece is hashed there while it is in the
cache. A chunk at the edge of a request, or one that several requests share, is read into a buffer,
hashed, and copied from there.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardopt.checkpoint.format.manifest import CHUNK_NBYTES, FileEntry, Slice
from shardopt.layout.span import Span
from shardopt.layout.state_spec import StateSpec

Bytes = NDArray[np.uint8]

_TASK_CHUNKS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Wanted(Span):
    """Bytes of a file that are to be read, or only verified.

    Attributes:
        file: Index of the file.
        target: Where the bytes go; None if they are only verified.
    """

    file: int
    target: Bytes | None = None


def wanted_slices(
    slices: Sequence[Slice], span: Span, spec: StateSpec, target: NDArray[Any]
) -> Iterator[Wanted]:
    """Find elements of a tensor in the files.

    Args:
        slices: The slices of the tensor, in order.
        span: The elements.
        spec: How they are kept.
        target: [span.numel], or their blocks; contiguous: where they go.
    """
    raw, filled = target.reshape(-1).view(np.uint8), 0
    index = bisect_left(slices, span.start, key=lambda part: part.stop - 1) if span else 0
    position = span.start
    while position < span.stop:
        part = slices[index]
        common = part.intersect(span)
        place = part.place(common, spec)
        piece = raw[filled : filled + place.numel]
        yield Wanted(place.start, place.stop, part.file, piece)
        position, index, filled = common.stop, index + 1, filled + place.numel


@dataclass(frozen=True, slots=True, eq=False)
class ReadTask(Span):
    """The bytes of consecutive chunks of a file, which one thread reads and verifies.

    Attributes:
        file: Index of the file.
        target: Where the bytes go as they are; None if they go into a buffer first.
        parts: The requests that get a part of the buffer.
    """

    file: int
    target: Bytes | None = None
    parts: list[Wanted] = field(default_factory=list)


def plan_tasks(wanted: Iterable[Wanted], files: Sequence[FileEntry]) -> Iterator[ReadTask]:
    """Arrange requests by chunks; see [Note: verified while it lands]."""
    by_file: dict[int, list[Wanted]] = {}
    for each in wanted:
        if each:
            by_file.setdefault(each.file, []).append(each)
    for file, requests in by_file.items():
        requests.sort(key=lambda each: each.start)
        yield from _plan_file(file, Span(0, files[file].nbytes), requests)


def _plan_file(file: int, whole_file: Span, wanted: Sequence[Wanted]) -> Iterator[ReadTask]:
    shared: ReadTask | None = None  # the chunk that the next request may have a part of
    for each in wanted:
        inner = _whole_chunks(each, whole_file)
        for position in (each.start, each.stop - 1):
            if position in inner:
                continue
            if shared is not None and position in shared:
                if shared.parts[-1] is not each:
                    shared.parts.append(each)
                continue
            if shared is not None:
                yield shared
            start = position // CHUNK_NBYTES * CHUNK_NBYTES
            chunk = Span(start, start + CHUNK_NBYTES).intersect(whole_file)
            shared = ReadTask(chunk.start, chunk.stop, file, None, [each])
        for part in inner.chunks(_TASK_CHUNKS * CHUNK_NBYTES):
            target = None if each.target is None else each.target[part.index_in(each)]
            yield ReadTask(part.start, part.stop, file, target)
    if shared is not None:
        yield shared


def _whole_chunks(wanted: Span, whole_file: Span) -> Span:
    """Return the bytes of the chunks that lie within ``wanted``; the file's last may be short."""
    start = -(-wanted.start // CHUNK_NBYTES) * CHUNK_NBYTES
    stop = wanted.stop
    if stop < whole_file.stop:
        stop = stop // CHUNK_NBYTES * CHUNK_NBYTES
    return Span(start, max(start, stop))
