"""The dtypes that parameters may have, and the dtypes their updates are computed in.

[Note: 16-bit parameters and masters]
A 16-bit parameter keeps too few bits to accumulate small updates: 1 + 0.001 is 1 again in bfloat16.
Its owner therefore holds a *master* copy of it in float32, as it does moments. Gradients arrive in
16 bits and are summed in float32; the master is updated and rounded to the nearest, ties to even,
into the parameter, all in one pass. If somebody wrote to the parameter since, it no longer equals
the rounded master: then the master follows it. So initial values, loaded weights and
``p.data.clamp_()`` need no calls of their own.
"""

import ml_dtypes  # registers bfloat16 with NumPy
import numpy as np

from shardopt.policy import ShardPolicy

DTYPES = ("float16", "bfloat16", "float32", "float64")
COMPUTE_DTYPE = "compute_dtype"
"""The wire dtype that stands for the ``compute_dtype`` of the parameters, whatever that is."""

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def compute_dtype(dtype: str) -> str:
    """Return the dtype in which parameters of ``dtype`` are updated: of moments and masters."""
    return "float32" if has_master(dtype) else dtype


def has_master(dtype: str) -> bool:
    """Whether parameters of ``dtype`` have a master; see [Note: 16-bit parameters and masters]."""
    return np.dtype(dtype).itemsize == 2


def is_floating(dtype: np.dtype) -> bool:
    """Whether ``dtype`` is real floating point, bfloat16 included."""
    return dtype.kind == "f" or dtype == _BFLOAT16


def wire_of(policy: ShardPolicy) -> str | None:
    """Return the wire dtype of a node's sums, for ``wire_dtype_of``.

    If a node sums several backwards, the sum has more digits than 16-bit gradients can hold, even
    on a node of one rank, so that it is sent in the dtype in which it was computed.

    Args:
        policy: As it was given.
    """
    sums_by_node = policy.accumulate == "node"
    return policy.wire_dtype or (COMPUTE_DTYPE if sums_by_node else None)


def wire_dtype_of(dtype: str, node_size: int, wire_dtype: str | None) -> str:
    """Return the dtype in which gradients, summed over a node, are sent to other nodes.

    Args:
        dtype: Of the parameters.
        node_size: Ranks on a node: a single rank's gradients are the sum.
        wire_dtype: As ``wire_of`` returns it; None and ``COMPUTE_DTYPE`` lose no bit.
    """
    if wire_dtype == COMPUTE_DTYPE:
        return compute_dtype(dtype)
    if wire_dtype is not None:
        return wire_dtype
    return dtype if node_size == 1 else compute_dtype(dtype)
