"""The content of a rank's file, before it is written: a header, and flat arrays end to end.

See [Note: format version 1]. The header is safetensors' own. ``DCP_SHARDING_INFO`` in its metadata
lets ``torch.distributed.checkpoint.HuggingFaceStorageReader`` put the slices of all files together.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardopt.checkpoint.format.manifest import itemsize
from shardopt.checkpoint.format.messages import must
from shardopt.errors import CheckpointError
from shardopt.layout.span import Span

Bytes = NDArray[np.uint8]

HEADER_ALIGNMENT = 4096  # of data in the file: direct reads and writes, and mmap, need it
PIECE_NBYTES = 8 << 20

_METADATA = "__metadata__"  # safetensors keeps this name for itself

SAFETENSORS_DTYPES = {
    **{"bool": "BOOL", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    **{"complex64": "F32", "complex128": "F64"},
}
"""The names that dtypes have in safetensors; a complex number is two real ones."""


class Item(NamedTuple):
    """A flat array in a file.

    Attributes:
        name: Its name in the file, unique there.
        dtype: NumPy's name for the type of its elements.
        span: The elements of the tensor ``name`` that it holds; other files may hold others.
    """

    name: str
    dtype: str
    span: Span


class FileLayout:
    """The places of arrays in a file, whatever their values are.

    Args:
        items: The arrays. Those of wide dtypes come first in the file, so that all are aligned.

    Attributes:
        header: The bytes before the data.
        nbytes: Size of the file.
        offsets: The byte at which each of the items begins.
        order: Indices of the items in the order in which they lie in the file.

    Raises:
        CheckpointError: Two items have the same name, or one a name that safetensors reserves.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.order = sorted(range(len(items)), key=lambda i: -itemsize(items[i].dtype))
        entries, firsts, position = {}, {}, 0
        offsets = [0] * len(items)
        for index in self.order:
            name, dtype, span = items[index]
            stop = position + span.numel * itemsize(dtype)
            entries[name] = {
                "dtype": SAFETENSORS_DTYPES[dtype],
                "shape": [span.numel * (2 if dtype.startswith("complex") else 1)],
                "data_offsets": [position, stop],
            }
            firsts[name] = {"saved_offsets": [span.start]}
            offsets[index] = position
            position = stop
        _require_names([item.name for item in items])
        self.header = _header(entries, firsts)
        self.nbytes = self.header.size + position
        self.offsets = [offset + self.header.size for offset in offsets]


class FileImage:
    """The content of a file, which is put together piece by piece.

    Args:
        layout: The layout of the file.
        arrays: The values of each item, flat.

    Attributes:
        nbytes: Size of the file.
    """

    def __init__(self, layout: FileLayout, arrays: Sequence[NDArray[Any]]) -> None:
        self.nbytes = layout.nbytes
        self._sources = [layout.header, *(arrays[i].view(np.uint8) for i in layout.order)]
        self._starts = [0, *(layout.offsets[i] for i in layout.order), layout.nbytes]

    def piece(
        self, span: Span, buffer: Bytes, copy: Callable[[Bytes, Bytes], None] = np.copyto
    ) -> Bytes:
        """Copy some bytes of the file into ``buffer``, and return them.

        Several threads may call it at once, each with a buffer of its own.
        """
        start, position = span.start, span.start
        index = bisect_right(self._starts, start, hi=len(self._sources)) - 1
        while position < span.stop:  # with integers, not spans: there may be many small arrays
            first, last = self._starts[index], self._starts[index + 1]
            stop = min(span.stop, last)
            part = self._sources[index][position - first : stop - first]
            copy(buffer[position - start : stop - start], part)
            position = stop
            index += 1
        return buffer[: span.numel]


def run_all(
    function: Any,
    arguments: Sequence[Any],
    num_threads: int,
    prepare: Callable[[], object] | None = None,
) -> list[Any]:
    """Call ``function`` with each argument, on several threads; return the results in order.

    Args:
        function: The function.
        arguments: One for each call.
        num_threads: Number of threads. A single one is the calling thread.
        prepare: Called by each other thread before all else.
    """
    if num_threads == 1 or len(arguments) == 1:
        return [function(argument) for argument in arguments]
    with ThreadPoolExecutor(
        num_threads, thread_name_prefix="shardopt-file", initializer=prepare
    ) as pool:
        return list(pool.map(function, arguments))


def aligned_empty(nbytes: int) -> Bytes:
    """Allocate memory that begins on a page, as direct reads and writes need it."""
    memory = np.empty(nbytes + HEADER_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % HEADER_ALIGNMENT
    return memory[start : start + nbytes]


def _require_names(names: Sequence[str]) -> None:
    seen = {_METADATA}
    for name in names:
        if name in seen:
            rule, remedy = "be unique in a file", "Rename the parameter that has the same name"
            raise CheckpointError(must("names of tensors", rule, f"{name!r} again", remedy))
        seen.add(name)


def _header(entries: dict[str, Any], firsts: dict[str, Any]) -> Bytes:
    """Return the header of a safetensors file: its length, JSON, and spaces up to a page."""
    sharding = json.dumps(firsts, separators=(",", ":"))
    metadata = {"format": "pt", "DCP_SHARDING_INFO": sharding}
    text = json.dumps({_METADATA: metadata, **entries}, separators=(",", ":")).encode()
    nbytes = -(-(8 + len(text)) // HEADER_ALIGNMENT) * HEADER_ALIGNMENT
    content = (nbytes - 8).to_bytes(8, "little") + text.ljust(nbytes - 8)
    return np.frombuffer(content, np.uint8)
