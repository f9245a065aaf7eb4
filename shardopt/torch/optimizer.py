"""A torch.optim.Optimizer over the sharded one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor

from shardopt.core.optimizer import Optimizer
from shardopt.errors import HyperparamsError, ShardoptError
from shardopt.params.groups import defaults_of
from shardopt.policy import ShardPolicy
from shardopt.torch.face import make_adapter
from shardopt.torch.tensors import as_complex, state_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    import numpy as np
    from mpi4py import MPI
    from numpy.typing import NDArray

    from shardopt.layout.footprint import MemoryReport
    from shardopt.layout.partition import Partition
    from shardopt.params.groups import Group
    from shardopt.report import StepReport

__all__ = ["NAdam"]


class NAdam(torch.optim.Optimizer):
    """torch.optim.NAdam, sharded over MPI ranks.

    Every rank builds the same model and computes gradients of its own batch; ``step`` averages
    them over the ranks and updates the parameters. Rank 0's initial parameters win. Learning rate
    schedulers, ``torch.amp.GradScaler``, optimizer hooks and ``param_groups`` work as they do with
    any torch optimizer.

    ``p.data`` becomes a view of memory that all ranks of a node share: what one writes there, all
    see, and ``p.data.mul_(0.5)`` on two ranks halves twice. All ranks may copy the same values in,
    as ``load_state_dict`` does, once none needs the old ones; else put another tensor in its
    place, and initialise before the optimizer is built. ``p.grad`` becomes a view of memory of
    this rank, into which autograd accumulates; after ``zero_grad()`` it is zero instead of None,
    and a parameter that no backward has reached since counts as one without a gradient all the
    same. The moments are sharded: ``state`` stays empty, ``state_dict`` and ``gather_state_dict``
    have them.

    Parameters in bfloat16 or float16 have a float32 master in the shard of their owner, and their
    moments are float32. Complex parameters are pairs of reals, as in torch.

    Collective: construction, ``step``, ``add_param_group``, ``load_state_dict``,
    ``gather_state_dict`` and ``close``. What one rank finds wrong, all raise.

    Args:
        params: Tensors, (name, tensor) pairs, or dicts with ``params`` and hyperparameters.
        lr: Learning rate, a number or a tensor of one element.
        betas: Decay of the first and second moment.
        eps: Added to the square root of the second moment.
        weight_decay: Added to the gradient, or taken off the parameter when decoupled.
        momentum_decay: psi of the momentum schedule.
        decoupled_weight_decay: Decay weights as AdamW does.
        foreach: Accepted for torch's sake; the step is one fused pass whatever it says.
        maximize: Follow the gradient instead of descending it.
        capturable: Must be False.
        differentiable: Must be False.
        variant: Whose NAdam: ``torch``, ``keras``, ``optax`` or ``lucid``.
        max_grad_norm: Clip the global norm of the averaged gradient to this, in the place of
            ``clip_grad_norm_``, which would see this rank's gradient alone.
        comm: The ranks that train together; None is COMM_WORLD.
        policy: How to shard.

    Raises:
        TypeError: As torch.optim.Optimizer raises it.
        ValueError: As torch.optim.Optimizer raises it; ``PartitionError`` and ``HyperparamsError``
            are ValueErrors too.
        RankMismatchError: Ranks were given different models or settings.
        SharedMemoryError: The node's shared memory is too small.
        LauncherError: The job was started with another MPI's launcher.
    """

    _step_supports_amp_scaling = True  # GradScaler then hands grad_scale and found_inf to step
    _core: Optimizer[Tensor] | None = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        variant: str = "torch",
        max_grad_norm: float | None = None,
        comm: MPI.Intracomm | None = None,
        policy: ShardPolicy | None = None,
    ) -> None:
        defaults = {
            **defaults_of(locals()),
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        init = super().__init__

        def make() -> list[Group]:
            init(params, defaults)
            return list(map(_require_plain, self.param_groups))

        self._core = Optimizer(
            make,
            face=make_adapter(),
            defaults=defaults,
            max_grad_norm=max_grad_norm,
            comm=comm,
            policy=policy or ShardPolicy(),
        )
        self.param_groups = self._core.param_groups

    @property
    def core(self) -> Optimizer[Tensor]:
        """What all faces have in common."""
        assert self._core is not None, "__init__ has ended"
        return self._core

    # -- a step ------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Average the gradients over ranks and update the parameters.

        Call ``zero_grad`` before the next backward: with ``max_grad_norm`` or ``check_finite``
        gradients hold sums over ranks afterwards.

        Collective: every rank.

        Args:
            closure: Computes the loss and the gradients; called first.

        Returns:
            What the closure returned, or None.

        Raises:
            PartitionError: A parameter or gradient was replaced by one of another shape or dtype,
                or a gradient is sparse.
            HyperparamsError: A hyperparameter in ``param_groups`` is out of range.
            RankMismatchError: Ranks have different hyperparameters or make different calls.
            RankFailureError: A rank did not come within ``policy.timeout_s``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        try:
            self.core.step(
                loss_scale=1.0 if scale is None else float(scale),
                overflowed=found_inf is not None and bool(found_inf),
            )
        except Exception:  # GradScaler takes back what it has set only after a step
            vars(self).pop("grad_scale", None)
            vars(self).pop("found_inf", None)
            raise
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero this rank's gradients in place; clone those that you keep a reference to.

        Args:
            set_to_none: Count a parameter as one without a gradient until a backward reaches it
                or its gradient is written to; else only those count so that have none already.
        """
        self.core.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; those already there keep their state.

        Collective: every rank.

        Raises:
            TypeError: As torch.optim.Optimizer raises it.
            ValueError: As torch.optim.Optimizer raises it.
            RankMismatchError: Ranks were given different groups.
        """
        add = super().add_param_group
        if self._core is None:  # torch's own __init__ is at work
            add(param_group)
            return

        def make() -> list[Group]:
            add(param_group)
            return [_require_plain(self.param_groups.pop())]

        self._core.extend("add_param_group()", make)

    # -- state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Copy this rank's part of the state; no communication.

        Returns:
            As ``Optimizer.state_dict``, with tensors.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.core.state_dict()
        for entry in state_dict["state"].values():
            entry.update(state_tensors(entry))
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def gather_state_dict(self, root: int = 0) -> dict[str, Any] | None:
        """Bring the whole state to one rank: what torch.optim.NAdam loads.

        Collective: every rank.

        Returns:
            On ``root`` the state dict, with tensors in the parameters' shapes; None elsewhere. It
            differs from torch's in that ``mu_product`` is float64, that moments of 16-bit
            parameters are float32 and come with their ``master``, and that parameters without a
            gradient so far have an entry.

        Raises:
            CheckpointError: ``root`` is no rank.
        """
        state_dict = self.core.gather_state_dict(root)
        if state_dict is not None:
            params = [param for group in self.param_groups for param in group["params"]]
            for param, entry in zip(params, state_dict["state"].values(), strict=True):
                tensors = state_tensors(entry)
                if param.is_complex():
                    for key in tensors.keys() & {"exp_avg", "exp_avg_sq"}:
                        tensors[key] = as_complex(tensors[key])
                entry.update(tensors)
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any] | None) -> None:
        """Take over a state; parameters themselves are not in it.

        Collective: every rank.

        Args:
            state_dict: This rank's, as ``state_dict`` gave it on as many ranks; or a whole one, as
                ``gather_state_dict`` or torch.optim.NAdam gave it. Ranks that have none pass
                None and get that of the lowest rank that has a whole one.

        Raises:
            CheckpointError: It is of another model or another number of ranks. Nothing has changed
                then.
        """
        state_dict = copy.copy(state_dict)  # hooks may change it
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)  # type: ignore[arg-type]  # may be None
            state_dict = state_dict if changed is None else changed
        self.core.load_state_dict(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> NoReturn:
        """Refuse copies: two optimizers cannot own the same windows.

        Raises:
            ShardoptError: Always.
        """
        raise ShardoptError(
            "an optimizer must not be copied or pickled; got a call of copy or pickle. Use "
            "gather_state_dict() or state_dict() and load_state_dict()."
        )

    # -- about it ----------------------------------------------------------------------------------

    @property
    def comm(self) -> MPI.Intracomm:
        """The communicator given."""
        return self.core.comm

    @property
    def last_step(self) -> StepReport:
        """What the last ``step()`` did."""
        return self.core.last_step

    @property
    def partition(self) -> Partition:
        """Where every element lives."""
        return self.core.partition

    def memory_report(self) -> MemoryReport:
        """Bytes that parameters, gradients and moments take, here and without sharding."""
        return self.core.memory_report()

    def sum_over_ranks(self, values: Sequence[float] | NDArray[Any]) -> NDArray[np.float64]:
        """Add up a few numbers over all ranks; see ``core.Optimizer``. Collective: every rank."""
        return self.core.sum_over_ranks(values)

    def close(self) -> None:
        """Give parameters memory of their own again and release the windows. Collective."""
        self.core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.core.__exit__(kind, error, traceback)


def _require_plain(group: Group) -> Group:
    for name in ("capturable", "differentiable"):
        if group[name]:
            raise HyperparamsError(
                f"{name} must be False; got {group[name]}. The step is one pass of a kernel that "
                "neither CUDA graphs nor autograd see: use torch.optim.NAdam for that."
            )
    return group
