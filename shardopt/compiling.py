"""Compiled functions, whose code is kept on disk where that is possible.

[Note: where compiled code is kept]
Numba keeps code beside the source, else in the user's cache folder, or where ``NUMBA_CACHE_DIR``
points. A container may allow none of them, and a disk may be full. Then each process compiles anew,
which takes longer and changes nothing else; the first optimizer warns of it.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

import numba
from numba.core.caching import FunctionCache

from shardopt.errors import CompileCacheWarning
from shardopt.report import tell

_F = TypeVar("_F", bound=Callable[..., Any])

_problems: list[str] = []


def compiled(
    signature: Any = None, *, calls: Sequence[ModuleType] = (), **options: Any
) -> Callable[[_F], _F]:
    """Compile a function, which will hold no GIL; see [Note: where compiled code is kept].

    Args:
        signature: The types to compile it for at once; None does so for each type it is called
            with.
        calls: Other modules with functions that it calls: code is made anew if one has changed.
        **options: Of ``numba.njit``.
    """

    def compile_function(function: _F) -> _F:
        dispatcher: Any = numba.njit(nogil=True, **options)(function)
        try:
            make_cache: Any = _Cache  # Numba's constructor has no types
            dispatcher._cache = make_cache(function)  # as its enable_caching() does
            dispatcher._cache.watch([module.__file__ for module in calls])
        except RuntimeError as error:
            _problems.append(str(error))
        if signature is not None:
            dispatcher.compile(signature)
            dispatcher.disable_compile()
        result: _F = dispatcher
        return result

    return compile_function


def warn_of_cache_problems(*, aloud: bool) -> None:
    """Warn if compiled code could not be kept since the last call.

    Args:
        aloud: Whether this rank prints it.
    """
    if not _problems:
        return
    first = _problems[0].rstrip(".")
    _problems.clear()
    warning = CompileCacheWarning(
        f"could not keep compiled code on disk: {first}. Set NUMBA_CACHE_DIR to a folder that can "
        "be written to, the same in every run; until then every start takes some seconds longer."
    )
    tell(warning, aloud=aloud)


class _Cache(FunctionCache):
    """Numba's cache of one function, which can do without its files."""

    def watch(self, paths: Sequence[str]) -> None:
        """Take code for old once one of some files has changed, beside that of the function."""
        if paths:
            stamps = [(status.st_mtime, status.st_size) for status in map(os.stat, paths)]
            self._cache_file._source_stamp = (self._cache_file._source_stamp, *stamps)

    @contextmanager
    def _guard_against_spurious_io_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            _problems.append(f"{type(error).__name__}: {error}")
