"""Spans of a rank's work, written as JSON that the viewers of Chrome and Perfetto read.

See [Note: trace files] for the files themselves.
"""

import itertools
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from shardopt.errors import TraceError
from shardopt.trace_file import PROCESS, ROWS, SUFFIX, Args, EventFile

_MAX_NBYTES = 1 << 30  # of a file: viewers open no larger ones
_BORN_NS = time.time_ns()
_numbers = itertools.count(1)

Annotate = Callable[[str], AbstractContextManager[object] | None]
"""Returns the span of a name for a profiler, or None if none is running."""


class Subject(Protocol):
    """Something that a span is about."""

    def trace_args(self) -> Args:
        """Return what the trace is to show of it: numbers and text."""
        ...


class _Nothing:
    """See ``NOTHING``."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        pass

    def land(self) -> None:
        """Record nothing."""


NOTHING = _Nothing()
"""A span and a flight that are not recorded."""


class Flight(Protocol):
    """Something that has begun and ends elsewhere, maybe in another thread."""

    def land(self) -> None:
        """End it."""
        ...


class Trace:
    """Where the spans of an optimizer on this rank go; here, nowhere.

    Attributes:
        is_on: Whether they go to a file.
    """

    is_on = False

    def span(
        self,
        name: str,
        subject: Subject | None = None,
        *,
        step: int | None = None,
        ranks: Callable[[], Sequence[int]] | None = None,
    ) -> AbstractContextManager[object]:
        """Return a span of this thread, to be entered at once.

        Args:
            name: What is done, such as ``update``.
            subject: What it is done to.
            step: Number of the step.
            ranks: Returns the ranks of the optimizer that it depends on now; empty for all.
        """
        return NOTHING

    def flight(self, name: str, subject: Subject) -> Flight:
        """Begin what goes on beside the spans of threads, such as a ``reduce_scatter``."""
        return NOTHING

    def lap(self, name: str, start_ns: int, end_ns: int) -> None:
        """Record a phase of a step that has ended, in the time of ``time.perf_counter_ns``."""

    def describe(self, name: str, args: Args) -> None:
        """Write a metadata event."""

    def flush(self) -> None:
        """Write what has been recorded so far."""

    def close(self) -> None:
        """Complete the file. Nothing is recorded any more."""


OFF = Trace()
"""The trace that records nothing."""


class FileTrace(Trace):
    """Spans that are written to a file; see [Note: trace files].

    Args:
        folder: Where the file is made; made itself if it does not exist.
        rank: This rank in MPI_COMM_WORLD.
        max_nbytes: The file ends at this size.

    Attributes:
        path: The file.
        is_on: See ``Trace``.

    Raises:
        OSError: It cannot be made, or not be written to.
    """

    is_on = True

    def __init__(self, folder: Path, rank: int, max_nbytes: int = _MAX_NBYTES) -> None:
        self.path = folder / f"rank{rank:05}-{_BORN_NS}-{next(_numbers)}{SUFFIX}"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventFile(self.path, rank, max_nbytes)
        self._flights = itertools.count(1)
        self._key = f"{rank}.{self.path.name.partition('.')[0].rpartition('-')[2]}"
        self.describe("process_name", {"name": f"rank {rank} on {os.uname().nodename}"})
        self.describe("process_sort_index", {"sort_index": rank})
        clocks = {"clock_ns": time.perf_counter_ns(), "wall_ns": time.time_ns()}
        place = {"rank": rank, "host": os.uname().nodename, "os_pid": os.getpid()}
        self.describe(PROCESS, {"format": 1, **place, "born_ns": _BORN_NS, **clocks})
        try:
            self._file.write()
        except OSError:
            self._file.discard()
            raise
        self._close = weakref.finalize(self, self._file.close)  # at the latest when Python exits

    def span(
        self,
        name: str,
        subject: Subject | None = None,
        *,
        step: int | None = None,
        ranks: Callable[[], Sequence[int]] | None = None,
    ) -> AbstractContextManager[object]:
        """See ``Trace.span``."""
        if self._file.is_over:
            return NOTHING
        args = {} if subject is None else subject.trace_args()
        if step is not None:
            args = {**args, "step": step}
        if ranks is not None:
            args = {**args, "ranks": list(ranks())}
        return _Span(self._file, name, args)

    def flight(self, name: str, subject: Subject) -> Flight:
        """See ``Trace.flight``."""
        if self._file.is_over:
            return NOTHING
        return _Flight(self._file, name, f"{self._key}.{next(self._flights)}", subject.trace_args())

    def lap(self, name: str, start_ns: int, end_ns: int) -> None:
        """See ``Trace.lap``."""
        self._file.record((ROWS.mine(), "X", name, start_ns, end_ns, "phase", {}))

    def describe(self, name: str, args: Args) -> None:
        """See ``Trace.describe``."""
        self._file.record((ROWS.mine(), "M", name, 0, 0, "", args))

    def flush(self) -> None:
        """See ``Trace.flush``."""
        self._file.flush()

    def close(self) -> None:
        """See ``Trace.close``."""
        self._close()


class AnnotatedTrace(Trace):
    """A trace whose spans a profiler sees, too, while one is running.

    Args:
        inner: The trace.
        annotate: Shows a span to the profiler.

    Attributes:
        is_on: See ``Trace``.
    """

    def __init__(self, inner: Trace, annotate: Annotate) -> None:
        self.is_on = inner.is_on
        self._inner = inner
        self._annotate = annotate

    def span(
        self,
        name: str,
        subject: Subject | None = None,
        *,
        step: int | None = None,
        ranks: Callable[[], Sequence[int]] | None = None,
    ) -> AbstractContextManager[object]:
        """See ``Trace.span``."""
        shown, span = self._annotate(name), self._inner.span(name, subject, step=step, ranks=ranks)
        return span if shown is None else _both(shown, span)

    def flight(self, name: str, subject: Subject) -> Flight:
        """See ``Trace.flight``."""
        return self._inner.flight(name, subject)

    def lap(self, name: str, start_ns: int, end_ns: int) -> None:
        """See ``Trace.lap``."""
        self._inner.lap(name, start_ns, end_ns)

    def describe(self, name: str, args: Args) -> None:
        """See ``Trace.describe``."""
        self._inner.describe(name, args)

    def flush(self) -> None:
        """See ``Trace.flush``."""
        self._inner.flush()

    def close(self) -> None:
        """See ``Trace.close``."""
        self._inner.close()


@contextmanager
def _both(
    outer: AbstractContextManager[object], inner: AbstractContextManager[object]
) -> Iterator[None]:
    with outer, inner:
        yield


class _Span:
    """A span of the thread that enters it."""

    __slots__ = ("_args", "_file", "_name", "_row", "_start_ns")

    def __init__(self, file: EventFile, name: str, args: Args) -> None:
        self._file, self._name, self._args = file, name, args

    def __enter__(self) -> None:
        self._row = ROWS.mine()
        self._start_ns = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        end_ns = time.perf_counter_ns()
        span = self._row, "X", self._name, self._start_ns, end_ns, "span", self._args
        self._file.record(span)


class _Flight:
    """A flight; see ``Trace.flight``."""

    __slots__ = ("_args", "_file", "_key", "_name", "_start_ns")

    def __init__(self, file: EventFile, name: str, key: str, args: Args) -> None:
        self._file, self._name, self._key, self._args = file, name, key, args
        self._start_ns = time.perf_counter_ns()

    def land(self) -> None:
        """See ``Flight.land``."""
        end_ns = time.perf_counter_ns()
        flight = ROWS.mine(), "b", self._name, self._start_ns, end_ns, self._key, self._args
        self._file.record(flight)


def open_trace(given: str | os.PathLike[str] | None, rank: int) -> Trace:
    """Return the trace that a policy or the environment asks for.

    Args:
        given: ``ShardPolicy.trace``; None takes the environment's SHARDOPT_TRACE.
        rank: This rank in MPI_COMM_WORLD.

    Raises:
        TraceError: No file can be made there.
    """
    name, folder = "policy.trace", given
    if folder is None:
        name, folder = "SHARDOPT_TRACE", os.environ.get("SHARDOPT_TRACE")
    if not folder:
        return OFF
    folder = os.fspath(folder)
    try:
        return FileTrace(Path(folder), rank)
    except OSError as error:
        raise TraceError(
            f"{name} must be a folder in which files can be made and written; got {folder!r} "
            f"({error.strerror or error}). Choose another folder, or leave it out."
        ) from error
