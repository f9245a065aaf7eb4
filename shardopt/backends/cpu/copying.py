"""Copying past the cache: what is not read again soon should not push out what is.

The C library does so from tens of megabytes on. Below, each line of the target is first read from
memory to be overwritten, so that a copy takes 1.7 times as long, and three times as long if the
line is in the cache of another core, such as one that reads what this core writes over and over.
"""

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from shardopt.comm.node_memory.fence import fence
from shardopt.compiling import compiled

_LINE_NBYTES = 64
_VECTOR_NBYTES = 32


@intrinsic
def _copy_line(typing_context: Any, target: Any, source: Any, start: Any) -> Any:
    """Copy a cache line from ``source[start]`` to ``target[start]``, which begins a line."""
    signature = types.void(target, source, start)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bytes_of = [
            context.make_array(kind)(context, builder, value).data
            for kind, value in zip(signature.args[:2], arguments[:2], strict=True)
        ]
        vector = ir.VectorType(ir.IntType(64), _VECTOR_NBYTES // 8)
        temporal = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        for shift in range(0, _LINE_NBYTES, _VECTOR_NBYTES):
            index = builder.add(arguments[2], ir.Constant(arguments[2].type, shift))
            to, origin = (
                builder.bitcast(builder.gep(array, [index]), vector.as_pointer())
                for array in bytes_of
            )
            store = builder.store(builder.load(origin, align=1), to, align=_VECTOR_NBYTES)
            store.set_metadata("nontemporal", temporal)
        return context.get_dummy_value()

    return signature, generate


_TARGET = types.Array(types.uint8, 1, "C")
_SOURCE = types.Array(types.uint8, 1, "C", readonly=True)


@compiled(types.void(_TARGET, _SOURCE))
def _copy(target: NDArray[np.uint8], source: NDArray[np.uint8]) -> None:
    first = min(target.size, -target.ctypes.data % 64)
    last = first + (target.size - first) // 64 * 64
    for i in range(first):
        target[i] = source[i]
    for i in range(first, last, 64):
        _copy_line(target, source, i)  # type: ignore[call-arg]  # Numba adds the context
    for i in range(last, target.size):
        target[i] = source[i]
    fence()  # type: ignore[call-arg]  # likewise; such stores are not ordered with others


def copy_past_cache(target: NDArray[np.uint8], source: NDArray[np.uint8]) -> None:
    """Copy ``source`` [n], contiguous, to ``target`` [n], contiguous; they do not overlap."""
    assert target.size == source.size
    _copy(target, source)
