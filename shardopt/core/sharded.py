"""The door between an optimizer and its checkpoints: they use ``Sharded`` and nothing else."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

from shardopt._typing import FloatArray
from shardopt.backends.codes import part_of
from shardopt.comm.consensus import Description
from shardopt.core.listeners import BackgroundWork
from shardopt.core.optimizer import Optimizer
from shardopt.core.shared_params import UserChanges
from shardopt.core.state_dict import has_entry
from shardopt.errors import CheckpointError
from shardopt.layout.partition import ParamSpec
from shardopt.layout.span import Span
from shardopt.layout.state_spec import PARAM_KEY, StateSpec
from shardopt.params.group_values import saved_values
from shardopt.params.groups import Group, group_values
from shardopt.params.model import ModelContent
from shardopt.report import StepReport, tell
from shardopt.rule.coefficients import StepCount
from shardopt.rule.hyperparams import Rule
from shardopt.rule.nadam import NAdam
from shardopt.store.buffers import ShardBuffers
from shardopt.trace import Trace

T = TypeVar("T")

_WARNED: WeakSet[Any] = WeakSet()  # the optimizers of which a warning has been issued


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


class HasCore(Protocol):
    """An optimizer as users have it, of any framework."""

    @property
    def core(self) -> Any:
        """The optimizer inside, which is the same for all frameworks."""
        ...


def sharded_of(opt: HasCore) -> Sharded:
    """Return what checkpoints see of an optimizer.

    Raises:
        CheckpointError: ``opt`` is something else.
    """
    core = getattr(opt, "core", None)
    if not isinstance(core, Optimizer):
        raise CheckpointError(
            f"opt must be an optimizer of shardopt; got a {type(opt).__name__}. Pass the optimizer "
            "itself, not its state."
        )
    return ShardedOptimizer(core)


class ShardedOptimizer:
    """An optimizer behind the door of checkpoints; see ``Sharded``.

    Args:
        core: The optimizer.
    """

    def __init__(self, core: Optimizer[Any]) -> None:
        self._core = core
        self.rank: int = core.parts.topology.rank
        self.world_size: int = core.parts.topology.world_size
        self.num_cores: int = core.parts.num_cores

    @property
    def background(self) -> list[BackgroundWork]:
        """See ``Sharded``."""
        return self._core.background

    @property
    def trace(self) -> Trace:
        """See ``Sharded``."""
        return self._core.parts.trace

    @property
    def layout(self) -> object:
        """See ``Sharded``: the partition, which is replaced when parameters are added."""
        return self._core.partition

    @property
    def is_state_untouched(self) -> bool:
        """See ``Sharded``."""
        return self._core.parts.memory.state.is_untouched

    def tensors(self) -> list[TensorShard]:
        """See ``Sharded``; one array of a region after another."""
        tensors: list[TensorShard] = []
        for buffers in self._core.parts.memory.buffers:
            runs = list(self._runs(buffers))
            tensors += [shard for shard, _ in runs]
            for spec in buffers.region.state:
                tensors += [
                    replace(shard, key=spec.key, array=spec, local=in_state)
                    for shard, in_state in runs
                ]
        return tensors

    def arrays(self, tensors: Sequence[TensorShard]) -> list[FloatArray]:
        """See ``Sharded``."""
        memory = self._core.parts.memory
        wholes = [
            {PARAM_KEY: buffers.params, **memory.state.arrays(index)}
            for index, buffers in enumerate(memory.buffers)
        ]
        return [
            part_of(wholes[shard.region][shard.key], shard.local).reshape(-1) for shard in tensors
        ]

    def open(self) -> None:
        """See ``Sharded``."""
        self._core.parts.residence.bring_home(params=True, state=True)

    def trim(self) -> None:
        """See ``Sharded``."""
        core = self._core
        params, counts = core.parts.registry.bindings, core.step_counts
        arena = core.parts.memory.arena
        unused = {i for i, c in enumerate(counts) if not has_entry(params[i].param, c)}
        if unused:
            tensors = [t for t in self.tensors() if t.param in unused and t.key != PARAM_KEY]
            for array in self.arrays(tensors):
                arena.trim(array)

    def scalars(self) -> Scalars:
        """See ``Sharded``."""
        core = self._core
        return Scalars(
            params=[param.spec for param in core.partition.params],
            step_counts=core.step_counts,
            groups=[group_values(group) for group in core.param_groups],
            num_steps=core.last_step.step,
            loss_scale=core.last_step.loss_scale,
            seed=core.policy.seed,
            rule=core.parts.registry.rule,
        )

    def restore(self, scalars: Scalars) -> None:
        """See ``Sharded``."""
        report = StepReport(step=scalars.num_steps, loss_scale=scalars.loss_scale)
        groups = [group_values(group) for group in scalars.groups]
        self._core.restore(groups, scalars.step_counts, report)
        self._core.params.publish_all(report.step)
        self.trim()

    def take_over_groups(self, call: str) -> None:
        """See ``Sharded``."""
        self._core.take_over_groups(call)

    def require_whole(self, call: str) -> None:
        """See ``Sharded``."""
        self._core.parts.grads.require_whole(call)

    def mend(self) -> None:
        """See ``Sharded``."""
        self._core.parts.grads.mend()

    def find_changes(self) -> UserChanges:
        """See ``Sharded``."""
        return self._core.params.find_changes()

    def settle(self, changes: UserChanges) -> None:
        """See ``Sharded``."""
        self._core.settle(changes)

    def read_model(self, model: Any, saved: Collection[str] | None) -> ModelContent:
        """See ``Sharded``."""
        return self._core.parts.registry.adapter.read_model(model, self._params, saved)

    def load_model(
        self, model: Any, content: ModelContent, values: Mapping[str, Any]
    ) -> tuple[Any, Sequence[str]]:
        """See ``Sharded``."""
        adapter = self._core.parts.registry.adapter
        return adapter.load_model(model, self._params, content, values)

    def warn_once(self, warning: Warning) -> None:
        """See ``Sharded``."""
        if self._core not in _WARNED:
            _WARNED.add(self._core)
            tell(warning, aloud=self.rank == 0)

    def agree(self, call: str, description: Description, error: Exception | None = None) -> None:
        """See ``Sharded``."""
        self._core.enter_call(call, description, error)

    def allgather(self, value: T, call: str) -> list[T]:
        """See ``Sharded``."""
        return self._core.parts.collectives.allgather(value, self._core.last_step.step, call)

    @property
    def _params(self) -> list[Any]:
        return [binding.param for binding in self._core.parts.registry.bindings]

    def _runs(self, buffers: ShardBuffers) -> Iterator[tuple[TensorShard, Span]]:
        """Yield the parts of parameters of one region, and where their state is in its arrays."""
        partition, region = self._core.partition, buffers.region
        for shard in buffers.shards:
            bucket = partition.bucket_of(shard)
            for index, span, in_state in partition.owned_params([shard]):
                param = partition.params[index]
                yield (
                    TensorShard(
                        param=index,
                        spec=param.spec,
                        key=PARAM_KEY,
                        array=StateSpec(PARAM_KEY, region.dtype),
                        span=span,
                        bucket_span=bucket.intersect(param).within(param),
                        region=shard.region,
                        local=span.shift(param.start - region.start),
                    ),
                    in_state,
                )
