"""Failure policies. ``Abort``, the only one so far, ends the job when a rank fails."""

import faulthandler
import fcntl
import os
import sys
import termios
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from types import TracebackType
from typing import Any, NoReturn, Protocol

from mpi4py import MPI

from shardopt.errors import RankFailureError

_KEYBOARD_INTERRUPT_CODE = 130
_LONGEST_WAIT_S = 1.0
_LONGEST_ABORT_S = 5.0
_installed = False


class FailurePolicy(Protocol):
    """The reaction of a rank to failures, its own and those of others.

    Collectives and deadlines notice failures and describe them; the policy decides what follows.
    """

    def watch(self) -> None:
        """Install what notices a failure of this rank, such as an uncaught exception."""

    def on_missing(self, error: RankFailureError, ranks: Sequence[int]) -> NoReturn:
        """Handle ranks that have left the job or did not respond in time.

        Args:
            error: The description, for the user.
            ranks: The missing ranks, as far as they are known.

        Raises:
            RankFailureError: ``error``.
        """

    def on_lost(self, error: RankFailureError, ranks: Sequence[int]) -> NoReturn:
        """Handle a broken connection that MPI has reported.

        Args:
            error: The description, for the user; MPI's own error is its cause.
            ranks: The lost ranks, or those that this rank waited for if MPI names none.

        Raises:
            RankFailureError: ``error``.
        """

    def on_overdue(self, message: str) -> None:
        """Handle a call that takes too long and cannot be given up; called in another thread.

        Args:
            message: The description, for the user.
        """

    def leave(self) -> None:
        """Leave the job; called when the interpreter exits, while MPI can still be used."""


class Abort:
    """Ends the whole job when one rank fails, with a non-zero code and the error printed last."""

    def __init__(self) -> None:
        self._is_broken = False

    def watch(self) -> None:
        """Install the hook for uncaught exceptions; see ``install_abort_hook``."""
        install_abort_hook()

    def on_missing(self, error: RankFailureError, ranks: Sequence[int]) -> NoReturn:
        """Raise ``error``; even if it is caught, the job ends with code 1 when this rank exits."""
        self._is_broken = True
        raise error

    def on_lost(self, error: RankFailureError, ranks: Sequence[int]) -> NoReturn:
        """Raise ``error``, as ``on_missing`` does."""
        self.on_missing(error, ranks)

    def on_overdue(self, message: str) -> None:
        """Print the stacks of all threads and the message, and end the job."""
        faulthandler.dump_traceback()
        sys.stderr.write(f"{RankFailureError.__module__}.{RankFailureError.__name__}: {message}\n")
        end_job(1)

    def leave(self) -> None:
        """End the job if it is broken: ranks that are out of step cannot end by themselves."""
        if self._is_broken:
            end_job(1)


def install_abort_hook() -> None:
    """Make an uncaught exception on this rank end all ranks, its traceback printed last.

    Without it the other ranks would wait for this one until they time out. That holds for every
    thread. A job of one rank is left alone, as is a forked child, and hooks that were installed
    before still print.
    """
    global _installed  # the interpreter has one hook for the main thread and one for the others
    if _installed or MPI.COMM_WORLD.size == 1:
        return
    _installed = True
    report, report_thread, pid = sys.excepthook, threading.excepthook, os.getpid()

    def abort_after_report(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if os.getpid() != pid:
            report(kind, error, traceback)
        else:
            _end_job_after(kind, lambda: report(kind, error, traceback))

    def abort_after_thread(args: threading.ExceptHookArgs) -> None:
        if os.getpid() != pid or issubclass(args.exc_type, SystemExit):  # which ends a thread only
            report_thread(args)
        else:
            _end_job_after(args.exc_type, lambda: report_thread(args))

    sys.excepthook = abort_after_report
    threading.excepthook = abort_after_thread


def _end_job_after(kind: type[BaseException], report: Callable[[], object]) -> None:
    """Print an exception of class ``kind`` by calling ``report``, and end the job."""
    with redirect_stderr(StringIO()) as text:
        report()
    # A hook installed after ours, as by torch's init_process_group, may keep what is written in
    # memory until ours returns, which it does not.
    stream: Any = sys.__stderr__ if isinstance(sys.stderr, StringIO) else sys.stderr
    sys.stderr = stream
    stream.write(text.getvalue())  # in one piece: other ranks may be writing theirs
    end_job(_KEYBOARD_INTERRUPT_CODE if issubclass(kind, KeyboardInterrupt) else 1)


def end_job(code: int) -> None:
    """End every rank of the job at once with ``code``, after all that this rank has printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    silence = os.open(os.devnull, os.O_WRONLY)
    # Abort may itself wait for a host that is gone; this ends the process without Python's help.
    faulthandler.dump_traceback_later(_LONGEST_ABORT_S, exit=True, file=silence)
    for stream in (1, 2):
        _wait_until_read(stream)
        os.dup2(silence, stream)  # the library's own notice would bury the traceback
    MPI.COMM_WORLD.Abort(code)
    os._exit(code)  # MPICH returns; Python's own exit would then wait for a host that is gone


def _wait_until_read(stream: int) -> None:
    """Wait for the reader of a pipe: MPICH's launcher drops what it has not read at an abort."""
    unread, start = array("i", [1]), time.monotonic()
    while unread[0] > 0 and time.monotonic() - start < _LONGEST_WAIT_S:
        try:
            fcntl.ioctl(stream, termios.FIONREAD, unread)
        except OSError:  # no pipe
            return
        time.sleep(0.001)
