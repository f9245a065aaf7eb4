"""Background work that is polled after every step."""

from typing import Protocol


class StepListener(Protocol):
    """Background work that all ranks poll together after every step, such as a save."""

    def vote(self) -> int:
        """Return this rank's value in the min-allreduce that ends a step."""
        ...

    def after_step(self, lowest: int) -> None:
        """Act on the lowest vote of all ranks; called on all ranks after the same step."""
        ...

    def close(self) -> None:
        """Finish: the optimizer is about to be closed. Collective: every rank."""
        ...
