"""NAdam for models written in lucid: ``from shardopt.lucid import NAdam``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from lucid import Tensor
from lucid.nn import Parameter
from lucid.optim import Optimizer as LucidOptimizer

from shardopt.comm.consensus import attempt
from shardopt.core.front_end import InPlaceFrontEnd
from shardopt.core.optimizer import Optimizer
from shardopt.errors import PartitionError
from shardopt.params.adapter import ArrayAdapter, array_error
from shardopt.params.groups import defaults_of, make_groups
from shardopt.policy import ShardPolicy
from shardopt.rule.nadam import mu_product_at

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mpi4py import MPI

    from shardopt._typing import FloatArray
    from shardopt.rule.nadam import Hyperparams

__all__ = ["NAdam"]


@LucidOptimizer.register  # for isinstance() alone: it inherits none of lucid's methods
class NAdam(InPlaceFrontEnd):
    """The NAdam of the paper and of torch, in place of lucid.optim.NAdam, sharded over MPI ranks.

    ``variant="lucid"`` computes the numbers of lucid.optim.NAdam instead. Those are not NAdam's:
    lucid has no momentum schedule, shrinks ``exp_avg`` by ``1 - momentum_decay`` at every step and
    corrects the bias twice, so that early steps are a third as long.

    Arguments have lucid's order, and lucid's schedulers accept this optimizer. Either optimizer
    loads the state dicts of the other; ``mu_product``, which lucid does not keep, is then computed
    from ``step``.

    Collective: construction and most methods; see ``core.Optimizer`` for those and for the errors.

    Args:
        params: ``model.parameters()``, (name, parameter) pairs, or dicts with ``params`` and
            hyperparameters.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the square root of the second moment.
        weight_decay: Added to the gradient, or subtracted from the parameter when decoupled.
        momentum_decay: psi of the momentum schedule.
        variant: The NAdam to follow: ``torch``, ``keras``, ``optax`` or ``lucid``.
        decoupled_weight_decay: Decay weights as AdamW does.
        maximize: Follow the gradient instead of descending it.
        max_grad_norm: Clip the global norm of the averaged gradient to this.
        comm: The ranks that train together; None is COMM_WORLD.
        policy: How to shard.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> with NAdam(model.parameters(), lr=0.01) as opt:
        ...     for x, y in batches:  # its own on each rank
        ...         opt.zero_grad()
        ...         loss = ((model(x) - y) ** 2).mean()
        ...         loss.backward()
        ...         opt.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        *,
        variant: str = "torch",
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        comm: MPI.Intracomm | None = None,
        policy: ShardPolicy | None = None,
    ) -> None:
        defaults = defaults_of(locals())
        self.core = Optimizer(
            attempt(make_groups, params, defaults),
            adapter=_LucidAdapter(),
            defaults=defaults,
            max_grad_norm=max_grad_norm,
            comm=comm,
            policy=policy or ShardPolicy(),
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set gradients to None, as lucid does, or zero this rank's gradients in place.

        Args:
            set_to_none: Set them to None; ``step`` skips a parameter whose gradient is None on
                every rank. With False, backward adds to shared memory in place: ``step`` then
                copies nothing, and no two parameters hold the same array, to which lucid would add
                twice.
        """
        super().zero_grad(set_to_none)


class _LucidAdapter(ArrayAdapter[Parameter]):
    """See ``Adapter``."""

    def name(self, param: Parameter) -> str | None:
        if not isinstance(param, Parameter):
            raise PartitionError(
                f"params must hold lucid.nn.Parameter; got {type(param).__name__}. "
                "Pass model.parameters(), or wrap tensors: nn.Parameter(tensor)."
            )
        return None

    def data(self, param: Parameter, name: str) -> FloatArray:
        return _dense_array("data", name, param.data)

    def value(self, value: Any, name: str) -> FloatArray:
        return _dense_array("data", name, value)

    def grad(self, param: Parameter, name: str) -> FloatArray | None:
        if param.grad is None:
            return None
        grad = _dense_array("grad", name, param.grad)
        dtype = self.data(param, name).dtype
        with np.errstate(over="ignore"):  # policy.check_finite finds overflows
            # Gradients may be wider than their parameter: float64 inputs make float64 gradients.
            return grad.astype(dtype, casting="same_kind", copy=False)

    def read_entry(self, entry: Mapping[str, Any], hyper: Hyperparams) -> Mapping[str, Any]:
        if "mu_product" in entry:
            return entry
        return {**entry, "mu_product": mu_product_at(float(entry["step"]), hyper)}


def _dense_array(role: str, name: str, value: Any) -> FloatArray:
    if isinstance(value, Tensor):  # Embedding.reset_parameters() assigns one
        value = value.data
    if isinstance(value, np.generic):  # the results of arithmetic with 0-d arrays
        value = np.asarray(value)
    if not isinstance(value, np.ndarray):
        got = f"{type(value).__module__}.{type(value).__name__}"
        remedy = "Move the model to the CPU: model.to('cpu')"
        raise array_error(role, name, rule="a NumPy array", got=got, remedy=remedy)
    got = f"dtype {value.dtype}"
    if value.dtype.kind == "c":
        remedy = "Train the real and the imaginary part as two parameters"
        raise array_error(role, name, rule="real", got=got, remedy=remedy)
    if value.dtype.kind != "f":
        remedy = "Convert it: .astype(lucid.Float32)"
        raise array_error(role, name, rule="floating point", got=got, remedy=remedy)
    array: FloatArray = value
    return array
