"""What goes on beside training: a save under way, and the wait for a signal."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from shardopt.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future
    from types import FrameType

    from shardopt.checkpoint.saving import Committed, Saving
    from shardopt.core.optimizer import Optimizer


class PendingSave:
    """A save that goes on at the ends of steps, once all ranks have done their jobs.

    Collective: construction, and every method but ``bid``.

    Args:
        saving: Just begun.
        core: Whose steps are taken.
        landed: Called with what came of it, and with whether somebody waits for that.
    """

    def __init__(
        self,
        saving: Saving,
        core: Optimizer[Any],
        landed: Callable[[Committed | CheckpointError, bool], None],
    ) -> None:
        self._saving = saving
        self._core = core
        self._landed = landed
        self._job: Future[Any] | None = next(saving)
        core.listeners.append(self)

    def vote(self) -> int:
        """Whether this rank's job is done."""
        return int(self._job is None or self._job.done())

    def after_step(self, least: int) -> None:
        """Go on if the jobs of all ranks are done."""
        if least:
            self._go_on(awaited=False)

    def close(self) -> None:
        """Wait for all jobs."""
        self.wait(awaited=False)

    def wait(self, *, awaited: bool = True) -> None:
        """Wait for all jobs, as the user does."""
        while self._job is not None:
            self._job.exception()  # waits
            self._go_on(awaited=awaited)

    def _go_on(self, *, awaited: bool) -> None:
        outcome: Committed | CheckpointError
        try:
            self._job = next(self._saving)
        except StopIteration as end:
            outcome = end.value
        except CheckpointError as error:
            outcome = error
        else:
            return
        self._job = None
        self._core.listeners.remove(self)
        self._landed(outcome, awaited)


class SignalWatch:
    """Lets all ranks know, after the same step, of a signal that came to any of them.

    Args:
        core: Whose steps are taken.
        signals: Those caught from now on.
        heard: Called after each step with the signal, or None.
    """

    def __init__(
        self,
        core: Optimizer[Any],
        signals: Sequence[signal.Signals],
        heard: Callable[[signal.Signals | None], None],
    ) -> None:
        self._core = core
        self._heard = heard
        self._caught: set[int] = set()
        self._before = {number: signal.signal(number, self._catch) for number in signals}
        core.listeners.append(self)

    def vote(self) -> int:
        """The highest signal that came to this rank, negative; 0 for none."""
        return -max(self._caught, default=0)

    def after_step(self, least: int) -> None:
        """Tell of the signal; others are told of after the next steps."""
        self._caught.discard(-least)
        self._heard(signal.Signals(-least) if least else None)

    def close(self) -> None:
        """Let signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
        if self in self._core.listeners:
            self._core.listeners.remove(self)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught.add(number)
