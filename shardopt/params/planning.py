"""Param groups that an optimizer is about to have: checked and laid out before anything changes."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

from shardopt._typing import FloatArray
from shardopt.errors import PartitionError
from shardopt.layout.partition import ParamSpec, Partition
from shardopt.layout.rearranging import rearrange
from shardopt.layout.state_spec import StateForm
from shardopt.params.adapter import Adapter
from shardopt.params.binding import Binding, Departure, require_disjoint, require_like
from shardopt.params.forms import require_same_form
from shardopt.params.group_values import make_plain
from shardopt.params.groups import (
    Group,
    complete_groups,
    complete_names,
    own_names,
    require_distinct,
)
from shardopt.params.known_groups import params_in
from shardopt.params.registry import Registry, describe_hypers
from shardopt.rule.hyperparams import Rule
from shardopt.rule.rules import require_own


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A parameter of planned groups.

    Attributes:
        param: The framework's object.
        own_name: The name it was given, or None.
        source: Its number so far; None if it is new.
    """

    param: Any
    own_name: str | None
    source: int | None


@dataclass(frozen=True)
class PlannedGroups:
    """Groups that an optimizer is about to have, and the partition with them in it.

    Attributes:
        groups: Those that are added behind the present ones or, after an edit, all of them.
        members: Their parameters.
        first_group: The number of the first of them.
        first_param: The number of the first parameter in them.
        partition: The layout of all parameters.
        leaving: The numbers so far of those that are going to leave.
        departures: The same, with memory to leave to.
        kept_regions: The numbers of the regions that stay; None if nothing moves.
    """

    groups: list[Group]
    members: list[Member]
    first_group: int
    first_param: int
    partition: Partition
    leaving: Sequence[int] = ()
    departures: Sequence[Departure] = ()
    kept_regions: Sequence[int] | None = None

    @property
    def added(self) -> dict[int, Any]:
        """The new parameters, by number."""
        members = enumerate(self.members, self.first_param)
        return {index: member.param for index, member in members if member.source is None}

    @property
    def moves(self) -> dict[int, int]:
        """The new number of each parameter that stays, by the number so far, after an edit."""
        members = enumerate(self.members, self.first_param)
        return {each.source: index for index, each in members if each.source is not None}


def plan_added(groups: list[Group], registry: Registry[Any]) -> PlannedGroups:
    """Lay out new groups behind the present ones.

    Raises:
        PartitionError: A parameter is listed twice, shares memory with another, or cannot be
            used.
        HyperparamsError: A hyperparameter is out of range.
    """
    _check(groups, registry)
    first_group, first_param = len(registry.param_groups), len(registry.bindings)
    names = own_names(groups, registry.adapter)
    params = [param for group in groups for param in group["params"]]
    known = registry.bindings if any(registry.index_of(p) is not None for p in params) else []
    all_names = complete_names(names, first_param)
    require_distinct(
        [b.param for b in known] + params, [binding.name for binding in known] + all_names
    )
    arrays = _arrays_of(params, all_names, registry)
    _require_apart(arrays, all_names, registry.bindings, registry)
    members = [Member(param, own, None) for param, own in zip(params, names, strict=True)]
    named = _Named(members, all_names, arrays)
    specs = _specs(groups, named, first_group, registry)
    partition = registry.partition.extend(specs)
    return PlannedGroups(groups, members, first_group, first_param, partition)


def plan_edited(registry: Registry[Any], defaults: Mapping[str, Any]) -> PlannedGroups:
    """Lay out the param groups as their user has edited them.

    Args:
        registry: Has them.
        defaults: Hyperparameters for groups that lack some.

    Raises:
        PartitionError: As in ``plan_added``.
        HyperparamsError: Likewise.
    """
    groups, bindings = registry.param_groups, registry.bindings
    complete_groups(groups, defaults)
    _check(groups, registry)
    members = _edited_members(groups, registry)
    params = [member.param for member in members]
    names = complete_names(member.own_name for member in members)
    require_distinct(params, names)
    added = [(m.param, name) for m, name in zip(members, names, strict=True) if m.source is None]
    new_names = [name for _, name in added]
    new_arrays = _arrays_of([param for param, _ in added], new_names, registry)
    staying = [member.source for member in members if member.source is not None]
    _require_apart(new_arrays, new_names, [bindings[index] for index in staying], registry)
    new = iter(new_arrays)
    arrays = [next(new) if m.source is None else bindings[m.source].data for m in members]
    specs = _specs(groups, _Named(members, names, arrays), 0, registry)
    stays = set(staying)
    leaving = [index for index in range(len(bindings)) if index not in stays]
    return PlannedGroups(
        groups,
        members,
        first_group=0,
        first_param=0,
        partition=rearrange(registry.partition, specs, [member.source for member in members]),
        leaving=leaving,
        departures=[bindings[index].copy_out() for index in leaving],
        kept_regions=registry.partition.regions_with(staying),
    )


def _edited_members(groups: Sequence[Group], registry: Registry[Any]) -> list[Member]:
    """Return the parameters of edited groups.

    Parameters that are known keep the name that they were given. A new one gets the name that
    stands in its place, unless that belongs to another.
    """
    members: list[Member] = []
    params = [param for group in groups for param in group["params"]]
    indices = [registry.index_of(param) for param in params]
    known_names = {registry.bindings[index].own_name for index in indices if index is not None}
    for group in groups:
        given: Sequence[str | None] = group.get("param_names") or ()
        if len(given) != len(group["params"]):
            given = [None] * len(group["params"])
        for param, name in zip(group["params"], given, strict=True):
            index = registry.index_of(param)
            if index is not None:
                members.append(Member(param, registry.bindings[index].own_name, index))
                continue
            own = registry.adapter.name(param)  # raises if it is none of the framework's
            members.append(Member(param, own if name in known_names else name or own, None))
    return members


def _check(groups: Sequence[Group], registry: Registry[Any]) -> None:
    for group in groups:
        make_plain(group, registry.rule)
        registry.rule.from_group(group)
        require_own(registry.rule, group)
        registry.adapter.check_group(group)


def _arrays_of(
    params: Sequence[Any], names: Sequence[str], registry: Registry[Any]
) -> list[FloatArray]:
    """Return the values of new parameters, whose gradients must fit."""
    for param, name in zip(params, names, strict=True):
        require_device(registry.adapter, param, name, registry.device)
    arrays = [registry.adapter.data(p, name) for p, name in zip(params, names, strict=True)]
    for param, name, array in zip(params, names, arrays, strict=True):
        grad = registry.adapter.grad(param, name)
        if grad is not None:
            require_like("grad", name, grad, array)
    return arrays


def find_device(adapter: Adapter[Any], groups: Sequence[Group]) -> str | None:
    """Return the device that the parameters of groups are on, or None if there are none."""
    for param in params_in(groups):
        adapter.name(param)  # raises if it is none of the framework's
        return adapter.device(param)
    return None


def require_device(adapter: Adapter[Any], param: Any, name: str, device: str) -> None:
    """Refuse a parameter that is not where the others are.

    Raises:
        PartitionError: It is on another device.
    """
    if (got := adapter.device(param)) != device:
        raise PartitionError(
            f"parameter {name!r} must be on {device}, as the first one of the optimizer or the "
            f"parameters of other ranks are; got {got}. Move it, or give each device an optimizer "
            "of its own."
        )


def _require_apart(
    arrays: Sequence[FloatArray],
    names: Sequence[str],
    known: Sequence[Binding],
    registry: Registry[Any],
) -> None:
    """Refuse new parameters that share memory with each other or with those that are known."""
    known = known if any(map(registry.may_overlap, arrays)) else []
    all_names = [*(binding.name for binding in known), *names]
    require_disjoint(all_names, [*(binding.own_data for binding in known), *arrays])


class _Named(NamedTuple):
    """Parameters of planned groups, with the names that they are going to have and their values."""

    members: Sequence[Member]
    names: Sequence[str]
    arrays: Sequence[FloatArray]


def _specs(
    groups: Sequence[Group], named: _Named, first_group: int, registry: Registry[Any]
) -> list[ParamSpec]:
    group_of = [number for number, group in enumerate(groups) for _ in group["params"]]
    bits_of = [registry.rules.bits_of(group) for group in groups]
    specs = []
    for member, name, array, group in zip(*named, group_of, strict=True):
        dtype, shape = array.dtype.name, tuple(array.shape)
        form = _form_of(member, ParamSpec(name, shape, dtype, group), bits_of[group], registry)
        specs.append(ParamSpec(name, shape, dtype, first_group + group, form))
    return specs


def _form_of(member: Member, spec: ParamSpec, bits: int, registry: Registry[Any]) -> StateForm:
    """Return how the state of a parameter is kept: once it is there, that cannot change.

    Raises:
        HyperparamsError: An edited group asks for something else.
        PartitionError: Its state cannot be kept as a group asks for.
    """
    if registry.adapter.keeps_full_state(member.param):
        bits = 32
    device = registry.adapter.device(member.param)
    form = registry.rules.form(spec, bits, device)
    if member.source is not None:
        before = registry.partition.params[member.source].spec.form
        require_same_form(spec.name, form, before)
    return form


def describe_groups(planned: PlannedGroups | None, rule: Rule) -> dict[str, object]:
    """Describe planned groups, in an order in which a difference between ranks explains itself."""
    if planned is None:
        return {}
    hypers = [rule.from_group(group) for group in planned.groups]
    description: dict[str, object] = {
        "the number of param groups": planned.first_group + len(hypers),
        "the number of parameters": len(planned.partition.params),
        **describe_hypers(hypers, planned.first_group),
    }
    for index, member in enumerate(planned.members, planned.first_param):
        spec, source = planned.partition.params[index].spec, member.source
        description[f"the name of parameter {index}"] = spec.name
        if source is not None:
            description[f"the place of {spec.name!r} before param_groups were edited"] = source
            description[f"the group of parameter {spec.name!r}"] = spec.group
            continue
        description[f"the shape of parameter {spec.name!r}"] = spec.shape
        description[f"the dtype of parameter {spec.name!r}"] = spec.dtype
        description[f"the form of the state of parameter {spec.name!r}"] = astuple(spec.form)
        description[f"the group of parameter {spec.name!r}"] = spec.group
    return description
