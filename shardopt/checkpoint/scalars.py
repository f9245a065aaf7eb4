"""The step counts and hyperparameters from which an optimizer goes on, besides tensors."""

from dataclasses import replace
from typing import Any

from shardopt.checkpoint.format.fields import damaged
from shardopt.checkpoint.format.manifest import Manifest
from shardopt.checkpoint.format.messages import must
from shardopt.checkpoint.format.reader import Reader
from shardopt.checkpoint.matching import LoadOptions, Match, other_model
from shardopt.core.sharded import Scalars
from shardopt.errors import CheckpointError
from shardopt.rule.coefficients import StepCount
from shardopt.rule.hyperparams import Rule
from shardopt.rule.rules import RULES


def restored_scalars(
    scalars: Scalars, reader: Reader, found: Match, options: LoadOptions
) -> tuple[Scalars, list[str]]:
    """Return what the optimizer goes on from besides tensors, and what there is to say of it.

    Args:
        scalars: What it has now.
        reader: Of the checkpoint.
        found: The sources of its parameters.
        options: How to load.

    Raises:
        CheckpointError: The checkpoint has other param groups.
        DamagedCheckpointError: Its param groups are not valid.
    """
    manifest = reader.manifest
    fresh = StepCount()
    counts = []
    for spec, source, count in zip(scalars.params, found.params, scalars.step_counts, strict=True):
        if source is None:
            counts.append(count)
        elif source.param is None or options.only is not None:
            counts.append(fresh)
        else:
            entry = manifest.params[source.param]
            if scalars.rule.name == manifest.optimizer:
                counts.append(StepCount(entry.step, entry.mu_product))
            else:
                hyper = scalars.rule.from_group(scalars.groups[spec.group])
                counts.append(hyper.count_at(entry.step))
    if options.only is not None:
        return replace(scalars, step_counts=counts), []
    groups, notes = scalars.groups, list[str]()
    if scalars.rule.name != manifest.optimizer:
        notes.append(_other_rule_note(scalars.rule, manifest))
    elif options.strict or len(manifest.groups) == len(groups):
        groups = _read_groups(scalars, reader)
    else:
        there = len(manifest.groups)
        notes.append(f"{there} param groups there, {len(groups)} here: hyperparameters stay")
    restored = Scalars(
        params=scalars.params,
        step_counts=counts,
        groups=groups,
        num_steps=manifest.num_steps,
        loss_scale=manifest.loss_scale,
        rule=scalars.rule,
    )
    return restored, notes


def require_rule(rule: Rule, manifest: Manifest, options: LoadOptions) -> None:
    """Refuse the state of another optimizer, unless it was asked for or is not to be loaded.

    Raises:
        CheckpointError: It is such a state.
    """
    if options.other_optimizer or options.only is not None or rule.name == manifest.optimizer:
        return
    remedy = (
        f"Load it into {manifest.optimizer}, pass other_optimizer=True to go on from its moments "
        "and step counts, or only='params' to start anew"
    )
    rule_text = f"be {rule.name}'s, as the optimizer is"
    raise CheckpointError(must("the checkpoint", rule_text, f"{manifest.optimizer}'s", remedy))


def _other_rule_note(rule: Rule, manifest: Manifest) -> str:
    """Return what there is to say of a state that another optimizer has saved."""
    saved = RULES[manifest.optimizer]
    note = (
        f"moments and step counts are of {saved.name}; the hyperparameters of this {rule.name} stay"
    )
    if "mu_product" in rule.count_keys:
        note += "; mu_product was computed from the step counts"
    elif "mu_product" in saved.count_keys:
        note += "; mu_product was dropped"
    return note


def _read_groups(scalars: Scalars, reader: Reader) -> list[dict[str, Any]]:
    """Read the values of each param group; those that were not saved stay as they are."""
    saved = reader.manifest.groups
    if len(saved) != len(scalars.groups):
        raise other_model("param_groups", f"be {len(saved)}", len(scalars.groups))
    read: list[dict[str, Any]] = []
    for index, (group, value) in enumerate(zip(scalars.groups, saved, strict=True)):
        values = reader.decode(value)
        if not isinstance(values, dict):
            raise damaged(f"param_groups[{index}]", "be a dict", type(values).__name__)
        values = {**group, **values}
        try:
            scalars.rule.from_group(values)
        except (TypeError, ValueError) as error:  # HyperparamsError, or of arrays
            raise damaged(f"param_groups[{index}]", "be valid", str(error)) from None
        read.append(values)
    return read
