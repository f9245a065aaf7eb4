"""The fused step on CPUs: threads that run the loops of ``shardopt.backends.cpu.loops``."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardopt._typing import FloatArray, IntArray
from shardopt.backends.base import ALL_FINITE, Rows, UpdatePlan
from shardopt.backends.codes import shaped
from shardopt.backends.cpu import codes, loops, sums
from shardopt.backends.cpu.copying import copy_past_cache
from shardopt.backends.cpu.elements import STAND_INS
from shardopt.errors import KernelError
from shardopt.layout.dtypes import DTYPES, compute_dtype
from shardopt.layout.partition import CHUNK_NUMEL
from shardopt.layout.span import Span
from shardopt.layout.state_spec import FULL, StateForm, state_specs
from shardopt.rule.coefficients import NUM_COEFFICIENTS
from shardopt.rule.rounding import Chance

_MOMENTS_AND_MASTER = "exp_avg", "exp_avg_sq", "master"
_LIKE = {np.dtype(dtype): np.empty(0, dtype) for dtype in ("uint8", "float32")}

MIN_PIECE_NUMEL = 64 * CHUNK_NUMEL
"""The least that a thread is given of a shard: handing a piece over costs some 20 us."""


class CpuKernel:
    """Updates shards on this rank's cores.

    Args:
        threads: Cores to use. A shard is cut into pieces that plain Python threads update: the
            loops release the GIL, and Numba's threading layers would oversubscribe the cores
            that several ranks of a node share.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self.piece_numel = 2 * threads * MIN_PIECE_NUMEL  # well under a millisecond
        self._pool = ThreadPoolExecutor(threads - 1, "shardopt") if threads > 1 else None
        self._poisoned = ALL_FINITE

    def prepare(
        self,
        dtype: str,
        wire_dtype: str | None = None,
        num_nodes: int = 1,
        form: StateForm = FULL,
    ) -> None:
        """See ``Kernel.prepare``; compiles."""
        if dtype not in DTYPES:
            raise KernelError(
                f"parameter dtype must be one of {', '.join(DTYPES)}; got {dtype}. "
                "Convert the parameters."
            )
        full, span = compute_dtype(dtype), Span(0, CHUNK_NUMEL)
        grads, param = np.zeros((2, CHUNK_NUMEL), dtype)
        total, squares = np.zeros(CHUNK_NUMEL, full), np.zeros(1)
        sources = [Rows.of(grads), Rows.of(total)]  # of updates
        self.reduce(sources[0], total, span, squares)  # the same code for squares alone
        if wire_dtype is not None:
            wire = np.zeros(CHUNK_NUMEL, wire_dtype)
            self.reduce(sources.pop(0), wire, span, None)
            self.reduce(Rows.of(wire), total, span, squares)
        state = {
            each.key: shaped(np.zeros(each.nbytes(CHUNK_NUMEL), np.uint8).view(each.dtype), each)
            for each in state_specs(dtype, form)
        }
        coefficients = np.zeros((1, NUM_COEFFICIENTS), full)
        chance = Chance(np.empty(0, np.uint64), np.empty(0, np.int64))
        plan = UpdatePlan(
            span,
            np.zeros((0, 3), np.int64),
            coefficients,
            chance=chance if form.rounds_by_chance else None,
        )
        for rows in sources:
            self.update(rows, Rows.of(param), state, plan)
        copy_past_cache(np.empty(0, np.uint8), np.empty(0, np.uint8))  # for checkpoints

    def update(
        self, sources: Rows, targets: Rows, state: Mapping[str, FloatArray], plan: UpdatePlan
    ) -> None:
        """See ``Kernel.update``."""
        grads, params = _by_address(sources), _by_address(targets)
        keys, chance = _DTYPES[targets.dtype].state_keys, plan.chance
        three = tuple(_at_address(state.get(key)) for key in _MOMENTS_AND_MASTER if chance)

        def update_piece(piece: Span) -> int:
            partials = _partial_sums(sources, targets.dtype)
            if chance is None:
                arrays = tuple(state[key] for key in keys)
                part = piece.start, piece.stop, plan.segments, plan.coefficients
                return int(loops.update(grads, params, arrays, partials, part))
            memory = partials, codes.scratch()
            of_chance = piece.start, piece.stop, plan.segments, *chance, plan.coefficients
            return int(codes.update(grads, params, three, memory, of_chance))

        found = [flag for flag in self._run(update_piece, plan.span) if flag != ALL_FINITE]
        if found:
            position = plan.origin + min(found)
            first = self._poisoned == ALL_FINITE
            self._poisoned = position if first else min(position, self._poisoned)

    def take_poisoned(self) -> int:
        """See ``Kernel.take_poisoned``."""
        position, self._poisoned = self._poisoned, ALL_FINITE
        return position

    def reduce(
        self,
        sources: Rows,
        out: FloatArray | None,
        span: Span,
        square_sums: NDArray[np.float64] | None,
        factor: float = 1.0,
    ) -> None:
        """See ``Kernel.reduce``."""
        rows = _by_address(sources)
        dtype = _DTYPES[sources.dtype].full if out is None else out.dtype
        total = np.empty(0, dtype) if out is None else _stand_in(out)
        squares = np.empty(0) if square_sums is None else square_sums

        def reduce_piece(piece: Span) -> None:
            scratch = _partial_sums(sources, dtype), np.empty(sums.NUM_ACCUMULATORS)
            local = piece.shift(-span.start)
            chunks = slice(local.start // CHUNK_NUMEL, local.stop // CHUNK_NUMEL)
            scaled = piece.start, piece.stop, factor
            sums.reduce(rows, total[local.slice], scratch, scaled, squares[chunks])

        self._run(reduce_piece, span)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _run(self, work: Callable[[Span], Any], span: Span) -> list[Any]:
        """Call ``work`` on whole chunks that cover ``span``, on several threads if it is long."""
        parts = max(1, min(self.threads, span.numel // MIN_PIECE_NUMEL))
        if parts == 1 or self._pool is None:
            return [work(span)]
        pieces = [span.cut(index, parts, CHUNK_NUMEL) for index in range(parts)]
        others = [self._pool.submit(work, piece) for piece in pieces[1:]]
        return [work(pieces[0]), *(other.result() for other in others)]


@dataclass(frozen=True, slots=True)
class _Dtype:
    """Facts about a dtype that are too slow to look up at every call.

    Attributes:
        like: See [Note: rows by address].
        full: Its ``compute_dtype``.
        state_keys: Names of the state, in the order in which ``loops.update`` takes it.
    """

    like: FloatArray
    full: np.dtype[Any]
    state_keys: tuple[str, ...]

    @classmethod
    def of(cls, dtype: str) -> "_Dtype":
        like = _stand_in(np.empty(0, dtype))
        keys = tuple(each.key for each in state_specs(dtype))
        return cls(like, np.dtype(compute_dtype(dtype)), keys)


def _stand_in(array: FloatArray) -> FloatArray:
    return array.view(STAND_INS.get(array.dtype, array.dtype))


_DTYPES = {np.dtype(dtype): _Dtype.of(dtype) for dtype in DTYPES}


def _by_address(rows: Rows) -> tuple[IntArray, FloatArray]:
    """Return rows as the loops take them; see [Note: rows by address]."""
    return rows.addresses, _DTYPES[rows.dtype].like


def _at_address(array: FloatArray | None) -> tuple[int, FloatArray] | None:
    """Return an array of the state, if there is one, as ``codes.update`` takes it."""
    if array is None:
        return None
    return array.__array_interface__["data"][0], _LIKE[array.dtype]  # in half the time of ctypes


def _partial_sums(sources: Rows, out_dtype: np.dtype[Any]) -> FloatArray:
    """Allocate what ``loops`` keeps the sums of subtrees in; for one thread at a time."""
    dtype = np.promote_types(_DTYPES[sources.dtype].full, _DTYPES[out_dtype].full)
    return np.empty((len(sources).bit_length(), CHUNK_NUMEL), dtype)
