"""The state of the optax transformation: a pytree whose leaves are all that a checkpoint needs.

[Note: a state that is data]
To optax a state is data: it may be copied, saved, mapped over, kept and gone back to. The moments
however are in node memory, sharded, and an update overwrites them. Therefore a state that ``init``
or ``update`` returns is *live*: its leaves are copied out of node memory when somebody asks for
them, and after a later update it raises unless it has them already. A state that is made of leaves,
as ``jax.tree.map``, a checkpoint or a pickle does, is *kept*: its leaves are all there is to it.
``update`` compares them with node memory, and loads them if they differ. The optimizer is only the
place where the present state is: it is not data, and states of all optimizers have one structure.

On several nodes no rank has all moments. States then have a token in the place of moments, which
tells whether they are of the present step.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from shardopt.errors import CheckpointError
from shardopt.jax.residence import KEEP, Fields, Residence

if TYPE_CHECKING:
    from shardopt.jax.optimizer import ShardedOptimizer

__all__ = ["NAdamState"]


class NAdamState:
    """The state of an optax transformation, such as ``nadam``; see [Note: a state that is data].

    A pytree with the leaves of ``Fields``, which are attributes of the state, too.

    Args:
        residence: Where the present state is.
        fields: The leaves of a kept state.
        structure: That of the parameters; None to find it in the leaves.
        is_live: Whether it shows the present state instead.
    """

    __slots__ = ("__weakref__", "_is_live", "_kept", "_structure", "_version", "residence")

    def __init__(
        self,
        residence: Residence,
        fields: Fields | None,
        structure: Any = None,
        *,
        is_live: bool = False,
    ) -> None:
        self.residence = residence
        self._kept = fields
        self._version = -1  # of the leaves of a live state
        self._structure = structure
        self._is_live = is_live
        if is_live:
            residence.add(self)

    @property
    def optimizer(self) -> ShardedOptimizer:
        """The optimizer that has the moments: for its reports, settings and checkpoints.

        Raises:
            CheckpointError: The state was unpickled, and nothing has been updated yet.
        """
        if self.residence.optimizer is None:
            raise CheckpointError(
                "a state must have been updated since it was unpickled; got one that has no "
                "optimizer yet. Pass it to update first."
            )
        return self.residence.optimizer

    @property
    def count(self) -> int:
        """The largest number of steps that a parameter has taken."""
        if self._is_live:
            return self.optimizer.count
        return int(np.max(self.fields.step, initial=0))

    @property
    def is_live(self) -> bool:
        """Whether it shows what is in memory now, whatever that is."""
        return self._is_live

    @property
    def is_stale(self) -> bool:
        """Whether its moments have been overwritten."""
        return self._kept is None and not self._is_live

    @property
    def fields(self) -> Fields:
        """The leaves.

        Raises:
            CheckpointError: The moments have been overwritten.
        """
        if self._is_live and self._version != self.residence.version:
            self._kept = self.residence.fields(self._structure)
            self._version = self.residence.version
        if self._kept is None:
            raise CheckpointError(
                "a state must be copied while it is the present one, to be read or gone back to "
                f"later; got one whose moments an update has overwritten. {KEEP}."
            )
        return self._kept

    @property
    def structure(self) -> Any:
        """The structure of the parameters, or None if a kept state does not have it."""
        if self._structure is None and self.fields.exp_avg is not None:
            return jax.tree_util.tree_structure(self.fields.exp_avg)
        return self._structure

    def leave(self, version: int) -> None:
        """Stop showing what is in memory, which has been of a version and is about to change."""
        self._is_live = False
        if self._version != version:
            self._kept = None

    def close(self) -> None:
        """Release the moments. Collective: every rank."""
        self.optimizer.close()

    def __getattr__(self, name: str) -> Any:
        if name in Fields._fields:
            return getattr(self.fields, name)
        raise AttributeError(f"a {type(self).__name__} has no attribute {name!r}")

    def __repr__(self) -> str:
        kind = "live" if self._is_live else "stale" if self.is_stale else "kept"
        return f"<{type(self).__name__}, {kind}>"

    def __copy__(self) -> NAdamState:
        return NAdamState(self.residence, self.fields, self._structure)

    def __deepcopy__(self, memo: dict[int, Any]) -> NAdamState:
        return NAdamState(self.residence, copy.deepcopy(self.fields, memo), self._structure)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, tuple(self.fields)


def _flatten(state: NAdamState) -> tuple[tuple[Fields], Residence]:
    return (state.fields,), state.residence


def _flatten_with_keys(state: NAdamState) -> tuple[Any, Residence]:
    return ((jax.tree_util.GetAttrKey("fields"), state.fields),), state.residence


def _unflatten(residence: Residence, children: Any) -> NAdamState:
    (fields,) = children  # a named tuple, which optax.tree_utils.tree_get() looks into
    return NAdamState(residence, fields)


def _unpickled(*fields: Any) -> NAdamState:
    return NAdamState(Residence(), Fields(*fields))


jax.tree_util.register_pytree_with_keys(NAdamState, _flatten_with_keys, _unflatten, _flatten)
