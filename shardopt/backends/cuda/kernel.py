"""The fused step on GPUs: variants of ``fused.cu``, their arguments, and their launches."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import FloatArray, IntArray
from shardopt.backends.base import ALL_FINITE, Rows, UpdatePlan, address_of
from shardopt.errors import KernelError
from shardopt.layout.dtypes import DTYPES, compute_dtype
from shardopt.layout.padding import round_up
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from shardopt.layout.state_spec import FULL, StateForm
from shardopt.rule.coefficients import NUM_COEFFICIENTS

SOURCE = Path(__file__).with_name("fused.cu")

FLAG_UNSET = 0x7F7F7F7F7F7F7F7F
"""The flag while all parameters are finite: no position in the flat index space."""

_THREADS = 256
_COHORTS = 16
_NUM_ACCUMULATORS = 64
_ACCESS_NBYTES = 16
_MAX_TABLES = 1024
_MAX_ARGUMENT_NBYTES = 4096  # of what every driver accepts

Launch = Callable[[int, int, bytes], None]
"""Starts a kernel on so many blocks of so many threads; the bytes are its argument, by value."""


class Launcher(Protocol):
    """A GPU as ``CudaKernel`` uses it; it works in the order of the calls.

    Attributes:
        flag: [1] int64 in its memory, which kernels lower to where they find inf or NaN.
    """

    flag: Any

    def load(self, name: str, text: str, options: tuple[str, ...]) -> Launch:
        """Compile a text in CUDA C++ and return one of its kernels.

        Raises:
            KernelError: It cannot be compiled for this GPU.
        """
        ...

    def upload(self, table: NDArray[Any]) -> Any:
        """Return a copy of a table that the GPU addresses; called seldom, so it may wait."""
        ...

    def take_flag(self) -> int:
        """Return what the flag was lowered to since the last call, and set it to ``FLAG_UNSET``.

        Does not wait: work that the GPU has not done yet is reported by a later call.
        """
        ...


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the kernels that ``fused.cu`` can be compiled to.

    Attributes:
        name: Of the kernel.
        macros: See the head of ``fused.cu``.
        arguments: Its argument, a struct.
    """

    name: str
    macros: tuple[tuple[str, int | str], ...]
    arguments: np.dtype[Any]

    @property
    def options(self) -> tuple[str, ...]:
        """Options for the compiler."""
        return tuple(f"-D{name}={value}" for name, value in self.macros)

    @property
    def lanes(self) -> int:
        """Elements that a thread handles at once."""
        return int(dict(self.macros)["LANES"])


@functools.cache
def update_variant(grad: str, param: str, num_sources: int, num_targets: int) -> Variant:
    """Return the variant that sums ``grad`` and updates ``param``, names of dtypes."""
    full = compute_dtype(param)
    macros = _macros(full, grad, param, num_sources)
    macros |= {"UPDATE": 1, "PARAM": param.upper(), "TARGETS": num_targets}
    fields: list[tuple[Any, ...]] = [
        ("sources", "u8", num_sources),
        ("targets", "u8", num_targets),
        *((name, "u8") for name in ("exp_avg", "exp_avg_sq", "master")),
        *((name, "u8") for name in ("segments", "first_segments", "poisoned")),
        *((name, "i8") for name in ("start", "origin")),
        ("num_segments", "i4"),
        ("cohorts", full, (_COHORTS, NUM_COEFFICIENTS)),
    ]
    return Variant("update", tuple(macros.items()), np.dtype(fields, align=True))


@functools.cache
def reduce_variant(grad: str, out: str | None, num_sources: int) -> Variant:
    """Return the variant that sums ``grad`` into ``out``, names of dtypes."""
    full = compute_dtype(grad)
    if out is not None:
        full = np.promote_types(full, compute_dtype(out)).name
    macros = _macros(full, grad, out or full, num_sources)
    macros |= {"UPDATE": 0, "OUT": "NONE" if out is None else out.upper()}
    fields: list[tuple[Any, ...]] = [
        ("sources", "u8", num_sources),
        ("out", "u8"),
        ("square_sums", "u8"),
        ("num_chunks", "i8"),
        ("factor", full),
    ]
    return Variant("reduce", tuple(macros.items()), np.dtype(fields, align=True))


def _macros(full: str, grad: str, written: str, num_sources: int) -> dict[str, int | str]:
    narrowest = min(np.dtype(dtype).itemsize for dtype in (full, grad, written))
    return {
        "COMPUTE": full.upper(),
        "GRAD": grad.upper(),
        "SOURCES": num_sources,
        "LANES": _ACCESS_NBYTES // narrowest,
        "THREADS": _THREADS,
        "CHUNK": CHUNK_NUMEL,
        "COHORTS": _COHORTS,
    }


@dataclass(frozen=True, slots=True)
class _Table:
    """The segments that one launch updates.

    Attributes:
        cohorts: The rows of the coefficients that belong to them.
        span: The chunks they are in.
        num_segments: How many they are.
        segments: On the device, [num_segments, 3], as in ``UpdatePlan`` but for the row, which
            counts from the start of ``cohorts``.
        first_segments: On the device, for each chunk the first segment that ends behind its start.
    """

    cohorts: Span
    span: Span
    num_segments: int
    segments: Any
    first_segments: Any


class CudaKernel:
    """Updates shards on a GPU; calls return before the work is done.

    Args:
        launcher: The GPU.
        node_size: Number of ranks of the node, for ``prepare``.
        is_staged: Whether parameters reach other ranks through memory of the node, likewise.
    """

    piece_numel = 1 << 24  # a tenth of a millisecond

    def __init__(self, launcher: Launcher, node_size: int = 1, *, is_staged: bool = False) -> None:
        self._launcher = launcher
        self._node_size = node_size
        self._is_staged = is_staged
        self._launches: dict[Variant, Launch] = {}
        self._tables: dict[tuple[Span, bytes], list[_Table]] = {}

    def prepare(
        self,
        dtype: str,
        wire_dtype: str | None = None,
        num_nodes: int = 1,
        form: StateForm = FULL,
    ) -> None:
        """See ``Kernel.prepare``."""
        assert form == FULL  # others are refused for parameters on devices
        if dtype not in DTYPES:
            raise KernelError(
                f"parameter dtype must be one of {', '.join(DTYPES)}; got {dtype}. "
                "Convert the parameters."
            )
        full, size = compute_dtype(dtype), self._node_size
        writes_home = num_nodes > 1 or (self._is_staged and size > 1)  # for those without a copy
        num_targets = (1 if self._is_staged else size) + writes_home
        variants = [reduce_variant(dtype, None, 1), update_variant(full, dtype, 1, num_targets)]
        if wire_dtype is None:
            variants.append(reduce_variant(dtype, full, size))
            variants.append(update_variant(dtype, dtype, size, num_targets))
        else:
            variants.append(reduce_variant(dtype, wire_dtype, size))
            variants.append(reduce_variant(wire_dtype, full, num_nodes))
        for variant in variants:
            self._load(variant)

    def update(
        self, sources: Rows, targets: Rows, state: Mapping[str, FloatArray], plan: UpdatePlan
    ) -> None:
        """See ``Kernel.update``."""
        variant = update_variant(sources.dtype.name, targets.dtype.name, len(sources), len(targets))
        arguments = np.zeros(1, variant.arguments)
        arguments["sources"] = sources.addresses
        arguments["targets"] = targets.addresses
        for key, array in state.items():
            arguments[key] = address_of(array)
        arguments["poisoned"] = address_of(self._launcher.flag)
        arguments["origin"] = plan.origin
        for table in self._tables_of(plan.span, plan.segments):
            coefficients = plan.coefficients[table.cohorts.slice]
            arguments["cohorts"][0, : len(coefficients)] = coefficients
            arguments["segments"] = address_of(table.segments)
            arguments["first_segments"] = address_of(table.first_segments)
            arguments["num_segments"] = table.num_segments
            arguments["start"] = table.span.start
            self._launch(variant, table.span.numel // CHUNK_NUMEL, arguments)

    def take_poisoned(self) -> int:
        """See ``Kernel.take_poisoned``."""
        position = self._launcher.take_flag()
        return ALL_FINITE if position == FLAG_UNSET else position

    def reduce(
        self,
        sources: Rows,
        out: FloatArray | None,
        span: Span,
        square_sums: NDArray[np.float64] | None,
        factor: float = 1.0,
    ) -> None:
        """See ``Kernel.reduce``."""
        if not span:
            return
        out_dtype = None if out is None else out.dtype.name
        variant = reduce_variant(sources.dtype.name, out_dtype, len(sources))
        num_chunks = span.numel // CHUNK_NUMEL
        arguments = np.zeros(1, variant.arguments)
        arguments["sources"] = sources.part(span).addresses
        arguments["out"] = 0 if out is None else address_of(out)
        arguments["square_sums"] = 0 if square_sums is None else address_of(square_sums)
        arguments["num_chunks"] = num_chunks
        arguments["factor"] = factor
        chunks_per_block = _THREADS * variant.lanes // _NUM_ACCUMULATORS
        self._launch(variant, -(-num_chunks // chunks_per_block), arguments)

    def close(self) -> None:
        """Release the tables and kernels."""
        self._tables.clear()
        self._launches.clear()

    def _launch(self, variant: Variant, blocks: int, arguments: NDArray[Any]) -> None:
        self._load(variant)(blocks, _THREADS, arguments.tobytes())

    def _load(self, variant: Variant) -> Launch:
        if variant not in self._launches:
            if variant.arguments.itemsize > _MAX_ARGUMENT_NBYTES:
                raise KernelError(
                    f"the addresses of sources and targets must fit into {_MAX_ARGUMENT_NBYTES:,} "
                    f"bytes of arguments; got {variant.arguments.itemsize:,} bytes. Start fewer "
                    "ranks on a node, or use fewer nodes."
                )
            text = SOURCE.read_text(encoding="utf-8")
            self._launches[variant] = self._launcher.load(variant.name, text, variant.options)
        return self._launches[variant]

    def _tables_of(self, span: Span, segments: IntArray) -> list[_Table]:
        """Return the launches that an update takes; they are the same in most steps."""
        key = span, segments.tobytes()
        if key not in self._tables:
            if len(self._tables) == _MAX_TABLES:
                del self._tables[next(iter(self._tables))]
            self._tables[key] = _tables(self._launcher, span, segments)
        return self._tables[key]


def _tables(launcher: Launcher, span: Span, segments: IntArray) -> list[_Table]:
    """Group the segments within a span by cohorts, as many as fit into one launch, and upload."""
    starts, stops, rows = segments.T
    is_inside = (starts < stops) & (stops > span.start) & (starts < span.stop)
    tables = []
    for group in np.unique(rows[is_inside] // _COHORTS).tolist():
        cohorts = Span(group * _COHORTS, (group + 1) * _COHORTS)
        chosen = segments[is_inside & (rows // _COHORTS == group)] - [0, 0, cohorts.start]
        first, last = int(chosen[0, 0]), int(chosen[-1, 1])
        chunks = Span(first // CHUNK_NUMEL * CHUNK_NUMEL, round_up(last, CHUNK_NUMEL))
        chunks = chunks.intersect(span)
        begins = np.arange(chunks.start, chunks.stop, CHUNK_NUMEL)
        first_segments = np.searchsorted(chosen[:, 1], begins, "right").astype(np.int32)
        uploaded = launcher.upload(chosen), launcher.upload(first_segments)
        tables.append(_Table(cohorts, chunks, len(chosen), *uploaded))
    return tables
