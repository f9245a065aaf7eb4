"""All rules, by name."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from shardopt.errors import HyperparamsError
from shardopt.rule.adam import Adam, AdamW
from shardopt.rule.hyperparams import Rule
from shardopt.rule.nadam import NAdam
from shardopt.rule.radam import RAdam

RULES: Mapping[str, Rule] = {rule.name: rule for rule in (NAdam, Adam, AdamW, RAdam)}

HYPERPARAM_NAMES = frozenset(name for rule in RULES.values() for name in rule.names())
"""The hyperparameters of any rule."""


@cache
def names_of_others(rule: Rule) -> tuple[str, ...]:
    """Return the hyperparameters that only other rules have."""
    return tuple(sorted(HYPERPARAM_NAMES.difference(rule.names())))


def require_own(rule: Rule, group: Mapping[str, Any]) -> None:
    """Refuse a hyperparameter of another rule in a param group: it would be without effect.

    Raises:
        HyperparamsError: There is one, and it is neither zero, False nor None.
    """
    for name in names_of_others(rule):
        if group.get(name):
            raise HyperparamsError(
                f"{name} must be left out of the param groups of {rule.name}, which has no such "
                f"hyperparameter; got {group[name]!r}. Remove it from the group."
            )
