"""Writing a file: its bytes, and the priority of the threads that write it."""

import os
from threading import get_native_id

import numpy as np
import pytest
import xxhash

from shardopt.checkpoint.format.disk import write_file
from shardopt.checkpoint.format.image import PIECE_NBYTES
from shardopt.checkpoint.format.manifest import CHUNK_NBYTES

CONTENT = np.random.default_rng(0).integers(0, 256, 2 * PIECE_NBYTES + 5000, np.uint8)


class WatchedImage:
    """An image that notes which threads ask for it, and how nice they are."""

    nbytes = CONTENT.size

    def __init__(self):
        self.niceness = {}

    def piece(self, span, buffer):
        self.niceness[get_native_id()] = os.getpriority(os.PRIO_PROCESS, 0)
        buffer[: span.numel] = CONTENT[span.slice]
        return buffer[: span.numel]


@pytest.mark.parametrize("is_beside", [False, True])
def test_only_threads_that_write_beside_training_stand_back(tmp_path, is_beside):
    own, image = os.getpriority(os.PRIO_PROCESS, 0), WatchedImage()
    digests = write_file(tmp_path / "a", image, is_beside=is_beside)
    assert (tmp_path / "a").read_bytes() == CONTENT.tobytes()
    starts = range(0, CONTENT.size, CHUNK_NBYTES)
    chunks = [CONTENT[start : start + CHUNK_NBYTES] for start in starts]
    assert digests == "".join(xxhash.xxh3_128_hexdigest(chunk.data) for chunk in chunks)
    assert image.niceness.pop(get_native_id()) == own
    assert set(image.niceness.values()) == {19 if is_beside else own}
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
