"""Comparison of the tensors of two checkpoints."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardopt.checkpoint.format.manifest import Manifest
from shardopt.checkpoint.format.reader import Reader
from shardopt.checkpoint.format.requests import Wanted
from shardopt.cli.ckpt.contents import StoredArray
from shardopt.cli.ckpt.pieces import BATCH_NBYTES, Tensor, batches, read_batch
from shardopt.cli.progress import progress
from shardopt.layout.span import Span

_BLOCK_NUMEL = 1 << 18  # elements that are compared at once, in float64


@dataclass(slots=True)
class Distance:
    """The distance between two tensors. NaN equals NaN, and 0 equals -0.

    Attributes:
        different: Number of elements that differ.
        nan_in_one: Number of elements that are NaN in only one of the two.
        max_abs: Largest absolute difference of all other elements.
        max_rel: Largest difference relative to the larger of the two numbers.
    """

    different: int = 0
    nan_in_one: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0

    def add(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        """Take further elements into account."""
        if a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8)):
            return
        for span in Span(0, a.size).chunks(_BLOCK_NUMEL):
            x, y = a[span.slice], b[span.slice]
            exact = x.dtype.kind in "iu" and y.dtype.kind in "iu"  # float64 has 53 bits
            self._add_block(_wide(x), _wide(y), (x != y) if exact else None)

    def _add_block(
        self, a: NDArray[np.float64], b: NDArray[np.float64], differ: NDArray[np.bool_] | None
    ) -> None:
        nan_a, nan_b = np.isnan(a), np.isnan(b)
        if differ is None:
            differ = (a != b) & ~(nan_a & nan_b)
        self.different += int(np.count_nonzero(differ))
        self.nan_in_one += int(np.count_nonzero(nan_a ^ nan_b))
        differ &= ~(nan_a | nan_b)
        a, b = a[differ], b[differ]
        if not a.size:
            return
        with np.errstate(over="ignore", invalid="ignore"):
            gap = np.abs(a - b)
            relative = gap / np.maximum(np.abs(a), np.abs(b))
        relative[np.isinf(gap)] = np.inf
        self.max_abs = max(self.max_abs, float(gap.max()))
        self.max_rel = max(self.max_rel, float(relative.max()))


def _wide(block: NDArray[Any]) -> NDArray[np.float64]:
    """Return a block in float64; a complex number is two real ones."""
    if block.dtype.kind == "c":
        block = block.view(f"f{block.itemsize // 2}")
    return block.astype(np.float64)


def compare(a: Reader, b: Reader, pairs: Mapping[Tensor, Tensor]) -> dict[Tensor, Distance]:
    """Compare tensors of equal shapes.

    Tensors at the same places of files with equal digests are equal, and are not read.

    Args:
        a: One checkpoint.
        b: Another checkpoint.
        pairs: The tensors of ``a``, each with the tensor of ``b`` to compare it with.

    Raises:
        DamagedCheckpointError: A chunk does not have its digest.
    """
    distances = {tensor: Distance() for tensor in pairs}
    unequal = list(_not_known_equal(a.manifest, b.manifest, pairs))
    total = sum(tensor.nbytes for tensor in unequal)
    with progress("comparing", total) as advance:
        for batch in batches(unequal):
            ours = read_batch(a, batch, advance)
            theirs = read_batch(b, batch, lambda _: None, pairs.__getitem__)
            for piece, x, y in zip(batch, ours, theirs, strict=True):
                distances[piece.tensor].add(x, y)
    return distances


def _not_known_equal(a: Manifest, b: Manifest, pairs: Mapping[Tensor, Tensor]) -> Iterator[Tensor]:
    same = {
        index
        for index, (ours, theirs) in enumerate(zip(a.files, b.files, strict=False))
        if (ours.nbytes, ours.digests) == (theirs.nbytes, theirs.digests)
    }
    for ours, theirs in pairs.items():
        alike = list(ours.slices) == list(theirs.slices) and (
            (ours.dtype, ours.kept) == (theirs.dtype, theirs.kept)
        )
        if not (alike and all(part.file in same for part in ours.slices)):
            yield ours


def array_bytes_equal(a: Reader, ours: StoredArray, b: Reader, theirs: StoredArray) -> bool:
    """Return whether two arrays of ``extra`` of equal dtype and shape are bitwise equal."""
    pieces = zip(_bytes_of(a, ours), _bytes_of(b, theirs), strict=True)
    return all(np.array_equal(x, y) for x, y in pieces)


def _bytes_of(reader: Reader, array: StoredArray) -> Iterator[NDArray[np.uint8]]:
    for span in Span(0, array.entry.nbytes).chunks(BATCH_NBYTES):
        target = np.empty(span.numel, np.uint8)
        place = span.shift(array.entry.offset)
        reader.read([Wanted(place.start, place.stop, array.file, target)])
        yield target
