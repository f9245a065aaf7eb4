"""One rank's uncaught exception ends the whole job."""

import faulthandler
import fcntl
import os
import sys
import termios
import time
from array import array
from contextlib import redirect_stderr
from io import StringIO
from types import TracebackType

from mpi4py import MPI

_KEYBOARD_INTERRUPT_CODE = 130
_LONGEST_WAIT_S = 1.0
_LONGEST_ABORT_S = 5.0
_installed = False


def install_abort_hook() -> None:
    """Let an uncaught exception on this rank end all ranks, its traceback printed last.

    Without it the other ranks would wait for this one in their next collective, for ever. A job
    of one rank is left alone, and so is whatever hook was there before: it still prints.
    """
    global _installed  # the interpreter has one excepthook
    if _installed or MPI.COMM_WORLD.size == 1:
        return
    _installed = True
    report = sys.excepthook

    def abort_after_report(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        with redirect_stderr(StringIO()) as text:
            report(kind, error, traceback)
        sys.stderr.write(text.getvalue())  # in one piece: other ranks may be writing theirs
        end_job(_KEYBOARD_INTERRUPT_CODE if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = abort_after_report


def end_job(code: int) -> None:
    """End every rank of the job at once with ``code``; what this rank has printed stands last."""
    sys.stdout.flush()
    sys.stderr.flush()
    silence = os.open(os.devnull, os.O_WRONLY)
    # Abort may itself wait for a host that is gone; this ends the process without Python's help.
    faulthandler.dump_traceback_later(_LONGEST_ABORT_S, exit=True, file=silence)
    for stream in (1, 2):
        _wait_until_read(stream)
        os.dup2(silence, stream)  # the library's own notice would bury the traceback
    MPI.COMM_WORLD.Abort(code)
    os._exit(code)  # MPICH comes back; the end of Python would then wait for a host that is gone


def _wait_until_read(stream: int) -> None:
    """Wait for the reader of a pipe: MPICH's launcher drops what it has not read at an abort."""
    unread, start = array("i", [1]), time.monotonic()
    while unread[0] > 0 and time.monotonic() - start < _LONGEST_WAIT_S:
        try:
            fcntl.ioctl(stream, termios.FIONREAD, unread)
        except OSError:  # no pipe
            return
        time.sleep(0.001)
