"""The place of the present state of the optax transformation: an optimizer, whose memory has it."""

from __future__ import annotations

import os
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

import jax
import numpy as np
from jax import numpy as jnp

from shardopt.comm.consensus import attempt
from shardopt.errors import CheckpointError, PartialStateWarning, StaleStateWarning
from shardopt.jax.adapter import Leaf, require_untraced
from shardopt.jax.arrays import aligned_copy
from shardopt.jax.optimizer import Inputs
from shardopt.layout.state_spec import StateSpec, state_specs
from shardopt.report import tell

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from shardopt._typing import FloatArray
    from shardopt.jax.optimizer import ShardedOptimizer
    from shardopt.jax.state import NAdamState

__all__ = ["KEEP", "Fields", "Residence"]

_ARRAY_KEYS = ("exp_avg", "exp_avg_sq", "master")
_PROCESS_ID = int.from_bytes(os.urandom(4), "little")
_IDS = count()
KEEP = "Copy it before the next update, jax.tree.map(jnp.copy, state), or pass keep_states=True"


class Fields(NamedTuple):
    """The leaves of a state, under the names that they have in checkpoints.

    Attributes:
        step: [num_params] int32, the steps that each parameter has taken.
        mu_product: [num_params, 2] uint32, the bits of float64 numbers, which JAX may lack; None
            except with NAdam.
        exp_avg: A tree like the parameters; None on several nodes.
        exp_avg_sq: Likewise.
        master: Likewise, with None for parameters that are not of 16 bits.
        token: [4] uint32 on several nodes: the process, the optimizer, and the step. Else None.
    """

    step: Any
    mu_product: Any
    exp_avg: Any
    exp_avg_sq: Any
    master: Any
    token: Any


class Residence:
    """The place of the present state: an optimizer, and what updates have done with it.

    All are equal, so that they make no difference to the structure of a state.

    Attributes:
        optimizer: None for a state that was unpickled, until an update builds one.
        settings: The hyperparameters that the last update has set.
        origin: What it was built with besides: communicator and policy.
    """

    def __init__(self) -> None:
        self.optimizer: ShardedOptimizer | None = None
        self.settings: dict[str, Any] = {}
        self.origin: tuple[Any, Any] = None, None
        self._id = next(_IDS)
        self._shown: tuple[int, list[Any]] = -1, []
        self._live: WeakSet[NAdamState] = WeakSet()
        self._left: WeakSet[NAdamState] = WeakSet()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Residence)

    def __hash__(self) -> int:
        return hash(Residence)

    def add(self, state: NAdamState) -> None:
        """Register a live state, so that ``leave`` can tell it when it no longer is."""
        self._live.add(state)

    @property
    def opt(self) -> ShardedOptimizer:
        """The optimizer, which is there."""
        assert self.optimizer is not None
        return self.optimizer

    @property
    def version(self) -> int:
        """Grows whenever the state in memory changes, in an update or otherwise."""
        return self.opt.core.parts.rule.version

    @property
    def is_whole(self) -> bool:
        """Whether each rank can read all moments."""
        return self.opt.core.states.is_whole

    @property
    def is_open(self) -> bool:
        """Whether there is an optimizer that can be used."""
        return self.optimizer is not None and not attempt(self.opt.core.require_open).error

    def has_like(self, params: Any) -> bool:
        """Whether there is an optimizer that can be used for such parameters."""
        shapes = [np.shape(leaf) for leaf in jax.tree_util.tree_leaves(params)]
        return self.is_open and shapes == [leaf.data.shape for leaf in self.opt.leaves]

    def read(self, structure: Any, grads: Any, params: Any) -> Inputs:
        """See ``ShardedOptimizer.read``; the structure may be that of no parameters."""
        num_params, num_leaves = structure.num_leaves, len(self.opt.leaves)
        if num_params == 0 and all(leaf.data.size == 0 for leaf in self.opt.leaves):
            require_untraced()
            return Inputs([leaf.data for leaf in self.opt.leaves], [None] * num_leaves)
        _require(num_params == num_leaves, "exp_avg", f"{num_leaves} arrays", num_params)
        return self.opt.read(structure, grads, params)

    def fields(self, structure: Any) -> Fields:
        """Copy the state in memory into arrays that never change.

        Args:
            structure: That of the parameters.
        """
        entries = self._entries() if self.is_whole else None
        step, mu_product = self._counts(structure.num_leaves, entries)
        with jax.ensure_compile_time_eval():  # these arrays are no part of anybody's trace
            trees, token = [None, None, None], None
            if entries is not None:
                views = self._views(entries, structure.num_leaves)
                trees = [_copy_tree(key, views, self.opt.leaves, structure) for key in _ARRAY_KEYS]
            else:
                token = jnp.asarray(self._token())
                if step.any():
                    tell(PartialStateWarning(_PARTIAL), aloud=True)
            exp_avg, exp_avg_sq, master = trees
            products = None if mu_product is None else jnp.asarray(mu_product)
            fields = Fields(jnp.asarray(step), products, exp_avg, exp_avg_sq, master, token)
        self._shown = self.version, jax.tree_util.tree_leaves(fields)
        return fields

    def differing(self, fields: Fields, num_params: int) -> dict[int, Any] | None:
        """Compare the leaves of a kept state with the state in memory.

        Returns:
            None if they are the same, else the ``state`` of a state dict of them.

        Raises:
            CheckpointError: They do not fit, or moments are not among them.
        """
        leaves, (version, shown) = jax.tree_util.tree_leaves(fields), self._shown
        if version == self.version and _are_all(leaves, shown, lambda leaf, other: leaf is other):
            return None
        if not self.is_whole:
            counts = [each for each in self._counts(num_params) if each is not None]
            if not _are_all(leaves, [*counts, self._token()], _is_same):
                raise CheckpointError(_NOT_PRESENT)
            return None
        kept = _kept_entries(fields, self._specs(self.opt.leaves[:num_params]))
        entries = self._entries()
        views = self._views(entries, num_params)
        numbers = _kept_counts(fields, num_params, has_products=self._has_products)
        both = zip(fields[:2], self._counts(num_params, entries), strict=True)
        pairs = [(given, present) for given, present in both if present is not None]
        for entry, view in zip(kept, views, strict=True):
            pairs += [(entry[key], array) for key, array in view.items()]
        if all(_is_same(given, present) for given, present in pairs):
            return None
        for entry, number in zip(kept, numbers, strict=True):
            entry.update(number)
        places = self._places()
        return {
            places[id(leaf)]: entry
            for leaf, entry in zip(self.opt.leaves, kept, strict=False)
            if id(leaf) in places
        }

    def leave(self, version: int) -> None:
        """Leave the state of a version for another: states that are live now stay behind."""
        self._shown = -1, []
        if not self._live:
            return
        self._left, self._live = self._live, WeakSet()
        for state in self._left:
            state.leave(version)

    def warn_of_stale(self) -> None:
        """Warn, once, that somebody keeps a state that can no longer be gone back to."""
        left, self._left = self._left, WeakSet()
        if any(state.is_stale for state in left):
            what = "an earlier state is still referenced, whose moments have been overwritten"
            tell(StaleStateWarning(f"{what}: it cannot be gone back to. {KEEP}."), aloud=True)

    def _places(self) -> dict[int, int]:
        """Return the place of each leaf in the param groups, which users may edit, by its id."""
        params = (leaf for group in self.opt.param_groups for leaf in group["params"])
        return {id(leaf): place for place, leaf in enumerate(params)}

    def _entries(self) -> list[dict[str, Any] | None]:
        """Return each leaf's state as state dicts have it, None if it has none; on one node."""
        entries, places = self.opt.state_dict()["state"], self._places()
        return [entries.get(places.get(id(leaf))) for leaf in self.opt.leaves]

    @property
    def _has_products(self) -> bool:
        return "mu_product" in self.opt.rule.count_keys

    def _counts(self, num_params: int, entries: Sequence[Any] | None = None) -> tuple[Any, Any]:
        """Return ``step`` and ``mu_product`` of ``Fields``, on several nodes without entries."""
        leaves = self.opt.leaves[:num_params]
        if entries is None:
            counts, index_of = self.opt.core.step_counts, self.opt.core.parts.registry.index_of
            indices = [index_of(leaf) for leaf in leaves]
            found = [None if index is None else counts[index] for index in indices]
            pairs = [(0, 1.0) if each is None else (each.step, each.mu_product) for each in found]
        else:
            pairs = [
                (0, 1.0) if entry is None else (entry["step"], entry.get("mu_product", 1.0))
                for entry in entries[:num_params]
            ]
        steps, products = (np.array([pair[i] for pair in pairs]) for i in range(2))
        bits = products.astype(np.float64).view(np.uint32).reshape(-1, 2)
        return steps.astype(np.int32), bits if self._has_products else None

    def _views(self, entries: Sequence[Any], num_params: int) -> list[dict[str, FloatArray]]:
        """Return views of the arrays of each parameter's state, in its shape; on one node."""
        views = []
        leaves = self.opt.leaves[:num_params]
        for entry, leaf, specs in zip(entries, leaves, self._specs(leaves), strict=False):
            views.append(
                {
                    each.key: np.zeros(leaf.data.shape, each.value_dtype)
                    if entry is None
                    else entry[each.key]
                    for each in specs
                }
            )
        return views

    def _specs(self, leaves: Sequence[Leaf]) -> list[tuple[StateSpec, ...]]:
        """Return the arrays of the state of each parameter."""
        registry = self.opt.core.parts.registry
        params = registry.partition.params
        indices = [registry.index_of(leaf) for leaf in leaves]
        return [
            state_specs(leaf.data.dtype.name) if index is None else params[index].spec.state
            for leaf, index in zip(leaves, indices, strict=True)
        ]

    def _token(self) -> Any:
        return np.array([_PROCESS_ID, self._id, *divmod(self.version, 1 << 32)], np.uint32)


def _copy_tree(
    key: str, views: Sequence[Mapping[str, FloatArray]], leaves: Sequence[Leaf], structure: Any
) -> Any:
    """Return copies of one array of each parameter's state as a tree; None where it has none."""
    copies = [
        jax.device_put(aligned_copy(view[key]), leaf.placement) if key in view else None
        for view, leaf in zip(views, leaves, strict=False)
    ]
    return jax.tree_util.tree_unflatten(structure, copies)


def _kept_entries(fields: Fields, specs: Sequence[tuple[StateSpec, ...]]) -> list[dict[str, Any]]:
    """Return the arrays of each parameter's state, as they are in a kept state.

    Raises:
        CheckpointError: Some are missing, or cannot be read.
    """
    entries: list[dict[str, Any]] = [{} for _ in specs]
    for key in _ARRAY_KEYS:
        having = [
            entry
            for entry, arrays in zip(entries, specs, strict=True)
            if any(each.key == key for each in arrays)
        ]
        values = jax.tree_util.tree_leaves(getattr(fields, key))
        _require(len(values) == len(having), key, f"{len(having)} arrays", len(values))
        for entry, value in zip(having, values, strict=True):
            entry[key] = _read(key, value)
    return entries


def _kept_counts(fields: Fields, num_params: int, *, has_products: bool) -> list[dict[str, float]]:
    """Return the step count of each parameter, as it is in a kept state.

    Raises:
        CheckpointError: They do not fit.
    """
    step = _read("step", fields.step)
    _require(step.shape == (num_params,), "step", f"shape {(num_params,)}", step.shape)
    if not has_products:
        got = "one, as NAdam's have"
        _require(fields.mu_product is None, "mu_product", "no value with this optimizer", got)
        return [{"step": float(number)} for number in step]
    bits = _read("mu_product", fields.mu_product)
    _require(bits.shape == (num_params, 2), "mu_product", f"shape {(num_params, 2)}", bits.shape)
    _require(bits.dtype.kind in "iu", "mu_product", "integers", bits.dtype)
    # A state of zeros is a new one, as it is in optax.
    products = np.ascontiguousarray(bits.astype(np.uint32)).view(np.float64).reshape(-1)
    return [
        {"step": float(number), "mu_product": float(product) if number else 1.0}
        for number, product in zip(step, products, strict=True)
    ]


def _read(key: str, value: Any) -> Any:
    try:
        return np.asarray(value)
    except (RuntimeError, TypeError, ValueError) as error:  # deleted, or on other hosts
        got = str(error).partition("\n")[0].rstrip(".")
        raise CheckpointError(
            f"{key} of the state must be readable; got {got}. {_AS_RETURNED}."
        ) from error


def _require(condition: bool, key: str, rule: str, got: object) -> None:
    if not condition:
        raise CheckpointError(f"{key} of the state must have {rule}; got {got}. {_AS_RETURNED}.")


def _is_same(given: Any, present: Any) -> bool:
    """Whether two arrays are equal bit for bit."""
    array = np.asarray(given)
    if array.dtype != present.dtype or array.shape != present.shape:
        return False
    bits = f"u{present.dtype.itemsize}"
    return np.array_equal(np.ascontiguousarray(array).view(bits), present.view(bits))


def _are_all(left: Sequence[Any], right: Sequence[Any], holds: Callable[[Any, Any], bool]) -> bool:
    return len(left) == len(right) and all(map(holds, left, right))


_AS_RETURNED = "Pass what init or update returned, or what was saved of it"
_PARTIAL = (
    "the leaves of the state have no moments, as each node has a part of them: what is saved of it "
    "cannot be resumed from. Save state.optimizer with shardopt.checkpoint."
)
_NOT_PRESENT = (
    "state must be the present one on several nodes, where its leaves have no moments; got another "
    "one. Save state.optimizer with shardopt.checkpoint, and load that to go back."
)
