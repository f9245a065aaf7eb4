"""Elements of arrays in compiled code: dtypes that Numba lacks, and arrays by address.

[Note: integers that stand in for floats]
Numba has no 16-bit floats on CPUs. Arrays of integers stand in for them, uint16 for bfloat16 and
int16 for float16, and functions that are chosen by type while compiling let one set of loops serve
all dtypes. They return to 32 bits after every few operations: Numba computes with integers in
64 bits, which not every LLVM narrows again, and half of a vector's lanes would be lost.

[Note: rows by address]
A set of rows is a tuple of an array of addresses and an empty array of the rows' dtype. Code is
therefore compiled by dtype, whatever the number of rows and wherever they lie. ``row`` returns
elements of one of them as an array.

[Note: what is compiled, and how often]
Numba compiles a function for each combination of the types that it is called with, takes a fifth of
a second for the smallest of them, and optimises it anew in each function that calls it. The first
step of a program waits for that. So a choice that need not be one of types is made by a value: an
array that is not wanted is empty, not None, and a sum that is not to be scaled has the factor 1.
Functions that only compiled code calls have no entry for Python (see ``inner``), and what would be
a function of a line or two is an intrinsic. Numba keeps the code of each function on disk and
watches its file; other modules that it calls into are named as ``calls``.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload
from numba.np.arrayobj import populate_array

from shardopt.compiling import compiled

STAND_INS = {
    np.dtype(ml_dtypes.bfloat16): np.dtype(np.uint16),
    np.dtype(np.float16): np.dtype(np.int16),
}
"""Integers for 16-bit floats; see [Note: integers that stand in for floats]."""

typed_intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = intrinsic
_array_type: Callable[..., Any] = types.Array
_populate: Callable[..., Any] = populate_array


def chosen_by_type(choose: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function for compiled code; its body is what ``choose`` returns for the types."""

    def stub(*arguments: Any) -> Any:
        raise NotImplementedError

    overload(stub, strict=False)(choose)
    return stub


def widen_bfloat16(element: Any) -> Any:
    """Return the float32 of the bits of a bfloat16."""
    return np.uint32(element << 16).view(np.float32)


def narrow_bfloat16(value: Any, like: Any) -> Any:
    """Return the bits of the bfloat16 that is nearest to a float32."""
    bits = np.float32(value).view(np.uint32)
    rounded = np.uint32(bits + 0x7FFF + (bits >> 16 & 1))  # to the nearest; of a tie, to the even
    quiet = np.uint32(bits | 0x400000)  # a NaN, which rounding could carry over into a number
    return np.uint16(np.uint32(rounded if value == value else quiet) >> 16)


@typed_intrinsic
def _extend_half(_: Any, element: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@typed_intrinsic
def _truncate_to_half(_: Any, value: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


def widen_float16(element: Any) -> Any:
    """Return the float32 of the bits of a float16, by an instruction."""
    return _extend_half(element)


def narrow_float16(value: Any, like: Any) -> Any:
    """Return the bits of the float16 that is nearest to a float32, by an instruction."""
    return _truncate_to_half(value)


def widen_float16_by_bits(element: Any) -> Any:
    """Return what ``widen_float16`` does, without it."""
    magnitude = np.uint32(element & 0x7FFF)
    moved = np.uint32(magnitude << 13)
    tiny = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24)).view(np.uint32)
    large = np.uint32(moved | 0x7F800000 if magnitude >= 0x7C00 else moved + (112 << 23))
    wide = np.uint32(tiny if magnitude < 0x0400 else large)
    return np.uint32(wide | (element & 0x8000) << 16).view(np.float32)


def narrow_float16_by_bits(value: Any, like: Any) -> Any:
    """Return what ``narrow_float16`` does, without it."""
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(min(np.uint32(bits & 0x7FFFFFFF), np.uint32(0x47800000)))  # 2**16: inf
    normal = np.uint32(magnitude - (112 << 23) + 0xFFF + (magnitude >> 13 & 1))
    # The last place of 0.5 in float32 is that of float16's subnormals: to add it rounds to them.
    shifted = np.float32(magnitude.view(np.float32) + np.float32(0.5))
    tiny = np.uint32(shifted.view(np.uint32) - np.uint32(0x3F000000))
    rounded = np.uint32(tiny if magnitude < 113 << 23 else normal >> 13)
    number = np.uint32(rounded if value == value else 0x7E00)
    return np.int16(number | (bits >> 16 & 0x8000))


def converts_float16() -> bool:
    """Return whether the processor has instructions that convert float16, as nearly all have.

    Without them LLVM would call a C library that need not be installed. Converted by bits, an
    update takes about twice as long.
    """
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return triple.startswith(("aarch64", "arm64")) or "+f16c" in features.split(",")


def _array(context: Any, builder: Any, kind: Any, address: Any, numel: Any) -> Any:
    """Return the memory at an address as an array, which counts no references."""
    array = context.make_array(kind)(context, builder)
    pointer = builder.inttoptr(address, context.get_data_type(kind.dtype).as_pointer())
    itemsize = ir.Constant(ir.IntType(64), kind.dtype.bitwidth // 8)
    _populate(array, pointer, [numel], [itemsize], itemsize, None)
    return array._getvalue()


@typed_intrinsic
def array_at(_: Any, address: Any, like: Any, numel: Any) -> Any:
    """Return memory as an array, [numel], of the dtype of ``like``.

    Parts of arrays that Numba counts references to take longer to make.
    """
    kind = _array_type(like.dtype, 1, "C")

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return _array(context, builder, kind, arguments[0], arguments[2])

    return kind(types.int64, like, types.int64), generate


@typed_intrinsic
def row(_: Any, rows: Any, number: Any, start: Any, stop: Any) -> Any:
    """Return elements [start, stop) of a row as an array; see [Note: rows by address]."""
    addresses, like = rows
    kind = _array_type(like.dtype, 1, "C")

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        whole, number, start, stop = arguments
        table = context.make_array(addresses)(context, builder, builder.extract_value(whole, 0))
        address = builder.load(builder.gep(table.data, [number]))
        skipped = builder.mul(start, ir.Constant(start.type, like.dtype.bitwidth // 8))
        first = builder.add(address, skipped)
        return _array(context, builder, kind, first, builder.sub(stop, start))

    return kind(rows, types.int64, types.int64, types.int64), generate


@typed_intrinsic
def address_of(_: Any, array: Any) -> Any:
    """Return where an array begins; ``ctypes.data`` would count a reference."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        structure = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.ptrtoint(structure.data, ir.IntType(64))

    return types.int64(array), generate


def inner(*calls: ModuleType, forceinline: bool = False) -> Callable[..., Any]:
    """Compile a function on first use that only compiled code calls: never call it from Python.

    Args:
        *calls: Other modules with functions that it calls.
        forceinline: Whether LLVM makes it part of all that call it.
    """
    return compiled(
        calls=calls,
        error_model="numpy",
        forceinline=forceinline,
        no_cpython_wrapper=True,
        no_cfunc_wrapper=True,
    )


def _widened(context: Any, builder: Any, kind: Any, element: Any) -> Any:
    if isinstance(kind, types.Float):
        return element
    by_bits = widen_float16 if converts_float16() else widen_float16_by_bits
    function = widen_bfloat16 if kind == types.uint16 else by_bits
    return context.compile_internal(builder, function, types.float32(kind), [element])


@typed_intrinsic
def widen(_: Any, element: Any) -> Any:
    """Return the element, exactly, in the dtype that kernels compute in."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return _widened(context, builder, element, arguments[0])

    return (element if isinstance(element, types.Float) else types.float32)(element), generate


@typed_intrinsic
def widen_to(_: Any, element: Any, like: Any) -> Any:
    """Return the element, exactly, in the dtype of ``like``, a dtype that kernels compute in."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        wide = _widened(context, builder, element, arguments[0])
        return context.cast(builder, wide, element if element == like else types.float32, like)

    return like(element, like), generate


@chosen_by_type
def narrow(value: Any, like: Any) -> Any:
    """Return the value rounded to the nearest in the 16-bit dtype of ``like``; NaN stays NaN."""
    if like == types.uint16:
        return narrow_bfloat16
    return narrow_float16 if converts_float16() else narrow_float16_by_bits


@chosen_by_type
def current(master: Any, param: Any) -> Any:
    """Return the master, or the parameter if somebody wrote to it or it is its own master."""

    def follow(master: Any, param: Any) -> Any:
        written, rounded = np.float32(widen(param)), np.float32(widen(narrow(master, param)))
        return master if rounded.view(np.uint32) == written.view(np.uint32) else written

    return (lambda master, param: master) if isinstance(param, types.Float) else follow


def copy(values: Any, out: Any) -> None:
    """Copy values to ``out``: an assignment of slices would look for overlaps first."""
    for i in range(out.size):
        out[i] = values[i]


def round_to(values: Any, out: Any) -> None:
    """Write values to ``out``, rounded to its 16-bit dtype."""
    for i in range(out.size):
        out[i] = narrow(values[i], out[i])


@chosen_by_type
def store(values: Any, out: Any) -> Any:
    """Copy computed values to ``out``, rounding them if it has another dtype."""
    return copy if isinstance(out.dtype, types.Float) else round_to


@chosen_by_type
def is_finite(element: Any) -> Any:
    """Return whether the element is neither inf nor NaN."""
    if isinstance(element, types.Float):
        return lambda element: np.isfinite(element)
    if element == types.uint16:
        return lambda element: element & 0x7F80 != 0x7F80
    return lambda element: element & 0x7C00 != 0x7C00
