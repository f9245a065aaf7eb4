"""A GPU, through CuPy: compiles kernels, launches them, and reads their flag."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from shardopt.backends.cuda.kernel import FLAG_UNSET, Launch
from shardopt.errors import KernelError


class CudaDevice:
    """The GPU that is current when it is made.

    Args:
        current: Makes it and the stream that work goes to CuPy's current ones. Streams of later
            calls must wait for those of earlier ones.

    Attributes:
        flag: See ``Launcher``.
    """

    def __init__(self, current: Callable[[], AbstractContextManager[None]]) -> None:
        self._current = current
        self.flag = cupy.full(1, FLAG_UNSET, np.int64)
        pinned = cupy.cuda.PinnedMemory(self.flag.nbytes)  # none of a pool, which would hand it on
        self._seen = np.frombuffer(cupy.cuda.PinnedMemoryPointer(pinned, 0), np.int64, 1)
        self._seen[0] = FLAG_UNSET
        self._copied = cupy.cuda.Event(disable_timing=True)

    def load(self, name: str, text: str, options: tuple[str, ...]) -> Launch:
        """See ``Launcher.load``; CuPy keeps what it compiles on disk."""
        module = cupy.RawModule(code=text, options=("-std=c++17", *options))
        try:
            with self._current():
                function = module.get_function(name)
        except cupy.cuda.compiler.CompileException as error:
            raise KernelError(
                f"the GPU must be able to run the kernel for {' '.join(options)}; got {error}. "
                "16-bit parameters take compute capability 8.0, others 7.0."
            ) from error

        def launch(blocks: int, threads: int, argument: bytes) -> None:
            by_value = np.frombuffer(argument, f"V{len(argument)}")
            with self._current():
                function((blocks,), (threads,), (by_value,))

        return launch

    def upload(self, table: NDArray[Any]) -> Any:
        """See ``Launcher.upload``."""
        with self._current():
            return cupy.asarray(table)

    def take_flag(self) -> int:
        """See ``Launcher.take_flag``; a copy of the flag is read once it has arrived."""
        if not self._copied.done:
            return FLAG_UNSET  # the flag keeps what kernels find until it can be copied
        found = int(self._seen[0])
        with self._current():
            self.flag.get(out=self._seen, blocking=False)
            self.flag.fill(FLAG_UNSET)
            self._copied.record()
        return found
