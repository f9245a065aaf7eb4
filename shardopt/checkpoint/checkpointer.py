"""Checkpoints of a training run, one after another, written while training goes on."""

import signal
from collections.abc import Callable, Container, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from shardopt.checkpoint.background import PendingSave, SignalWatch
from shardopt.checkpoint.format import disk
from shardopt.checkpoint.format.directory import (
    StepFolder,
    StepNames,
    list_checkpoints,
    removable,
)
from shardopt.checkpoint.format.messages import must, require
from shardopt.checkpoint.format.reader import Reader, read_manifest
from shardopt.checkpoint.loading import load
from shardopt.checkpoint.matching import Rename
from shardopt.checkpoint.operation import Committed, SaveOperation, SavePlan
from shardopt.checkpoint.report import Restored
from shardopt.checkpoint.snapshot import Layouts
from shardopt.checkpoint.staging import StagedImage
from shardopt.checkpoint.tensors import Reviver
from shardopt.comm.consensus import attempt
from shardopt.core.sharded import Sharded
from shardopt.core.sharded_optimizer import HasCore, sharded_of
from shardopt.errors import CheckpointError, CheckpointWarning, DamagedCheckpointError
from shardopt.report import tell

_RESTORE = "Checkpointer.restore()"
_ROOM_NBYTES = 1 << 20  # for small arrays of extra, besides what is known to be staged


class Checkpointer:
    """Saves a run's checkpoints into a directory, ``step-000000001200`` and so on, and finds them.

    ``save`` returns as soon as this rank's part has been copied. Another thread hashes and writes
    the copy, past the page cache where possible. At the end of a later ``step()`` the ranks learn,
    without any additional message, that all of them have written, and commit the checkpoint. If
    that fails, you are warned at once, and the next ``save`` or ``wait`` raises the error; training
    can go on and save again.

    The copy takes as much memory as what is saved: 12 bytes for each parameter in float32, divided
    over the ranks. The first save takes longer, unless ``restore`` came before it. With
    ``asynchronous=False`` there is no copy, and ``save`` takes as long as the disk does.

    Use it as a context manager, or call ``wait`` or ``close`` at the end: otherwise a save that is
    still in progress is not committed.

    Args:
        directory: A folder on a file system that all ranks see; made if it does not exist.
        keep_last: Number of checkpoints to keep: older ones are removed once a newer one is safe.
            None keeps all.
        asynchronous: Whether training goes on while the disk writes.

    Attributes:
        signalled: The signal that any of the ranks received in the last step, or None; the same on
            every rank. See ``save_on_signal``.
    """

    def __init__(
        self, directory: str | Path, keep_last: int | None = 3, asynchronous: bool = True
    ) -> None:
        valid = keep_last is None or (type(keep_last) is int and keep_last >= 1)
        rule, remedy = "be a whole number >= 1 or None", "Pass 3, for example"
        require(valid, "keep_last", rule, repr(keep_last), remedy)
        self.signalled: signal.Signals | None = None
        self._directory = Path(directory).absolute()
        self._keep_last = keep_last
        self._asynchronous = asynchronous
        self._layouts = Layouts()
        self._staged = StagedImage()
        self._pending: PendingSave | None = None
        self._failure: CheckpointError | None = None
        self._watch: SignalWatch | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._swept = False

    def save(
        self,
        step: int | np.integer,
        opt: HasCore,
        extra: Mapping[str, Any] | None = None,
        *,
        model: Any = None,
        per_rank_buffers: bool = False,
    ) -> None:
        """Save a checkpoint; see ``shardopt.checkpoint.save`` for what is in it.

        Waits for the previous save, if that is still in progress.

        Collective: every rank.

        Args:
            step: The step of the training run. If there is a checkpoint of the step already, it is
                kept, and the new one is called ``step-000000001200.1``.
            opt: An optimizer of any framework.
            extra: See ``shardopt.checkpoint.save``; may be changed once this returns.
            model: Likewise.
            per_rank_buffers: Likewise.

        Raises:
            CheckpointError: This save failed, or the previous one did; on every rank.
        """
        self.wait()
        sharded = sharded_of(opt)
        number = int(step) if isinstance(step, np.integer) else step
        plan = SavePlan(
            call="Checkpointer.save()",
            step=number,
            folder=self._directory,
            names=StepNames(number),
            layouts=self._layouts,
            after_commit=self._tidy,
        )
        if self._asynchronous:
            plan = replace(plan, submit=self._submit, staged=self._staged)
        operation = SaveOperation(plan, sharded, extra, model, per_rank_buffers=per_rank_buffers)
        if not self._asynchronous:
            _warn_of_problem(sharded, operation.finish())
            return
        on_done = partial(self._end_save, sharded)
        self._pending = PendingSave(operation, sharded.background, on_done)

    def restore(
        self,
        opt: HasCore,
        step: int | None = None,
        *,
        model: Any = None,
        strict: bool = True,
        only: str | None = None,
        rename: Rename | None = None,
        other_optimizer: bool = False,
    ) -> Restored | None:
        """Load the newest checkpoint that all ranks find undamaged.

        Warns of newer ones that are damaged, and passes them over.

        Collective: every rank.

        Args:
            opt: An optimizer of any framework.
            step: Load a checkpoint of this step, and no other.
            model: See ``shardopt.checkpoint.load``.
            strict: Likewise.
            only: Likewise.
            rename: Likewise.
            other_optimizer: Likewise.

        Returns:
            Where to go on, or None if the directory has no checkpoint.

        Raises:
            CheckpointError: None of the checkpoints can be loaded, or the newest is of another
                model or optimizer; on every rank. Optimizer and model are as they were.
        """
        self.wait()
        sharded, reasons = sharded_of(opt), dict[StepFolder, str]()
        sharded.take_over_groups(_RESTORE)
        # Listed again each time: a missing checkpoint may have been removed for a newer one.
        while folder := self._newest(sharded, step, reasons):
            try:
                loaded = load(
                    folder.path,
                    opt,
                    model=model,
                    strict=strict,
                    only=only,
                    rename=rename,
                    other_optimizer=other_optimizer,
                )
            except CheckpointError as error:
                damaged = isinstance(error, DamagedCheckpointError)
                if not damaged and sharded.allgather(folder.path.exists(), _RESTORE)[0]:
                    raise
                reasons[folder] = f"{folder.path.name}: {error}"
                continue
            for passed, reason in reasons.items():
                if passed > folder:
                    _warn(sharded, f"a newer checkpoint was passed over. {reason}")
            return replace(loaded, step=folder.step)
        if reasons or step is not None:
            wanted = "a checkpoint" if step is None else f"a checkpoint of step {step}"
            got = "; ".join(reasons.values()).rstrip(".") or "none"
            rule, remedy = f"hold {wanted} that can be loaded", "Look with: shardopt ckpt verify"
            raise CheckpointError(must(repr(str(self._directory)), rule, got, remedy))
        return None

    def peek(self) -> Restored | None:
        """Return what ``restore`` would go on from, without loading or verifying it.

        Its ``extra`` may decide which model to build. Not collective, and needs no MPI: call it on
        one rank and broadcast the result.

        Returns:
            The newest checkpoint whose manifest can be read, or None.

        Raises:
            CheckpointError: The directory cannot be read.
        """
        for folder in reversed(self._list()):
            with (
                suppress(CheckpointError),
                Reader(folder.path, read_manifest(folder.path)) as reader,
            ):
                revive = Reviver()
                extra = reader.extra(revive)
                for note in revive.notes:
                    tell(CheckpointWarning(note), aloud=True)
                return Restored(folder.step, extra, folder.path)
        return None

    def wait(self) -> None:
        """Wait until the last checkpoint would survive a loss of power.

        Collective: every rank.

        Raises:
            CheckpointError: It could not be saved; on every rank.
        """
        if self._pending is not None:
            self._pending.wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise type(failure)(str(failure)) from failure

    def steps(self) -> list[int]:
        """Return the steps that have checkpoints, oldest first; damaged ones included."""
        return sorted({folder.step for folder in list_checkpoints(self._directory)})

    def save_on_signal(self, opt: HasCore, *signals: signal.Signals) -> None:
        """Catch signals from now on, and show them to all ranks in ``signalled``.

        A scheduler sends one before it takes the machines away (Slurm: ``--signal=TERM@120``), to
        one rank or to all. Check ``signalled`` after each step::

            opt.step()
            if step % 1000 == 0 or checkpointer.signalled:
                checkpointer.save(step, opt)
            if checkpointer.signalled == signal.SIGTERM:
                break  # and end with a code other than 0, so that a launcher starts it again

        Collective: every rank, from the main thread.

        Args:
            opt: The optimizer whose steps are taken.
            *signals: The signals; SIGTERM and SIGUSR1 unless given.
        """
        self._stop_watching()
        sharded, chosen = sharded_of(opt), signals or (signal.SIGTERM, signal.SIGUSR1)
        self._watch, error = attempt(
            lambda: SignalWatch(chosen, sharded.background, self._note_signal)
        )
        try:
            sharded.agree("Checkpointer.save_on_signal()", {"signals": chosen}, error)
        except Exception:
            self._stop_watching()
            raise

    def close(self) -> None:
        """Wait for the save in progress, and restore the handlers of signals. Collective."""
        self._stop_watching()
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None
            self._staged = StagedImage()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:  # other ranks may not take part in a commit
            self._stop_watching()

    # -- inside ------------------------------------------------------------------------------------

    def _submit(self, job: Callable[[], Any]) -> Future[Any]:
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="shardopt-checkpoint")
        return self._writer.submit(job)

    def _end_save(
        self, sharded: Sharded, outcome: Committed | CheckpointError, awaited: bool
    ) -> None:
        """Report the end of a save that went on beside training; ``awaited`` errors are raised."""
        self._pending = None
        if isinstance(outcome, Committed):
            _warn_of_problem(sharded, outcome)
            return
        self._failure = outcome
        if not awaited:
            _warn(sharded, f"a checkpoint could not be saved, as wait() will say, too: {outcome}")

    def _newest(
        self, sharded: Sharded, step: int | None, tried: Container[StepFolder]
    ) -> StepFolder | None:
        """Find the newest checkpoint not tried yet, on rank 0, and prepare to save. Collective."""
        _, error = attempt(lambda: self._reserve(sharded))
        found = None
        if sharded.rank == 0 and error is None:
            found, error = attempt(self._list)
        sharded.agree(_RESTORE, {"step": step}, error)
        folders = sharded.allgather(found, _RESTORE)[0]
        wanted = (folder for folder in reversed(folders or ()) if step in (None, folder.step))
        return next((folder for folder in wanted if folder not in tried), None)

    def _reserve(self, sharded: Sharded) -> None:
        """Prepare before training begins what saves need: the layout, and memory, touched."""
        if self._asynchronous:
            names = tuple(spec.name for spec in sharded.scalars().params)
            layout = self._layouts.lay_out(sharded, names, ())
            self._staged.reserve(layout.file.nbytes + _ROOM_NBYTES)

    def _list(self) -> list[StepFolder]:
        try:
            return list_checkpoints(self._directory, stripped=True)
        except OSError as error:
            got = f"{error.strerror} for {str(self._directory)!r}"
            remedy = "Pass the directory that checkpoints were saved to"
            raise CheckpointError(must("directory", "be readable", got, remedy)) from error

    def _tidy(self, newest: Path) -> str | None:
        """Remove what is no longer needed. Called on rank 0, on the writer's thread."""
        try:
            if not self._swept:
                disk.remove_stale_folders(self._directory)
                self._swept = True
            if self._keep_last is not None:
                folders = list_checkpoints(self._directory)
                for folder in removable(folders, self._keep_last, [newest]):
                    disk.remove(folder.path)
        except OSError as error:
            return f"older ones cannot be removed: {error}"
        return None

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _note_signal(self, number: signal.Signals | None) -> None:
        self.signalled = number


def _warn_of_problem(sharded: Sharded, committed: Committed) -> None:
    if committed.problem is not None:
        _warn(sharded, f"{committed.path.name} is safe, but {committed.problem}")


def _warn(sharded: Sharded, text: str) -> None:
    tell(CheckpointWarning(text), aloud=sharded.rank == 0)
