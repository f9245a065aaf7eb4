"""The arrays that make up a parameter's optimizer state: one table that everything else reads.

[Note: states of 8 bits]
With ``optim_bits=8`` an array of the state is made of *blocks*: a scale, a float32, and a code of
one byte for each of ``BLOCK_NUMEL`` elements. Parameters begin on multiples of that in the flat
index space, so a block has elements of one parameter, with one step count, and one owner. What is
behind the last element of a parameter is zero. See ``backends.codes`` for what a code means.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from shardopt.layout.dtypes import compute_dtype, has_master
from shardopt.layout.span import Span

PARAM_KEY = "param"
"""The key of a parameter itself, beside those of the arrays of its state."""

BLOCK_NUMEL = 256
"""Elements that share a scale; see [Note: states of 8 bits]."""

BLOCK_NBYTES = 4 + BLOCK_NUMEL

MIN_CODED_NUMEL = 4096
"""Smaller parameters keep moments in float32: they take little memory, and need not be alike."""

Codec = Literal["signed", "unsigned"]


@dataclass(frozen=True, slots=True)
class StateForm:
    """How the state of a parameter is kept.

    Attributes:
        optim_bits: Bits of an element of the moments: 32 for those of their ``compute_dtype``, or
            8; see [Note: states of 8 bits].
        has_masters: Whether a 16-bit parameter has a master; see
            [Note: 16-bit parameters and masters]. True for all others, which need none.
    """

    optim_bits: int = 32
    has_masters: bool = True

    @property
    def rounds_by_chance(self) -> bool:
        """Whether an update rounds some of its results up or down by chance."""
        return self != FULL


FULL = StateForm()


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One array of the state of a parameter.

    Attributes:
        key: Its name in state dicts, in checkpoints and for kernels.
        dtype: Of its elements, one for each element of the parameter; ``uint8`` for blocks, whose
            array is [num_blocks, ``BLOCK_NBYTES``].
        is_optional: Whether a state dict may lack it: it then starts as zeros.
        codec: The kind of codes in blocks; None if there are none.
    """

    key: str
    dtype: str
    is_optional: bool = False
    codec: Codec | None = None

    @property
    def value_dtype(self) -> str:
        """Dtype of the elements that users see."""
        return self.dtype if self.codec is None else "float32"

    def nbytes(self, numel: int) -> int:
        """Return the bytes it takes for a parameter, or a shard, of ``numel`` elements."""
        if self.codec is not None:
            return blocks_of(Span(0, numel)).numel * BLOCK_NBYTES
        return numel * np.dtype(self.dtype).itemsize

    def bytes_of(self, span: Span) -> Span:
        """Return where some elements are in the array, in bytes."""
        assert self.codec is None or span.start % BLOCK_NUMEL == 0
        start = self.nbytes(span.start)
        return Span(start, start + self.nbytes(span.numel))


def blocks_of(span: Span) -> Span:
    """Return the blocks of some elements: whole ones, but for the end of a parameter."""
    assert span.start % BLOCK_NUMEL == 0
    return Span(span.start // BLOCK_NUMEL, -(-span.stop // BLOCK_NUMEL))


@lru_cache
def state_specs(dtype: str, form: StateForm = FULL) -> tuple[StateSpec, ...]:
    """Return the state of parameters of ``dtype``.

    A master of zero follows the parameter (see [Note: 16-bit parameters and masters]), so that
    the state dicts of other optimizers, which have none, can be loaded.
    """
    full = compute_dtype(dtype)
    moments = StateSpec("exp_avg", full), StateSpec("exp_avg_sq", full)
    if form.optim_bits == 8:
        moments = (
            StateSpec("exp_avg", "uint8", codec="signed"),
            StateSpec("exp_avg_sq", "uint8", codec="unsigned"),
        )
    if has_master(dtype) and form.has_masters:
        return (*moments, StateSpec("master", full, is_optional=True))
    return moments
