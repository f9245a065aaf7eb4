"""Tensors of a checkpoint read piece by piece, verified, in bounded memory.

The pieces come in the order of the files, so that each file is read once from beginning to end, no
matter how many ranks saved it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardopt.backends.codes import shaped, values_of
from shardopt.checkpoint.format.manifest import PARAM_KEY, Manifest, Slice, itemsize
from shardopt.checkpoint.format.names import tensor_name
from shardopt.checkpoint.format.reader import Reader
from shardopt.checkpoint.format.requests import Wanted, wanted_slices
from shardopt.checkpoint.format.values import array_place, stored_array
from shardopt.layout.span import Span
from shardopt.layout.state_spec import BLOCK_NUMEL, StateSpec
from shardopt.measure.cores import count_cores

BATCH_NBYTES = 8 << 20
_BATCH_PIECES = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A parameter, an array of its state, or a tensor of the model that the optimizer did not hold.

    Attributes:
        name: Its name.
        dtype: NumPy's name for the type of its elements.
        shape: Its shape.
        slices: Where its elements lie.
        form: What it was if it was a framework's tensor, such as ``torch.float8_e4m3fn``.
        kept: How its elements are kept; None if they are as they are read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    slices: Sequence[Slice]
    form: str = ""
    kept: StateSpec | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def spec(self) -> StateSpec:
        """How its elements are kept."""
        return self.kept or StateSpec(self.name, self.dtype)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * itemsize(self.dtype)


class Piece(NamedTuple):
    """A span of a flattened tensor."""

    tensor: Tensor
    span: Span


def param_tensor(manifest: Manifest, index: int, key: str = PARAM_KEY) -> Tensor:
    """Return a parameter, or an array of its state."""
    param = manifest.params[index]
    name, spec, slices = tensor_name(param.name, key), param.spec_of(key), manifest.slices[index]
    kept = None if spec.codec is None else spec
    return Tensor(name, spec.value_dtype, param.shape, slices[key], kept=kept)


def model_tensors(manifest: Manifest) -> list[Tensor]:
    """Return the tensors of the model that the optimizer did not hold; of rank 0, if ranks differ.

    Values that are no tensors are left out.
    """
    if manifest.model is None:
        return []
    found = []
    for name, value in manifest.model.values_of(0).items():
        entry, place = stored_array(manifest, value), array_place(value)
        if entry is not None and place is not None:
            slices = [Slice(0, entry.numel, place[0], entry.offset)] if entry.numel else []
            found.append(Tensor(name, entry.dtype, entry.shape, slices, entry.form))
    return found


def batches(tensors: Iterable[Tensor]) -> Iterator[list[Piece]]:
    """Cut tensors into pieces, and yield them in batches of at most ``BATCH_NBYTES``."""
    slices = sorted(
        (
            (part.file, part.offset, Span(part.start, part.stop), tensor)
            for tensor in tensors
            for part in tensor.slices
        ),
        key=lambda each: each[:2],
    )
    batch: list[Piece] = []
    room = BATCH_NBYTES
    for _, _, span, tensor in slices:
        size = itemsize(tensor.dtype)
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
    kept, wanted = [], list[Wanted]()
    for piece in batch:
        tensor = tensor_of(piece.tensor)
        spec = tensor.spec
        before = 0 if tensor.kept is None else piece.span.start % BLOCK_NUMEL  # in the first block
        span = Span(piece.span.start - before, piece.span.stop)
        array = np.empty(spec.nbytes(span.numel), np.uint8).view(spec.dtype)
        wanted.extend(wanted_slices(tensor.slices, span, spec, array))
        kept.append((shaped(array, spec), spec, span.numel, before))
    reader.read(wanted, count_cores())
    arrays = [values_of(array, spec, numel)[before:] for array, spec, numel, before in kept]
    advance(sum(array.nbytes for array in arrays))
    return arrays
