"""Saving: what all ranks do from the snapshot to the commit.

[Note: a save in three parts]
What takes long is done in *jobs*: system calls and hashing, no MPI, so that they can run on another
thread while training goes on. What lies between them is collective, on the main thread, and short.
A save is a generator that yields each job of this rank, in the same order on all ranks; whoever
drives it goes on once the jobs of all ranks are done. ``save`` waits for them, ``Checkpointer``
need not.

1. Agree; rank 0 makes the folder; each rank lays out its file, and may copy it.  Job: write it.
2. Tell rank 0 what was written.                                   Job of rank 0: manifest, commit.
3. Tell all ranks how it ended.
"""

import os
import platform
import secrets
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import numpy as np
from mpi4py import MPI

from shardopt._typing import FloatArray
from shardopt._version import __version__
from shardopt.checkpoint.format import disk
from shardopt.checkpoint.format.image import FileImage
from shardopt.checkpoint.format.manifest import ArrayEntry, FileEntry, Manifest, file_name, to_text
from shardopt.checkpoint.format.reader import Reader
from shardopt.checkpoint.format.values import Array, encode
from shardopt.checkpoint.snapshot import Layout, lay_out, merge_slices, param_entries, part_arrays
from shardopt.comm.consensus import attempt
from shardopt.core.optimizer import Optimizer
from shardopt.errors import CheckpointError, ShardoptError
from shardopt.params.groups import group_values

T = TypeVar("T")

Saving = Generator[Future[Any], None, "Committed"]
"""A save under way; yields this rank's jobs and in the end returns what came of them."""

PER_RANK = "per_rank"


class HasCore(Protocol):
    """An optimizer of any face."""

    @property
    def core(self) -> Optimizer[Any]:
        """What all faces have in common."""
        ...


def core_of(opt: HasCore) -> Optimizer[Any]:
    """Give the core of what a user calls an optimizer.

    Raises:
        CheckpointError: It is none.
    """
    core = getattr(opt, "core", None)
    if not isinstance(core, Optimizer):
        raise CheckpointError(
            f"opt must be an optimizer of shardopt; got a {type(opt).__name__}. Pass the optimizer "
            "itself, not its state."
        )
    return core


@dataclass(frozen=True)
class Plan:
    """How a save is to be done; the same on every rank.

    Attributes:
        call: What the user has called, for messages.
        step: Of the training run.
        folder: Where the checkpoint's folder is to be.
        names: The folder gets the first of these that is free.
        submit: Runs a job, here or elsewhere.
        layout: Lays out this rank's file, given the arrays in it beside the parameters'.
        stage: What is to be written for an image, for example a copy.
        after_commit: What rank 0 does then, in its job; gives what went wrong with that, or None.
    """

    call: str
    step: int
    folder: Path
    names: Callable[[], Iterable[str]]
    submit: Callable[[Callable[[], Any]], Future[Any]]
    layout: Callable[[Optimizer[Any], Sequence[Array]], Layout] = lambda core, arrays: lay_out(
        core.partition, core.buffers, core.topology.rank, arrays
    )
    stage: Callable[[FileImage], disk.Image] = lambda image: image
    after_commit: Callable[[Path], str | None] = lambda _: None


class Committed(NamedTuple):
    """A checkpoint that is safe now, and what went wrong after that, or None."""

    path: Path
    problem: str | None


def save(path: str | Path, opt: HasCore, *, extra: Mapping[str, Any] | None = None) -> None:
    """Save everything that training needs to go on, on any number of ranks.

    Parameters, masters, moments, steps and hyperparameters are saved; gradients are not. Each rank
    writes what it owns into a file of its own. The checkpoint has its name only once all of it
    is on the disk: a crash at any moment leaves either nothing of that name or all of it.

    Returns when the checkpoint would survive a loss of power; ``Checkpointer`` does not wait for
    that.

    Collective: every rank.

    Args:
        path: Folder to be made, on a file system that all ranks see. It must not exist: nothing is
            ever overwritten.
        opt: A NAdam of any face.
        extra: What else is needed, a dict of None, bool, int, float, str, list, tuple, dict and
            arrays (NumPy's, or what NumPy can read). ``extra["per_rank"]`` is each rank's own, of
            all other entries rank 0's are saved.

    Raises:
        CheckpointError: It could not be saved; on every rank. Nothing has changed then.
    """
    path, step = Path(path).absolute(), core_of(opt).last_step.step
    plan = Plan("save()", step, path.parent, lambda: [path.name], submit=run_here)
    finish(start_saving(plan, opt, extra))


def run_here(job: Callable[[], T]) -> Future[T]:
    """Run a job at once."""
    future: Future[T] = Future()
    try:
        future.set_result(job())
    except Exception as error:
        future.set_exception(error)
    return future


def finish(saving: Saving) -> Committed:
    """Drive a save to its end, waiting for every job. Collective."""
    while True:
        try:
            next(saving).exception()  # waits
        except StopIteration as end:
            committed: Committed = end.value
            return committed


def start_saving(plan: Plan, opt: HasCore, extra: Mapping[str, Any] | None) -> Saving:
    """See [Note: a save in three parts]. Collective, and so is going on with it."""
    core = core_of(opt)
    here = core.topology.rank == 0
    begun, error = attempt(lambda: _begin(plan, core, extra))
    try:
        _agree(core, plan, error)
        assert begun is not None
        core.adopt(begun.replaced)
        folder = plan.folder / _gather(core, plan, begun.unfinished)[0]
        with ExitStack() as claims:
            content, error = attempt(lambda: _lay_out(plan, core, begun))
            written = plan.submit(lambda: _write(folder, content, error, claims))
            yield written
            files = _gather(core, plan, _outcome(core, plan, written))
            committed = plan.submit(lambda: _commit(plan, folder, content, files) if here else None)
            yield committed
            outcome: Committed = _gather(core, plan, _outcome(core, plan, committed))[0]
            return outcome
    except Exception:
        if here and begun is not None:
            disk.discard(plan.folder / begun.unfinished)
        raise


@dataclass(frozen=True)
class _Begun:
    """What this rank brings to a save.

    Attributes:
        replaced: Parameters that somebody has put other arrays in the place of.
        arrays: That the JSON of this rank refers to.
        per_rank: JSON of ``extra["per_rank"]``.
        shared: JSON of all else in ``extra`` and of the param groups; of rank 0.
        unfinished: Name of the folder, until the commit; of rank 0.
    """

    replaced: dict[int, FloatArray]
    arrays: list[Array]
    per_rank: Any
    shared: tuple[Any, Any] = (None, None)
    unfinished: str = ""


def _begin(plan: Plan, core: Optimizer[Any], extra: Mapping[str, Any] | None) -> _Begun:
    """Look at everything that may be wrong; rank 0 makes the folder, after all else."""
    rank, arrays = core.topology.rank, list[Array]()
    if type(plan.step) is not int or plan.step < 0:
        raise CheckpointError(
            f"step must be a whole number >= 0; got {plan.step!r}. Count the steps of the run."
        )
    if extra is not None and not isinstance(extra, Mapping):
        raise CheckpointError(
            f"extra must be a dict; got {type(extra).__name__}. Write {{'name': value}}."
        )
    rest = dict(extra or {})
    per_rank = encode(rest.pop(PER_RANK, None), f"extra[{PER_RANK!r}]", rank, arrays)
    replaced = core.find_replaced()
    if rank != 0:
        return _Begun(replaced, arrays, per_rank)
    everyones = encode(rest, "extra", rank, arrays) if extra is not None else None
    groups = [
        encode(group_values(group), f"param_groups[{i}]", rank, arrays)
        for i, group in enumerate(core.param_groups)
    ]
    with _os_errors(plan.folder):
        free = (name for name in plan.names() if not os.path.lexists(plan.folder / name))
        name = next(free, None) or _refuse_existing(plan)
        unfinished = f"{disk.UNFINISHED_PREFIX}{name}-{secrets.token_hex(4)}"
        disk.make_unfinished(plan.folder / unfinished)
    return _Begun(replaced, arrays, per_rank, (everyones, groups), unfinished)


@dataclass(frozen=True)
class _Written:
    """What a rank has put into its file, and where.

    Attributes:
        file: The file.
        places: (param, key, start, stop, offset in the file) of each part.
        per_rank: JSON of this rank.
    """

    file: FileEntry
    places: list[tuple[int, str, int, int, int]]
    per_rank: Any


@dataclass(frozen=True)
class _Content:
    """What a rank is going to write, and, on all ranks, what is known of it now.

    Attributes:
        image: The file.
        written: What will have been written, but for the digests.
        draft: The manifest without files and slices.
    """

    image: disk.Image
    written: _Written
    draft: Manifest


def _lay_out(plan: Plan, core: Optimizer[Any], begun: _Begun) -> _Content:
    topology, layout = core.topology, plan.layout(core, begun.arrays)
    values = part_arrays(layout.parts, core.buffers)
    image = FileImage(layout.file, [*values, *(array.reshape(-1) for array in begun.arrays)])
    arrays = zip(begun.arrays, layout.file.offsets[len(values) :], strict=True)
    file = FileEntry(
        name=file_name(topology.rank, topology.world_size),
        nbytes=image.nbytes,
        header_nbytes=layout.file.header.size,
        digests="",
        arrays=tuple(ArrayEntry(a.dtype.name, a.shape, offset) for a, offset in arrays),
    )
    everyones, groups = begun.shared
    draft = Manifest(
        step=plan.step,
        world_size=topology.world_size,
        num_steps=core.last_step.step,
        loss_scale=core.last_step.loss_scale,
        params=param_entries(core.partition, core.step_counts),
        slices=(),
        groups=groups,
        extra={"replicated": everyones, PER_RANK: None},
        files=(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        attempt=begun.unfinished.rpartition("-")[2],
        writer=_versions(),
    )
    return _Content(plan.stage(image), _Written(file, layout.places, begun.per_rank), draft)


def _write(
    folder: Path, content: _Content | None, error: Exception | None, claims: ExitStack
) -> _Written:
    """Write this rank's file, or say why there is none. A job."""
    if content is None:
        raise error or AssertionError
    with _os_errors(folder):
        claims.enter_context(disk.claimed(folder))
        digests = disk.write_file(folder / content.written.file.name, content.image)
        disk.sync_folder(folder)
    return replace(content.written, file=replace(content.written.file, digests=digests))


def _commit(
    plan: Plan, folder: Path, content: _Content | None, written: Sequence[_Written]
) -> Committed:
    """Make the files a checkpoint. A job of rank 0."""
    assert content is not None
    per_rank = [each.per_rank for each in written]
    draft = content.draft
    manifest = replace(
        draft,
        files=tuple(each.file for each in written),
        slices=merge_slices(draft.params, [each.places for each in written]),
        extra={**draft.extra, PER_RANK: per_rank if any(p is not None for p in per_rank) else None},
    )
    with _os_errors(folder):
        for problem in Reader(folder, manifest).file_problems():
            raise CheckpointError(
                f"a checkpoint must be written where rank 0 sees all of it; got, in "
                f"{str(folder)!r}: {problem} Nothing that was there before has changed."
            )
        disk.write_manifest(folder, to_text(manifest))
        for name in plan.names():
            with suppress(FileExistsError):
                disk.commit(folder, plan.folder / name)
                return Committed(plan.folder / name, plan.after_commit(plan.folder / name))
    return _refuse_existing(plan)


def _refuse_existing(plan: Plan) -> NoReturn:
    last = list(plan.names())[-1]
    raise CheckpointError(
        f"path must not exist; got {str(plan.folder / last)!r}, which is there already. Choose "
        "another, or use a Checkpointer."
    )


def _versions() -> dict[str, str]:
    vendor, version = MPI.get_vendor()
    return {
        "shardopt": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "mpi": f"{vendor} {'.'.join(map(str, version))}",
    }


def _agree(core: Optimizer[Any], plan: Plan, error: Exception | None) -> None:
    core.enter_call(plan.call, {"step": plan.step, "folder": str(plan.folder)}, error)


def _gather(core: Optimizer[Any], plan: Plan, value: T) -> list[T]:
    return core.collectives.gather(value, core.last_step.step, plan.call)


def _outcome(core: Optimizer[Any], plan: Plan, job: Future[T]) -> T:
    """What a job gave, once it has ended well on all ranks. Collective."""
    result, error = attempt(job.result)
    if error is not None and not isinstance(error, ShardoptError):
        failure = CheckpointError(
            f"a checkpoint must be written to {str(plan.folder)!r}; got {type(error).__name__}: "
            f"{error}. Nothing that was there before has changed: save again."
        )
        failure.__cause__, error = error, failure
    _agree(core, plan, error)
    return result  # type: ignore[return-value]  # no error


@contextmanager
def _os_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the file system into ours."""
    try:
        yield
    except OSError as error:
        remedy = "Nothing that was there before has changed: see to the disk and save again"
        if isinstance(error, FileNotFoundError):
            remedy = "All ranks must see the folder, and nobody may remove it"
        raise CheckpointError(
            f"a checkpoint must be written to {str(folder)!r}; got {error.strerror or error}. "
            f"{remedy}."
        ) from error
