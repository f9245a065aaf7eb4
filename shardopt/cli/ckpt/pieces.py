"""Tensors of a checkpoint piece by piece, verified, in memory that does not grow with them.

Pieces come in the order of the files, so that each file is read once from its beginning to its end,
however many ranks have saved it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardopt.checkpoint.format.manifest import Manifest, itemsize
from shardopt.checkpoint.format.reader import Reader, Wanted, wanted_slices
from shardopt.measure.cores import count_cores

BATCH_NBYTES = 8 << 20
_BATCH_PIECES = 4096


class Tensor(NamedTuple):
    """A parameter, by its index in the manifest, or an array of its state."""

    param: int
    key: str


class Piece(NamedTuple):
    """The elements [start, stop) of a flattened tensor."""

    tensor: Tensor
    start: int
    stop: int


def batches(manifest: Manifest, tensors: Iterable[Tensor]) -> Iterator[list[Piece]]:
    """Divide tensors into pieces, and pieces into batches of at most ``BATCH_NBYTES``."""
    slices = sorted(
        (part.file, part.offset, part.start, part.stop, tensor)
        for tensor in tensors
        for part in manifest.slices[tensor.param][tensor.key]
    )
    batch: list[Piece] = []
    room = BATCH_NBYTES
    for _, _, start, end, tensor in slices:
        size = itemsize(manifest.params[tensor.param].dtype_of(tensor.key))
        while start < end:
            if batch and (room < size or len(batch) == _BATCH_PIECES):
                yield batch
                batch, room = [], BATCH_NBYTES
            stop = min(end, start + room // size)
            batch.append(Piece(tensor, start, stop))
            room -= (stop - start) * size
            start = stop
    if batch:
        yield batch


def read_batch(
    reader: Reader,
    batch: Sequence[Piece],
    advance: Callable[[int], None],
    tensor_of: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[NDArray[Any]]:
    """Read pieces.

    Args:
        reader: Of the checkpoint.
        batch: The pieces.
        advance: Called with the number of bytes that they have.
        tensor_of: Where the tensor is in this checkpoint, if the batch was made for another.

    Raises:
        DamagedCheckpointError: What they lie in is not what was written.
    """
    arrays, wanted = [], list[Wanted]()
    for piece in batch:
        tensor = tensor_of(piece.tensor)
        dtype = reader.manifest.params[tensor.param].dtype_of(tensor.key)
        array = np.empty(piece.stop - piece.start, dtype)
        slices = reader.manifest.slices[tensor.param][tensor.key]
        wanted.extend(wanted_slices(slices, piece.start, piece.stop, array))
        arrays.append(array)
    reader.read(wanted, count_cores())
    advance(sum(array.nbytes for array in arrays))
    return arrays
