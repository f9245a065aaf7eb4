"""The inputs of a step: those of one rank, and those that all ranks have agreed on."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import NamedTuple

import xxhash

from shardopt._typing import FloatArray
from shardopt.params.writes import Written
from shardopt.rule.hyperparams import Hyperparams


class Shares(NamedTuple):
    """The inputs of one rank that may differ between ranks, so that others must know them.

    Attributes:
        present: Bit mask of the parameters that have a gradient.
        replaced: Bit mask of the parameters whose value was replaced.
        written: What was written in place, with hashes of the values.
        loss_scale: Factor on the loss before backward.
        overflowed: Whether a gradient is known not to be finite.
        changed: Bit mask of the buckets that must be sent again; see [Note: gradients sent during
            backward].
        edited: Whether the user has changed gradients before they are averaged.
    """

    present: int
    replaced: int
    written: Mapping[Written, int]
    loss_scale: float
    overflowed: bool
    changed: int = 0
    edited: bool = False

    def fingerprint(self) -> list[str]:
        """Return strings for a digest, in hex because decimal digits of long masks are slow."""
        masks = map(hex, (self.present, self.replaced, self.changed))
        written = xxhash.xxh3_64_hexdigest(repr(self.written).encode()) if self.written else ""
        return [*masks, written, str(self.loss_scale), str(self.overflowed), str(self.edited)]


@dataclass(frozen=True)
class LocalInputs:
    """The inputs of one rank before a step.

    Attributes:
        hypers: The hyperparameters of each param group.
        replaced: Arrays that users assigned in place of a parameter's view, by parameter index.
        written: What users have written in place, with hashes of the values.
        present: See ``Shares``.
        loss_scale: See ``Shares``.
        overflowed: See ``Shares``.
        changed: See ``Shares``.
        edited: See ``Shares``.
        copied_nbytes: Bytes of gradients that had to be copied into shared memory.
        same: Anything else that must be the same on all ranks, by name; names must read well in
            "<name> must be the same".
    """

    hypers: Sequence[Hyperparams] = ()
    replaced: Mapping[int, FloatArray] = field(default_factory=dict)
    written: Mapping[Written, int] = field(default_factory=dict)
    present: int = 0
    loss_scale: float = 1.0
    overflowed: bool = False
    changed: int = 0
    edited: bool = False
    copied_nbytes: int = 0
    same: Mapping[str, object] = field(default_factory=dict)

    @property
    def shares(self) -> Shares:
        """The part that other ranks must know."""
        replaced = mask_of(self.replaced)
        return Shares(
            self.present,
            replaced,
            self.written,
            self.loss_scale,
            self.overflowed,
            self.changed,
            self.edited,
        )


@dataclass(frozen=True)
class AgreedInputs:
    """The inputs that all ranks use in a step; the same on every rank.

    Attributes:
        hypers: The hyperparameters of each param group.
        present: Bit mask of the parameters that have a gradient on some rank.
        replaced: For each rank, a bit mask of the parameters that it has replaced; empty if no rank
            has replaced any.
        written: For each rank what it has written in place; one entry if all are equal.
        loss_scale: The lowest of all ranks, so that no gradient grows.
        overflowed: Whether a gradient on some rank is known not to be finite.
        changed: Bit mask of the buckets that some rank must send again.
        edited: Whether the user of some rank has changed gradients before they are averaged.
        rescaled: Whether loss scales differ between ranks.
    """

    hypers: Sequence[Hyperparams]
    present: int
    replaced: Sequence[int]
    written: Sequence[Mapping[Written, int]]
    loss_scale: float
    overflowed: bool
    changed: int
    edited: bool
    rescaled: bool

    @classmethod
    def merge(cls, hypers: Sequence[Hyperparams], everyone: Sequence[Shares]) -> "AgreedInputs":
        """Merge the inputs of all ranks, in rank order; if all are equal, one entry is enough."""
        masks = [each.replaced for each in everyone]
        scales = {each.loss_scale for each in everyone}
        return cls(
            hypers=hypers,
            present=reduce(or_, (each.present for each in everyone), 0),
            replaced=masks if any(masks) else (),
            written=[each.written for each in everyone],
            loss_scale=min(scales, default=math.inf),
            overflowed=any(each.overflowed for each in everyone),
            changed=reduce(or_, (each.changed for each in everyone), 0),
            edited=any(each.edited for each in everyone),
            rescaled=len(scales) > 1,
        )


def mask_of(indices: Iterable[int]) -> int:
    """Return the bit mask of some parameter indices."""
    return sum(1 << index for index in indices)
