"""The user's side of the optimizer: param groups, parameters, and what was done to them since."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from shardopt.bindings import Binding, Face, P, read_before_write, require_disjoint
from shardopt.groups import Group, HyperparamsReader, name_params, require_distinct
from shardopt.kernels.base import FloatArray
from shardopt.nadam import HYPERPARAM_NAMES, Hyperparams
from shardopt.partition import ParamSpec, Partition
from shardopt.storage import SectionStorage


@dataclass(frozen=True)
class Addition:
    """Groups about to be added, and the partition with them in it; nothing has changed yet."""

    groups: list[Group]
    names: list[str]
    partition: Partition
    first_group: int

    @property
    def params(self) -> list[Any]:
        """The new parameters in order."""
        return [param for group in self.groups for param in group["params"]]


@dataclass(frozen=True)
class Survey:
    """What one rank found before a step.

    Attributes:
        hypers: The hyperparameters of each group.
        present: Bit mask of the parameters that have a gradient.
        replaced: Arrays that have taken the place of a window's view, by parameter index.
        copied_nbytes: Gradients that had to be copied into the window.
    """

    hypers: list[Hyperparams] = field(default_factory=list)
    present: int = 0
    replaced: dict[int, FloatArray] = field(default_factory=dict)
    copied_nbytes: int = 0

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

    def __init__(self, face: Face[P], partition: Partition) -> None:
        self.face = face
        self.partition = partition
        self.param_groups: list[Group] = []
        self.bindings: list[Binding] = []
        self._reader = HyperparamsReader()
        self._windows: list[FloatArray] = []

    def plan(self, make: Callable[[], list[Group]]) -> Addition:
        """Lay out new groups behind the present ones.

        Raises:
            PartitionError: A parameter is listed twice, shares memory with another, or cannot be
                used.
            HyperparamsError: A hyperparameter is out of range.
        """
        groups = make()
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
        group_of = [
            len(self.param_groups) + i for i, group in enumerate(groups) for _ in group["params"]
        ]
        specs = [
            ParamSpec(name, tuple(array.shape), array.dtype.name, group)
            for name, array, group in zip(names, arrays, group_of, strict=True)
        ]
        return Addition(groups, names, self.partition.extend(specs), len(self.param_groups))

    def commit(self, addition: Addition, storages: Sequence[SectionStorage]) -> list[Binding]:
        """Take planned groups in; their parameters are not bound yet."""
        first = len(self.bindings)
        for param, name in zip(addition.params, addition.names, strict=True):
            placed = addition.partition.params[len(self.bindings)]
            storage = storages[placed.section]
            views = storage.param_view(placed), storage.grad_view(placed)
            self.bindings.append(Binding(name, param, self.face, *views))
        self.param_groups += addition.groups
        self.partition = addition.partition
        self._windows = [array for storage in storages for array in (storage.params, storage.grads)]
        return self.bindings[first:]

    def survey(self) -> Survey:
        """Look at everything users may have changed since the last step; copy gradients in.

        Only this rank reads its gradients now, so that copying them before the ranks have agreed
        changes nothing for the others.

        Raises:
            PartitionError: A parameter or gradient was replaced by one that does not fit.
            HyperparamsError: A hyperparameter is out of range.
        """
        hypers = self._reader.read(self.param_groups)
        present = 0
        new_data: dict[int, FloatArray] = {}
        new_grads: dict[int, FloatArray] = {}
        for index, binding in enumerate(self.bindings):
            data = binding.find_new_data()
            if data is not None:
                new_data[index] = data
            has_grad, grad = binding.find_new_grad()
            present |= has_grad << index
            if grad is not None:
                new_grads[index] = grad
        new_data = read_before_write(new_data, self._windows)
        return Survey(hypers, present, new_data, self._take_grads(present, new_grads))

    def adopt(self, replaced: Mapping[int, FloatArray], winners: int) -> int:
        """Bind replaced parameters to the window again.

        Args:
            replaced: Of the survey.
            winners: Bit mask of those whose new value this rank writes into the window.

        Returns:
            Bytes written.
        """
        copied_nbytes = 0
        for index, array in replaced.items():
            binding = self.bindings[index]
            if winners >> index & 1:
                binding.data[...] = array
                copied_nbytes += binding.data.nbytes
            self.face.bind_data(binding.param, binding.data)
        return copied_nbytes

    def release(self) -> None:
        """Untie all parameters from the windows."""
        self._windows.clear()
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


def describe_addition(addition: Addition | None) -> dict[str, object]:
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
