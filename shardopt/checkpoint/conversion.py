"""Optimizer state that a checkpoint holds in another form than the optimizer that loads it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shardopt.backends.codes import put_values, shaped, values_of
from shardopt.checkpoint.format.manifest import Manifest, ParamEntry, Slice
from shardopt.checkpoint.format.reader import Reader
from shardopt.checkpoint.format.requests import Wanted, wanted_slices
from shardopt.checkpoint.matching import Match
from shardopt.checkpoint.snapshot import chance_of
from shardopt.core.sharded import Scalars
from shardopt.layout.partition import ParamSpec
from shardopt.layout.span import Span
from shardopt.layout.state_spec import StateSpec


@dataclass(frozen=True, slots=True)
class Conversion:
    """Part of an array of the state that is floats in the checkpoint and codes here, or vice versa.

    Attributes:
        slices: Where the whole array lies.
        span: The part, in elements.
        there: How it is kept in the checkpoint.
        here: How it is kept in the optimizer.
        target: The part in the optimizer's memory, flat; blocks as bytes.
    """

    slices: Sequence[Slice]
    span: Span
    there: StateSpec
    here: StateSpec
    target: Any

    def wanted(self, buffer: Any = None) -> Iterator[Wanted]:
        """Yield requests to read it into a buffer of bytes."""
        return wanted_slices(self.slices, self.span, self.there, self._buffer(buffer))

    def read(self, reader: Reader, num_threads: int) -> None:
        """Read and convert it; rounds to the nearest."""
        buffer = self._buffer(None)
        reader.read(self.wanted(buffer), num_threads)
        found = shaped(buffer.view(self.there.dtype), self.there)
        values = values_of(found, self.there, self.span.numel)
        put_values(shaped(self.target, self.here), self.here, values)

    def _buffer(self, buffer: Any) -> Any:
        nbytes = self.there.nbytes(self.span.numel)
        return np.empty(nbytes, np.uint8) if buffer is None else buffer


def form_notes(manifest: Manifest, found: Match, scalars: Scalars) -> Iterator[str]:
    """Yield sentences about state that does not go on bit for bit as it was."""
    pairs = [
        (manifest.params[source.param], spec)
        for source, spec in zip(found.params, scalars.params, strict=True)
        if source is not None and source.param is not None
    ]

    def count(is_so: Callable[[ParamEntry, ParamSpec], bool]) -> int:
        return sum(is_so(there, here) for there, here in pairs)

    if number := count(lambda there, here: here.form.optim_bits < there.form.optim_bits):
        yield f"moments of {number} parameters have been rounded to 8 bits"
    if number := count(lambda there, here: here.form.optim_bits > there.form.optim_bits):
        yield f"moments of {number} parameters have 8 bits in the checkpoint and 32 from now on"
    if number := count(lambda there, here: here.form.has_masters < there.form.has_masters):
        yield (
            f"masters of {number} parameters have been left out: they go on from their rounded "
            "values"
        )
    if number := count(lambda there, here: here.form.has_masters > there.form.has_masters):
        yield f"masters of {number} parameters begin with the values that these have in 16 bits"
    if number := count(
        lambda there, here: (
            there.form == here.form and there.chance != chance_of(here, scalars.seed)
        )
    ):
        yield (
            f"{number} parameters have another name or seed than when they were saved: rounding by "
            "chance goes on with other random numbers"
        )
