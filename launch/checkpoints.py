"""A run that can be left and taken up again: its checkpoints, and the signals that ask for them."""

from __future__ import annotations

import math
import secrets
import signal
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from shardopt.checkpoint import Checkpointer, Restored

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from mpi4py import MPI

    from corpus import Corpus
    from options import Options

FIXED_OPTIONS = ("framework", "dtype", "layers", "width", "context", "seed")
"""What makes a run the same run, with its text. --steps and --lr only shape what is to come."""
SAVES = 10
STOPS = (signal.SIGINT, signal.SIGTERM)
"""On Ctrl-C MPICH's mpirun hands SIGINT on to the ranks, Open MPI's sends them SIGTERM."""


@dataclass(frozen=True)
class Origin:
    """Where this job takes up the run, the same on all ranks; step 0 is the run's beginning.

    Attributes:
        run: A name that no other run has.
        batch: Sequences in a step, on all ranks together: those of the job that began the run.
        step: The last that was taken before.
        path: The checkpoint, or None at the beginning.
        num_ranks: How many saved it.
    """

    run: str
    batch: int
    step: int = 0
    path: Path | None = None
    num_ranks: int = 0


def look_for_origin(directory: Path) -> tuple[Origin | None, dict[str, Any]]:
    """Find what the newest checkpoint says of its run, without loading it.

    Returns:
        Where the run would go on, or None if there is no checkpoint; and the options that make it.

    Raises:
        ValueError: The folder cannot be used.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--checkpoint must be a folder that can be written; got {str(directory)!r}: "
            f"{error.strerror}. Choose another folder."
        ) from None
    newest = Checkpointer(directory).peek()
    return (None, {}) if newest is None else read_origin(newest)


def read_origin(restored: Restored) -> tuple[Origin, dict[str, Any]]:
    """Take apart what ``Checkpoints`` puts into a checkpoint beside the optimizer.

    Raises:
        ValueError: Somebody else saved it.
    """
    match restored.extra:
        case {"run": str(run), "batch": int(batch), "ranks": int(ranks), "options": dict(options)}:
            return Origin(run, batch, restored.step, restored.path, ranks), options
    raise ValueError(
        f"--checkpoint must be a folder of train_lm.py's own; got {str(restored.path.parent)!r}, "
        "where another program has saved. Choose another folder."
    )


def require_same_run(
    options: Options, corpus: Corpus, num_ranks: int, origin: Origin, saved: dict[str, Any]
) -> None:
    """See that the command line asks for the run that ``origin`` is of, and for more of it.

    Raises:
        ValueError: It does not.
    """
    for name, value in describe_run(options, corpus).items():
        if value != saved.get(name):
            raise ValueError(
                f"--{name} must be {saved.get(name)}, as in the run that {options.checkpoint} "
                f"holds; got {value}. Give what it began with, or another folder for --checkpoint."
            )
    if options.steps <= origin.step:
        raise ValueError(
            f"--steps must be more than the {origin.step} that the run in {options.checkpoint} "
            f"has taken; got {options.steps}. Ask for more, or choose another folder for "
            "--checkpoint."
        )
    if num_ranks > origin.batch:
        raise ValueError(
            f"ranks must be at most {origin.batch}, one for each sequence of a step in the run "
            f"that {options.checkpoint} holds; got {num_ranks}. Start fewer."
        )


def describe_run(options: Options, corpus: Corpus) -> dict[str, Any]:
    """Say what may not change when the run goes on."""
    fixed = {name: getattr(options, name) for name in FIXED_OPTIONS}
    return {**fixed, "text": corpus.fingerprint}


class Checkpoints:
    """Saves a run and hears the signals that ask for it, from whatever rank they came to.

    Ctrl-C and SIGTERM end the run after a last save. SIGUSR1 asks for a save, and the run goes on.
    All ranks learn of a signal at the end of the same step: one that stopped on its own would leave
    the others waiting in their next collective. Without ``--checkpoint`` nothing is saved.

    As a context manager it waits in the end for what is being saved. Signals do then what they did
    before, so that a second Ctrl-C need not wait.
    """

    def __init__(self, options: Options, opt: Any, comm: MPI.Intracomm) -> None:
        self._options = options
        self._opt = opt
        self._comm = comm
        self._interval = options.save_every or math.ceil(options.steps / SAVES)
        # It touches no disk before the first save: where there is none, it hears signals only.
        self._checkpointer = Checkpointer(options.checkpoint or options.out)

    def restore(self) -> Origin:
        """Load the newest checkpoint into the optimizer, if there is one. Collective.

        Raises:
            ValueError: There are some, but none can be loaded; on all ranks.
        """
        directory = self._options.checkpoint
        restored = self._checkpointer.restore(self._opt) if directory else None
        if directory and restored:
            origin, _ = read_origin(restored)
            return replace(origin, path=directory / restored.path.name)
        run = self._comm.bcast(secrets.token_hex(8))
        return Origin(run, self._options.batch * self._comm.size)

    def watch(self, origin: Origin, corpus: Corpus) -> None:
        """Hear signals from now on; they ask for checkpoints of this run. Collective."""
        self._extra = {
            "run": origin.run,
            "batch": origin.batch,
            "ranks": self._comm.size,
            "options": describe_run(self._options, corpus),
        }
        asking = (signal.SIGUSR1,) if self._options.checkpoint else ()
        self._checkpointer.save_on_signal(self._opt, *STOPS, *asking)

    @property
    def exit_code(self) -> int:
        """128 + the signal that ends the run, as shells count; 0 as long as none does."""
        signalled = self._checkpointer.signalled
        return 128 + signalled if signalled in STOPS else 0

    def save_if_due(self, step: int) -> None:
        """Save after this step, if a signal asks for it or it is time to. Collective.

        The data of every step follow from the seed and the step's number: the number, which a
        checkpoint has anyway, is all that there is to keep of their order.
        """
        due = step % self._interval == 0 or step == self._options.steps
        if self._options.checkpoint and (due or self._checkpointer.signalled):
            self._checkpointer.save(step, self._opt, self._extra)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._checkpointer.__exit__(kind, error, trace)
