"""A progress bar on terminals, for work that takes longer than a second."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

_PATIENCE_S = 1.0


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how much of the work is done.

    Args:
        title: The work, in a word or two.
        total: Bytes in total.

    Yields:
        A function that any thread may call with the number of bytes it has just finished.
    """
    bar = _make_bar() if sys.stderr.isatty() else None
    if bar is None:
        yield lambda nbytes: None
        return
    task = bar.add_task(title, total=total)
    show_at, lock = time.monotonic() + _PATIENCE_S, Lock()

    def advance(nbytes: int) -> None:
        bar.advance(task, nbytes)
        if not bar.live.is_started and time.monotonic() > show_at:
            with lock:
                bar.start()  # does nothing the second time

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


def _make_bar() -> "Progress | None":
    try:  # here: rich is an extra, and slow to load
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
    except ImportError:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    speed = (TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, *speed, console=Console(stderr=True), transient=True)
