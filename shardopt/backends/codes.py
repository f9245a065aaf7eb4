"""Moments as codes of 8 bits, in NumPy: how they are made, and what they stand for.

[Note: codes of 8 bits]
Of a float32 without its sign all but the upper 11 bits are rounded away: 8 of exponent, 3 of
mantissa. Read as an integer, which grows with the value, this is its *level*; eight levels make an
octave. The scale of a block is the largest value in it, after rounding, and a code counts levels
from there downwards:

    signed     a sign, and 127 for the largest level down to 1; below it zero (exp_avg)
    unsigned   255 for the largest level down to 1, which also stands for all below (exp_avg_sq)

So what is decoded and encoded again stays as it is, bit for bit, however it is rounded: it has no
bits that could be rounded, and the scale is one of the values. An exp_avg_sq is never zero unless
its whole block is: divided by the root of zero, an update could be of any size. An inf or NaN
becomes the inf of its sign and leaves little of its block.

exp_avg is rounded to the nearest. exp_avg_sq is rounded by chance, as beta2 = 0.999 changes it by a
thousandth in a step, far less than the distance of two levels, and it would never move: to the bits
that are to go a random number of as many bits is added, so that it goes up as often as it is near
the next level, and is right on average. [Note: random numbers of updates] is about those numbers.

exp_avg would be right on average as well if it was rounded by chance, but with 1.3 times the error.
Rounded to the nearest it is, too, if gradients scatter by 0.3 of their mean or more, as from batch
to batch. If they scatter by a tenth it is 10 % small, and 29 % if they are all the same.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import FloatArray
from shardopt.layout.span import Span
from shardopt.layout.state_spec import BLOCK_NBYTES, BLOCK_NUMEL, Codec, StateSpec, blocks_of

Blocks = NDArray[np.uint8]
"""[num_blocks, ``BLOCK_NBYTES``]: a scale of 4 bytes, and codes, in each row."""

SHIFT = 20
"""The lower bits of a float32, which are rounded away."""

NEAREST = 1 << SHIFT - 1
"""Rounds to the nearest if it is added; a random number rounds by chance."""

_BATCH_BLOCKS = 256
_INF_LEVEL = 0x7F800000 >> SHIFT
_TOP_CODE: dict[Codec, int] = {"signed": 127, "unsigned": 255}


def shaped(array: NDArray[Any], spec: StateSpec) -> NDArray[Any]:
    """Return a flat array as those of ``spec`` are: that of blocks has a row for each."""
    return array if spec.codec is None else array.reshape(-1, BLOCK_NBYTES)


def part_of(array: NDArray[Any], span: Span) -> NDArray[Any]:
    """Return some elements of an array of the state, whole blocks if it has those."""
    return array[span.slice] if array.ndim == 1 else array[blocks_of(span).slice]


def values_of(array: NDArray[Any], spec: StateSpec, numel: int) -> FloatArray:
    """Return the elements of an array of the state: the array itself unless it has codes."""
    return array if spec.codec is None else decode(array, spec.codec, numel)


def put_values(array: NDArray[Any], spec: StateSpec, values: FloatArray) -> None:
    """Write elements into an array of the state, rounded to the nearest if it has codes."""
    if spec.codec is None:
        array[:] = values
    else:
        encode(values, array, spec.codec)


def decode(blocks: Blocks, codec: Codec, numel: int) -> NDArray[np.float32]:
    """Return the values that codes stand for; see [Note: codes of 8 bits].

    Args:
        blocks: The codes.
        codec: Their kind.
        numel: Number of values; there may be fewer than codes.
    """
    values = np.empty((len(blocks), BLOCK_NUMEL), np.float32)
    for batch in _batches(len(blocks)):
        values[batch.slice] = _decoded(blocks[batch.slice], codec)
    return values.reshape(-1)[:numel]


def _decoded(blocks: Blocks, codec: Codec) -> NDArray[np.float32]:
    top, codes = _levels(blocks[:, :4].copy().view(np.float32)), blocks[:, 4:].astype(np.int64)
    sign = codes & 0x80 if codec == "signed" else np.int64(0)
    codes = codes - sign
    levels = np.where(codes > 0, codes + top - _TOP_CODE[codec], 0)
    bits = (levels << SHIFT | sign << 24).astype(np.uint32)
    return bits.view(np.float32)


def encode(
    values: FloatArray, blocks: Blocks, codec: Codec, noise: int | NDArray[np.uint32] = NEAREST
) -> None:
    """Write values as codes; see [Note: codes of 8 bits].

    Args:
        values: [numel] the values.
        blocks: Where their codes go; codes behind the last one become zero.
        codec: The kind of codes.
        noise: [numel] or a number below 2**``SHIFT``: what is added to the bits that are rounded
            away.
    """
    for batch in _batches(len(blocks)):
        part = batch.scale(BLOCK_NUMEL).slice
        numbers = noise if isinstance(noise, int) else noise[part]
        _encode(values[part], blocks[batch.slice], codec, numbers)


def _encode(
    values: FloatArray, blocks: Blocks, codec: Codec, noise: int | NDArray[np.uint32]
) -> None:
    padded = np.zeros(len(blocks) * BLOCK_NUMEL, np.float32)
    padded[: values.size] = values
    bits = padded.view(np.uint32).astype(np.int64)
    magnitude = bits & 0x7FFFFFFF
    magnitude[: values.size] += noise
    levels = np.minimum(magnitude >> SHIFT, _INF_LEVEL).reshape(blocks[:, 4:].shape)
    top = levels.max(axis=1, keepdims=True, initial=0)
    below = top - _TOP_CODE[codec]
    if codec == "signed":
        codes = np.where(levels > np.maximum(below, 0), levels - below, 0)
        codes |= (bits >> 24 & 0x80).reshape(codes.shape)
    else:
        codes = np.where(top > 0, np.maximum(levels, np.maximum(below + 1, 1)) - below, 0)
    blocks[:, 4:] = codes
    _clear_behind(blocks, values.size)
    blocks[:, :4] = (top << SHIFT).astype(np.uint32).view(np.uint8).reshape(-1, 4)


def _batches(num_blocks: int) -> Iterator[Span]:
    """Cut blocks into batches, as what is computed on the way takes many times their memory."""
    return Span(0, num_blocks).chunks(_BATCH_BLOCKS)


def _levels(values: NDArray[np.float32]) -> NDArray[np.int64]:
    return values.view(np.uint32).astype(np.int64) >> SHIFT


def _clear_behind(blocks: Blocks, numel: int) -> None:
    """Zero the codes behind the last element, which are all in one block."""
    if numel % BLOCK_NUMEL:
        blocks[-1, 4 + numel % BLOCK_NUMEL :] = 0
