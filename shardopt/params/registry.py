"""The user's side of the optimizer: param groups, parameters, and what was done to them since."""

from bisect import bisect_right, insort
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np

from shardopt._typing import FloatArray
from shardopt.layout.partition import ParamSpec, Partition
from shardopt.params.adapter import Adapter, P
from shardopt.params.binding import (
    Binding,
    byte_bounds,
    read_before_write,
    require_disjoint,
    require_like,
)
from shardopt.params.groups import Group, HyperparamsReader, name_params, require_distinct
from shardopt.params.inputs import LocalInputs
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


class Registry(Generic[P]):
    """All parameters of this rank, in the order of ``param_groups``.

    Args:
        adapter: Reads and binds the framework's parameters.
        partition: Empty so far.

    Attributes:
        adapter: As given.
        param_groups: As the user sees them.
        bindings: One for each parameter.
        partition: Where every element lives.
        shared: All memory that parameters and gradients live in.
    """

    def __init__(self, adapter: Adapter[P], partition: Partition) -> None:
        self.adapter = adapter
        self.partition = partition
        self.param_groups: list[Group] = []
        self.bindings: list[Binding] = []
        self._reader = HyperparamsReader()
        self.shared: list[FloatArray] = []
        self._bounds: list[tuple[int, int]] = []  # of the regions' parameters, sorted
        self._index_of: dict[int, int] = {}
        self._buffers: Sequence[ShardBuffers] = ()
        self._live: tuple[list[bool], list[FloatArray]] = [], []
        self._of_mask: tuple[int, list[P]] = 0, []  # the last mask's parameters: it seldom changes

    # -- parameters come and go --------------------------------------------------------------------

    def plan(self, groups: list[Group]) -> PlannedGroups:
        """Lay out new groups behind the present ones.

        Raises:
            PartitionError: A parameter is listed twice, shares memory with another, or cannot be
                used.
            HyperparamsError: A hyperparameter is out of range.
        """
        for group in groups:
            Hyperparams.from_group(group)
        names = name_params(groups, self.adapter, len(self.bindings))
        params = [param for group in groups for param in group["params"]]
        known = self.bindings if any(id(param) in self._index_of for param in params) else []
        known_names = [binding.name for binding in known]
        require_distinct([binding.param for binding in known] + params, known_names + names)
        arrays = [self.adapter.data(param, name) for param, name in zip(params, names, strict=True)]
        known = self.bindings if any(map(self._may_overlap, arrays)) else []
        known_names = [binding.name for binding in known]
        require_disjoint(known_names + names, [b.own_data for b in known] + arrays)
        for param, name, array in zip(params, names, arrays, strict=True):
            grad = self.adapter.grad(param, name)
            if grad is not None:
                require_like("grad", name, grad, array)
        first_group = len(self.param_groups)
        group_of = [first_group + i for i, group in enumerate(groups) for _ in group["params"]]
        specs = [
            ParamSpec(name, tuple(array.shape), array.dtype.name, group)
            for name, array, group in zip(names, arrays, group_of, strict=True)
        ]
        return PlannedGroups(groups, names, self.partition.extend(specs), first_group)

    def register(self, planned: PlannedGroups, buffers: Sequence[ShardBuffers]) -> list[Binding]:
        """Add planned groups, and return the bindings of their parameters, not bound yet.

        Args:
            planned: See ``plan``.
            buffers: The memory of all regions.
        """
        first = len(self.bindings)
        for param, name in zip(planned.params, planned.names, strict=True):
            placed = planned.partition.params[len(self.bindings)]
            memory = buffers[placed.region]
            views = memory.node_param(placed), memory.own_param(placed), memory.own_grad(placed)
            self._index_of[id(param)] = len(self.bindings)
            self.bindings.append(Binding(name, param, self.adapter, views))
        self.param_groups += planned.groups
        self.partition = planned.partition
        self._buffers = buffers
        for each in buffers[len(self._bounds) :]:
            self.shared += each.params, each.own_params, each.grads
            insort(self._bounds, byte_bounds(each.own_params))
        return self.bindings[first:]

    def mask_of_trained(self) -> int:
        """Return the bit mask of the parameters that require a gradient."""
        trained = (self.adapter.requires_grad(binding.param) for binding in self.bindings)
        return sum(1 << index for index, wanted in enumerate(trained) if wanted)

    def _may_overlap(self, array: FloatArray) -> bool:
        """Whether an array may share memory with a parameter."""
        start, stop = byte_bounds(array)
        before = bisect_right(self._bounds, (stop,)) - 1  # regions do not overlap each other
        return before >= 0 and self._bounds[before][1] > start

    def index_of(self, param: P) -> int | None:
        """Return the index of a parameter, or None if it is not this optimizer's."""
        return self._index_of.get(id(param))

    def release(self) -> None:
        """Leave all parameters without gradients, and with the values that they have."""
        self.shared.clear()
        self._bounds.clear()
        self._buffers, self._live = (), ([], [])
        self._of_mask = 0, []
        for binding in self.bindings:
            binding.release()

    # -- around a step -----------------------------------------------------------------------------

    def inspect(self, inputs: LocalInputs) -> LocalInputs:
        """Look at everything users may have changed since the last step; copy gradients in.

        Only this rank reads its gradients now, so copying them before the ranks have agreed
        changes nothing for the others.

        Args:
            inputs: As far as they are known.

        Returns:
            The same, with hyperparameters and gradients.

        Raises:
            PartitionError: A gradient was replaced by one that does not fit.
            HyperparamsError: A hyperparameter is out of range.
        """
        hypers = self._reader.read(self.param_groups)
        present = 0
        new_grads: dict[int, FloatArray] = {}
        for index, binding in enumerate(self.bindings):
            has_grad, grad = binding.find_new_grad()
            present |= has_grad << index
            if grad is not None:
                new_grads[index] = grad
        copied_nbytes = inputs.copied_nbytes + self._take_grads(present, new_grads)
        return LocalInputs(
            hypers=hypers,
            replaced=inputs.replaced,
            written=inputs.written,
            present=present,
            loss_scale=inputs.loss_scale,
            overflowed=inputs.overflowed,
            changed=inputs.changed,
            copied_nbytes=copied_nbytes,
        )

    def find_replaced(self) -> dict[int, FloatArray]:
        """Find arrays that have taken the place of parameters' views, by parameter index.

        Raises:
            PartitionError: One has another shape or dtype.
        """
        replaced: dict[int, FloatArray] = {}
        for index, binding in enumerate(self.bindings):
            data = binding.find_new_data()
            if data is not None:
                replaced[index] = data
        return read_before_write(replaced, self.shared)

    def adopt(self, replaced: Mapping[int, FloatArray], winners: Container[int]) -> int:
        """Bind replaced parameters to shared memory again.

        Args:
            replaced: See ``find_replaced``.
            winners: The parameters whose new value this rank writes into shared memory.

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

    def bump_version(self, present: int) -> None:
        """Report to the framework that the parameters of a bit mask have new values."""
        if self._of_mask[0] != present:
            params = [b.param for index, b in enumerate(self.bindings) if present >> index & 1]
            self._of_mask = present, params
        self.adapter.bump_version(self._of_mask[1])

    def rebind(self) -> None:
        """Make every parameter show shared memory, whatever has taken its place; its value is new.

        A loaded checkpoint is there.
        """
        for binding in self.bindings:
            binding.bind_data()
        self.adapter.bump_version([binding.param for binding in self.bindings])

    def cleared_by(self, *, set_to_none: bool) -> list[bool]:
        """Return for each parameter whether ``zero_grad`` leaves it without a gradient.

        Args:
            set_to_none: Leave all without; else one that has none may stay so, if that is what its
                framework does.
        """
        if set_to_none:
            return [True] * len(self.bindings)
        if self.adapter.grads_from_start:
            return [False] * len(self.bindings)
        return [not binding.has_grad() for binding in self.bindings]

    def zero_grads(self) -> None:
        """Zero this rank's gradients in shared memory."""
        for grads in self._live_grads():
            grads.view(np.uint8)[:] = 0

    def scale_grads(self, factor: float) -> None:
        """Multiply this rank's gradients in shared memory."""
        for grads in self._live_grads():
            grads *= grads.dtype.type(factor)

    def _live_grads(self) -> list[FloatArray]:
        """Return the memory of gradients that are in use; see ``Binding.is_live``."""
        is_live = [binding.is_live for binding in self.bindings]
        if self._live[0] != is_live:
            mask = int("".join("01"[live] for live in reversed(is_live)), 2)
            grads = [
                buffers.grads[buffers.local(run).slice]
                for region, buffers in enumerate(self._buffers)
                for run in self.partition.runs(region, mask)
            ]
            self._live = is_live, grads
        return self._live[1]

    def bind_grads(self, cleared: Sequence[bool]) -> None:
        """Bind gradients that have been zeroed in shared memory, or leave parameters without.

        Args:
            cleared: See ``cleared_by``.
        """
        for binding, none in zip(self.bindings, cleared, strict=True):
            if none:
                binding.clear_grad()
            else:
                binding.bind_grad()

    def _take_grads(self, present: int, new_grads: Mapping[int, FloatArray]) -> int:
        """Copy all gradients that are elsewhere into shared memory, and return their bytes."""
        values = read_before_write(new_grads, self.shared)
        for index, binding in enumerate(self.bindings):
            if index in values:
                binding.write_grad(values[index])
            elif not present >> index & 1:
                binding.zero_grad()
        return sum(array.nbytes for array in values.values())


def describe_groups(planned: PlannedGroups | None) -> dict[str, object]:
    """Describe new groups, in an order in which a difference between ranks explains itself."""
    if planned is None:
        return {}
    specs, num_new = planned.partition.params, len(planned.params)
    first = len(specs) - num_new  # what was there before has been compared before
    hypers = [Hyperparams.from_group(group) for group in planned.groups]
    description: dict[str, object] = {
        "the number of param groups": planned.first_group + len(hypers),
        "the number of parameters": len(specs),
        **describe_hypers(hypers, planned.first_group),
    }
    for index, spec in enumerate([param.spec for param in specs[first:]], first):
        description[f"the name of parameter {index}"] = spec.name
        description[f"the shape of parameter {spec.name!r}"] = spec.shape
        description[f"the dtype of parameter {spec.name!r}"] = spec.dtype
        description[f"the group of parameter {spec.name!r}"] = spec.group
    return description


def describe_hypers(hypers: Sequence[Hyperparams], first_group: int = 0) -> dict[str, object]:
    """Describe the hyperparameters of groups by name."""
    return {
        f"{name} of param group {index}": getattr(hyper, name)
        for index, hyper in enumerate(hypers, first_group)
        for name in HYPERPARAM_NAMES
    }
