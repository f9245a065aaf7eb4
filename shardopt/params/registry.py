"""The user's side of the optimizer: param groups, parameters, and what was done to them since."""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any, Generic, NamedTuple, Self

from shardopt._typing import FloatArray
from shardopt.layout.partition import ParamSpec, Partition
from shardopt.params.adapter import Adapter, P
from shardopt.params.binding import Binding, read_before_write, require_disjoint, require_like
from shardopt.params.groups import Group, HyperparamsReader, name_params, require_distinct
from shardopt.rule.nadam import HYPERPARAM_NAMES, Hyperparams
from shardopt.store.buffers import ShardBuffers


@dataclass(frozen=True)
class PlannedGroups:
    """Groups about to be added, and the partition with them in it; nothing has changed yet."""

    groups: list[Group]
    names: list[str]
    partition: Partition
    first_group: int

    @property
    def params(self) -> list[Any]:
        """The new parameters in order."""
        return [param for group in self.groups for param in group["params"]]


class StepInputs(NamedTuple):
    """What all ranks go by in a step, and what one rank brings to it.

    Attributes:
        present: Bit mask of the parameters that have a gradient.
        replaced: Bit mask of the parameters whose value was replaced.
        loss_scale: What the loss was multiplied by before backward.
        overflowed: Whether a gradient is known not to be finite.
        stale: Bit mask of the routes to be exchanged once more; see [Note: early travellers].
    """

    present: int
    replaced: int
    loss_scale: float
    overflowed: bool
    stale: int = 0

    @classmethod
    def merge(cls, brought: Sequence[Self]) -> Self:
        """What holds for all ranks; the lowest loss scale, so that no gradient grows."""
        return cls(
            present=reduce(or_, (each.present for each in brought), 0),
            replaced=reduce(or_, (each.replaced for each in brought), 0),
            loss_scale=min((each.loss_scale for each in brought), default=math.inf),
            overflowed=any(each.overflowed for each in brought),
            stale=reduce(or_, (each.stale for each in brought), 0),
        )

    def words(self) -> list[str]:
        """For a digest; decimal digits of a long mask take too much time."""
        masks = map(hex, (self.present, self.replaced, self.stale))
        return [*masks, str(self.loss_scale), str(self.overflowed)]


@dataclass(frozen=True)
class LocalInputs:
    """What one rank found before a step.

    Attributes:
        hypers: The hyperparameters of each group.
        replaced: Arrays that have taken the place of a window's view, by parameter index.
        present: Bit mask of the parameters that have a gradient.
        copied_nbytes: Gradients that had to be copied into the window.
        stale: As in ``StepInputs``.
    """

    hypers: list[Hyperparams] = field(default_factory=list)
    replaced: dict[int, FloatArray] = field(default_factory=dict)
    present: int = 0
    copied_nbytes: int = 0
    stale: int = 0

    @property
    def replaced_mask(self) -> int:
        """Bit mask of ``replaced``."""
        return sum(1 << index for index in self.replaced)


class Registry(Generic[P]):
    """All parameters in the order of ``param_groups``; knows no other rank.

    Attributes:
        face: How parameters are read and rebound.
        param_groups: As the user sees them.
        bindings: One for each parameter.
        partition: Where every element lives.
    """

    def __init__(self, face: Adapter[P], partition: Partition) -> None:
        self.face = face
        self.partition = partition
        self.param_groups: list[Group] = []
        self.bindings: list[Binding] = []
        self._reader = HyperparamsReader()
        self._windows: list[FloatArray] = []
        self._index_of: dict[int, int] = {}
        self._of_mask: tuple[int, list[P]] = 0, []  # the last mask's parameters: it seldom changes

    def plan(self, make: Callable[[], list[Group]]) -> PlannedGroups:
        """Lay out new groups behind the present ones.

        Raises:
            PartitionError: A parameter is listed twice, shares memory with another, or cannot be
                used.
            HyperparamsError: A hyperparameter is out of range.
        """
        groups = make()
        for group in groups:
            Hyperparams.from_group(group)
        names = name_params(groups, self.face, len(self.bindings))
        params = [param for group in groups for param in group["params"]]
        require_distinct(
            [binding.param for binding in self.bindings] + params,
            [binding.name for binding in self.bindings] + names,
        )
        arrays = [self.face.data(param, name) for param, name in zip(params, names, strict=True)]
        require_disjoint(
            [binding.name for binding in self.bindings] + names,
            [binding.data for binding in self.bindings] + arrays,
        )
        for param, name, array in zip(params, names, arrays, strict=True):
            grad = self.face.grad(param, name)
            if grad is not None:
                require_like("grad", name, grad, array)
        group_of = [
            len(self.param_groups) + i for i, group in enumerate(groups) for _ in group["params"]
        ]
        specs = [
            ParamSpec(name, tuple(array.shape), array.dtype.name, group)
            for name, array, group in zip(names, arrays, group_of, strict=True)
        ]
        return PlannedGroups(groups, names, self.partition.extend(specs), len(self.param_groups))

    def commit(self, addition: PlannedGroups, buffers: Sequence[ShardBuffers]) -> list[Binding]:
        """Take planned groups in; their parameters are not bound yet."""
        first = len(self.bindings)
        for param, name in zip(addition.params, addition.names, strict=True):
            placed = addition.partition.params[len(self.bindings)]
            storage = buffers[placed.region]
            views = storage.param_view(placed), storage.grad_view(placed)
            self._index_of[id(param)] = len(self.bindings)
            self.bindings.append(Binding(name, param, self.face, *views))
        self.param_groups += addition.groups
        self.partition = addition.partition
        self._windows = [array for storage in buffers for array in (storage.params, storage.grads)]
        return self.bindings[first:]

    def index_of(self, param: P) -> int | None:
        """Its place among all parameters, or None for one of others."""
        return self._index_of.get(id(param))

    def survey(self) -> LocalInputs:
        """Look at everything users may have changed since the last step; copy gradients in.

        Only this rank reads its gradients now, so that copying them before the ranks have agreed
        changes nothing for the others.

        Raises:
            PartitionError: A parameter or gradient was replaced by one that does not fit.
            HyperparamsError: A hyperparameter is out of range.
        """
        hypers = self._reader.read(self.param_groups)
        replaced = self.find_replaced()
        present = 0
        new_grads: dict[int, FloatArray] = {}
        for index, binding in enumerate(self.bindings):
            has_grad, grad = binding.find_new_grad()
            present |= has_grad << index
            if grad is not None:
                new_grads[index] = grad
        return LocalInputs(hypers, replaced, present, self._take_grads(present, new_grads))

    def find_replaced(self) -> dict[int, FloatArray]:
        """Find arrays that have taken the place of parameters' views of the window.

        Raises:
            PartitionError: One has another shape or dtype.
        """
        replaced: dict[int, FloatArray] = {}
        for index, binding in enumerate(self.bindings):
            data = binding.find_new_data()
            if data is not None:
                replaced[index] = data
        return read_before_write(replaced, self._windows)

    def adopt(self, replaced: Mapping[int, FloatArray], winners: Container[int]) -> int:
        """Bind replaced parameters to the window again.

        Args:
            replaced: Of the survey.
            winners: Those whose new value this rank writes into the window.

        Returns:
            Bytes written.
        """
        copied_nbytes = 0
        for index, array in replaced.items():
            binding = self.bindings[index]
            if index in winners:
                binding.data[...] = array
                copied_nbytes += binding.data.nbytes
            binding.bind_data()
        return copied_nbytes

    def zero_grads(self, set_to_none: bool, zero: Callable[[], None]) -> None:
        """Make gradients zero, or parameters have none.

        Args:
            set_to_none: Give no parameter a gradient; else one that has none may stay without, if
                that is what its framework does.
            zero: Zeroes this rank's gradients in the windows.
        """
        from_start = self.face.grads_from_start
        blank = [set_to_none or not (from_start or binding.has_grad()) for binding in self.bindings]
        zero()
        for binding, none in zip(self.bindings, blank, strict=True):
            if none:
                binding.blank_grad()
            else:
                binding.bind_grad()

    def updated(self, present: int) -> None:
        """Tell the face that the parameters of the bit mask have new values."""
        if self._of_mask[0] != present:
            params = [b.param for index, b in enumerate(self.bindings) if present >> index & 1]
            self._of_mask = present, params
        self.face.updated(self._of_mask[1])

    def rebind(self) -> None:
        """Let every parameter show the window, whatever has taken its place; it has a new value."""
        for binding in self.bindings:
            binding.bind_data()
        self.face.updated([binding.param for binding in self.bindings])

    def release(self) -> None:
        """Untie all parameters from the windows."""
        self._windows.clear()
        self._of_mask = 0, []
        for binding in self.bindings:
            binding.release()

    def _take_grads(self, present: int, new_grads: Mapping[int, FloatArray]) -> int:
        """Bring all gradients into the window and give the bytes that had to be copied."""
        values = read_before_write(new_grads, self._windows)
        for index, binding in enumerate(self.bindings):
            if index in values:
                binding.write_grad(values[index])
            elif not present >> index & 1:
                binding.clear_grad()
        return sum(array.nbytes for array in values.values())


def describe_addition(addition: PlannedGroups | None) -> dict[str, object]:
    """What must be equal on all ranks, in an order in which a difference explains itself."""
    if addition is None:
        return {}
    specs = [param.spec for param in addition.partition.params]
    hypers = [Hyperparams.from_group(group) for group in addition.groups]
    description: dict[str, object] = {
        "the number of param groups": addition.first_group + len(hypers),
        "the number of parameters": len(specs),
        **describe_hypers(hypers, addition.first_group),
    }
    for index, spec in enumerate(specs):
        description[f"the name of parameter {index}"] = spec.name
        description[f"the shape of parameter {spec.name!r}"] = spec.shape
        description[f"the dtype of parameter {spec.name!r}"] = spec.dtype
        description[f"the group of parameter {spec.name!r}"] = spec.group
    return description


def describe_hypers(hypers: Sequence[Hyperparams], first_group: int = 0) -> dict[str, object]:
    """The hyperparameters of groups by name."""
    return {
        f"{name} of param group {index}": getattr(hyper, name)
        for index, hyper in enumerate(hypers, first_group)
        for name in HYPERPARAM_NAMES
    }
