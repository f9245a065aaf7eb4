"""What is polled after every step."""

from typing import Protocol


class StepListener(Protocol):
    """Something that goes on beside the steps of all ranks, and takes notice at their ends."""

    def vote(self) -> int:
        """What this rank brings to the end of a step."""
        ...

    def after_step(self, least: int) -> None:
        """Learn the least that any rank has brought; called on all ranks after the same step."""
        ...

    def close(self) -> None:
        """Come to an end: the optimizer is about to be closed. Collective."""
        ...
