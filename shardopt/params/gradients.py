"""The gradients of this rank, on their way from its framework to the kernel."""

from collections.abc import Mapping
from typing import Any, Protocol

from shardopt.params.registry import Registry


class Gradients(Protocol):
    """How gradients get to where the kernel reads them; one way for each stage.

    Attributes:
        late_nbytes: Bytes of gradients that had to wait in private memory before the last ``take``.
        waited_s: Time that backward has waited for other ranks since the last ``take``, in seconds.
        are_averages: Whether frameworks show averages once backward is over.
        are_updates: Whether parameters are updated as backward goes, before the step.
    """

    late_nbytes: int
    waited_s: float
    are_averages: bool
    are_updates: bool

    def leave(self, call: str, step: int) -> None:
        """Hand the gradients so far to the framework, as the layout changes. Collective.

        Args:
            call: The user's call, for messages.
            step: The last step, for messages.

        Raises:
            RankMismatchError: Ranks make other calls.
        """
        ...

    def lay_out(self) -> None:
        """Take over another layout. Collective over the node."""
        ...

    def take(self, step: int) -> tuple[int, int]:
        """Have all gradients where the kernel reads them, or where they are sent from.

        Collective over the node, in stage 2 on several nodes over all ranks, and returns on all
        ranks before it raises on any. All ranks of the job must meet before any calls it again.

        Returns:
            Bit mask of the parameters that have a gradient on this rank; and the bytes copied.

        Raises:
            Exception: A gradient does not fit, or was changed in a way that cannot be followed.
        """
        ...

    def describe(self, loss_scale: float) -> Mapping[str, object]:
        """Return what must be the same on all ranks, by name, after ``take``."""
        ...

    def adopt_writes(self, present: int) -> None:
        """Adopt what users have written, once ``describe`` is known to be the same everywhere.

        Args:
            present: Bit mask of the parameters that have a gradient on some rank.
        """
        ...

    def show(self, present: int, step: int) -> None:
        """Have all ranks see averages that ``take`` has completed. Collective: every rank.

        Args:
            present: Bit mask of the parameters that have a gradient on some rank.
            step: As for ``take``.
        """
        ...

    def zero(self, *, set_to_none: bool) -> None:
        """Zero this rank's gradients, or leave parameters without; see ``zero_grad``."""
        ...

    def scale(self, factor: float) -> None:
        """Multiply this rank's gradients."""
        ...

    def require_settled(self, call: str) -> None:
        """Refuse a call of the user's while some parameters are updated and others are not.

        Raises:
            CallOrderError: A backward that updates has begun since the last step.
        """
        ...

    def require_whole(self, call: str) -> None:
        """Refuse a call of the user's that needs a state of which all belongs to the same step.

        Raises:
            CheckpointError: A step has raised that had updated a part.
        """
        ...

    def mend(self) -> None:
        """Note that the whole state is another, such as that of a checkpoint."""
        ...

    def commit(self, present: int) -> None:
        """Have the rule plan the updates that backward has made, for the step to commit.

        Args:
            present: Bit mask of the parameters that have a gradient on some rank.
        """
        ...

    def free(self) -> None:
        """Release what is shared; ranks have met before."""
        ...


class UpdatedBySteps:
    """The part of ``Gradients`` that has nothing to do where only steps update parameters."""

    are_updates = False

    def require_settled(self, call: str) -> None:
        """Do nothing: only steps update."""

    def require_whole(self, call: str) -> None:
        """Do nothing: a step that raises has updated nothing."""

    def mend(self) -> None:
        """Do nothing: the state is whole."""

    def commit(self, present: int) -> None:
        """Do nothing: the step has planned its updates."""


class RowGradients(UpdatedBySteps):
    """Each rank has a row of gradients of its own, for the step to sum: stage 1; see ``Gradients``.

    Args:
        registry: The parameters.
    """

    late_nbytes = 0
    waited_s = 0.0
    are_averages = False

    def __init__(self, registry: Registry[Any]) -> None:
        self._registry = registry

    def leave(self, call: str, step: int) -> None:
        """Do nothing: rows keep what they have."""

    def lay_out(self) -> None:
        """Do nothing: the registry knows its layout."""

    def take(self, step: int) -> tuple[int, int]:
        """See ``Gradients.take``: copies what is elsewhere into the row."""
        return self._registry.take_grads()

    def describe(self, loss_scale: float) -> Mapping[str, object]:
        """See ``Gradients.describe``."""
        return {}

    def adopt_writes(self, present: int) -> None:
        """Do nothing: the step reads rows as they are."""

    def show(self, present: int, step: int) -> None:
        """Do nothing: backward averages nothing."""

    def zero(self, *, set_to_none: bool) -> None:
        """See ``Gradients.zero``."""
        cleared = self._registry.cleared_by(set_to_none=set_to_none)
        self._registry.zero_grads()
        self._registry.bind_grads(cleared)

    def scale(self, factor: float) -> None:
        """See ``Gradients.scale``."""
        self._registry.scale_grads(factor)

    def free(self) -> None:
        """Do nothing: the memory is not this object's."""
