"""The files of traces: JSON that the viewers of Chrome and Perfetto read.

[Note: trace files]
Each optimizer that traces has a file per rank, in the form of Chrome's trace events: a JSON array
with one event per line, whose end may be missing. Events are kept in memory and written in batches,
at the latest when the first is a second old and another one ends, or while a rank waits, so that a
process that is killed loses about a second. Readers pass over a last line that is incomplete.

Times are those of the process's monotonic clock. Metadata events tell what the process is, where
its clock stood beside the wall clock, and how far it is from that of rank 0; see
[Note: clocks of a trace]. ``pid`` is the rank in MPI_COMM_WORLD and ``tid`` the number of a thread.
What several threads share, a bucket on its way to other nodes, is a pair of asynchronous events.

A failure to write ends the trace with a warning, and never a step.
"""

import json
import os
import re
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from shardopt.errors import TraceWarning

CLOCK, OPTIMIZER, PROCESS = "shardopt clock", "shardopt optimizer", "shardopt process"
"""Names of the metadata events that readers look for."""
SUFFIX = ".trace.json"

_BATCH = 256  # events
_MAX_KEPT = 1 << 16  # events in memory, if writing takes longer than recording
_MAX_AGE_NS = 1_000_000_000
_ROLES = {
    "MainThread": "calling thread",
    "shardopt exchange": "progress thread",
    "shardopt-checkpoint": "checkpoint thread",
    "shardopt-file": "checkpoint writer",
}
_COUNT = re.compile(r"[-_]\d+")
"""The numbers that Python gives to the threads of a pool, and to those without a name."""
_encode = json.JSONEncoder(default=str).encode  # made once: json.dumps would make one per call

Args = Mapping[str, object]
Event = tuple[int, str, str, int, int, str, Args]
"""(row, phase in Chrome's sense, name, start, end, category or key, args)."""


class EventFile:
    """A file of events, with the batch that is to be written next.

    Args:
        path: The file, which must not exist.
        rank: This rank.
        max_nbytes: The file ends at this size.

    Attributes:
        is_over: Whether nothing is recorded any more.
    """

    def __init__(self, path: Path, rank: int, max_nbytes: int) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self.is_over = False
        self._path, self._rank, self._room = path, rank, max_nbytes
        self._pid = os.getpid()
        self._kept: deque[Event] = deque()
        self._num_lost = 0
        self._begun = False
        self._named: set[int] = set()
        self._due_ns = time.perf_counter_ns() + _MAX_AGE_NS
        self._lock = threading.Lock()

    def record(self, event: Event) -> None:
        """Keep an event, and write the batch if it is time to."""
        if self.is_over:
            return
        if len(self._kept) >= _MAX_KEPT:
            self._num_lost += 1
            return
        self._kept.append(event)
        if len(self._kept) >= _BATCH or event[4] > self._due_ns:
            self.flush()

    def flush(self) -> None:
        """Write the batch, unless another thread does; a failure ends the trace."""
        if self.is_over or not self._lock.acquire(blocking=False):
            return
        try:
            self.write()
        except OSError as error:
            self._stop(error.strerror or str(error))
        finally:
            self._lock.release()

    def write(self) -> None:
        """Write the batch. One thread at a time.

        Raises:
            OSError: It cannot be written.
        """
        if os.getpid() != self._pid:  # a forked child, which must leave its parent's file alone
            self.is_over = True
            return
        self._due_ns = time.perf_counter_ns() + _MAX_AGE_NS
        kept = [self._kept.popleft() for _ in range(len(self._kept))]
        if self._num_lost:
            lost, self._num_lost = self._num_lost, 0
            kept.append((ROWS.mine(), "M", "events lost", 0, 0, "", {"number": lost}))
        lines = [line for event in kept for line in self._name_row(event[0])]
        lines += map(self._text, kept)
        if not lines:
            return
        text = (",\n" if self._begun else "[\n") + ",\n".join(lines)
        self._write_all(text.encode())
        self._begun = True
        if self._room < 0:
            self._stop("it has reached the size that viewers can open")

    def close(self) -> None:
        """Write the batch and the end of the array."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            try:
                self._finish()
            except OSError as error:
                self._stop(error.strerror or str(error))
            self.is_over = True

    def _finish(self) -> None:
        try:
            if not self.is_over:
                self.write()
                self._write_all(b"\n]\n")
        finally:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)  # some file systems only now report what they could not write

    def discard(self) -> None:
        """Remove the file."""
        self.is_over = True
        os.close(self._fd)
        self._path.unlink(missing_ok=True)

    def _name_row(self, row: int) -> list[str]:
        """Return the metadata of a row that the file has not had yet."""
        if row in self._named:
            return []
        self._named.add(row)
        title, order = {"name": ROWS.title(row)}, {"sort_index": row}
        return [
            self._text((row, "M", "thread_name", 0, 0, "", title)),
            self._text((row, "M", "thread_sort_index", 0, 0, "", order)),
        ]

    def _text(self, event: Event) -> str:
        """Return the line of an event, or the two lines of a flight."""
        row, kind, name, start_ns, end_ns, extra, args = event
        about, told = f'"name":"{name}","pid":{self._rank},"tid":{row}', f'"args":{_json(args)}'
        if kind == "X":
            times = f'"ts":{_us(start_ns)},"dur":{_us(end_ns - start_ns)}'
            return f'{{"ph":"X",{about},"cat":"{extra}",{times},{told}}}'
        if kind == "M":
            return f'{{"ph":"M",{about},{told}}}'
        about = f'{about},"cat":"flight","id":"{extra}"'
        begin = f'{{"ph":"b",{about},"ts":{_us(start_ns)},{told}}}'
        return f'{begin},\n{{"ph":"e",{about},"ts":{_us(end_ns)}}}'

    def _write_all(self, content: bytes) -> None:
        self._room -= len(content)
        while content:
            content = content[os.write(self._fd, content) :]

    def _stop(self, reason: str) -> None:
        """End the trace with a warning: what a trace meets must never end a step."""
        self.is_over = True
        self._kept.clear()
        warning = TraceWarning(
            f"{str(self._path)!r} ends here, as nothing more can be written to it: {reason}. "
            "Training goes on without a trace."
        )
        try:
            warnings.warn(warning, stacklevel=2)
        except TraceWarning:  # warnings are errors, but a step on this rank alone must not raise
            print(f"shardopt: {warning}", file=sys.stderr)


class _Rows:
    """Numbers for the threads of this process: a thread takes the row of one that has ended.

    A span takes its row when it begins: by the time it ends another thread may have ended, and
    its spans would overlap.
    """

    def __init__(self) -> None:
        self._own = threading.local()
        self._owners: list[tuple[str, weakref.ref[threading.Thread]]] = []
        self._lock = threading.Lock()

    def mine(self) -> int:
        """Return the number of this thread."""
        try:
            number: int = self._own.number
        except AttributeError:
            number = self._own.number = self._take(threading.current_thread())
        return number

    def title(self, row: int) -> str:
        """Return what the thread does."""
        name = self._owners[row][0]
        return _ROLES.get(name, name)

    def _take(self, thread: threading.Thread) -> int:
        kind = _COUNT.sub("", thread.name)
        with self._lock:
            for row, (name, owner) in enumerate(self._owners):
                before = owner()
                if name == kind and (before is None or not before.is_alive()):
                    self._owners[row] = kind, weakref.ref(thread)
                    return row
            self._owners.append((kind, weakref.ref(thread)))
            return len(self._owners) - 1


ROWS = _Rows()


def _json(args: Args) -> str:
    if not args:
        return "{}"
    pairs = [f'"{k}":{v if type(v) is int else _encode(v)}' for k, v in args.items()]
    return f"{{{','.join(pairs)}}}"


def _us(ns: int) -> str:
    """Write a time in microseconds, with all its digits."""
    return f"{ns // 1000}.{ns % 1000:03}"
