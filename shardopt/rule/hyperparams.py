"""The hyperparameters of a param group, validated, and the update rule that they belong to.

[Note: rules]
A rule is a subclass of ``Hyperparams``: it names an optimizer and its step counts, has its
hyperparameters with their defaults as fields, checks them, and computes the ``Terms`` of a step.
Its objects are the hyperparameters of one param group. All else, from front ends to kernels and
checkpoints, is the same for every rule.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias

from shardopt.errors import HyperparamsError
from shardopt.rule.coefficients import StepCoefficients, StepCount

FLAGS = ("decoupled_weight_decay", "maximize", "amsgrad")


class Terms(NamedTuple):
    """The coefficients of a step in which rules differ; see [Note: one formula]."""

    m_decay: float
    g_scale: float
    m_scale: float
    v_scale: float
    eps: float


@dataclass(frozen=True, slots=True)
class Hyperparams(ABC):
    """The hyperparameters that every rule has; see [Note: rules].

    Attributes:
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the square root of the second moment.
        weight_decay: Added to the gradient (L2), or subtracted from the parameter when decoupled.
        decoupled_weight_decay: Decay as in AdamW. The variants ``keras`` and ``optax`` always do.
        maximize: Follow the gradient instead of descending it.
        variant: The published form of the rule to follow: one of ``variants``.

    Raises:
        HyperparamsError: A value is out of range; the message names it.
    """

    name: ClassVar[str]
    """Of the optimizer, as users call it and checkpoints record it."""
    count_keys: ClassVar[tuple[str, ...]] = ("step",)
    """The keys of ``StepCount`` in an entry of the state."""
    variants: ClassVar[tuple[str, ...]]
    _reals: ClassVar[tuple[str, ...]] = ("lr", "eps", "weight_decay")

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    maximize: bool = False
    variant: str = "torch"

    def __post_init__(self) -> None:
        for name in self._reals:
            value = as_real(name, getattr(self, name))
            if not 0.0 <= value < math.inf:
                raise HyperparamsError(
                    f"{name} must be a finite number >= 0; got {value}. Pass {name}=0 or more."
                )
            object.__setattr__(self, name, value)
        object.__setattr__(self, "betas", _as_betas(self.betas))
        for name in FLAGS:
            if hasattr(self, name):
                object.__setattr__(self, name, as_flag(name, getattr(self, name)))
        if self.variant not in self.variants:
            raise HyperparamsError(
                f"variant must be one of {', '.join(self.variants)}; got {self.variant!r}. "
                "Leave it out for torch's numbers."
            )
        self._check()

    def _check(self) -> None:  # noqa: B027 (most rules need no more)
        """Check what only this rule knows.

        Raises:
            HyperparamsError: A value is out of range, or does not go with another.
        """

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the hyperparameters."""
        return _names_of(cls)

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> Self:
        """Read the hyperparameters out of a ``param_groups`` entry."""
        values: dict[str, Any] = {name: group.get(name) for name in cls.names()}
        return cls(**values)

    def values(self) -> tuple[object, ...]:
        """Return the values in the order of ``names``."""
        return tuple([getattr(self, name) for name in self.names()])

    @property
    def decays_decoupled(self) -> bool:
        """Whether weight decay shrinks the parameter rather than entering its gradient."""
        return self.variant in ("keras", "optax") or self.decoupled_weight_decay

    def after_step(self, count: StepCount) -> StepCount:
        """Return the count after one more step, taken with these hyperparameters."""
        return StepCount(count.step + 1)

    def count_at(self, step: int) -> StepCount:
        """Return the count after ``step`` steps, all of them taken with these hyperparameters."""
        return StepCount(step)

    @abstractmethod
    def terms(self, count: StepCount) -> Terms:
        """Compute what the rule makes of a step.

        Args:
            count: The count after it: ``count.step`` is its number, from 1.
        """

    def coefficients(
        self, count: StepCount, grad_scale: float, mean_scale: float = 1.0
    ) -> StepCoefficients:
        """Compute the coefficients of one step.

        Args:
            count: See ``terms``.
            grad_scale: Factor on the averaged gradient: 1 / loss_scale, times clipping.
            mean_scale: Factor that makes it of the sum of sources.
        """
        beta1, beta2 = self.betas
        decoupled, terms = self.decays_decoupled, self.terms(count)
        return StepCoefficients(
            source_scale=-grad_scale if self.maximize else grad_scale,
            weight_decay=0.0 if decoupled else self.weight_decay,
            param_decay=self.lr * self.weight_decay if decoupled else 0.0,
            m_decay=terms.m_decay,
            m_gain=1.0 - beta1,
            beta2=beta2,
            v_gain=1.0 - beta2,
            g_scale=terms.g_scale,
            m_scale=terms.m_scale,
            v_scale=terms.v_scale,
            eps=terms.eps,
            mean_scale=mean_scale,
        )


Rule: TypeAlias = type[Hyperparams]
"""See [Note: rules]."""


@cache
def _names_of(rule: Rule) -> tuple[str, ...]:
    return tuple(field.name for field in fields(rule))


def as_real(name: str, value: object) -> float:
    """Return a number, or an array or tensor of one element, as a float.

    Raises:
        HyperparamsError: It is not a real number.
    """
    with suppress(OverflowError, RuntimeError, TypeError, ValueError):  # tensors raise the second
        if not isinstance(value, str):  # float() would parse it
            return float(_item(value))
    raise HyperparamsError(f"{name} must be a real number; got {value!r}. Pass a float.")


def as_flag(name: str, value: object) -> bool:
    """Return a bool, or what counts as one, as a bool.

    Raises:
        HyperparamsError: It is text, or has no truth value.
    """
    with suppress(RuntimeError, TypeError, ValueError):
        if not isinstance(value, str):  # any text, even "false", counts as true
            return bool(_item(value))
    raise HyperparamsError(f"{name} must be True or False; got {value!r}. Pass a bool.")


def _item(value: Any) -> Any:
    """Return the element of an array or tensor, even of one with a graph, and all else as is."""
    item = getattr(value, "item", None)
    return item() if callable(item) else value


def _as_betas(betas: object) -> tuple[float, float]:
    try:
        first, second = iter(betas)  # type: ignore[call-overload]  # anything with two items
    except (TypeError, ValueError):
        raise HyperparamsError(
            f"betas must be two numbers; got {betas!r}. Pass for example (0.9, 0.999)."
        ) from None
    pair = as_real("betas[0]", first), as_real("betas[1]", second)
    for index, beta in enumerate(pair):
        if not 0.0 <= beta < 1.0:
            raise HyperparamsError(
                f"betas[{index}] must lie in [0, 1); got {beta}. Pass for example (0.9, 0.999)."
            )
    return pair
