"""One rank's uncaught exception ends the whole job."""

import os
import sys
from types import TracebackType

from mpi4py import MPI

_KEYBOARD_INTERRUPT_CODE = 130
_installed = False


def install_abort_hook() -> None:
    """Let an uncaught exception on this rank end all ranks, its traceback printed last.

    Without it the other ranks would wait for this one in their next collective, for ever. A job
    of one rank is left alone, and so is whatever hook was there before: it still prints.
    """
    global _installed  # noqa: PLW0603  # the interpreter has one excepthook
    if _installed or MPI.COMM_WORLD.size == 1:
        return
    _installed = True
    report = sys.excepthook

    def abort_after_report(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        report(kind, error, traceback)
        end_job(_KEYBOARD_INTERRUPT_CODE if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = abort_after_report


def end_job(code: int) -> None:
    """End every rank of the job at once with ``code``; what this rank has printed stands last."""
    sys.stdout.flush()
    sys.stderr.flush()
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # the library's own notice would bury the traceback
        os.dup2(silence, stream)
    MPI.COMM_WORLD.Abort(code)
