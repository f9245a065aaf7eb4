"""A save, from the snapshot to the commit.

[Note: a save in three parts]
What takes long is done in *jobs*, which make system calls and compute hashes, but use no MPI; they
may run on another thread while training goes on. The parts between them are collective, short, and
run on the main thread. Each begins once the jobs of all ranks have ended.

1. Agree; rank 0 makes the folder; each rank lays out its file, and may copy it.
   Job: ``write`` the file.
2. Send rank 0 what was written. Job of rank 0: ``commit``, which writes the manifest.
3. Send all ranks the outcome.
"""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from shardopt.checkpoint.format import disk
from shardopt.checkpoint.format.manifest import to_text
from shardopt.checkpoint.format.messages import must, require
from shardopt.checkpoint.format.reader import Reader
from shardopt.checkpoint.model import NamedModel, name_params, order_warning
from shardopt.checkpoint.snapshot import (
    Encoded,
    Layouts,
    Written,
    complete,
    encode_all,
    take_snapshot,
)
from shardopt.checkpoint.staging import StagedImage
from shardopt.comm.consensus import Description, attempt
from shardopt.core.sharded import Sharded
from shardopt.errors import CheckpointError, CheckpointWarning, ShardoptError
from shardopt.report import tell

T = TypeVar("T")


def run_here(job: Callable[[], T]) -> "Future[T]":
    """Run a job at once."""
    future: Future[T] = Future()
    try:
        future.set_result(job())
    except Exception as error:
        future.set_exception(error)
    return future


@dataclass(frozen=True)
class SavePlan:
    """Where and how to save.

    Attributes:
        call: The call that the user has made, for messages.
        step: The step of the training run.
        folder: Where the folder of the checkpoint will be.
        names: Names for it, of which it gets the first that is free.
        submit: Runs a job, here or on another thread.
        layouts: Lays out the file of this rank.
        staged: The memory that the file is copied to before it is written; None for no copy.
        after_commit: What rank 0 does next, in its job; returns what went wrong with that, or None.
    """

    call: str
    step: int
    folder: Path
    names: Iterable[str]
    submit: Callable[[Callable[[], Any]], Future[Any]] = run_here
    layouts: Layouts = field(default_factory=Layouts)
    staged: StagedImage | None = None
    after_commit: Callable[[Path], str | None] | None = None


class Committed(NamedTuple):
    """A checkpoint that is safe now, and what went wrong after that, or None."""

    path: Path
    problem: str | None


class State(Enum):
    """How far a save has come."""

    STARTING = "starting"
    WRITING = "writing"
    COMMITTING = "committing"
    COMMITTED = "committed"
    ABORTED = "aborted"


class _Start(NamedTuple):
    """The preparations of a rank, made before the ranks agree to save."""

    encoded: Encoded
    named: NamedModel
    changes: Any  # what users have done; see Sharded.find_changes
    name: str  # of the unfinished folder; empty except on rank 0


class SaveOperation:
    """One save; see [Note: a save in three parts].

    Collective: construction, which starts it, ``advance`` and ``finish``.

    Args:
        plan: Where and how to save; all but the callables must be the same on every rank.
        sharded: The state.
        extra: What the user wants to save with it.
        model: The model, or None.
        per_rank_buffers: Whether each rank saves its own buffers.

    Attributes:
        state: How far the save has come.
        committed: The checkpoint, once ``state`` is ``COMMITTED``.

    Raises:
        CheckpointError: Something cannot be saved; on every rank. So do ``advance`` and ``finish``.
    """

    def __init__(
        self,
        plan: SavePlan,
        sharded: Sharded,
        extra: Mapping[str, Any] | None,
        model: Any = None,
        *,
        per_rank_buffers: bool = False,
    ) -> None:
        self.state = State.STARTING
        self.committed: Committed | None = None
        self._plan = plan
        self._sharded = sharded
        self._lock: disk.FolderLock | None = None
        self._written: list[Written] = []
        self._trace = sharded.trace
        self._made: Path | None = None  # the folder, on rank 0
        sharded.take_over_groups(plan.call)
        with self._trace.span("save", step=plan.step), self._abort_on_error():
            start, error = attempt(lambda: self._prepare(extra, model, per_rank_buffers))
            described = {"per_rank_buffers": bool(per_rank_buffers)}
            self._agree(error, {**described, **start.named.description()} if start else {})
            assert start is not None
            if (problem := start.named.problem) is not None:
                tell(CheckpointWarning(f"{problem}."), aloud=sharded.rank == 0)
            if (warning := order_warning(start.named.names)) is not None:
                sharded.warn_once(warning)
            sharded.settle(start.changes)
            self._folder = plan.folder / self._allgather(start.name)[0]
            self._snapshot, self._error = attempt(
                lambda: take_snapshot(sharded, plan.layouts, start.encoded, plan.staged)
            )
            self._job = plan.submit(self.write)
            self.state = State.WRITING

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return self.state in (State.COMMITTED, State.ABORTED)

    @property
    def is_job_done(self) -> bool:
        """Whether ``advance`` would not have to wait for this rank's job."""
        return self._job.done()

    def advance(self) -> None:
        """Wait for the jobs of all ranks, and start the next ones."""
        with self._abort_on_error():
            if self.state is State.WRITING:
                self._written = self._allgather(self._outcome())
                self._job = self._plan.submit(self.commit)
                self.state = State.COMMITTING
            elif self.state is State.COMMITTING:
                self.committed = self._allgather(self._outcome())[0]
                self._release()
                self.state = State.COMMITTED

    def finish(self) -> Committed:
        """Wait for the end."""
        while not self.is_over:
            self.advance()
        assert self.committed is not None
        return self.committed

    def abort(self) -> None:
        """Release the lock, and remove what was written. No job may be running."""
        self._release()
        if self._made is not None:
            disk.discard(self._made)
        self.state = State.ABORTED

    # -- jobs --------------------------------------------------------------------------------------

    def write(self) -> Written:
        """Lock the folder until the end of the save, and write this rank's file. A job.

        Raises:
            CheckpointError: It cannot be written.
        """
        if self._snapshot is None:
            raise self._error or AssertionError
        written, image = self._snapshot.written, self._snapshot.image
        path = self._folder / written.file.name
        with self._trace.span("write_file", step=self._plan.step), _os_errors(self._folder):
            self._lock = disk.FolderLock(self._folder)
            is_beside = self._plan.staged is not None
            digests = disk.write_file(path, image, self._trace, is_beside=is_beside)
            disk.sync_folder(self._folder)
        return replace(written, file=replace(written.file, digests=digests))

    def commit(self) -> Committed | None:
        """Make the files a checkpoint. A job, which does nothing except on rank 0.

        Raises:
            CheckpointError: The checkpoint cannot be committed.
        """
        if self._sharded.rank != 0:
            return None
        assert self._snapshot is not None
        folder, plan = self._folder, self._plan
        digits = folder.name.rpartition("-")[2]
        manifest = complete(self._snapshot.draft, self._written, plan.step, digits)
        with self._trace.span("commit", step=plan.step), _os_errors(folder):
            for problem in Reader(folder, manifest).file_problems():
                raise CheckpointError(
                    f"could not write the checkpoint in {str(folder)!r}, as rank 0 does not see "
                    f"all of it: {problem} Nothing that was there before has changed."
                )
            disk.write_manifest(folder, to_text(manifest))
            for name in plan.names:
                with suppress(FileExistsError):
                    disk.commit(folder, plan.folder / name)
                    return self._after_commit(plan.folder / name)
        raise _exists_already(plan)

    def _after_commit(self, path: Path) -> Committed:
        hook = self._plan.after_commit
        return Committed(path, None if hook is None else hook(path))

    # -- inside ------------------------------------------------------------------------------------

    def _prepare(
        self, extra: Mapping[str, Any] | None, model: Any, per_rank_buffers: bool
    ) -> _Start:
        """Find everything that may be wrong; after that, rank 0 makes the folder."""
        plan, sharded, step = self._plan, self._sharded, self._plan.step
        is_count = type(step) is int and step >= 0
        remedy = "Count the steps of the run"
        sharded.require_whole(plan.call)
        require(is_count, "step", "be a whole number >= 0", repr(step), remedy)
        alone = per_rank_buffers and model is None
        require(not alone, "per_rank_buffers", "be False without model=", "True", "Pass model=")
        scalars = sharded.scalars()
        named = name_params(sharded, scalars.params, model)
        encoded = encode_all(
            extra, named, scalars, sharded.rank, per_rank_buffers=bool(per_rank_buffers)
        )
        changes = sharded.find_changes()
        if sharded.rank != 0:
            return _Start(encoded, named, changes, "")
        with _os_errors(plan.folder):
            free = (name for name in plan.names if not os.path.lexists(plan.folder / name))
            first = next(free, None)
            if first is None:
                raise _exists_already(plan)
            name = f"{disk.UNFINISHED_PREFIX}{first}-{secrets.token_hex(4)}"
            disk.make_unfinished(plan.folder / name)
            self._made = plan.folder / name
        return _Start(encoded, named, changes, name)

    def _outcome(self) -> Any:
        """Return the result of this rank's job, once the jobs of all ranks have ended well."""
        result, error = attempt(self._job.result)
        self._sharded.trim()
        if error is not None and not isinstance(error, ShardoptError):
            failure = CheckpointError(
                f"could not write the checkpoint in {str(self._plan.folder)!r}: "
                f"{type(error).__name__}: {error}. Nothing that was there before has changed: "
                "save again."
            )
            failure.__cause__, error = error, failure
        self._agree(error)
        return result

    def _agree(self, error: Exception | None, more: Description | None = None) -> None:
        plan = self._plan
        description = {"step": plan.step, "folder": str(plan.folder), **(more or {})}
        self._sharded.agree(plan.call, description, error)

    def _allgather(self, value: T) -> list[T]:
        return self._sharded.allgather(value, self._plan.call)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def _abort_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.abort()
            raise


def _exists_already(plan: SavePlan) -> CheckpointError:
    got = f"{str(plan.folder / next(iter(plan.names)))!r}, which is there already"
    return CheckpointError(must("path", "not exist", got, "Choose another, or use a Checkpointer"))


@contextmanager
def _os_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into errors of the save."""
    try:
        yield
    except OSError as error:
        remedy = "Nothing that was there before has changed: check the disk and save again"
        if isinstance(error, FileNotFoundError):
            remedy = "Check that all ranks see the folder, and that nobody removes it"
        raise CheckpointError(
            f"could not write the checkpoint in {str(folder)!r}: {error.strerror or error}. "
            f"{remedy}."
        ) from error
