"""A rank's file as it will be: a header and flat arrays end to end, none of it in one piece yet.

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
from shardopt.errors import CheckpointError

Bytes = NDArray[np.uint8]

HEADER_ALIGNMENT = 4096  # of data in the file: direct reads and writes, and mmap, need it
PIECE_NBYTES = 8 << 20

_METADATA = "__metadata__"  # what the format itself puts among the names

SAFETENSORS_DTYPES = {
    **{"bool": "BOOL", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    **{"complex64": "F32", "complex128": "F64"},
}
"""What safetensors calls our dtypes; a complex number is two real ones."""


class Item(NamedTuple):
    """A flat array in a file.

    Attributes:
        name: In the file, unique there.
        dtype: NumPy's name of it.
        first: Index of its first element in the tensor ``name``, of which other files may have
            other parts.
        numel: Its elements.
    """

    name: str
    dtype: str
    first: int
    numel: int


class FileLayout:
    """Where everything is in a file, whatever its values are.

    Args:
        items: What it holds. Wide dtypes come first in the file, so that all are aligned.

    Attributes:
        header: The bytes before the data.
        nbytes: Size of the file.
        offsets: Where each of the items begins.
        order: Indices of the items as they follow one another.

    Raises:
        CheckpointError: Two items have one name, or one a name that safetensors reserves.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.order = sorted(range(len(items)), key=lambda i: -itemsize(items[i].dtype))
        entries, firsts, position = {}, {}, 0
        offsets = [0] * len(items)
        for index in self.order:
            name, dtype, first, numel = items[index]
            stop = position + numel * itemsize(dtype)
            entries[name] = {
                "dtype": SAFETENSORS_DTYPES[dtype],
                "shape": [numel * (2 if dtype.startswith("complex") else 1)],
                "data_offsets": [position, stop],
            }
            firsts[name] = {"saved_offsets": [first]}
            offsets[index] = position
            position = stop
        _require_names([item.name for item in items])
        self.header = _header(entries, firsts)
        self.nbytes = self.header.size + position
        self.offsets = [offset + self.header.size for offset in offsets]


class FileImage:
    """The content of a file, given in pieces.

    Args:
        layout: Of the file.
        arrays: The values of each item, flat.

    Attributes:
        nbytes: Size of the file.
    """

    def __init__(self, layout: FileLayout, arrays: Sequence[NDArray[Any]]) -> None:
        self.nbytes = layout.nbytes
        self._sources = [layout.header, *(arrays[i].view(np.uint8) for i in layout.order)]
        self._starts = [0, *(layout.offsets[i] for i in layout.order), layout.nbytes]

    def piece(
        self,
        start: int,
        stop: int,
        buffer: Bytes,
        copy: Callable[[Bytes, Bytes], None] = np.copyto,
    ) -> Bytes:
        """Give bytes [start, stop) of the file: here copied into ``buffer``.

        Threads may ask for pieces at once, each with a buffer of its own.
        """
        index = bisect_right(self._starts, start, hi=len(self._sources)) - 1
        position = start
        while position < stop:
            first, last = self._starts[index], self._starts[index + 1]
            end = min(stop, last)
            part = self._sources[index][position - first : end - first]
            copy(buffer[position - start : end - start], part)
            position = end
            index += 1
        return buffer[: stop - start]


class StagedImage:
    """The content of a file in memory of its own, so that what it was copied from may change.

    The memory is kept for the next image: the first touch of a page costs more than a copy.

    Attributes:
        nbytes: Size of the file.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._memory = np.empty(0, np.uint8)

    def reserve(self, nbytes: int) -> None:
        """Have memory for a file of ``nbytes``, its pages touched."""
        if self._memory.size < nbytes:
            del self._memory  # before the larger one is there
            self._memory = aligned_empty(nbytes)
            self._memory[:: HEADER_ALIGNMENT // 2] = 0

    def copy(self, image: FileImage, num_threads: int) -> None:
        """Take over a whole file."""
        from shardopt.backends.cpu.copying import copy_past_cache  # here: readers do without Numba

        padded = -(-image.nbytes // HEADER_ALIGNMENT) * HEADER_ALIGNMENT
        self.reserve(padded)
        self.nbytes = image.nbytes

        def copy_piece(start: int) -> None:
            stop = min(start + PIECE_NBYTES, image.nbytes)
            image.piece(start, stop, self._memory[start:stop], copy_past_cache)

        run_all(copy_piece, range(0, image.nbytes, PIECE_NBYTES), num_threads)

    def piece(self, start: int, stop: int, buffer: Bytes) -> Bytes:
        """Give bytes [start, stop) of the file, and bytes up to a multiple of 4096 behind them."""
        return self._memory[start:stop]


def run_all(function: Any, arguments: Sequence[Any], num_threads: int) -> list[Any]:
    """Call ``function`` with each argument, several at once; gives the results in order."""
    if num_threads == 1 or len(arguments) == 1:
        return [function(argument) for argument in arguments]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(function, arguments))


def aligned_empty(nbytes: int) -> Bytes:
    """Memory that begins on a page, as direct reads and writes want it."""
    memory = np.empty(nbytes + HEADER_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % HEADER_ALIGNMENT
    return memory[start : start + nbytes]


def _require_names(names: Sequence[str]) -> None:
    seen = {_METADATA}
    for name in names:
        if name in seen:
            raise CheckpointError(
                f"names of tensors must be unique in a file; got {name!r} again. Rename the "
                "parameter that is called like something else."
            )
        seen.add(name)


def _header(entries: dict[str, Any], firsts: dict[str, Any]) -> Bytes:
    """Make the header of a safetensors file: its length, JSON, and spaces up to a page."""
    sharding = json.dumps(firsts, separators=(",", ":"))
    metadata = {"format": "pt", "DCP_SHARDING_INFO": sharding}
    text = json.dumps({_METADATA: metadata, **entries}, separators=(",", ":")).encode()
    nbytes = -(-(8 + len(text)) // HEADER_ALIGNMENT) * HEADER_ALIGNMENT
    content = (nbytes - 8).to_bytes(8, "little") + text.ljust(nbytes - 8)
    return np.frombuffer(content, np.uint8)
