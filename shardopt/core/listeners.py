"""Listeners that are told of each step, and background work that all ranks poll after it."""

from typing import Protocol

from shardopt.report import StepReport


class StepListener(Protocol):
    """Something on this rank that is told of each step, such as a log of metrics.

    Put it into ``opt.listeners``, on all ranks or only on some. What it raises is raised by
    ``step()``, on this rank and after the step: it may not hold up the others by collective calls.
    """

    def after_step(self, report: StepReport) -> None:
        """Take note of a step that is over."""
        ...

    def close(self) -> None:
        """Finish: the optimizer is about to be closed. What it raises is raised once it is."""
        ...


class BackgroundWork(Protocol):
    """Work that all ranks poll together after every step, such as a save."""

    def vote(self) -> int:
        """Return this rank's value in the min-allreduce that ends a step."""
        ...

    def after_step(self, lowest: int) -> None:
        """Act on the lowest vote of all ranks; called on all ranks after the same step."""
        ...

    def close(self) -> None:
        """Finish: the optimizer is about to be closed. Collective: every rank."""
        ...
