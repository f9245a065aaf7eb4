"""Edits that users make to averaged gradients, which the step adopts."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from shardopt._typing import FloatArray, IntArray
from shardopt.comm.node_memory.comparing import changed
from shardopt.errors import StageWarning
from shardopt.layout.span import Span
from shardopt.params.inputs import mask_of
from shardopt.params.registry import Registry
from shardopt.report import tell
from shardopt.store.memory import Memory
from shardopt.transport.ring import RingReduction

_MUCH_NBYTES = 1 << 20
_PIECE_NUMEL = 1 << 16  # of averages that are compared, which stay in cache


class AverageEdits:
    """Finds what users have written to averages, and by what they have multiplied them.

    Args:
        registry: The parameters of this rank.
        memory: Of the node.
    """

    def __init__(self, registry: Registry[Any], memory: Memory) -> None:
        self._registry, self._memory = registry, memory
        self._written: list[tuple[int, Span, int]] = []
        self._factors: dict[int, Sequence[float]] = {}  # on averages; they are still to be written
        self._has_warned = False

    def params(self, averaged: Collection[int]) -> set[int]:
        """Return the parameters whose averages this rank has multiplied or written to.

        Args:
            averaged: Parameters with averages.
        """
        writes, factors = self._find(averaged)
        return {*factors, *(index for index, _, _ in writes)}

    def find(self, averaged: Collection[int], replaced: Collection[int]) -> None:
        """Find all that this rank has done since ``apply`` or ``forget``, for ``describe``.

        Args:
            averaged: Parameters with averages.
            replaced: Those with other gradients, or none, than before.
        """
        self._written, self._factors = [], {}
        self._written, self._factors = self._find(averaged, replaced)

    def describe(self) -> Mapping[str, object]:
        """Return what must be the same on all ranks, by name."""
        digests: dict[int, list[int]] = {}
        for index, span, digest in self._written:
            digests.setdefault(index, []).extend((span.start, span.stop, digest))
        bindings = self._registry.bindings
        names = {index: bindings[index].name for index in digests}
        multiplied: dict[str, list[int]] = {}
        for index, factors in sorted(self._factors.items()):
            multiplied.setdefault(repr(factors), []).append(index)
        return {
            "the parameters whose averaged gradients were written to": list(names.values()),
            "the factors by which averaged gradients were multiplied": [
                (factors, bindings[of[0]].name, mask_of(of)) for factors, of in multiplied.items()
            ],
            **{f"what was written to the gradient of {names[i]!r}": d for i, d in digests.items()},
        }

    def apply(self, reduction: RingReduction) -> None:
        """Write all that was found into this rank's shards, alike on all ranks.

        Args:
            reduction: Has the shards.
        """
        views: list[tuple[Span, FloatArray | None]] = []
        for index, span, _ in self._written:
            views.append((span, self._own_average(index, span)))
        reduction.replace(views)
        reduction.multiply(self._factors)
        for _, view in self._memory.averages:
            view.refresh()
        self._written = []

    def forget(self) -> None:
        """Forget what was written."""
        for _, view in self._memory.averages:
            view.find_writes()
            view.refresh()

    def warn_of_copies(self) -> None:
        """Warn once, alike on all ranks, if each rank has copies of much that users wrote to."""
        bindings = self._registry.bindings
        nbytes = sum(span.numel * bindings[i].grad.itemsize for i, span, _ in self._written)
        if nbytes >= _MUCH_NBYTES and not self._has_warned:
            self._has_warned = True
            text = (
                f"p.grad was written to: each rank keeps {nbytes >> 20} MiB of its own until the "
                "step. To clip, pass max_grad_norm; to scale, multiply in place by numbers without "
                "another name for the elements: both take no memory. This is said once."
            )
            tell(StageWarning(text), aloud=self._memory.arena.comm.rank == 0)

    # -- inside ------------------------------------------------------------------------------------

    def _find(
        self, averaged: Collection[int], replaced: Collection[int] = ()
    ) -> tuple[list[tuple[int, Span, int]], dict[int, Sequence[float]]]:
        """Return what this rank has done to averages.

        Args:
            averaged: As for ``find``.
            replaced: Parameters with other gradients, or none: what written pages have of theirs
                is old.

        Returns:
            What it has written: the parameter, which part of the flat index space, and a hash of
            the values there. And by which factors it has multiplied others, or those, in order.
        """
        factors, products = self._find_factors(averaged)
        found: list[tuple[int, Span, int]] = []
        partition = self._registry.partition
        for region, (layout, view) in enumerate(self._memory.averages):
            (array,) = layout.arrays
            start = partition.regions[region].start
            parts: list[tuple[int, Span]] = []
            for page in view.find_writes():
                first, stop = (
                    (at - array.start) // array.itemsize for at in (page.start, page.stop)
                )
                within = Span(max(0, first), min(array.numel, stop)).shift(start)
                parts += partition.params_in(region, within)
            parts = [each for each in parts if each[0] not in replaced and each[0] not in products]
            if not parts:
                continue
            nbytes = [array.bytes_of(span.shift(-start)) for _, span in parts]
            spans: IntArray = np.array([(each.start, each.stop) for each in nbytes], np.int64)
            for number in np.flatnonzero(changed(view.view, view.shared, spans)).tolist():
                index, span = parts[number]
                values = self._own_average(index, span)
                found.append((index, span, xxhash.xxh3_64_intdigest(values.data)))
        return found, factors

    def _find_factors(
        self, averaged: Collection[int]
    ) -> tuple[dict[int, Sequence[float]], set[int]]:
        """Return the factors on averages that are to be written, by parameter.

        Returns:
            The factors; and those parameters whose elements on this rank have some already, which
            is all that has been written to them.
        """
        factors: dict[int, Sequence[float]] = {}
        products: set[int] = set()
        bindings, known = self._registry.bindings, self._registry.adapter.grad_factors()
        for index in sorted(averaged) if known else ():
            written, pending = known.get(id(bindings[index].param), ((), ()))
            if written and self._is_product(index, written):
                products.add(index)
                pending = (*written, *pending)
            if pending:
                factors[index] = tuple(pending)
        return factors, products

    def _is_product(self, index: int, factors: Sequence[float]) -> bool:
        """Whether a parameter has on this rank its average, multiplied by factors, and no more."""
        for piece in self._span(index).chunks(_PIECE_NUMEL):
            product = self._average(index, piece).copy()
            with np.errstate(all="ignore"):
                for factor in factors:
                    product *= product.dtype.type(factor)
            if product.tobytes() != self._own_average(index, piece).tobytes():
                return False
        return True

    def _own_average(self, index: int, span: Span) -> FloatArray:
        """Return the elements of an average in a span of the flat index space, as this rank's."""
        own: FloatArray = self._registry.bindings[index].grad.reshape(-1)
        return own[span.shift(-self._span(index).start).slice]

    def _average(self, index: int, span: Span) -> FloatArray:
        """Return the same in the row of the node."""
        partition = self._registry.partition
        region = partition.params[index].region
        layout, view = self._memory.averages[region]
        (array,) = layout.arrays
        row = view.shared[array.slice].view(array.spec.dtype)
        return row[span.shift(-partition.regions[region].start).slice]

    def _span(self, index: int) -> Span:
        """Return where a parameter is in the flat index space."""
        return self._registry.partition.params[index]
