"""The common ground of the optimizers that users import: each has a core and hands calls on.

[Note: assignments to an optimizer]
What users assign either holds or raises. A property with a setter takes the value, and a method
may be replaced, as schedulers and profilers do. Everything else that is an attribute of ours, or an
argument of the constructor, raises ``AttributeError`` with what to do instead. Names that mean
nothing to us are left to torch's users and tools, who attach things to optimizers, unless they
look like a misspelt name of ours; with the other frameworks, where nobody does, they are taken for
typing errors, unless they begin with an underscore or a subclass has such an attribute.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from difflib import get_close_matches
from functools import cache
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from shardopt._typing import FloatArray
from shardopt.comm.consensus import Outcome
from shardopt.core.listeners import StepListener
from shardopt.core.optimizer import Optimizer
from shardopt.errors import HyperparamsError
from shardopt.layout.footprint import MemoryReport
from shardopt.layout.partition import Partition
from shardopt.params.adapter import Adapter
from shardopt.params.groups import Group
from shardopt.policy import ShardPolicy
from shardopt.report import StepReport
from shardopt.rule.hyperparams import Rule

_REBUILD = "Build a new optimizer with it, and load the state of this one"
_REMEDIES = {
    "params": "Write values into the parameters, or call load_params() or add_param_group()",
    "comm": _REBUILD,
    "core": "Leave it alone",
    "policy": f"Set opt.policy.timeout_s; for other settings: {_REBUILD[0].lower()}{_REBUILD[1:]}",
    "last_step": "It is the report of the last step(): copy what you want to change",
    "listeners": "Append to it, and remove from it",
    "partition": "It follows from the parameters: call add_param_group() to add some",
    "count": "It counts steps: load_state_dict() or reset_state() change it",
}
_ARGUMENTS = frozenset({"params", "core"})  # the others are properties or stand in groups
_OF_TORCH = ("foreach", "fused", "capturable", "differentiable")


class FrontEnd:
    """A framework's optimizer: it makes param groups, and has the core that shards them.

    Each optimizer of a framework is a subclass of its own: a rule, and a constructor's signature.

    Attributes:
        core: The optimizer behind it.
    """

    rule: ClassVar[Rule]
    core: Optimizer[Any]
    _takes_any_name = False

    def __setattr__(self, name: str, value: Any) -> None:
        """See [Note: assignments to an optimizer].

        Raises:
            AttributeError: The assignment would be without effect.
        """
        if "core" in vars(self) and (remedy := self._remedy(name, value)):
            raise AttributeError(
                f"{name} of an optimizer must not be assigned; got {value!r:.80}. {remedy}."
            )
        super().__setattr__(name, value)

    def _remedy(self, name: str, value: Any) -> str | None:
        """Return what to do instead of assigning to a name, or None if it may be assigned."""
        own = getattr(type(self), name, None)
        if isinstance(own, property) and own.fset is not None:
            return None
        if name in self._group_names():
            return f"Write for group in opt.param_groups: group[{name!r}] = {value!r:.40}"
        if isinstance(own, property) or name in _ARGUMENTS:
            return _REMEDIES.get(name, "It can only be read")
        if hasattr(self.policy, name):
            return _REMEDIES["policy"]
        kind: Any = type(self)  # mypy takes no class of a subclass for hashable
        return None if name.startswith("_") or own is not None else _mistyped(kind, name)

    @classmethod
    def _group_names(cls) -> set[str]:
        """Return the names of what param groups hold besides parameters."""
        return {*cls.rule.names(), *_OF_TORCH}

    @property
    def policy(self) -> ShardPolicy:
        """How to shard; its ``timeout_s`` may be set and holds from the next wait on."""
        return self.core.policy

    @property
    def max_grad_norm(self) -> float | None:
        """The norm that gradients are clipped to, or None; holds from the next step on if set.

        Raises:
            HyperparamsError: It was set to something else.
        """
        return self.core.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self.core.max_grad_norm = value

    @property
    def defaults(self) -> dict[str, Any]:
        """Hyperparameters of groups added later that do not set their own; may be edited and set.

        Raises:
            HyperparamsError: It was set to something that is no dict.
        """
        return self.core.defaults if "core" in vars(self) else vars(self)["defaults"]

    @defaults.setter
    def defaults(self, values: dict[str, Any]) -> None:
        if not isinstance(values, MutableMapping):
            raise HyperparamsError(
                f"defaults must be a dict; got {values!r:.80}. Write {{'lr': ..., ...}}."
            )
        if "core" in vars(self):
            self.core.defaults = values
        else:  # torch's own constructor sets them
            vars(self)["defaults"] = values

    @property
    def comm(self) -> MPI.Intracomm:
        """The communicator given."""
        return self.core.comm

    @property
    def last_step(self) -> StepReport:
        """The report of the last ``step()``."""
        return self.core.last_step

    @property
    def listeners(self) -> list[StepListener]:
        """The listeners that are told of each step on this rank, a list that you may add to."""
        return self.core.listeners

    @property
    def partition(self) -> Partition:
        """Where every element lives."""
        return self.core.partition

    def state_dict(self) -> dict[str, Any]:
        """See ``StateCalls.state_dict``."""
        return self.core.states.state_dict()

    def reset_state(self, params: Iterable[Any] | None = None) -> None:
        """See ``StateCalls.reset_state``."""
        self.core.states.reset_state(params)

    def gather_state_dict(self, root: int = 0) -> dict[str, Any] | None:
        """See ``StateCalls.gather_state_dict``. Collective: every rank."""
        return self.core.states.gather_state_dict(root)

    def load_state_dict(self, state_dict: Mapping[str, Any] | None) -> None:
        """See ``StateCalls.load_state_dict``. Collective: every rank."""
        self.core.states.load_state_dict(state_dict)

    def add_param_group(self, param_group: Any) -> None:
        """See ``GroupCalls.add``. Collective: every rank."""
        self.core.groups.add(param_group)

    def load_params(self, values: Mapping[str, Any] | None) -> list[str]:
        """See ``ParamCalls.load_params``. Collective: every rank."""
        return self.core.values.load_params(values)

    def adopt(self, rank: int = 0) -> None:
        """See ``ParamCalls.adopt``. Collective: every rank."""
        self.core.values.adopt(rank)

    def memory_report(self) -> MemoryReport:
        """See ``core.Optimizer.memory_report``."""
        return self.core.memory_report()

    def sum_over_ranks(self, values: Sequence[float] | NDArray[Any]) -> NDArray[np.float64]:
        """See ``core.Optimizer.sum_over_ranks``. Collective: every rank."""
        return self.core.sum_over_ranks(values)

    def close(self) -> None:
        """See ``core.Optimizer.close``. Collective: every rank."""
        self.core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:  # else other ranks may not close; the end of the process frees memory
            self.close()


@cache  # GradScaler attaches two things at every step
def _mistyped(kind: type[FrontEnd], name: str) -> str | None:
    """Return what to do instead of assigning to a name of nothing, or None if it may be assigned.

    Args:
        kind: The front end.
        name: The name.
    """
    members = {each: getattr(kind, each) for each in dir(kind)}
    settable = [each for each, member in members.items() if getattr(member, "fset", None)]
    likeness = 0.85 if kind._takes_any_name else 0.6
    close = get_close_matches(name, [*settable, *sorted(kind._group_names())], 1, likeness)
    if kind._takes_any_name and not close:
        return None
    meant = f"Did you mean {close[0]}? " if close else ""
    return f"{meant}There are {', '.join(settable)}; hyperparameters are in opt.param_groups"


class ArrayFrontEnd(FrontEnd):
    """The front end of a framework whose parameters hold arrays.

    Its constructor is one of those in ``signatures``.
    """

    def _set_up(self, arguments: Mapping[str, Any]) -> None:
        """Make the parameters into groups, and call ``_start``; each framework in its own way.

        Args:
            arguments: Those of the constructor, by name.
        """
        raise NotImplementedError

    def _start(
        self,
        groups: Outcome[list[Group]],
        adapter: Adapter[Any],
        defaults: Group,
        arguments: Mapping[str, Any],
    ) -> None:
        """Make the core.

        Args:
            groups: See ``Optimizer``.
            adapter: Likewise.
            defaults: Likewise.
            arguments: Those of the constructor, by name; the rest of them is taken from here.
        """
        self.core = Optimizer(
            groups,
            adapter=adapter,
            rule=self.rule,
            defaults=defaults,
            max_grad_norm=arguments["max_grad_norm"],
            comm=arguments["comm"],
            policy=arguments["policy"] or ShardPolicy(),
        )

    @property
    def param_groups(self) -> list[Group]:
        """See ``core.Optimizer.param_groups``."""
        return self.core.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        self.core.param_groups = groups

    def zero_grad(self, set_to_none: bool = False) -> None:
        """See ``core.Optimizer.zero_grad``."""
        self.core.zero_grad(set_to_none)


class InPlaceFrontEnd(ArrayFrontEnd):
    """The front end of a framework whose parameters a step updates in place."""

    @property
    def state(self) -> Any:
        """The state of each parameter; see ``StateCalls.state``."""
        return self.core.states.state

    @state.setter
    def state(self, entries: Mapping[Any, Any]) -> None:
        self.core.states.set_state(entries)

    def grad(self, param: Any) -> FloatArray | None:
        """See ``ParamCalls.grad``; not collective."""
        return self.core.values.grad(param)

    def average_grads(self, loss_scale: float = 1.0) -> None:
        """See ``core.Optimizer.average_grads``. Collective: every rank."""
        self.core.average_grads(loss_scale)

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss_scale: float = 1.0,
        overflowed: bool = False,
    ) -> Any:
        """Average the gradients over ranks and update the parameters.

        Collective: every rank.

        Args:
            closure: Computes the loss and the gradients; called first.
            loss_scale: See ``core.Optimizer.step``, which names the errors raised, too.
            overflowed: Likewise.

        Returns:
            The closure's result, or None.
        """
        loss = None if closure is None else closure()
        self.core.step(loss_scale=loss_scale, overflowed=overflowed)
        return loss
