"""Calls that must be made before MPI ends, and never in a forked child."""

import functools
import itertools
import os
import weakref
from collections.abc import Callable
from typing import Any

from mpi4py import MPI

_numbers = itertools.count()
_mpi_is_ending = False


class ExitHook:
    """Calls a function once: when its owner is collected, or before MPI or the interpreter ends.

    A forked child inherits the hook, but the function is not called there: it would act on memory
    and connections that the child shares with its parent.

    Args:
        owner: Must hold this hook, and nothing else must.
        function: Must not refer to ``owner``.
        *args: Its arguments; likewise.
    """

    def __init__(self, owner: object, function: Callable[..., object], *args: Any) -> None:
        self._finalizer = weakref.finalize(owner, _call, os.getpid(), function, args)
        _watch_finalize()
        _hooks[next(_numbers)] = self

    def __call__(self) -> None:
        """Call the function now, unless it has been called."""
        self._finalizer()

    def cancel(self) -> None:
        """Never call the function."""
        self._finalizer.detach()


_hooks: weakref.WeakValueDictionary[int, ExitHook] = weakref.WeakValueDictionary()


def mpi_is_usable(pid: int) -> bool:
    """Whether MPI may be called.

    Args:
        pid: The process that uses MPI; a child that was forked from it must not.
    """
    return os.getpid() == pid and not _mpi_is_ending and not MPI.Is_finalized()


def _call(pid: int, function: Callable[..., object], args: tuple[Any, ...]) -> None:
    if mpi_is_usable(pid):
        function(*args)


@functools.cache
def _watch_finalize() -> None:
    """Run all hooks, the latest first, when ``MPI.Finalize()`` is called by hand.

    MPI_Finalize first of all deletes the attributes of COMM_SELF, while MPI can still be used. At
    the end of the interpreter the hooks run before mpi4py finalizes MPI.
    """
    keyval = MPI.Comm.Create_keyval(delete_fn=_run_hooks)
    MPI.COMM_SELF.Set_attr(keyval, os.getpid())


def _run_hooks(comm: MPI.Comm, keyval: int, pid: int) -> None:
    global _mpi_is_ending  # the process has one MPI
    for _, hook in sorted(_hooks.items(), reverse=True):
        hook()
    _mpi_is_ending = True
