"""The optimizer as checkpoints see it: an implementation of ``Sharded``."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

from shardopt._typing import FloatArray
from shardopt.backends.codes import part_of
from shardopt.comm.consensus import Description
from shardopt.core.listeners import BackgroundWork
from shardopt.core.optimizer import Optimizer
from shardopt.core.sharded import Scalars, Sharded, TensorShard
from shardopt.core.shared_params import UserChanges
from shardopt.core.state_dict import has_entry
from shardopt.errors import CheckpointError
from shardopt.layout.span import Span
from shardopt.layout.state_spec import PARAM_KEY, StateSpec
from shardopt.params.groups import group_values
from shardopt.params.model import ModelContent
from shardopt.report import StepReport, tell
from shardopt.store.buffers import ShardBuffers
from shardopt.trace import Trace

T = TypeVar("T")

_WARNED: WeakSet[Any] = WeakSet()  # the optimizers of which a warning has been issued


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
        self._core.groups.take_over(call)

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
