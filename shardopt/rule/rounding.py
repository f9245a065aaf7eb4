"""Random numbers for rounding by chance, the same for every layout.

[Note: random numbers of updates]
The random number of an element in a step is a hash of the seed of the policy, the name of its
parameter, the number of the step that this parameter takes, and the place of the element in the
flattened parameter. None of it depends on ranks, nodes, buckets, threads or the order of work, or
on parameters that come and go; a step that is skipped is not counted and uses no numbers up. So
results are the same for every layout, and those of a run that goes on from a checkpoint are the
same as without the interruption, unless a parameter has another name or seed by then.

The first three make a *salt* of 64 bits, on the host. Of it and the upper 32 bits of the place
follow 32 bits, which with the lower ones go through a hash whose operations a vector unit has.

One hash serves two elements of a block of 256, one in each half of it: the number of the second is
that of the first with its upper and lower 16 bits swapped. Rounding takes the upper 16 bits of a
number for a bfloat16 and the lower 20 for a moment, so where two results share bits, those that
matter most for one matter least for the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from shardopt.layout.state_spec import BLOCK_NUMEL

Salts = NDArray[np.uint64]


class Chance(NamedTuple):
    """The random numbers of segments of parameters, for rounding by chance.

    Attributes:
        salts: [num_segments] of the parameter of each.
        places: [num_segments] where each begins in its flattened parameter: where a block does.
    """

    salts: Salts
    places: NDArray[np.int64]


GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: multiples of it are far apart


def key_of(name: str, seed: int) -> int:
    """Return the part of a salt that stays the same from step to step.

    Args:
        name: Of the parameter.
        seed: As in ``ShardPolicy``.
    """
    return xxhash.xxh3_64_intdigest(name.encode(), seed=seed)


def make_salts(keys: Sequence[int], steps: Sequence[int]) -> Salts:
    """Return the salts of some parameters for their next steps.

    Args:
        keys: See ``key_of``.
        steps: The number of the step of each, from 1.
    """
    return mixed(np.array(keys, np.uint64) + np.array(steps, np.uint64) * np.uint64(GOLDEN))


def random_numbers(salt: int, start: int, numel: int) -> NDArray[np.uint32]:
    """Return the random numbers of elements of a parameter, [numel]; each has 32 bits.

    Args:
        salt: The salt of the parameter.
        start: The place of the first element in the flattened parameter.
        numel: Their number.
    """
    places = np.arange(start, start + numel, dtype=np.uint64)
    upper = places >> np.uint64(32)
    salts = mixed(np.uint64(salt) + upper * np.uint64(GOLDEN)).astype(np.uint32)
    half = np.uint32(BLOCK_NUMEL // 2)
    lower = places.astype(np.uint32)
    numbers = _hashed(lower & ~half ^ salts)
    swapped = numbers << np.uint32(16) | numbers >> np.uint32(16)
    return np.where(lower & half, swapped, numbers)


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return values of 64 bits, each of whose bits depends on all.

    It is the end of splitmix64: D. Stafford, "Better bit mixing", variant 13, 2011.
    """
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def _hashed(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return lowbias32 of values: C. Wellons, "Prospecting for hash functions", 2018."""
    values = (values ^ values >> np.uint32(16)) * np.uint32(0x7FEB352D)
    values = (values ^ values >> np.uint32(15)) * np.uint32(0x846CA68B)
    return values ^ values >> np.uint32(16)
