"""A copy of a rank's file in memory, from which it is written while training goes on."""

import numpy as np

from shardopt.backends.cpu.copying import copy_past_cache
from shardopt.checkpoint.format.image import (
    HEADER_ALIGNMENT,
    PIECE_NBYTES,
    Bytes,
    FileImage,
    aligned_empty,
    run_all,
)
from shardopt.layout.span import Span


class StagedImage:
    """The content of a file in memory of its own, so that its sources may change.

    The memory is kept for the next image: the first touch of a page takes longer than a copy.

    Attributes:
        nbytes: Size of the file.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._memory = np.empty(0, np.uint8)

    def reserve(self, nbytes: int) -> None:
        """Allocate memory for a file of ``nbytes``, and touch its pages."""
        if self._memory.size < nbytes:
            del self._memory  # before the larger one is allocated
            self._memory = aligned_empty(nbytes)
            self._memory[:: HEADER_ALIGNMENT // 2] = 0

    def copy(self, image: FileImage, num_threads: int) -> None:
        """Copy a whole file."""
        self.reserve(-(-image.nbytes // HEADER_ALIGNMENT) * HEADER_ALIGNMENT)
        self.nbytes = image.nbytes

        def copy_piece(span: Span) -> None:
            image.piece(span, self._memory[span.slice], copy_past_cache)

        run_all(copy_piece, list(Span(0, image.nbytes).chunks(PIECE_NBYTES)), num_threads)

    def piece(self, span: Span, buffer: Bytes) -> Bytes:
        """Return some bytes of the file, which lie in its own memory rather than in ``buffer``."""
        return self._memory[span.slice]
