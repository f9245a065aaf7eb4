"""Values for parameters, by name, such as those of a model's state dict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from shardopt._typing import FloatArray
from shardopt.comm.collectives import Collectives
from shardopt.errors import CheckpointError, RankMismatchError
from shardopt.params.binding import read_before_write
from shardopt.params.registry import Registry

_CALL = "load_params()"


@dataclass(frozen=True)
class ParamValues:
    """Values for all parameters.

    Attributes:
        arrays: [any shape] for each parameter, in its shape; they do not lie in its memory.
        others: The names that belong to no parameter.
        digest: Equal for equal values; 0 if nobody compares them any more.
    """

    arrays: Mapping[int, FloatArray]
    others: list[str]
    digest: int = 0


def parse_values(values: Mapping[str, Any] | None, registry: Registry[Any]) -> ParamValues | None:
    """Check values, if this rank has any, against the parameters.

    Raises:
        CheckpointError: A value is missing or does not fit; the message names the parameter.
    """
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise CheckpointError(
            f"the values must be a mapping from parameters' names; got {type(values).__name__}. "
            "Pass the model's state dict."
        )
    names = [binding.name for binding in registry.bindings]
    if missing := [name for name in names if name not in values]:
        raise CheckpointError(
            f"the values must have an entry for every parameter; got none for {missing[0]!r}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}. Pass (name, "
            "parameter) pairs to the optimizer, such as model.named_parameters(), so that "
            "parameters have the names that the model's state dict uses."
        )
    arrays: dict[int, FloatArray] = {}
    digest = xxhash.xxh3_64()
    for index, binding in enumerate(registry.bindings):
        array = registry.host(registry.adapter.value(values[binding.name], binding.name))
        if array.shape != binding.data.shape:
            raise CheckpointError(
                f"the value of parameter {binding.name!r} must have shape {binding.data.shape}; "
                f"got {array.shape}. Load it into the model that it was saved from."
            )
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        arrays[index] = array
    arrays = read_before_write(arrays, registry.shared)
    known = set(names)
    return ParamValues(arrays, [n for n in values if n not in known], digest.intdigest())


def share_values(
    mine: ParamValues | None, registry: Registry[Any], collectives: Collectives, step: int
) -> ParamValues:
    """Copy the values of the lowest rank that has any to ranks that have none.

    Collective: every rank.

    Raises:
        CheckpointError: No rank has any.
        RankMismatchError: Ranks have different ones.
    """
    digests = collectives.allgather(None if mine is None else mine.digest, step, _CALL)
    having = [rank for rank, digest in enumerate(digests) if digest is not None]
    if not having:
        raise CheckpointError(
            "some rank must have values; got None on all of them. Pass the model's state dict on "
            "one rank at least."
        )
    if len({digests[rank] for rank in having}) > 1:
        other = next(rank for rank in having if digests[rank] != digests[having[0]])
        raise RankMismatchError(
            "the values must be the same on every rank that has any; got different ones on rank "
            f"{having[0]} and rank {other}. Load one file on all, or pass None on all but one."
        )
    if len(having) == len(digests):
        assert mine is not None
        return mine
    others: Sequence[list[str]] = collectives.allgather(mine.others if mine else [], step, _CALL)
    arrays: dict[int, FloatArray] = {}
    for index, binding in enumerate(registry.bindings):
        array = np.empty(binding.data.shape, binding.data.dtype)
        if collectives.topology.rank == having[0] and mine is not None:
            array[...] = mine.arrays[index]
        collectives.bcast(array.reshape(-1), having[0], step, _CALL)
        arrays[index] = array
    return ParamValues(arrays, others[having[0]])
