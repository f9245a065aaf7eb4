"""The common ground of the optimizers that users import: each has a core and hands calls on."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from shardopt.core.optimizer import Optimizer
from shardopt.layout.footprint import MemoryReport
from shardopt.layout.partition import Partition
from shardopt.params.groups import Group
from shardopt.report import StepReport


class FrontEnd:
    """A framework's optimizer: it makes param groups, and has the core that shards them.

    Attributes:
        core: The optimizer behind it.
    """

    core: Optimizer[Any]

    @property
    def comm(self) -> MPI.Intracomm:
        """The communicator given."""
        return self.core.comm

    @property
    def last_step(self) -> StepReport:
        """The report of the last ``step()``."""
        return self.core.last_step

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
        """See ``core.Optimizer.add_param_group``. Collective: every rank."""
        self.core.add_param_group(param_group)

    def load_params(self, values: Mapping[str, Any] | None) -> list[str]:
        """See ``core.Optimizer.load_params``. Collective: every rank."""
        return self.core.load_params(values)

    def adopt(self, rank: int = 0) -> None:
        """See ``core.Optimizer.adopt``. Collective: every rank."""
        self.core.adopt(rank)

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


class ArrayFrontEnd(FrontEnd):
    """The front end of a framework whose parameters hold arrays."""

    @property
    def param_groups(self) -> list[Group]:
        """Dicts as in torch; hyperparameters written there hold from the next step on."""
        return self.core.param_groups

    @property
    def defaults(self) -> dict[str, Any]:
        """Hyperparameters of groups added later that do not set their own."""
        return self.core.defaults

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
