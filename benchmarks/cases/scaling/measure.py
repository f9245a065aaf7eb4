"""Measure counts or times on more and more ranks; see ``benchmarks.cases.scaling``."""

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.cases.scaling import COUNTS, Options
from benchmarks.harness.result import Result


def measure(options: Options) -> Iterator[Result]:
    """Count or time steps on each group of ranks. Collective: every rank."""
    if options.only == COUNTS:
        with _quick_imports():
            module = importlib.import_module("benchmarks.cases.scaling.counts")
    else:
        module = importlib.import_module("benchmarks.cases.scaling.times")
    yield from module.measure(options)


@contextmanager
def _quick_imports() -> Iterator[None]:
    """Import modules in less time in this block.

    With many ranks on few cores imports take longer than anything that is counted. Numba imports
    SciPy, if it is there, for linear algebra, which nothing here needs.
    """
    modules: dict[str, Any] = sys.modules
    hides = "scipy" not in modules
    if hides:
        modules["scipy"] = None  # as if it were not installed
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if hides:
            del modules["scipy"]
