"""The background work of checkpoints: a save in progress, and the wait for a signal."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from shardopt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from shardopt.checkpoint.operation import Committed, SaveOperation
    from shardopt.core.listeners import BackgroundWork


class PendingSave:
    """A save that advances after a step, once the jobs of all ranks have ended.

    Collective: construction, and every method except ``vote``.

    Args:
        operation: The save, which has just been started.
        background: The work of the optimizer whose steps advance it.
        on_done: Called at the end with the outcome, and with whether the user waits for it.
    """

    def __init__(
        self,
        operation: SaveOperation,
        background: list[BackgroundWork],
        on_done: Callable[[Committed | CheckpointError, bool], None],
    ) -> None:
        self._operation = operation
        self._background = background
        self._on_done = on_done
        background.append(self)

    def vote(self) -> int:
        """Return whether this rank's job is done."""
        return int(self._operation.is_job_done)

    def after_step(self, lowest: int) -> None:
        """Advance if the jobs of all ranks are done."""
        if lowest:
            self._advance(awaited=False)

    def close(self) -> None:
        """Wait for the end of the save, as the optimizer is about to be closed."""
        while not self._operation.is_over:
            self._advance(awaited=False)

    def wait(self) -> None:
        """Wait for the end of the save, for the user."""
        while not self._operation.is_over:
            self._advance(awaited=True)

    def _advance(self, *, awaited: bool) -> None:
        outcome: Committed | CheckpointError | None
        try:
            self._operation.advance()
            outcome = self._operation.committed
        except CheckpointError as error:
            outcome = error
        finally:
            if self._operation.is_over:
                self._background.remove(self)
        if outcome is not None:
            self._on_done(outcome, awaited)


class SignalWatch:
    """Informs all ranks after the same step of a signal that any of them has received.

    Args:
        signals: The signals, which are caught from now on.
        background: The work of the optimizer after whose steps it tells.
        on_signal: Called after each step with the signal, or None.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals],
        background: list[BackgroundWork],
        on_signal: Callable[[signal.Signals | None], None],
    ) -> None:
        self._background = background
        self._on_signal = on_signal
        self._caught: set[int] = set()
        self._before = {number: signal.signal(number, self._catch) for number in signals}
        background.append(self)

    def vote(self) -> int:
        """Return the highest signal that this rank has received, negative; 0 for none."""
        return -max(self._caught, default=0)

    def after_step(self, lowest: int) -> None:
        """Report one signal; others follow after the next steps."""
        self._caught.discard(-lowest)
        self._on_signal(signal.Signals(-lowest) if lowest else None)

    def close(self) -> None:
        """Restore the handlers that signals had before."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
        if self in self._background:
            self._background.remove(self)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught.add(number)
