"""A sharded optimizer behind optax's interface."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import jax
import numpy as np
from jax import numpy as jnp

from shardopt.comm.consensus import Outcome, attempt
from shardopt.core.state_dict import packed_groups
from shardopt.errors import CheckpointError, HyperparamsError, PartitionError
from shardopt.jax.adapter import require_untraced
from shardopt.jax.optimizer import Inputs, ShardedOptimizer, raise_on_all
from shardopt.jax.residence import Fields, Residence
from shardopt.jax.state import NAdamState
from shardopt.layout.dtypes import compute_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mpi4py import MPI

    from shardopt.policy import ShardPolicy
    from shardopt.rule.hyperparams import Rule

__all__ = ["make_transformation"]


def make_transformation(optimizer: type[ShardedOptimizer], arguments: Mapping[str, Any]) -> Any:
    """Return an ``optax.GradientTransformationExtraArgs`` that runs an optimizer.

    Args:
        optimizer: The class.
        arguments: Those of a function like ``nadam``, by name.

    Raises:
        ImportError: optax is not installed.
    """
    name = optimizer.rule.name
    try:
        import optax  # here, because only this function needs it
    except ImportError as error:
        raise ImportError(
            f"optax must be installed for shardopt.jax.{name.lower()}; got none. Run pip install "
            f"optax, or use shardopt.jax.{name}."
        ) from error
    settings = attempt(_settings_of, optimizer.rule, arguments)  # init and update raise, on all
    origin = arguments["comm"], arguments["policy"]
    keep_states = bool(arguments["keep_states"])
    transformation = _Transformation(optimizer, settings, *origin, keep_states=keep_states)
    return optax.GradientTransformationExtraArgs(transformation.init, transformation.update)


class _Plan(NamedTuple):
    """The arguments of an update, checked.

    Attributes:
        structure: Of the parameters.
        inputs: Of the step.
        state: To be loaded first, as state dicts have it; None if it is the present one.
        settings: The hyperparameters.
    """

    structure: Any
    inputs: Inputs
    state: dict[int, Any] | None
    settings: dict[str, Any]


class _Transformation:
    """The two functions of ``nadam`` and its like.

    Args:
        optimizer: The class of the optimizer.
        settings: Hyperparameters, maybe in arrays, and the learning rate maybe as a schedule; or
            an error that all ranks will raise.
        comm: See ``NAdam``.
        policy: Likewise.
        keep_states: See ``nadam``.
    """

    def __init__(
        self,
        optimizer: type[ShardedOptimizer],
        settings: Outcome[dict[str, Any]],
        comm: MPI.Intracomm | None,
        policy: ShardPolicy | None,
        *,
        keep_states: bool,
    ) -> None:
        self._optimizer = optimizer
        self._settings = settings
        self._origin = comm, policy
        self._keep_states = keep_states
        self._newest: ref[Residence] | None = None
        _register_with_flax()

    def init(self, params: Any) -> NAdamState:
        """Build the optimizer. Collective: every rank."""
        _register_with_flax()
        residence = self._build(params)
        if self._keep_states and not residence.is_whole:
            residence.opt.close()
            raise HyperparamsError(
                "keep_states must be False on several nodes; got True. Save state.optimizer with "
                "shardopt.checkpoint to go back to it."
            )
        return self._show(residence, jax.tree_util.tree_structure(params))

    def update(
        self,
        grads: Any,
        state: NAdamState,
        params: Any = None,
        *,
        loss_scale: float = 1.0,
        overflowed: bool = False,
        **_others: Any,
    ) -> tuple[Any, NAdamState]:
        """Take a step from a state. Collective: every rank."""
        residence = self._residence_of(state, params)
        opt = residence.opt
        plan, error = attempt(self._plan, residence, state, grads, params)
        if plan is not None:
            _, error = attempt(_apply, plan.settings, residence)
        if plan is not None and plan.state is not None and error is None:
            before, groups = residence.version, packed_groups(opt.param_groups)
            opt.load_state_dict({"state": plan.state, "param_groups": groups})
            residence.leave(before)
        before = residence.version
        old = [] if plan is None else _values_before(plan.structure, params, opt)
        inputs = Outcome(None if plan is None or error else plan.inputs, error)
        opt.advance(inputs, loss_scale=loss_scale, overflowed=overflowed)
        assert plan is not None
        if residence.version != before:  # else the step was skipped
            residence.leave(before)
        new = jax.tree_util.tree_leaves(opt.params)[: len(old)]
        updates = jax.tree_util.tree_unflatten(plan.structure, map(_difference, new, old))
        return updates, self._show(residence, plan.structure)

    def _build(self, params: Any, error: Exception | None = None) -> Residence:
        """Build an optimizer, or raise an error of this rank on all. Collective: every rank."""
        first, failed = attempt(self._first, params)
        if (wrong := error or failed) is not None:
            raise_on_all(wrong, self._optimizer.rule, *self._origin)
        assert first is not None
        (some, settings), (comm, policy) = first, self._origin
        residence = Residence()
        make: Any = self._optimizer  # each has a signature of its own
        residence.optimizer = make(some, **settings, comm=comm, policy=policy)
        residence.settings, residence.origin = settings, self._origin
        self._newest = ref(residence)
        return residence

    def _first(self, params: Any) -> tuple[Any, dict[str, Any]]:
        """Return the parameters and the hyperparameters to build an optimizer with."""
        require_untraced()
        # An optimizer must have something; a subtree that optax.multi_transform selects need not.
        some = params if jax.tree_util.tree_leaves(params) else np.zeros(0, np.float32)
        return some, self._values(0)

    def _show(self, residence: Residence, structure: Any) -> NAdamState:
        state = NAdamState(residence, None, structure, is_live=True)
        if self._keep_states:
            state.fields  # noqa: B018 (copies them)
        return state

    def _residence_of(self, state: Any, params: Any) -> Residence:
        """Return where a state is to be updated; build an optimizer for one that has none.

        Collective: every rank, if it has none.
        """
        newest = None if self._newest is None else self._newest()
        if isinstance(state, NAdamState):
            if state.is_live or state.residence.is_open:
                return state.residence
            if params is None:
                return self._build(params, _no_params("a state that was unpickled or closed"))
            fits = newest is not None and newest.has_like(params)
            state.residence = newest if newest is not None and fits else self._build(params)
            return state.residence
        return self._build(params, _not_a_state(state)) if newest is None else newest

    def _plan(self, residence: Residence, state: Any, grads: Any, params: Any) -> _Plan:
        """Check the arguments of an update; nothing changes.

        Raises:
            PartitionError: The trees do not fit, or something must be done outside of JAX.
            CheckpointError: The state does not.
            HyperparamsError: It comes from another transformation.
        """
        if not isinstance(state, NAdamState):
            raise _not_a_state(state)
        if not state.is_live and not isinstance(state.fields, Fields):
            raise _not_a_state(state.fields)
        residence.warn_of_stale()  # here, as warnings may be errors
        structure = state.structure
        if structure is None:  # a kept state of several nodes
            structure = jax.tree_util.tree_structure(grads if params is None else params)
        inputs = residence.read(structure, grads, params)
        if self._origin != residence.origin:
            raise HyperparamsError(
                "comm and policy must be those that the state was made with; got others. Call init "
                "of the new transformation."
            )
        kept = None
        if not state.is_live:
            kept = residence.differing(state.fields, structure.num_leaves)
        settings = self._values(state.count)
        reason = "weight_decay" if settings["weight_decay"] else "a state of another step"
        if params is None and (settings["weight_decay"] or kept is not None):
            raise _no_params(reason)
        return _Plan(structure, inputs, kept, settings)

    def _values(self, count: int) -> dict[str, Any]:
        """Return the hyperparameters as numbers, the learning rate after ``count`` steps.

        Raises:
            HyperparamsError: One is out of range.
        """
        settings, error = self._settings
        if settings is None:
            assert error is not None
            raise error
        values = {key: _plain(value) for key, value in settings.items() if key != "lr"}
        lr = settings["lr"]
        values["lr"] = _plain(lr(count) if callable(lr) else lr)
        rule = self._optimizer.rule
        rule(**{name: value for name, value in values.items() if name in rule.names()})
        return values


def _values_before(structure: Any, params: Any, opt: ShardedOptimizer) -> list[Any]:
    """Return the value of each parameter before the step: as passed, else the optimizer's."""
    given = [None] * structure.num_leaves if params is None else structure.flatten_up_to(params)
    if all(each is not None for each in given):
        return list(given)
    own = jax.tree_util.tree_leaves(opt.params)
    return [mine if each is None else each for each, mine in zip(given, own, strict=True)]


def _apply(settings: dict[str, Any], residence: Residence) -> None:
    """Set the hyperparameters that this transformation has others of than the last update.

    What users write into ``param_groups`` in between stays.
    """
    opt, last = residence.opt, residence.settings
    for key, value in settings.items():
        if key in last and value == last[key]:
            continue
        if key == "max_grad_norm":
            opt.max_grad_norm = value
        else:
            opt.param_groups[0][key] = value
    residence.settings = settings


def _difference(new: Any, old: Any) -> Any:
    """Return ``new - old`` in at least float32; ``optax.apply_updates`` rounds the sum."""
    dtype = compute_dtype(new.dtype.name)
    return new.astype(dtype) - jnp.asarray(old, dtype)


def _plain(value: Any) -> Any:
    """Return a hyperparameter without arrays, so that it does not change in place."""
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value.item() if hasattr(value, "dtype") and np.ndim(value) == 0 else value


def _settings_of(rule: Rule, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters among the arguments of ``nadam`` or its like.

    Raises:
        HyperparamsError: They contradict one another, or are not supported.
    """
    for name, (only, remedy) in _REFUSED.items():
        if name in arguments:
            _refuse(name, arguments[name], only, remedy)
    for name, other in (("lr", "learning_rate"), ("betas", "b1"), ("betas", "b2")):
        if arguments[name] is not None and arguments[other] is not None:
            raise HyperparamsError(
                f"{name} must be given once; got {other} as well. Leave one of them out."
            )
    usual = rule()
    lr, b1, b2 = (
        next((arguments[name] for name in names if arguments[name] is not None), default)
        for *names, default in (
            ("lr", "learning_rate", usual.lr),
            ("b1", usual.betas[0]),
            ("b2", usual.betas[1]),
        )
    )
    betas = (b1, b2) if arguments["betas"] is None else arguments["betas"]
    others = {name: arguments[name] for name in rule.names() if name in arguments}
    return {**others, "lr": lr, "betas": betas, "max_grad_norm": arguments["max_grad_norm"]}


_REFUSED: dict[str, tuple[Any, str]] = {
    "eps_root": (0.0, "Use eps, which is added to the root itself"),
    "mu_dtype": (None, "Leave it out: moments are float32, or float64"),
    "mask": (
        None,
        "Move the leaves without decay to a param group of state.optimizer that has weight_decay=0",
    ),
    "nesterov": (False, "Use shardopt.jax.nadam with variant='optax'"),
    "threshold": (5.0, "Leave it out"),
}
"""The arguments of optax that a step lacks: the only value, and what to do instead."""


def _refuse(name: str, value: Any, only: Any, remedy: str) -> None:
    """Raise if an argument of optax that is not to be had is given."""
    if isinstance(value, jax.core.Tracer):  # update will raise
        return
    if value is not None and (only is None or value != only):
        raise HyperparamsError(f"{name} must be {only}; got {value!r}. {remedy}.")


def _no_params(reason: str) -> PartitionError:
    return PartitionError(f"params must be given with {reason}; got None. Pass them to update.")


def _not_a_state(state: Any) -> CheckpointError:
    return CheckpointError(
        f"state must be one of shardopt.jax; got {type(state).__name__}. Pass what init or "
        "update returned."
    )


def _register_with_flax() -> None:
    """Register states with flax.serialization, if it is loaded."""
    flax: Any = sys.modules.get("flax.serialization")
    if flax is None or flax.is_serializable(NAdamState):
        return

    def save(state: NAdamState) -> dict[str, Any]:
        return {key: flax.to_state_dict(value) for key, value in state.fields._asdict().items()}

    def restore(state: NAdamState, saved: dict[str, Any]) -> NAdamState:
        if saved.keys() != set(Fields._fields):
            raise CheckpointError(
                f"a saved state must have the fields {', '.join(Fields._fields)}; got "
                f"{', '.join(saved)}. Restore what shardopt.jax has saved."
            )
        own = state.fields._asdict()
        fields = {k: flax.from_state_dict(own[k], saved[k], name=k) for k in Fields._fields}
        return NAdamState(state.residence, Fields(**fields))

    flax.register_serialization_state(NAdamState, save, restore)
