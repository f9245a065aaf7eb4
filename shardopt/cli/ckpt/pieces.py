"""Tensors of a checkpoint read piece by piece, verified, in bounded memory.

The pieces come in the order of the files, so that each file is read once from beginning to end, no
matter how many ranks saved it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardopt.checkpoint.format.manifest import Manifest, itemsize
from shardopt.checkpoint.format.reader import Reader
from shardopt.checkpoint.format.requests import Wanted, wanted_slices
from shardopt.layout.span import Span
from shardopt.measure.cores import count_cores

BATCH_NBYTES = 8 << 20
_BATCH_PIECES = 4096


class Tensor(NamedTuple):
    """A parameter, by its index in the manifest, or one of its state arrays."""

    param: int
    key: str


class Piece(NamedTuple):
    """A span of a flattened tensor."""

    tensor: Tensor
    span: Span


def batches(manifest: Manifest, tensors: Iterable[Tensor]) -> Iterator[list[Piece]]:
    """Cut tensors into pieces, and yield them in batches of at most ``BATCH_NBYTES``."""
    slices = sorted(
        (part.file, part.offset, Span(part.start, part.stop), tensor)
        for tensor in tensors
        for part in manifest.slices[tensor.param][tensor.key]
    )
    batch: list[Piece] = []
    room = BATCH_NBYTES
    for _, _, span, tensor in slices:
        size = itemsize(manifest.params[tensor.param].dtype_of(tensor.key))
        while span:
            if batch and (room < size or len(batch) == _BATCH_PIECES):
                yield batch
                batch, room = [], BATCH_NBYTES
            head = span.intersect(Span(span.start, span.start + room // size))
            batch.append(Piece(tensor, head))
            room -= head.numel * size
            span = Span(head.stop, span.stop)
    if batch:
        yield batch


def read_batch(
    reader: Reader,
    batch: Sequence[Piece],
    advance: Callable[[int], None],
    tensor_of: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[NDArray[Any]]:
    """Read the pieces of a batch.

    Args:
        reader: The checkpoint.
        batch: The pieces.
        advance: Called with the number of bytes read.
        tensor_of: Maps the tensors of the batch to those of this checkpoint, if the batch was made
            for another one.

    Raises:
        DamagedCheckpointError: A chunk does not have its digest.
    """
    arrays, wanted = [], list[Wanted]()
    for piece in batch:
        tensor, span = tensor_of(piece.tensor), piece.span
        dtype = reader.manifest.params[tensor.param].dtype_of(tensor.key)
        array = np.empty(span.numel, dtype)
        slices = reader.manifest.slices[tensor.param][tensor.key]
        wanted.extend(wanted_slices(slices, span, array))
        arrays.append(array)
    reader.read(wanted, count_cores())
    advance(sum(array.nbytes for array in arrays))
    return arrays
