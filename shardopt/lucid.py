"""NAdam for models written in lucid: ``from shardopt.lucid import NAdam``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from lucid import Tensor
from lucid.nn import Parameter
from lucid.optim import Optimizer as LucidOptimizer

from shardopt.core.optimizer import Optimizer
from shardopt.errors import PartitionError
from shardopt.params.adapter import ArrayAdapter
from shardopt.params.groups import defaults_of, make_groups
from shardopt.policy import ShardPolicy
from shardopt.rule.nadam import mu_product_at

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mpi4py import MPI

    from shardopt._typing import FloatArray
    from shardopt.rule.nadam import Hyperparams

__all__ = ["NAdam"]


@LucidOptimizer.register  # an instance of lucid's by name, with none of its methods
class NAdam(Optimizer[Parameter]):
    """The NAdam of the paper and of torch, in place of lucid.optim.NAdam, sharded over MPI ranks.

    ``variant="lucid"`` gives the numbers of lucid.optim.NAdam instead. Those are not NAdam's: lucid
    has no momentum schedule, shrinks ``exp_avg`` by ``1 - momentum_decay`` at every step and
    corrects the bias twice, so that early steps are a third as long.

    Arguments stand in lucid's order; state dicts go both ways, and ``mu_product``, which lucid does
    not keep, is rebuilt from ``step``. lucid's schedulers take this optimizer as one of lucid's.

    Collective: construction and most methods; see ``Optimizer`` for those and for the errors.

    Args:
        params: ``model.parameters()``, (name, parameter) pairs, or dicts with ``params`` and
            hyperparameters.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the square root of the second moment.
        weight_decay: Added to the gradient, or taken off the parameter when decoupled.
        momentum_decay: psi of the momentum schedule.
        variant: Whose NAdam: ``torch``, ``keras``, ``optax`` or ``lucid``.
        decoupled_weight_decay: Decay weights as AdamW does.
        maximize: Follow the gradient instead of descending it.
        max_grad_norm: Clip the global norm of the averaged gradient to this.
        comm: The ranks that train together; None is COMM_WORLD.
        policy: How to shard.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> with NAdam(model.parameters(), lr=0.01) as opt:
        ...     for x, y in batches:  # each rank its own
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
        super().__init__(
            lambda: make_groups(params, defaults),
            face=_LucidAdapter(),
            defaults=defaults,
            max_grad_norm=max_grad_norm,
            comm=comm,
            policy=policy or ShardPolicy(),
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Give the parameters no gradient, as lucid does, or zero this rank's gradients in place.

        Args:
            set_to_none: A parameter without a gradient on any rank is skipped by ``step``. With
                False backward adds to memory that the ranks share: nothing need be copied there,
                and no two parameters hold the same array, which lucid would add to twice.
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
        return _dense("data", name, param.data)

    def grad(self, param: Parameter, name: str) -> FloatArray | None:
        if param.grad is None:
            return None
        grad = _dense("grad", name, param.grad)
        dtype = self.data(param, name).dtype
        with np.errstate(over="ignore"):  # policy.check_finite is for that
            return grad.astype(dtype, casting="same_kind", copy=False)  # of float64 inputs

    def read_entry(self, entry: Mapping[str, Any], hyper: Hyperparams) -> Mapping[str, Any]:
        if "mu_product" in entry:
            return entry
        return {**entry, "mu_product": mu_product_at(float(entry["step"]), hyper)}


def _dense(what: str, name: str, value: Any) -> FloatArray:
    if isinstance(value, Tensor):  # where Embedding.reset_parameters() puts one
        value = value.data
    if isinstance(value, np.generic):  # what arithmetic makes of 0-d arrays
        value = np.asarray(value)
    problem = None
    if not isinstance(value, np.ndarray):
        kind = f"{type(value).__module__}.{type(value).__name__}"
        problem = f"a NumPy array; got {kind}. Move the model to the CPU: model.to('cpu')"
    elif value.dtype.kind == "c":
        problem = f"real; got dtype {value.dtype}. Train real and imaginary part as two parameters"
    elif value.dtype.kind != "f":
        problem = f"floating point; got dtype {value.dtype}. Convert it: .astype(lucid.Float32)"
    if problem is not None:
        raise PartitionError(f"{what} of parameter {name!r} must be {problem}.")
    array: FloatArray = value
    return array
