"""The checkpoints of a run, and the signals that ask for one or end the run."""

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

    from train_lm.corpus import Corpus
    from train_lm.options import Options

FIXED_OPTIONS = ("framework", "optimizer", "dtype", "layers", "width", "context", "seed")
"""The options that, with the text, identify a run. --steps and --lr only shape what is to come."""
_USUAL = {"optimizer": "nadam"}
"""The values of runs that were saved before there were such options."""
NUM_SAVES = 10
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""On Ctrl-C MPICH's mpirun passes SIGINT on to the ranks, Open MPI's sends them SIGTERM."""


@dataclass(frozen=True)
class Origin:
    """The point at which this job takes up the run, the same on all ranks.

    Attributes:
        run: A random name that identifies the run.
        batch: Sequences in a step, on all ranks together, as the run's first job chose them.
        step: The last step taken before; 0 at the beginning of the run.
        path: The checkpoint, or None at the beginning.
        num_ranks: The number of ranks that saved it.
    """

    run: str
    batch: int
    step: int = 0
    path: Path | None = None
    num_ranks: int = 0


def find_origin(directory: Path) -> tuple[Origin | None, dict[str, Any]]:
    """Read from the newest checkpoint where its run stands, without loading its tensors.

    Returns:
        The point at which the run would resume, or None if there is no checkpoint; and the options
        that identify the run.

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
    """Unpack the ``extra`` that ``Checkpoints`` saves beside the optimizer.

    Raises:
        ValueError: Another program saved this checkpoint.
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
    """Check that the command line asks for more steps of the run that was saved.

    Args:
        options: The command line's.
        corpus: The text, as read now.
        num_ranks: Ranks in this job.
        origin: The point at which the run would resume.
        saved: The options that identify the saved run.

    Raises:
        ValueError: It asks for another run, or for no more steps.
    """
    for name, value in identify_run(options, corpus).items():
        if value != saved.get(name, _USUAL.get(name)):
            raise ValueError(
                f"--{name} must be {saved.get(name, _USUAL.get(name))}, as in the run saved in "
                f"{options.checkpoint}; got {value}. Use the original value, or another folder "
                "for --checkpoint."
            )
    if options.steps <= origin.step:
        raise ValueError(
            f"--steps must be more than {origin.step}, the steps that the run saved in "
            f"{options.checkpoint} has taken; got {options.steps}. Choose a larger number, or "
            "another folder for --checkpoint."
        )
    if num_ranks > origin.batch:
        raise ValueError(
            f"the number of ranks must be at most {origin.batch}, the sequences per step of the "
            f"run saved in {options.checkpoint}; got {num_ranks}. Start fewer ranks."
        )


def identify_run(options: Options, corpus: Corpus) -> dict[str, Any]:
    """Return the settings that must not change when the run resumes."""
    fixed = {name: getattr(options, name) for name in FIXED_OPTIONS}
    return {**fixed, "text": corpus.fingerprint}


class Checkpoints:
    """Saves a run at intervals and on signals, whichever rank receives them.

    Ctrl-C and SIGTERM end the run after a last save. SIGUSR1 asks for a save, and the run goes on.
    All ranks learn of a signal at the end of the same step: a rank that stopped by itself would
    leave the others waiting in their next collective. Without ``--checkpoint`` nothing is saved.

    On exit from the context it waits for a save in progress. By then signals have their previous
    effect again, so a second Ctrl-C need not wait.

    Args:
        options: The command line's.
        opt: The optimizer.
        comm: The ranks that train.
    """

    def __init__(self, options: Options, opt: Any, comm: MPI.Intracomm) -> None:
        self._options = options
        self._opt = opt
        self._comm = comm
        self._interval = options.save_every or math.ceil(options.steps / NUM_SAVES)
        # It touches the disk only when it saves; without --checkpoint it just watches signals.
        self._checkpointer = Checkpointer(options.checkpoint or options.out)

    def restore(self) -> Origin:
        """Load the newest checkpoint into the optimizer, if there is one. Collective: every rank.

        Raises:
            ValueError: There are checkpoints, but none can be loaded; raised on all ranks.
        """
        directory = self._options.checkpoint
        restored = self._checkpointer.restore(self._opt) if directory else None
        if directory and restored:
            origin, _ = read_origin(restored)
            return replace(origin, path=directory / restored.path.name)
        run = self._comm.bcast(secrets.token_hex(8))
        return Origin(run, self._options.batch * self._comm.size)

    def watch(self, origin: Origin, corpus: Corpus) -> None:
        """Handle signals from now on, with checkpoints of this run. Collective: every rank."""
        self._extra = {
            "run": origin.run,
            "batch": origin.batch,
            "ranks": self._comm.size,
            "options": identify_run(self._options, corpus),
        }
        save_signals = (signal.SIGUSR1,) if self._options.checkpoint else ()
        self._checkpointer.save_on_signal(self._opt, *STOP_SIGNALS, *save_signals)

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal that ends the run, as in shells; 0 if there is none."""
        signalled = self._checkpointer.signalled
        return 128 + signalled if signalled in STOP_SIGNALS else 0

    def save_if_due(self, step: int) -> None:
        """Save after this step if the interval has passed or a signal asks. Collective: every rank.

        The data of every step follow from the seed and the step's number, which is in every
        checkpoint; nothing else needs to be kept of their order.
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
