"""Which ranges of two arrays differ, at the speed at which memory can be read."""

import numpy as np
from numba import types
from numpy.typing import NDArray

from shardopt._typing import IntArray
from shardopt.compiling import compiled

_WORD_NBYTES = 8
_BLOCK_NUMEL = 512  # words between two looks at whether a difference has been found

_BYTES = types.Array(types.uint8, 1, "C", readonly=True)
_WORDS = types.Array(types.uint64, 1, "C", readonly=True)
_SPANS = types.Array(types.int64, 2, "C", readonly=True)


@compiled(types.boolean(_BYTES, _BYTES))
def _bytes_differ(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> bool:
    difference = np.uint8(0)
    for i in range(a.size):  # a few
        difference |= a[i] ^ b[i]
    return bool(difference != 0)


@compiled(types.boolean(_WORDS, _WORDS))
def _words_differ(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> bool:
    for first in range(0, a.size, _BLOCK_NUMEL):
        x, y = a[first : first + _BLOCK_NUMEL], b[first : first + _BLOCK_NUMEL]
        difference = np.uint64(0)
        for i in range(x.size):  # without a branch, which vectorises
            difference |= x[i] ^ y[i]
        if difference != 0:
            return True
    return False


@compiled(types.void(types.Array(types.boolean, 1, "C"), _BYTES, _BYTES, _WORDS, _WORDS, _SPANS))
def _compare(
    result: NDArray[np.bool_],
    a: NDArray[np.uint8],
    b: NDArray[np.uint8],
    a_words: NDArray[np.uint64],
    b_words: NDArray[np.uint64],
    spans: IntArray,
) -> None:
    for i in range(spans.shape[0]):
        start, stop = spans[i, 0], spans[i, 1]
        head = min(stop, (start + _WORD_NBYTES - 1) // _WORD_NBYTES * _WORD_NBYTES)
        tail = max(head, stop // _WORD_NBYTES * _WORD_NBYTES)
        first, last = head // _WORD_NBYTES, tail // _WORD_NBYTES
        result[i] = (
            _bytes_differ(a[start:head], b[start:head])
            or (head < tail and _words_differ(a_words[first:last], b_words[first:last]))
            or _bytes_differ(a[tail:stop], b[tail:stop])
        )


def changed(
    view: NDArray[np.uint8], shared: NDArray[np.uint8], spans: IntArray
) -> NDArray[np.bool_]:
    """Return for each span whether any of its bytes differ.

    Args:
        view: [n] contiguous, at an address that is a multiple of 8.
        shared: [n], likewise.
        spans: [m, 2] contiguous; where each span begins and ends, in bytes.
    """
    assert view.size == shared.size
    assert not spans.size or (spans.min() >= 0 and spans.max() <= view.size)
    result = np.empty(len(spans), np.bool_)
    num_bytes = view.size // _WORD_NBYTES * _WORD_NBYTES
    words = view[:num_bytes].view(np.uint64), shared[:num_bytes].view(np.uint64)
    _compare(result, view, shared, *words, spans)
    return result
