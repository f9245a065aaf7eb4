"""The GPU of tests marked ``gpu``, or what stands in for it where they are only rehearsed.

Without a GPU these tests are skipped. ``--gpu stand-in`` runs them nevertheless: NumPy's front end
gets the device of ``arena_device``, the kernel runs as interpreted PTX where NVIDIA's compiler is
installed, and PyTorch stays on the CPU. That shows what is wrong with the tests, not with GPUs.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.support.kernel_arrays import HostKernel

STAND_IN = "stand-in"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that rehearses tests of GPUs."""
    parser.addoption(
        "--gpu",
        choices=["real", STAND_IN],
        default="real",
        help="what tests marked gpu run on; without a GPU, real ones are skipped",
    )


class Gpu:
    """The GPU that this rank uses, by way of CuPy.

    Attributes:
        is_real: Whether it is one.
        torch_name: Its name for PyTorch.
    """

    is_real = True

    def __init__(self) -> None:
        self._cupy: Any = importlib.import_module("cupy")
        self.torch_name = "cuda:0"

    def array(self, values: Any) -> Any:
        """Return a copy of an array on the GPU, as CuPy's users have it."""
        values = np.array(values, order="C")
        array = self._cupy.empty(values.shape, values.dtype)
        self.fill(array, values)
        return array

    def fill(self, array: Any, values: Any) -> None:
        """Write values into an array on the GPU, as a framework's kernels would."""
        values = np.ascontiguousarray(np.broadcast_to(values, array.shape), array.dtype)
        runtime = self._cupy.cuda.runtime
        stream = self._cupy.cuda.get_current_stream().ptr
        runtime.memcpyAsync(
            array.data.ptr, values.ctypes.data, values.nbytes, runtime.memcpyDefault, stream
        )
        self._cupy.cuda.get_current_stream().synchronize()  # before ``values`` is gone

    def host(self, array: Any) -> Any:
        """Return the values of an array."""
        values = np.empty(array.shape, array.dtype)
        runtime = self._cupy.cuda.runtime
        self.wait()
        runtime.memcpy(values.ctypes.data, array.data.ptr, values.nbytes, runtime.memcpyDefault)
        return values

    def wait(self) -> None:
        """Wait for everything."""
        self._cupy.cuda.runtime.deviceSynchronize()

    def stream(self) -> Any:
        """Return a context in which another stream is CuPy's current one."""
        return self._cupy.cuda.Stream(non_blocking=True)

    @contextlib.contextmanager
    def way(self, monkeypatch: pytest.MonkeyPatch, way: str) -> Iterator[None]:
        """Make optimizers exchange gradients the direct way, or staged, even where both work."""
        if way == "staged":
            refuse_peers(monkeypatch)
        yield

    def kernel(self) -> HostKernel:
        """Return the kernel, for host arrays."""
        from mpi4py import MPI

        from shardopt.backends.devices import make_device
        from shardopt.comm.node_memory.arena import Arena

        return _KernelOnGpu(self, make_device("cuda:0", Arena(MPI.COMM_SELF)))


class StandIn:
    """What stands in for a GPU; see ``Gpu``."""

    is_real = False
    torch_name = "cpu"

    def __init__(self) -> None:
        from tests.support import arena_device

        self._module = arena_device
        self.array, self.fill = arena_device.on_device, arena_device.fill

    def host(self, array: Any) -> Any:
        """See ``Gpu.host``."""
        return self._module.memory_of(array).copy()

    def wait(self) -> None:
        """See ``Gpu.wait``."""

    def stream(self) -> Any:
        """See ``Gpu.stream``."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def way(self, monkeypatch: pytest.MonkeyPatch, way: str) -> Iterator[None]:
        """See ``Gpu.way``."""
        if way == "staged" and importlib.util.find_spec("shardopt.backends.cuda.backend"):
            refuse_peers(monkeypatch)  # has no effect here, but must work
        with self._module.arena_devices(monkeypatch, has_peers=way != "staged"):
            yield

    def kernel(self) -> HostKernel:
        """See ``Gpu.kernel``."""
        from shardopt.backends.cpu.kernel import CpuKernel
        from tests.support.cuda import nvrtc
        from tests.support.cuda.devices import DeviceKernel, PtxDevice

        return DeviceKernel(PtxDevice()) if nvrtc.is_there() else HostKernel(CpuKernel(1))


class _KernelOnGpu(HostKernel):
    """Calls the kernel of a GPU with host arrays."""

    def __init__(self, gpu: Gpu, device: Any) -> None:
        super().__init__(device.kernel)
        self._gpu = gpu
        self._device = device

    def update(self, sources, targets, state, plan):
        """See ``HostKernel.update``."""
        on_gpu = self._gpu.array
        inner_targets = [*map(on_gpu, targets)]
        inner_state = {key: on_gpu(values) for key, values in state.items()}
        found = super().update([*map(on_gpu, sources)], inner_targets, inner_state, plan)
        self._gpu.wait()
        later = self.kernel.take_poisoned()  # a GPU tells of what it has done by then
        for outer, inner in zip(targets, inner_targets, strict=True):
            outer[...] = self._gpu.host(inner)
        for key, values in state.items():
            values[...] = self._gpu.host(inner_state[key])
        return max(found, later)

    def reduce(self, sources, out, span, square_sums=None, factor=1.0):
        """See ``HostKernel.reduce``; ``out`` may be one of the sources, or part of it."""
        on_gpu = self._gpu.array
        inner_out = None if out is None else on_gpu(out)
        inner_squares = None if square_sums is None else on_gpu(square_sums)
        super().reduce([*map(on_gpu, sources)], inner_out, span, inner_squares, factor)
        if out is not None:
            out[...] = self._gpu.host(inner_out)
        if square_sums is not None:
            square_sums[...] = self._gpu.host(inner_squares)


def refuse_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the probe of a node's GPUs find that ranks cannot reach each other's."""
    backend = importlib.import_module("shardopt.backends.cuda.backend")
    peers = importlib.import_module("shardopt.backends.cuda.peers")
    none = peers.Peers(False, "A test wants it.")
    monkeypatch.setattr(backend, "try_peers", lambda *_: none)


def why_none() -> str:
    """Return why there is no GPU to test, or an empty string."""
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        return "CuPy is not installed"
    try:
        return "" if cupy.cuda.runtime.getDeviceCount() else "the driver shows none"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return str(error)


@pytest.fixture(scope="session")
def gpu(request: pytest.FixtureRequest) -> Gpu | StandIn:
    """The GPU of this run; skips the test where there is none."""
    if request.config.getoption("--gpu") == STAND_IN:
        return StandIn()
    if reason := why_none():
        pytest.skip(f"there is no GPU here: {reason}")
    return Gpu()
