"""The optimizers for PyTorch, each of which is a torch.optim.Optimizer."""

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
from shardopt.errors import HyperparamsError, ShardoptError
from shardopt.params.groups import defaults_of, require_ordered
from shardopt.policy import ShardPolicy
from shardopt.torch.averages import make_adapter
from shardopt.torch.forward import ForwardHooks, why_not_prefetch
from shardopt.torch.module import embedding_weights, named_parameters, names_behind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shardopt._typing import FloatArray
    from shardopt.params.groups import Group

__all__ = ["ShardedOptimizer"]

_FOR_TORCH = ("foreach", "fused", "capturable", "differentiable")
"""Arguments of torch's optimizers that stand in param groups and are no hyperparameters."""


class ShardedOptimizer(torch.optim.Optimizer, FrontEnd):
    """An optimizer of torch's, sharded over MPI ranks; ``NAdam`` describes what all have in common.

    Args:
        arguments: Those of the constructor, by name.
    """

    _step_supports_amp_scaling = True  # GradScaler then passes grad_scale and found_inf to step
    _takes_any_name = True  # torch's own tools attach things to optimizers

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        params = arguments["params"]
        defaults = {
            **defaults_of(self.rule, arguments),
            **{name: arguments[name] for name in _FOR_TORCH if name in arguments},
        }
        policy, comm = arguments["policy"] or ShardPolicy(), arguments["comm"]
        wants_prefetch = getattr(policy, "prefetch_params", False)
        refused = why_not_prefetch(params) if wants_prefetch else None
        hooks = ForwardHooks(params) if wants_prefetch and refused is None else None
        embeddings: list[Tensor] = []
        if isinstance(params, torch.nn.Module):
            embeddings = embedding_weights(params)
            params = named_parameters(params)
        names = names_behind(params)
        entries, error = attempt(_in_order, params)
        if error is None:
            checked: Any = entries  # torch checks it
            error = attempt(super().__init__, checked, defaults).error or refused
        groups: Outcome[list[Group]] = Outcome(None, error)
        if error is None:
            groups = Outcome(self.param_groups, None)
        comm_size = getattr(MPI.COMM_WORLD if comm is None else comm, "size", 1)
        self.core = Optimizer(
            groups,
            adapter=make_adapter(
                names,
                comm_size,
                embeddings,
                stage=getattr(policy, "stage", 1),
                in_backward=getattr(policy, "update_in_backward", False),
                forward_hooks=hooks,
            ),
            rule=self.rule,
            defaults=defaults,
            max_grad_norm=arguments["max_grad_norm"],
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
        loss, error = None, None
        if self.policy.update_in_backward:
            error = self._why_not_after_updates(closure)
        elif closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        num_writes = 0  # it has found no gradient on this rank
        if isinstance(found_inf, Tensor):
            num_writes = _num_writes_of_scaler(found_inf.device)
        try:
            self.core.step(
                loss_scale=1.0 if scale is None else float(scale),
                overflowed=found_inf is not None and bool(found_inf),
                num_writes=num_writes,
                error=error,
            )
        except Exception:  # GradScaler deletes the attributes that it has set only after a step
            vars(self).pop("grad_scale", None)
            vars(self).pop("found_inf", None)
            raise
        return loss

    def grad(self, param: Tensor) -> FloatArray | None:
        """See ``ParamCalls.grad``; not collective."""
        return self.core.values.grad(param)

    def _why_not_after_updates(self, closure: Any) -> HyperparamsError | None:
        """Return why a step cannot come after backward has updated, or None if it can."""
        got = None if closure is None else "a closure: call it before step(), once"
        if getattr(self, "found_inf", None) is not None:
            got = "a GradScaler, which must look at gradients first: use bfloat16 without it"
        if got is None:
            return None
        return HyperparamsError(
            f"step() must be called alone with policy.update_in_backward; got {got}."
        )

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

    def wait_params(self) -> None:
        """Wait until all parameters are here, before something reads them without their module.

        It is needed with ``ShardPolicy(prefetch_params=True)`` only, and does nothing otherwise.

        Raises:
            CallOrderError: This rank has written to a parameter that was on its way.
            RankFailureError: A rank was lost, or did not respond for ``policy.timeout_s`` seconds.
        """
        self.core.wait_params()

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
        self.core.groups.extend("add_param_group()", groups)

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
        """Return the state, on one node in the form of torch's optimizer, and on any rank.

        Its tensors are views, as torch's are: later steps change them. Saved to a file or deep
        copied, it stays as it is. On several nodes it is the part of this rank's node, and a
        warning says so. There is no communication.

        Returns:
            A state dict like that of ``StateCalls.state_dict``, with tensors. On one node it
            differs from torch's in that NAdam's ``mu_product`` is float64, that 16-bit parameters
            have moments in float32 and a ``master``, and that parameters without a gradient so far
            have an entry, unless they are frozen.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.core.states.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def gather_state_dict(self, root: int = 0) -> dict[str, Any] | None:
        """Gather the whole state on one rank, in the form that torch's optimizer loads.

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
                torch's optimizer of the same name; or a part, from ``state_dict`` on several nodes.
                Ranks may pass different parts, or None, if all of them together have the whole.

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
