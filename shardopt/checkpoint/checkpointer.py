"""Checkpoints of a training run, one after another, written while training goes on."""

import signal
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from shardopt.checkpoint.format import disk
from shardopt.checkpoint.format.directory import (
    StepFolder,
    list_checkpoints,
    step_names,
    superfluous,
)
from shardopt.checkpoint.format.image import FileImage, StagedImage
from shardopt.checkpoint.format.reader import Reader, read_manifest
from shardopt.checkpoint.format.values import Array
from shardopt.checkpoint.listeners import PendingSave, SignalWatch
from shardopt.checkpoint.loading import load
from shardopt.checkpoint.saving import (
    Committed,
    HasCore,
    Plan,
    core_of,
    finish,
    run_here,
    start_saving,
)
from shardopt.checkpoint.snapshot import Layout, lay_out
from shardopt.comm.consensus import attempt
from shardopt.core.optimizer import Optimizer
from shardopt.errors import CheckpointError, CheckpointWarning, DamagedCheckpointError
from shardopt.report import tell

_ROOM_NBYTES = 1 << 20  # for small arrays of extra, beside what is known to be staged

T = TypeVar("T")


class Restored(NamedTuple):
    """Where training goes on.

    Attributes:
        step: As it was given to ``save``.
        extra: As it was given to ``save``; ``per_rank`` in it is a list of what each rank had.
        path: The checkpoint.
    """

    step: int
    extra: dict[str, Any] | None
    path: Path


class Checkpointer:
    """Saves a run's checkpoints into a directory, ``step-000000001200`` and so on, and finds them.

    ``save`` returns as soon as this rank's part has been copied. A thread of its own hashes and
    writes the copy, past the page cache where it can; the ranks notice at the end of a later
    ``step()``, without a message more than the step sends anyway, that all of them have written,
    and commit. What goes wrong then is warned of at once and raised by the next ``save`` or
    ``wait``; training can go on and save again.

    The copy takes as much memory as what is saved, 12 bytes for each parameter in float32, divided
    over the ranks. Its first use takes longer, unless ``restore`` came before. With
    ``asynchronous=False`` there is no copy, and ``save`` takes as long as the disk does.

    Use it as a context manager, or call ``wait`` or ``close`` in the end: what is under way then
    would not be committed.

    Args:
        directory: On a file system that all ranks see; made if it does not exist.
        keep_last: Older checkpoints are removed once a newer one is safe. None keeps all.
        asynchronous: Whether training goes on while the disk writes.

    Attributes:
        signalled: The signal that came in the last step, to whatever rank, or None; the same on
            every rank. See ``save_on_signal``.
    """

    def __init__(
        self, directory: str | Path, keep_last: int | None = 3, asynchronous: bool = True
    ) -> None:
        if keep_last is not None and (type(keep_last) is not int or keep_last < 1):
            raise CheckpointError(
                f"keep_last must be a whole number >= 1 or None; got {keep_last!r}. Pass 3, say."
            )
        self.signalled: signal.Signals | None = None
        self._directory = Path(directory).absolute()
        self._keep_last = keep_last
        self._asynchronous = asynchronous
        self._layout: Layout | None = None
        self._staged = StagedImage()
        self._in_flight: PendingSave | None = None
        self._failure: CheckpointError | None = None
        self._watch: SignalWatch | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._swept = False

    def save(
        self, step: int | np.integer, opt: HasCore, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Save a checkpoint; see ``shardopt.checkpoint.save`` for what is in it.

        Waits for the one before, if that is still being written.

        Collective: every rank.

        Args:
            step: Of the training run. A step that is there already is kept as well: the new one
                is then called ``step-000000001200.1``.
            opt: A NAdam of any face.
            extra: See ``shardopt.checkpoint.save``; may be changed once this returns.

        Raises:
            CheckpointError: This save failed, or the one before did; on every rank.
        """
        self.wait()
        core, number = core_of(opt), int(step) if isinstance(step, np.integer) else step
        plan = Plan(
            call="Checkpointer.save()",
            step=number,
            folder=self._directory,
            names=lambda: step_names(number),
            submit=run_here,
            layout=self._lay_out,
            after_commit=self._tidy,
        )
        if not self._asynchronous:
            _tell_problem(core, finish(start_saving(plan, opt, extra)))
            return

        def stage(image: FileImage) -> StagedImage:
            self._staged.copy(image, core.num_cores)
            return self._staged

        def landed(outcome: Committed | CheckpointError, awaited: bool) -> None:
            self._in_flight = None
            if isinstance(outcome, Committed):
                _tell_problem(core, outcome)
                return
            self._failure = outcome
            if not awaited:
                _tell(core, f"a checkpoint could not be saved, as wait() will say, too: {outcome}")

        saving = start_saving(replace(plan, submit=self._submit, stage=stage), opt, extra)
        self._in_flight = PendingSave(saving, core, landed)

    def restore(self, opt: HasCore, step: int | None = None) -> Restored | None:
        """Load the newest checkpoint that is whole on all ranks.

        Warns of newer ones that are damaged, and passes them over.

        Collective: every rank.

        Args:
            opt: A NAdam of any face.
            step: Load a checkpoint of this step, and no other.

        Returns:
            Where to go on, or None if the directory has no checkpoint.

        Raises:
            CheckpointError: None of those there can be loaded, or the newest is of another model;
                on every rank. The optimizer is as it was.
        """
        self.wait()
        core, reasons = core_of(opt), dict[StepFolder, str]()
        # Looked for again each time, as what is missing may have been removed for a newer one.
        while folder := self._newest(core, step, reasons):
            try:
                extra = load(folder.path, opt)
            except CheckpointError as error:
                damaged = isinstance(error, DamagedCheckpointError)
                if not damaged and _from_rank_0(core, folder.path.exists()):
                    raise
                reasons[folder] = f"{folder.path.name}: {error}"
                continue
            for passed, reason in reasons.items():
                if passed > folder:
                    _tell(core, f"a newer checkpoint was passed over. {reason}")
            return Restored(folder.step, extra, folder.path)
        if reasons or step is not None:
            wanted = "a checkpoint" if step is None else f"a checkpoint of step {step}"
            got = "; ".join(reasons.values()).rstrip(".") or "none"
            raise CheckpointError(
                f"{str(self._directory)!r} must hold {wanted} that can be loaded; got {got}. Look "
                "with: shardopt ckpt verify."
            )
        return None

    def peek(self) -> Restored | None:
        """Tell what ``restore`` would go on from, without loading or verifying it.

        What is in ``extra`` may decide which model to build. Not collective, and needs no MPI: ask
        on one rank and broadcast.

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
                return Restored(folder.step, reader.extra(), folder.path)
        return None

    def wait(self) -> None:
        """Return when what was saved last would survive a loss of power.

        Collective: every rank.

        Raises:
            CheckpointError: It could not be saved; on every rank.
        """
        if self._in_flight is not None:
            self._in_flight.wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise type(failure)(str(failure)) from failure

    def steps(self) -> list[int]:
        """List the steps of which there are checkpoints, oldest first; damaged ones included."""
        return sorted({folder.step for folder in list_checkpoints(self._directory)})

    def save_on_signal(self, opt: HasCore, *signals: signal.Signals) -> None:
        """Let ``signalled`` tell of signals from now on, instead of what they did before.

        A scheduler sends one before it takes the machines away (Slurm: ``--signal=TERM@120``), to
        one rank or to all. Look at ``signalled`` after each step::

            opt.step()
            if step % 1000 == 0 or checkpointer.signalled:
                checkpointer.save(step, opt)
            if checkpointer.signalled == signal.SIGTERM:
                break

        Collective: every rank, from the main thread.

        Args:
            opt: Whose steps are taken.
            *signals: SIGTERM and SIGUSR1 unless given.
        """
        self._stop_watching()
        chosen = signals or (signal.SIGTERM, signal.SIGUSR1)
        self._watch, error = attempt(lambda: SignalWatch(core_of(opt), chosen, self._hear))
        try:
            core_of(opt).enter_call("Checkpointer.save_on_signal()", {"signals": chosen}, error)
        except Exception:
            self._stop_watching()
            raise

    def close(self) -> None:
        """Wait for what is under way, and give signals back. Collective."""
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
        else:  # other ranks may not come to a commit
            self._stop_watching()

    # -- inside ------------------------------------------------------------------------------------

    def _submit(self, job: Callable[[], Any]) -> Future[Any]:
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="shardopt-checkpoint")
        return self._writer.submit(job)

    def _reserve(self, core: Optimizer[Any]) -> None:
        """Prepare before training begins what saves will need: the layout, and memory, touched."""
        if self._asynchronous:
            self._staged.reserve(self._lay_out(core, ()).file.nbytes + _ROOM_NBYTES)

    def _lay_out(self, core: Optimizer[Any], arrays: Sequence[Array]) -> Layout:
        self._layout = lay_out(
            core.partition, core.buffers, core.topology.rank, arrays, self._layout
        )
        return self._layout

    def _newest(
        self, core: Optimizer[Any], step: int | None, tried: Container[StepFolder]
    ) -> StepFolder | None:
        """Let rank 0 find the newest checkpoint not tried, and get ready to save. Collective."""
        _, error = attempt(lambda: self._reserve(core))
        found = None
        if core.topology.rank == 0 and error is None:
            found, error = attempt(self._list)
        core.enter_call("Checkpointer.restore()", {"step": step}, error)
        folders = _from_rank_0(core, found)
        wanted = (folder for folder in reversed(folders or ()) if step in (None, folder.step))
        return next((folder for folder in wanted if folder not in tried), None)

    def _list(self) -> list[StepFolder]:
        try:
            return list_checkpoints(self._directory, stripped=True)
        except OSError as error:
            raise CheckpointError(
                f"directory must be readable; got {error.strerror} for {str(self._directory)!r}. "
                "Pass the directory that checkpoints were saved to."
            ) from error

    def _tidy(self, newest: Path) -> str | None:
        """Remove what is not needed any more. On rank 0, on the writer's thread."""
        try:
            if not self._swept:
                disk.remove_leftovers(self._directory)
                self._swept = True
            if self._keep_last is not None:
                folders = list_checkpoints(self._directory)
                for folder in superfluous(folders, self._keep_last, [newest]):
                    disk.remove(folder.path)
        except OSError as error:
            return f"older ones cannot be removed: {error}"
        return None

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _hear(self, number: signal.Signals | None) -> None:
        self.signalled = number


def _from_rank_0(core: Optimizer[Any], value: T) -> T:
    return core.collectives.gather(value, core.last_step.step, "Checkpointer.restore()")[0]


def _tell_problem(core: Optimizer[Any], committed: Committed) -> None:
    if committed.problem is not None:
        _tell(core, f"{committed.path.name} is safe, but {committed.problem}")


def _tell(core: Optimizer[Any], text: str) -> None:
    tell(CheckpointWarning(text), aloud=core.topology.rank == 0)
