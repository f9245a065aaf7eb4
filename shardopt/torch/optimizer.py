"""The optimizer for PyTorch, which is a torch.optim.Optimizer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from mpi4py import MPI
from torch import Tensor

from shardopt.comm.consensus import Outcome, attempt
from shardopt.core.front_end import FrontEnd
from shardopt.core.optimizer import Optimizer
from shardopt.errors import ShardoptError
from shardopt.params.groups import defaults_of, require_ordered
from shardopt.policy import ShardPolicy
from shardopt.torch.averages import make_adapter
from shardopt.torch.module import embedding_weights, named_parameters, names_behind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shardopt.params.groups import Group

__all__ = ["NAdam"]


class NAdam(torch.optim.Optimizer, FrontEnd):
    """torch.optim.NAdam, sharded over MPI ranks.

    Every rank builds the same model and computes gradients of its own batch; ``step`` averages
    them over the ranks and updates the parameters. Rank 0's initial parameters win. Learning rate
    schedulers, ``torch.amp.GradScaler``, optimizer hooks and ``param_groups`` work as they do with
    any torch optimizer.

    ``p.data`` becomes this rank's own view of weights of which the node has one copy. Write to it
    as you would in DDP, alike on all ranks: the next step adopts what was written. ``p.grad``
    becomes a view of this rank's own memory, into which autograd accumulates. After ``zero_grad()``
    it is zero instead of None; a parameter that no backward has reached since still counts as one
    without a gradient. The moments are sharded over the ranks, but each rank of a node addresses
    all of them: ``state`` and ``state_dict`` are as torch's.

    With ``ShardPolicy(stage=2)`` ``p.grad`` is the average over all ranks after backward, and None
    after ``zero_grad()``; see [Note: what p.grad is in stage 2].

    Parameters in bfloat16 or float16 have a float32 master in the shard of their owner, and their
    moments are float32; ``ShardPolicy(master_weights=False, optim_bits=8)`` does with less. Complex
    parameters are pairs of reals, as in torch.

    Collective: construction, ``step``, ``average_grads``, ``add_param_group``, ``load_state_dict``,
    ``gather_state_dict`` and ``close``. If one rank raises, all ranks raise.

    Args:
        params: A module, tensors, (name, tensor) pairs, or dicts with ``params`` and
            hyperparameters. A module, its ``parameters()`` and pairs give parameters the names that
            messages and checkpoints show. With ``optim_bits=8`` in the policy, the embeddings of a
            module keep moments in float32.
        lr: Learning rate, a number or a tensor of one element.
        betas: Decay of the first and second moment.
        eps: Added to the square root of the second moment.
        weight_decay: Added to the gradient, or subtracted from the parameter when decoupled.
        momentum_decay: psi of the momentum schedule.
        decoupled_weight_decay: Decay weights as AdamW does.
        foreach: Accepted for compatibility with torch, and ignored: the step is one fused pass.
        maximize: Follow the gradient instead of descending it.
        capturable: Must be False.
        differentiable: Must be False.
        variant: The NAdam to follow: ``torch``, ``keras``, ``optax`` or ``lucid``.
        max_grad_norm: Clip the global norm of the averaged gradient to this. Use it instead of
            ``clip_grad_norm_``, which would only see this rank's gradient, unless
            ``average_grads`` comes before.
        comm: The ranks that train together; None is COMM_WORLD.
        policy: How to shard.

    Raises:
        TypeError: As torch.optim.Optimizer raises it.
        ValueError: As torch.optim.Optimizer raises it; ``PartitionError`` and ``HyperparamsError``
            are ValueErrors too.
        RankMismatchError: Ranks were given different models or settings.
        SharedMemoryError: The memory of a node cannot be had.
        LauncherError: The job was started with another MPI's launcher.
    """

    _step_supports_amp_scaling = True  # GradScaler then passes grad_scale and found_inf to step
    _takes_any_name = True  # torch's own tools attach things to optimizers

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
        embeddings: list[Tensor] = []
        if isinstance(params, torch.nn.Module):
            embeddings = embedding_weights(params)
            params = named_parameters(params)
        names = names_behind(params)
        entries, error = attempt(_in_order, params)
        if error is None:
            checked: Any = entries  # torch checks it
            error = attempt(super().__init__, checked, defaults).error
        groups: Outcome[list[Group]] = Outcome(None, error)
        if error is None:
            groups = Outcome(self.param_groups, None)
        policy = policy or ShardPolicy()
        comm_size = getattr(MPI.COMM_WORLD if comm is None else comm, "size", 1)
        self.core = Optimizer(
            groups,
            adapter=make_adapter(names, comm_size, embeddings, stage=getattr(policy, "stage", 1)),
            defaults=defaults,
            max_grad_norm=max_grad_norm,
            comm=comm,
            policy=policy,
        )
        del self._groups  # the core has them now
        del vars(self)["defaults"]  # the core has the same dict

    # -- a step ------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Average the gradients over ranks and update the parameters.

        Call ``zero_grad`` before the next backward: with ``max_grad_norm`` or ``check_finite``,
        a step leaves sums over ranks in the gradients.

        Collective: every rank.

        Args:
            closure: Computes the loss and the gradients; called first.

        Returns:
            The result of the closure, or None.

        Raises:
            PartitionError: A parameter or gradient was replaced by one of another shape or dtype,
                or a gradient is sparse.
            HyperparamsError: A hyperparameter in ``param_groups`` is out of range.
            CallOrderError: A backward has come after ``average_grads``.
            RankMismatchError: Ranks have different hyperparameters or make different calls.
            RankFailureError: A rank stopped responding for ``policy.timeout_s`` seconds.
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
                num_writes=0 if found_inf is None else _num_writes_of_scaler(found_inf.device),
            )
        except Exception:  # GradScaler deletes the attributes that it has set only after a step
            vars(self).pop("grad_scale", None)
            vars(self).pop("found_inf", None)
            raise
        return loss

    @torch.no_grad()
    def average_grads(self, loss_scale: float = 1.0) -> None:
        """Average the gradients over ranks now; ``p.grad`` is then as after the backward of DDP.

        In this order: the backward passes of a step, ``average_grads``, ``GradScaler.unscale_``,
        ``clip_grad_norm_`` and whatever else changes or logs gradients, ``step``. See
        ``core.Optimizer.average_grads`` for the rules and the errors.

        Collective: every rank.

        Args:
            loss_scale: Divide the gradients by this; leave it out with a ``GradScaler``, which
                divides them itself.
        """
        self.core.average_grads(loss_scale)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero this rank's gradients in place; clone gradients that you want to keep.

        Args:
            set_to_none: Treat every parameter as one without a gradient until a backward reaches it
                or its gradient is written to. With False, only parameters that already have no
                gradient are treated so.
        """
        self.core.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; the existing ones keep their state.

        Collective: every rank.

        Raises:
            TypeError: As torch.optim.Optimizer raises it.
            ValueError: As torch.optim.Optimizer raises it.
            RankMismatchError: Ranks were given different groups.
        """
        if not hasattr(self, "core"):  # called by torch's own __init__
            super().add_param_group(param_group)
            return
        _, error = attempt(_in_order, [param_group])
        if error is None:  # it checks as torch does
            error = attempt(super().add_param_group, param_group).error
        groups: Outcome[list[Group]] = Outcome(None, error)
        if error is None:
            groups = Outcome([self.param_groups.pop()], None)
        self.core.extend("add_param_group()", groups)

    @property  # type: ignore[override,unused-ignore]  # of torch, where it is an attribute
    def param_groups(self) -> list[Group]:
        """See ``core.Optimizer.param_groups``."""
        groups: list[Group] = self.core.param_groups if hasattr(self, "core") else self._groups
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        if hasattr(self, "core"):
            self.core.param_groups = groups
        else:  # torch's own __init__ begins with an empty one
            self._groups = groups

    # -- state -------------------------------------------------------------------------------------

    @property  # type: ignore[override,unused-ignore]  # of torch, where it is an attribute
    def state(self) -> Any:
        """The state of each parameter; see ``StateCalls.state``."""
        return self.core.states.state

    @state.setter
    def state(self, entries: Mapping[Any, Any]) -> None:
        if hasattr(self, "core"):  # else torch's own __init__ sets an empty one
            self.core.states.set_state(entries)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, on one node in the form of torch.optim.NAdam's, and on any rank.

        Its tensors are views, as torch's are: later steps change them. Saved to a file or deep
        copied, it stays as it is. On several nodes it is the part of this rank's node, and a
        warning says so. There is no communication.

        Returns:
            A state dict like that of ``StateCalls.state_dict``, with tensors. On one node it
            differs from torch's in that ``mu_product`` is float64, that 16-bit parameters have
            moments in float32 and a ``master``, and that parameters without a gradient so far have
            an entry, unless they are frozen.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.core.states.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def gather_state_dict(self, root: int = 0) -> dict[str, Any] | None:
        """Gather the whole state on one rank, in the form that torch.optim.NAdam loads.

        Collective: every rank.

        Returns:
            On ``root`` a state dict like that of ``state_dict`` on one node, with copies; None
            elsewhere.

        Raises:
            CheckpointError: ``root`` is not a rank.
        """
        return self.core.states.gather_state_dict(root)

    def load_state_dict(self, state_dict: Mapping[str, Any] | None) -> None:
        """Load a state, which does not include the parameters themselves.

        Collective: every rank.

        Args:
            state_dict: A whole one, from ``state_dict`` on one node, ``gather_state_dict`` or
                torch.optim.NAdam; or a part, from ``state_dict`` on several nodes. Ranks may pass
                different parts, or None, if all of them together have the whole.

        Raises:
            CheckpointError: The state belongs to another model, or shows this optimizer at another
                step, or a part is missing. The optimizer is then unchanged.
        """
        state_dict = copy.copy(state_dict)  # hooks may change it
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)  # type: ignore[arg-type]  # may be None
            state_dict = state_dict if changed is None else changed
        self.core.states.load_state_dict(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> NoReturn:
        """Refuse copies: two optimizers cannot own the same shared memory.

        Raises:
            ShardoptError: Always.
        """
        raise ShardoptError(
            "an optimizer must not be copied or pickled; got a call of copy or pickle. Use "
            "gather_state_dict() or state_dict() and load_state_dict()."
        )


def _in_order(params: Any) -> Any:
    """Return the parameters, maybe in a list, unless they or those of a group have no order."""
    require_ordered("params", params)
    if isinstance(params, Iterator):
        params = list(params)
    for entry in params if isinstance(params, Sequence) else ():
        if isinstance(entry, dict) and not isinstance(entry.get("params"), set):  # torch refuses it
            require_ordered("params of a group", entry.get("params"))
    return params


@functools.cache
def _num_writes_of_scaler(device: torch.device) -> int:
    """Return how many writes to a gradient torch counts when GradScaler divides it."""
    ones = torch.ones(3, dtype=torch.float32, device=device)
    grad, found_inf, factor = ones.clone().chunk(3)
    torch._amp_foreach_non_finite_check_and_unscale_([grad], found_inf, factor)
    return grad._version
