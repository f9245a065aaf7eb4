"""How far tensors of two checkpoints are apart."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardopt.checkpoint.format.manifest import Manifest, itemsize
from shardopt.checkpoint.format.reader import Reader, Wanted
from shardopt.cli.ckpt.contents import StoredArray
from shardopt.cli.ckpt.pieces import BATCH_NBYTES, Tensor, batches, read_batch
from shardopt.cli.progress import progress

_BLOCK = 1 << 18  # elements that are compared at once, in float64


@dataclass(slots=True)
class Distance:
    """How far two tensors are apart. NaN is equal to NaN, and 0 to -0.

    Attributes:
        different: Elements that differ.
        nan_in_one: Those of them that are NaN in one of the two only.
        max_abs: The largest absolute difference of all others.
        max_rel: The largest difference relative to the larger of the two numbers.
    """

    different: int = 0
    nan_in_one: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0

    def add(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        """Take further elements into account."""
        if a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8)):
            return
        for start in range(0, a.size, _BLOCK):
            self._add_block(
                a[start : start + _BLOCK].astype(np.float64),
                b[start : start + _BLOCK].astype(np.float64),
            )

    def _add_block(self, a: NDArray[np.float64], b: NDArray[np.float64]) -> None:
        nan_a, nan_b = np.isnan(a), np.isnan(b)
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


def compare(a: Reader, b: Reader, pairs: Mapping[Tensor, Tensor]) -> dict[Tensor, Distance]:
    """Compare tensors of equal shapes.

    Those that lie alike in files of equal digests are equal: they need not be read.

    Args:
        a: One checkpoint.
        b: Another.
        pairs: Tensors of ``a``, and those of ``b`` that they are compared with.

    Raises:
        DamagedCheckpointError: Something that was read is not what was written.
    """
    distances = {tensor: Distance() for tensor in pairs}
    unequal = list(_not_known_equal(a.manifest, b.manifest, pairs))
    total = sum(_nbytes(a.manifest, tensor) for tensor in unequal)
    with progress("comparing", total) as advance:
        for batch in batches(a.manifest, unequal):
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
        parts, others = a.slices[ours.param][ours.key], b.slices[theirs.param][theirs.key]
        alike = list(parts) == list(others) and _dtype(a, ours) == _dtype(b, theirs)
        if not (alike and all(part.file in same for part in parts)):
            yield ours


def array_bytes_equal(a: Reader, ours: StoredArray, b: Reader, theirs: StoredArray) -> bool:
    """Whether arrays of ``extra``, of equal dtypes and shapes, are equal bit by bit."""
    pieces = zip(_bytes_of(a, ours), _bytes_of(b, theirs), strict=True)
    return all(np.array_equal(x, y) for x, y in pieces)


def _bytes_of(reader: Reader, array: StoredArray) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, array.entry.nbytes, BATCH_NBYTES):
        target = np.empty(min(BATCH_NBYTES, array.entry.nbytes - start), np.uint8)
        reader.read([Wanted(array.file, array.entry.offset + start, target.size, target)])
        yield target


def _dtype(manifest: Manifest, tensor: Tensor) -> str:
    return manifest.params[tensor.param].dtype_of(tensor.key)


def _nbytes(manifest: Manifest, tensor: Tensor) -> int:
    return manifest.params[tensor.param].numel * itemsize(_dtype(manifest, tensor))
