"""JAX's arrays as NumPy arrays and back.

[Note: arrays that never change]
``jax.device_put`` and DLPack make a jax array share the memory of a NumPy buffer that starts on a
multiple of 64 bytes, even with ``may_alias=False``, and parameters in shared memory start on such
multiples. Arrays handed out are therefore made from copies that nobody else holds. These copies
start on such a multiple, too, so that JAX adopts them without copying again.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

_ALIGNMENT_NBYTES = 64  # XLA's; see [Note: arrays that never change]
_KEY = "jax.key:"


def aligned_copy(array: np.ndarray[Any, Any]) -> Any:
    """Return a copy in memory of its own; see [Note: arrays that never change]."""
    raw = np.empty(array.nbytes + _ALIGNMENT_NBYTES, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT_NBYTES
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def name_of(path: Any) -> str:
    """Return the name of a leaf of a tree."""
    return jax.tree_util.keystr(path) or "params"  # a single array is a tree, too


def to_stored(array: Any) -> tuple[Any, str]:
    """Return an array's elements, without a copy where they can be read, and its form.

    Raises:
        TypeError: It is a tracer, deleted or on other hosts.
        RuntimeError: Likewise.
    """
    if isinstance(array, jax.core.Tracer):
        raise TypeError("a tracer")
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(array)), f"{_KEY}{jax.random.key_impl(array)}"
    form = f"jax.{array.dtype.name}"
    values = np.asarray(array)
    return values.view(np.uint8) if form.startswith("jax.float8") else values, form


def from_stored(array: Any, form: str) -> Any:
    """Return a jax array with the elements of an array.

    Raises:
        ValueError: The array is not of that form.
        NotImplementedError: JAX has no such elements as it is set up.
    """
    if form.startswith(_KEY):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=form.removeprefix(_KEY))
    dtype = jnp.dtype(form.removeprefix("jax."))
    if form.startswith("jax.float8") and array.dtype == np.uint8:
        array = array.view(dtype)
    if array.dtype != dtype:
        raise ValueError(f"{array.dtype} in the form {form!r}")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise NotImplementedError(f"arrays of {dtype}, as jax_enable_x64 is not set")
    return jnp.asarray(array)
