"""NAdam for models written in JAX: ``from shardopt.jax import NAdam``.

[Note: arrays that never change]
``jax.device_put`` and DLPack lay a jax array over a NumPy buffer on a multiple of 64 bytes, also
with ``may_alias=False``, and parameters in the windows start on such multiples. Arrays handed out
are therefore made from copies that nobody else knows. These start on such a multiple too: then JAX
takes them over as they are and does not copy them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import numpy as jnp

from shardopt.core.optimizer import Optimizer
from shardopt.errors import PartitionError
from shardopt.layout.dtypes import DTYPES, compute_dtype
from shardopt.params.adapter import ArrayAdapter
from shardopt.params.groups import defaults_of, make_groups
from shardopt.policy import ShardPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI

    from shardopt._typing import FloatArray
    from shardopt.params.groups import Group

__all__ = ["NAdam", "nadam"]

_TREES = {"data": "params", "grad": "grads"}
_ALIGNMENT_NBYTES = 64  # XLA's; see [Note: arrays that never change]


class _Leaf:
    """One leaf of the parameters, and what ``param_groups`` shows of it.

    Attributes:
        name: Its path in the tree, for messages.
        data: Its value, in the window.
        grad: Its gradient, [same shape and dtype], or None.
        placement: The sharding that was chosen for it, or None for JAX's choice.
    """

    __slots__ = ("data", "grad", "name", "placement")

    def __init__(self, name: str, data: FloatArray, placement: Any) -> None:
        self.name = name
        self.data = data
        self.grad: FloatArray | None = None
        self.placement = placement

    def __repr__(self) -> str:
        return f"<{self.name}, shape={self.data.shape}>"


class NAdam(Optimizer[_Leaf]):
    """NAdam as torch.optim.NAdam computes it, sharded over MPI ranks; pytrees in and out.

    Arrays that are handed out never change: every step makes new ones, a copy on each rank beside
    the node's own in the windows. They are put on the devices on which those given had been put.
    Parameters are named by their paths in the tree and form one param group.

    Steps run on the host, outside of ``jax.jit``: compile what computes the gradients.

    Collective: construction and most methods; see ``Optimizer`` for those and for the errors.

    Args:
        params: Pytree of arrays, [any shape] each, in float16, bfloat16, float32 or, with
            ``jax_enable_x64``, float64; rank 0's values win. It is not changed.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the square root of the second moment.
        weight_decay: Added to the gradient, or taken off the parameter when decoupled.
        momentum_decay: psi of the momentum schedule.
        decoupled_weight_decay: Decay weights as AdamW does.
        variant: Whose NAdam: ``torch``, ``keras``, ``optax`` or ``lucid``.
        maximize: Follow the gradient instead of descending it.
        max_grad_norm: Clip the global norm of the averaged gradient to this.
        comm: The ranks that train together; None is COMM_WORLD.
        policy: How to shard.

    Example:
        >>> with NAdam(params, lr=0.1) as opt:
        ...     params = opt.params
        ...     for batch in batches:
        ...         params = opt.step(grad_of_loss(params, batch))
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        variant: str = "torch",
        maximize: bool = False,
        max_grad_norm: float | None = None,
        comm: MPI.Intracomm | None = None,
        policy: ShardPolicy | None = None,
    ) -> None:
        defaults = defaults_of(locals())
        self._leaves: list[_Leaf] = []
        self._offered: tuple[Any, Any] = None, None

        def make() -> list[Group]:
            self._leaves, self._structure = _make_leaves(params)
            return make_groups(self._leaves, defaults)

        super().__init__(
            make,
            face=_JaxAdapter(),
            defaults=defaults,
            max_grad_norm=max_grad_norm,
            comm=comm,
            policy=policy or ShardPolicy(),
        )

    @property
    def params(self) -> Any:
        """The current values as a pytree of new arrays."""
        copies = [_aligned_copy(leaf.data) for leaf in self._leaves]
        arrays = jax.device_put(copies, [leaf.placement for leaf in self._leaves])
        return jax.tree_util.tree_unflatten(self._structure, arrays)

    @property
    def count(self) -> int:
        """Steps taken, those of a loaded state included: what an optax schedule is asked for."""
        return max(clock.step for clock in self.step_counts)

    def step(  # type: ignore[override]  # gradients cannot be found anywhere, they are given
        self,
        grads: Any,
        params: Any = None,
        *,
        loss_scale: float = 1.0,
        overflowed: bool = False,
    ) -> Any:
        """Average the gradients over ranks and update the parameters.

        Collective: every rank.

        Args:
            grads: This rank's gradients, a pytree like the parameters, in their shapes and dtypes.
                None in the place of a leaf: this rank has no gradient of it. A parameter that has
                none on any rank stays as it is.
            params: What the parameters are before the step, for those who change what they were
                handed out; where ranks change the same one, the lowest rank's value wins. None, for
                all or in the place of a leaf: they are what the optimizer has.
            loss_scale: See ``Optimizer.step``.
            overflowed: See ``Optimizer.step``.

        Returns:
            The new parameters, as ``params`` gives them.

        Raises:
            PartitionError: ``grads`` or ``params`` is another tree than the optimizer's, or holds
                an array of another shape or dtype, or a tracer.
            HyperparamsError: A hyperparameter in ``param_groups`` is out of range.
            RankMismatchError: Ranks have different hyperparameters or make different calls.
            RankFailureError: A rank did not come within ``policy.timeout_s``.
        """
        views = [leaf.data for leaf in self._leaves]
        self._offered = grads, params
        try:
            super().step(loss_scale=loss_scale, overflowed=overflowed)
        finally:  # a step that was refused takes over nothing
            self._offered = None, None
            for leaf, view in zip(self._leaves, views, strict=True):
                leaf.data, leaf.grad = view, None
        return self.params

    def _prepare_step(self) -> None:
        """Put what ``step`` was given where the face finds it."""
        grads, params = self._offered
        new_grads = _arrays_like("grad", grads, self._structure, self._leaves)
        new_data: list[FloatArray | None] = [None] * len(self._leaves)
        if params is not None:
            new_data = _arrays_like("data", params, self._structure, self._leaves)
        for leaf, grad, data in zip(self._leaves, new_grads, new_data, strict=True):
            leaf.grad = grad
            if data is not None and not _is_same(data, leaf.data):
                leaf.data = data


# The optimizer is no data: under tree_map, and as optax's state, it has no leaves.
jax.tree_util.register_pytree_node(NAdam, lambda opt: ((), opt), lambda opt, _: opt)


def nadam(lr: float | Callable[[int], Any] = 2e-3, **settings: Any) -> Any:
    """Give ``NAdam`` as an ``optax.GradientTransformation``.

    ``init(params)`` builds the optimizer, which is the state; call its ``close()`` in the end.
    ``update(grads, opt, params)`` steps and gives new minus old parameters, from which
    ``optax.apply_updates`` makes the new ones up to one rounding of the difference and one of the
    sum; 16-bit parameters get float32 differences, which leave nothing to round. Parameters that
    are passed and are not the optimizer's, be it by such rounding, take their place, which costs a
    copy: ``NAdam`` itself is faster.

    Limits: ``init`` and ``update`` are collective and run outside of ``jax.jit``. Transformations
    chained before it see this rank's gradients, not yet averaged.

    Args:
        lr: Learning rate, or an optax schedule: a function of the number of steps taken.
        **settings: As ``NAdam`` takes them.

    Raises:
        ImportError: optax is not installed.
    """
    try:
        import optax  # here: an extra of an extra
    except ImportError as error:
        raise ImportError(
            "optax must be installed for shardopt.jax.nadam; got none. Run pip install optax, or "
            "use shardopt.jax.NAdam."
        ) from error

    def rate(count: int) -> float:
        with jax.ensure_compile_time_eval():  # under jax.jit the step is to say what is wrong
            return float(lr(count)) if callable(lr) else lr

    def init(params: Any) -> NAdam:
        return NAdam(params, rate(0), **settings)

    def update(grads: Any, opt: NAdam, params: Any = None) -> tuple[Any, NAdam]:
        if callable(lr):
            opt.param_groups[0]["lr"] = rate(opt.count)
        old = opt.params if params is None else params
        return jax.tree_util.tree_map(_difference, opt.step(grads, params), old), opt

    return optax.GradientTransformation(init, update)


class _JaxAdapter(ArrayAdapter[_Leaf]):
    """See ``Adapter``."""

    def name(self, param: _Leaf) -> str | None:
        if not isinstance(param, _Leaf):
            raise PartitionError(
                f"params must be one pytree, given at once; got a {type(param).__name__} later. "
                "Build a new optimizer for the larger tree."
            )
        return param.name

    def data(self, param: _Leaf, name: str) -> FloatArray:
        return param.data

    def grad(self, param: _Leaf, name: str) -> FloatArray | None:
        return param.grad


def _make_leaves(params: Any) -> tuple[list[_Leaf], Any]:
    """Flatten the parameters; also gives the tree's structure."""
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves: list[_Leaf] = []
    starts: set[int] = set()
    for path, value in paths:
        name = _name_of(path)
        array = _as_array("data", name, value)
        if array.dtype != jax.dtypes.canonicalize_dtype(array.dtype):
            raise PartitionError(
                f"data of parameter {name!r} must be of a dtype that JAX keeps; got {array.dtype}. "
                "Set jax_enable_x64, or convert it with .astype(np.float32)."
            )
        if array.ctypes.data in starts:  # two leaves of one value may share an array: no tie
            array = array.copy()
        starts.add(array.ctypes.data)
        chosen = isinstance(value, jax.Array) and value.committed
        leaves.append(_Leaf(name, array, value.sharding if chosen else None))
    return leaves, structure


def _arrays_like(
    what: str, tree: Any, structure: Any, leaves: Sequence[_Leaf]
) -> list[FloatArray | None]:
    """Flatten a tree that must be like the parameters, but for None in the place of leaves."""
    try:
        values = structure.flatten_up_to(tree)
    except ValueError as error:
        difference = _describe_difference(tree, leaves) or str(error).partition(".")[0]
        raise PartitionError(
            f"{_TREES[what]} must be a tree like the optimizer's params; got {difference}. "
            "Pass what jax.grad gives for these params, or they themselves."
        ) from error
    return [
        None if value is None else _as_array(what, leaf.name, value)
        for value, leaf in zip(values, leaves, strict=True)
    ]


def _describe_difference(tree: Any, leaves: Sequence[_Leaf]) -> str | None:
    """Name the first leaf that only one of the two trees has, or None."""
    try:
        paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is None)
    except ValueError:  # keys of a dict that cannot be sorted
        return None
    given = {_name_of(path): value for path, value in paths}
    wanted = [leaf.name for leaf in leaves]
    for name in wanted:
        if name not in given:
            return f"nothing for {name!r}"
    others = (name for name, value in given.items() if name not in wanted and value is not None)
    return next((f"something for {name!r}" for name in others), None)


def _name_of(path: Any) -> str:
    return jax.tree_util.keystr(path) or "params"  # an array alone is a tree too


def _as_array(what: str, name: str, value: Any) -> FloatArray:
    """Give a leaf as NumPy has it, without a copy where its memory is the CPU's."""
    array, problem = None, ""
    if isinstance(value, jax.core.Tracer):
        problem = "known when the optimizer is called; got a tracer. Call it outside of jax.jit"
    elif type(value) is float:
        array = np.asarray(value, jnp.result_type(float))
    else:
        try:
            array = np.asarray(value)
        except (RuntimeError, TypeError, ValueError) as error:  # deleted, on other hosts, a key
            got = str(error).partition("\n")[0].rstrip(".")
            problem = f"readable as a NumPy array; got {got}. Pass arrays that this process holds"
    if array is not None and array.dtype.name not in DTYPES:
        got = str(array.dtype) if hasattr(value, "dtype") else type(value).__name__
        problem = f"of dtype {', '.join(DTYPES)}; got {got}. Convert it, or keep it elsewhere"
    if array is None or problem:
        raise PartitionError(f"{what} of parameter {name!r} must be {problem}.")
    return array


def _is_same(left: FloatArray, right: FloatArray) -> bool:
    return left.dtype == right.dtype and np.array_equal(left, right)


def _aligned_copy(array: FloatArray) -> FloatArray:
    """Copy to memory of its own; see [Note: arrays that never change]."""
    raw = np.empty(array.nbytes + _ALIGNMENT_NBYTES, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT_NBYTES
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _difference(new: Any, old: Any) -> Any:
    """What ``optax.apply_updates`` has to add; wider than 16 bits, which it rounds to."""
    dtype = compute_dtype(new.dtype.name)
    return new.astype(dtype) - jnp.asarray(old, dtype)
