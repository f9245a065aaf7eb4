"""The door between an optimizer and its checkpoints: they use ``Sharded`` and nothing else."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from shardopt._typing import FloatArray
from shardopt.comm.consensus import Description
from shardopt.core.listeners import BackgroundWork
from shardopt.layout.partition import ParamSpec
from shardopt.layout.span import Span
from shardopt.layout.state_spec import StateSpec
from shardopt.params.group_values import saved_values
from shardopt.params.groups import Group
from shardopt.params.model import ModelContent
from shardopt.rule.coefficients import StepCount
from shardopt.rule.hyperparams import Rule
from shardopt.rule.nadam import NAdam
from shardopt.trace import Trace

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TensorShard:
    """The part of one tensor that this rank owns: of a parameter, or of an array of its state.

    It holds no array, so that keeping it does not keep the memory of a closed optimizer alive; see
    ``Sharded.arrays``.

    Attributes:
        param: Index of the parameter.
        spec: The parameter.
        key: ``PARAM_KEY``, or the name of the array in state dicts, such as ``exp_avg``.
        array: How its elements are kept.
        span: The elements owned, counted within the flattened parameter.
        bucket_span: The elements of the parameter in the same bucket, which include the span.
        region: Index of the memory that the elements live in.
        local: Their place in that memory.
    """

    param: int
    spec: ParamSpec
    key: str
    array: StateSpec
    span: Span
    bucket_span: Span
    region: int
    local: Span


@dataclass(frozen=True)
class Scalars:
    """Everything that is saved besides tensors; the same on every rank.

    Attributes:
        params: The parameters, in the order of the param groups.
        step_counts: One for each of them.
        groups: The values of each param group, without its parameters.
        num_steps: Calls of ``step()`` so far.
        loss_scale: The loss scale of the last of them.
        seed: Of rounding by chance.
        rule: The update rule.
    """

    params: Sequence[ParamSpec]
    step_counts: Sequence[StepCount]
    groups: Sequence[Group]
    num_steps: int
    loss_scale: float
    seed: int = 0
    rule: Rule = NAdam

    def saved_groups(self) -> tuple[list[Group], dict[str, str]]:
        """Return the groups as files can hold them.

        Returns:
            Plain values; and what had to be left out, with the name of its type.
        """
        both = [saved_values(group) for group in self.groups]
        left_out = {
            f"param_groups[{index}][{name!r}]": kind
            for index, (_, missing) in enumerate(both)
            for name, kind in missing.items()
        }
        return [saved for saved, _ in both], left_out


class Sharded(Protocol):
    """A training state that is sharded over ranks, as checkpoints see it."""

    @property
    def rank(self) -> int:
        """This rank."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    @property
    def num_cores(self) -> int:
        """Number of threads that this rank should use."""
        ...

    @property
    def background(self) -> list[BackgroundWork]:
        """The work that all ranks poll after every step; the same on every rank."""
        ...

    @property
    def trace(self) -> Trace:
        """Shows what a save does, and when."""
        ...

    @property
    def layout(self) -> object:
        """A token: as long as it is the same object, ``tensors`` returns the same."""
        ...

    @property
    def is_state_untouched(self) -> bool:
        """Whether nobody on this rank has had an array of the state; see ``StateStore``."""
        ...

    def tensors(self) -> list[TensorShard]:
        """Return everything that this rank owns."""
        ...

    def arrays(self, tensors: Sequence[TensorShard]) -> list[FloatArray]:
        """Return the elements of each of ``tensors`` in node memory; see ``open``.

        They are flat; what has codes is the bytes of its blocks.
        """
        ...

    def open(self) -> None:
        """Have what this rank owns in node memory, to read it there, or to write parts of it."""
        ...

    def trim(self) -> None:
        """Release the memory of state that is not in use, such as that of frozen parameters.

        Reading it, to save it, and loading zeros take memory for it.
        """
        ...

    def scalars(self) -> Scalars:
        """Return what is saved besides tensors."""
        ...

    def restore(self, scalars: Scalars) -> None:
        """Go on from a state whose elements have been written into ``arrays``. Collective."""
        ...

    def take_over_groups(self, call: str) -> None:
        """Take over param groups that users have edited, before anything else. Collective.

        Args:
            call: The name of the call, as users know it.
        """
        ...

    def require_whole(self, call: str) -> None:
        """Refuse a state of which a step that raised has updated a part.

        Args:
            call: The name of the call, as users know it.

        Raises:
            CheckpointError: It has.
        """
        ...

    def mend(self) -> None:
        """Note that all of the state has been loaded."""
        ...

    def find_changes(self) -> Any:
        """Find what users have done to parameters and state since the last step.

        Raises:
            PartitionError: A parameter was replaced by what does not fit.
        """
        ...

    def settle(self, changes: Any) -> None:
        """Take over what ``find_changes`` found, rather than in the next step. Collective.

        Raises:
            RankMismatchError: Ranks have written to different parameters.
        """
        ...

    def read_model(self, model: Any, saved: Collection[str] | None) -> ModelContent:
        """Return what a checkpoint needs of a model of the same framework.

        Args:
            model: The model.
            saved: The names of the parameters in the checkpoint to be loaded; None for a save.

        Raises:
            CheckpointError: It is no such model.
        """
        ...

    def load_model(
        self, model: Any, content: ModelContent, values: Mapping[str, Any]
    ) -> tuple[Any, Sequence[str]]:
        """Load values into a model, after ``restore``; see ``Adapter``."""
        ...

    def warn_once(self, warning: Warning) -> None:
        """Issue a warning about the optimizer, on rank 0, unless there was one before."""
        ...

    def agree(self, call: str, description: Description, error: Exception | None = None) -> None:
        """Raise on every rank if one has an error or if ranks make different calls. Collective.

        Args:
            call: The name of the call, as users know it.
            description: What must be equal on all ranks.
            error: What went wrong on this rank, or None.
        """
        ...

    def allgather(self, value: T, call: str) -> list[T]:
        """Return the values of all ranks, in rank order. Collective."""
        ...
