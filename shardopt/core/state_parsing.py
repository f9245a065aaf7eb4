"""State dicts as they come in, checked against the optimizer, which does not change."""

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from shardopt._typing import FloatArray
from shardopt.core.state_dict import PART_KEY, OptimizerState
from shardopt.core.state_edits import COUNT_KEYS
from shardopt.errors import CheckpointError, HyperparamsError
from shardopt.layout.dtypes import is_floating
from shardopt.layout.partition import ParamSpec
from shardopt.layout.span import Span
from shardopt.layout.state_spec import StateSpec
from shardopt.params.groups import Group, group_values
from shardopt.params.writes import Written
from shardopt.rule.coefficients import StepCount
from shardopt.rule.hyperparams import Rule
from shardopt.rule.rules import names_of_others


@dataclass(frozen=True)
class Piece:
    """The state of one parameter in a state dict.

    Attributes:
        runs: Runs of the flattened parameter.
        arrays: By key, flat: their elements, end to end.
        in_place: The keys of arrays that are views of the very place that they are to be put in.
    """

    runs: tuple[Span, ...]
    arrays: Mapping[str, FloatArray]
    in_place: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LoadedState:
    """A state dict that fits the optimizer.

    Attributes:
        groups: The values of each param group.
        step_counts: One for each parameter.
        pieces: For each parameter, or None for one that has no entry: it has never stepped.
        is_whole: Whether it has everything, rather than a part.
        node: The number of the node whose part it is, and how many there are; None if it does not
            tell.
        has_surplus_masters: Whether it has masters of 16-bit parameters that have none here.
    """

    groups: list[Group]
    step_counts: list[StepCount]
    pieces: list[Piece | None]
    is_whole: bool
    node: tuple[int, int] | None
    has_surplus_masters: bool = False

    @property
    def is_in_place(self) -> bool:
        """Whether it shows nothing but the optimizer's present state."""
        return all(piece is None or piece.in_place == piece.arrays.keys() for piece in self.pieces)

    def runs(self) -> list[tuple[Span, ...] | None]:
        """Return what it has of each parameter."""
        return [None if piece is None else piece.runs for piece in self.pieces]


class Views(Protocol):
    """Knows the views of the optimizer's own state that have been handed out."""

    def admit(
        self, value: Any, array: FloatArray, part: Written, step: int
    ) -> tuple[FloatArray, bool]:
        """Check an array of a state dict, which may be such a view.

        Args:
            value: As it stands there.
            array: Its elements.
            part: What it is to be.
            step: The step of the same entry.

        Returns:
            The array, or a copy of a view of another part; and whether it is in place already.

        Raises:
            CheckpointError: It is a view that was handed out at another step.
        """
        ...


def parse_state(
    state_dict: Mapping[str, Any] | None, state: OptimizerState, views: Views
) -> LoadedState | None:
    """Check a state dict, if this rank has one, against the optimizer, which does not change.

    Args:
        state_dict: In the format of ``StateCalls.state_dict`` or the framework.
        state: The optimizer's.
        views: Of it.

    Raises:
        CheckpointError: It does not fit; the message says where.
    """
    if state_dict is None:
        return None
    try:
        return _parse_state(state_dict, state, views)
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        got = f"{type(error).__name__} ({error}) where it was read"
        raise CheckpointError(
            f"state_dict must have the form of torch's; got {got}. {_OWN_FORMAT}."
        ) from error


def _parse_state(state_dict: Mapping[str, Any], state: OptimizerState, views: Views) -> LoadedState:
    is_dict, got = isinstance(state_dict, Mapping), type(state_dict).__name__
    require(is_dict, "state_dict", "have the form of torch's", got, _OWN_FORMAT)
    for key in ("state", "param_groups"):
        rule = f"have the key {key!r}"
        require(key in state_dict, "state_dict", rule, sorted(state_dict), _OWN_FORMAT)
    entries = state_dict["state"]
    others = {key for entry in entries.values() for key in COUNT_KEYS if key in entry}
    others -= set(state.rule.count_keys)
    rule = f"be {state.rule.name}'s, which has no {', '.join(others)}"
    require(not others, "the state", rule, "another optimizer's", _OTHER_RULE)
    new_groups = _parse_groups(state_dict["param_groups"], state)
    hypers = [state.rule.from_group(group) for group in new_groups]
    ids = _parse_ids(state_dict["param_groups"])
    surplus = sorted(set(entries) - set(ids), key=str)
    rule = "have entries for the params of its param_groups only"
    require(not surplus, "state", rule, surplus, _OTHER_MODEL)
    is_whole = not any("slices" in entry for entry in entries.values())
    node = None
    if not is_whole and PART_KEY in state_dict:
        node = int(state_dict[PART_KEY]["node"]), int(state_dict[PART_KEY]["num_nodes"])
    pairs = list(zip(state.partition.params, ids, strict=True))
    has_surplus_masters = any(
        "master" in entries.get(own_id, ()) for p, own_id in pairs if not p.spec.form.has_masters
    )
    loaded = LoadedState(new_groups, [], [], is_whole, node, has_surplus_masters)
    for index, (param, own_id) in enumerate(pairs):
        if own_id not in entries:  # torch has no entry for one that never stepped
            loaded.step_counts.append(StepCount())
            loaded.pieces.append(None)
            continue
        given = entries[own_id]
        entry = state.read_entry(given, hypers[param.spec.group])
        piece = _parse_piece(entry, param.spec, state.rule, is_whole=is_whole)
        count = parse_step_count(entry, param.spec.name)
        admitted = {
            key: views.admit(given.get(key), array, Written(index, key), count.step)
            for key, array in piece.arrays.items()
        }
        arrays = {key: array for key, (array, _) in admitted.items()}
        in_place = frozenset(key for key, (_, is_in_place) in admitted.items() if is_in_place)
        loaded.step_counts.append(count)
        loaded.pieces.append(Piece(piece.runs, arrays, in_place))
    return loaded


def _parse_ids(groups: Sequence[Mapping[str, Any]]) -> list[Hashable]:
    """Return what a state dict calls the parameters, in their order."""
    ids = [each for group in groups for each in group["params"]]
    require(len(set(ids)) == len(ids), "params of param_groups", "be unique", ids, _OTHER_MODEL)
    return ids


def _parse_piece(entry: Mapping[str, Any], spec: ParamSpec, rule: Rule, *, is_whole: bool) -> Piece:
    """Check one parameter's entry."""
    specs = spec.state
    present = [array for array in specs if not array.is_optional or array.key in entry]
    keys = {*rule.count_keys, *(array.key for array in present)}
    keys |= set() if is_whole else {"slices"}
    must = f"have the keys {', '.join(sorted(keys))}"
    got = set(entry) - {"master"} | (keys & {"master"})  # not all parameters use masters
    remedy = _OTHER_RULE if got ^ keys == {"mu_product"} else _OTHER_MODEL
    require(got == keys, f"{rule.name}'s state of {spec.name!r}", must, sorted(entry), remedy)
    runs: tuple[Span, ...] = (Span(0, spec.numel),)
    shape = spec.shape
    if not is_whole:
        runs = _parse_slices(entry["slices"], spec)
        shape = (sum(run.numel for run in runs),)
    arrays = {
        each.key: _parse_array(entry[each.key], each, spec.name, shape)
        if each in present
        else np.zeros(sum(run.numel for run in runs), each.value_dtype)
        for each in specs
    }
    return Piece(runs, arrays)


def _parse_slices(slices: Any, spec: ParamSpec) -> tuple[Span, ...]:
    runs = tuple(Span(int(start), int(stop)) for start, stop in slices)
    rule = f"be ascending runs of its {spec.numel} elements"
    ends = [0, *(position for run in runs for position in (run.start, run.stop)), spec.numel]
    require(ends == sorted(ends), f"slices of {spec.name!r}", rule, list(slices), _OTHER_MODEL)
    return runs


def _parse_array(value: Any, spec: StateSpec, name: str, shape: tuple[int, ...]) -> FloatArray:
    """Check an array of the state of a parameter, and return it flat.

    Raises:
        CheckpointError: It has another shape, or is not floating point.
    """
    array, what = np.asarray(value), f"{spec.key} of {name!r}"
    require(is_floating(array.dtype), what, "be floating point", array.dtype, _OTHER_MODEL)
    require(array.shape == shape, what, f"have shape {shape}", array.shape, _OTHER_MODEL)
    flat: FloatArray = array.reshape(-1).astype(spec.value_dtype, copy=False)
    return flat


def _parse_groups(saved: Sequence[Mapping[str, Any]], state: OptimizerState) -> list[Group]:
    groups = state.groups
    require(
        len(saved) == len(groups), "param_groups", f"be {len(groups)}", len(saved), _OTHER_MODEL
    )
    parsed: list[Group] = []
    for index, (old, new) in enumerate(zip(groups, saved, strict=True)):
        name, size, got = f"params of param_groups[{index}]", len(old["params"]), new["params"]
        require(len(got) == size, name, f"be {size}", len(got), _OTHER_MODEL)
        others = [key for key in names_of_others(state.rule) if key in new and key not in old]
        rule = f"be {state.rule.name}'s, which has no {', '.join(others)}"
        require(not others, f"param_groups[{index}]", rule, "another optimizer's", _OTHER_RULE)
        values = group_values({**old, **copy.deepcopy(dict(new))})  # it may hold tensors
        try:
            state.rule.from_group(values)
        except HyperparamsError as error:
            raise CheckpointError(f"in param_groups[{index}] of the state dict, {error}") from None
        parsed.append(values)
    return parsed


def parse_step_count(entry: Mapping[str, Any], name: str) -> StepCount:
    """Check the step count of a parameter.

    Raises:
        CheckpointError: It is none.
    """
    step, mu_product = float(entry["step"]), float(entry.get("mu_product", 1.0))
    whole = step >= 0 and step.is_integer()
    require(whole, f"step of {name!r}", "be a whole number >= 0", step, _OTHER_MODEL)
    in_range = 0.0 <= mu_product <= 1.0
    require(in_range, f"mu_product of {name!r}", "lie in [0, 1]", mu_product, _OTHER_MODEL)
    return StepCount(int(step), mu_product)


def parse_entry(
    entry: Any, spec: ParamSpec, group: Group, state: OptimizerState, *, is_whole: bool
) -> tuple[Mapping[str, float], dict[str, FloatArray]]:
    """Check an entry of ``opt.state`` that a user has put together.

    Args:
        entry: The entry.
        spec: Its parameter.
        group: The param group of that.
        state: The optimizer's.
        is_whole: Whether it must have arrays, as this rank shows the whole state.

    Returns:
        The step count, by key, and the arrays, flat.

    Raises:
        CheckpointError: It is not what ``opt.state`` has there.
    """
    specs, count_keys = spec.state if is_whole else (), state.rule.count_keys
    keys = [*count_keys, *(each.key for each in specs)]
    name, rule = f"opt.state of {spec.name!r}", f"be a dict with the keys {', '.join(keys)}"
    require(isinstance(entry, Mapping), name, rule, f"a {type(entry).__name__}", AS_STATE)
    hyper = state.rule.from_group(group)
    try:
        values = state.read_entry(entry, hyper)
        require(set(values) == set(keys), name, rule, sorted(values), AS_STATE)
        numbers = {key: float(values[key]) for key in count_keys}
        arrays = {
            each.key: _parse_array(values[each.key], each, spec.name, spec.shape) for each in specs
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        got = f"{type(error).__name__} ({error}) where it was read"
        raise CheckpointError(f"{name} must {rule}; got {got}. {AS_STATE}.") from error
    return numbers, arrays


AS_STATE = "Put in what opt.state has there, or call opt.reset_state()"
_OWN_FORMAT = "Pass what state_dict() or gather_state_dict() gave"
_OTHER_MODEL = "Load it into the optimizer of the model it was saved from"
_OTHER_RULE = (
    "It is another optimizer's: load it into that, and go on from a checkpoint of it with "
    "shardopt.checkpoint.load(..., other_optimizer=True)"
)


def require(holds: bool, name: str, rule: str, got: object, remedy: str) -> None:
    """Refuse a state that breaks a rule.

    Raises:
        CheckpointError: It does.
    """
    if not holds:
        raise CheckpointError(f"{name} must {rule}; got {got}. {remedy}.")
