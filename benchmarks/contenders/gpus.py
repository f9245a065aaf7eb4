"""Where benchmarks of GPUs run: on a GPU or, to rehearse them without one, on what stands in.

The stand-in is the tests' device for NumPy's front end and the kernel (see
``tests/support/arena_device.py``), and the CPU for PyTorch.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from benchmarks.contenders.internals import Device, stand_in_devices
from benchmarks.contenders.ours import Shardopt
from benchmarks.contenders.problem import DTYPE, Problem
from benchmarks.harness.meter import proportional_set_nbytes
from benchmarks.harness.placing import FloatArray, fill_random
from shardopt import ShardPolicy
from shardopt.numpy import NAdam, Parameter

GPU = "cuda"
STAND_IN = "stand-in"
DEVICES = (GPU, STAND_IN)

_BLOCK_NUMEL = 1 << 22
_DEFAULTS = ShardPolicy()


class Place:
    """A GPU, or what stands in for it.

    Attributes:
        device: For arrays and kernels.
        is_real: Whether it is a GPU.
        torch_name: Its name for PyTorch.
    """

    def __init__(self, device: Device, *, is_real: bool) -> None:
        self.device = device
        self.is_real = is_real
        self.torch_name = "cuda:0" if is_real else "cpu"
        self._cupy: Any = importlib.import_module("cupy") if is_real else None

    def zeros(self, numel: int, dtype: str) -> Any:
        """Allocate [numel] zeros, as an optimizer does."""
        return self.device.zeros(numel, dtype)

    def fill(self, array: Any, size: float, seed: int) -> None:
        """Fill an array with the same random numbers over and over; see ``fill_random``."""
        block = self.device.host_zeros(min(_BLOCK_NUMEL, array.size), array.dtype.name)
        fill_random(block, size, seed)
        for start in range(0, array.size, len(block)):
            part = array[start : start + len(block)]
            self.device.copy(part, block[: part.size])
        self.wait()

    def wait(self) -> None:
        """Wait for all work, be it ours or PyTorch's."""
        if self.is_real:
            self._cupy.cuda.runtime.deviceSynchronize()
        else:
            self.device.wait()

    def user_array(self, values: FloatArray) -> Any:
        """Return a copy of an array as CuPy's users have it."""
        if self.is_real:
            return self._cupy.asarray(values)
        return importlib.import_module("tests.support.arena_device").on_device(values)

    def release(self) -> None:
        """Release the free memory that CuPy keeps."""
        if self.is_real:
            self._cupy.get_default_memory_pool().free_all_blocks()

    def used_nbytes(self) -> int:
        """Return the memory in use: all of the GPU's, or that of this process."""
        if not self.is_real:
            return proportional_set_nbytes()
        free_nbytes, all_nbytes = self._cupy.cuda.runtime.memGetInfo()
        return int(all_nbytes - free_nbytes)


@contextmanager
def opened(name: str) -> Iterator[Place]:
    """Open one of ``DEVICES``; optimizers that are made in the block work on it."""
    is_real = name == GPU
    with nullcontext() if is_real else stand_in_devices():
        device = Device(is_real=is_real)
        yield Place(device, is_real=is_real)
        device.close()


def repeated(work: Callable[[], object], times: int, place: Place) -> Callable[[], None]:
    """Make one sample of many calls, and of the wait for all of them."""

    def run() -> None:
        for _ in range(times):
            work()
        place.wait()

    return run


class ShardoptOnGpu(Shardopt):
    """This project in NumPy's front end, with CuPy's arrays."""

    def __init__(
        self,
        problem: Problem,
        place: Place,
        policy: ShardPolicy = _DEFAULTS,
    ) -> None:
        self._place = place
        self._params = [
            Parameter(place.user_array(problem.param(tensor)), f"tensor{tensor}")
            for tensor in range(problem.num_tensors)
        ]
        self._optimizer = NAdam(self._params, comm=problem.comm, policy=policy)
        for tensor, param in enumerate(self._params):
            place.device.copy(param.grad, problem.grad(tensor))
            place.wait()

    def tensor(self, index: int) -> FloatArray:
        """See ``Contender``."""
        values: FloatArray = self._place.device.host(self._params[index].data)
        return values


class TorchOnGpu:
    """torch's own NAdam on one GPU.

    Args:
        torch: The module.
        place: Where.
        numels: Elements of each tensor.
        in_graph: Whether its step is captured into a CUDA graph and replayed.
    """

    def __init__(
        self, torch: Any, place: Place, numels: list[int], *, in_graph: bool = False
    ) -> None:
        dtype, device = getattr(torch, DTYPE), place.torch_name
        params = [torch.randn(n, dtype=dtype, device=device).requires_grad_() for n in numels]
        for param in params:
            param.grad = torch.randn_like(param) * 0.01
        capturable = in_graph and place.is_real
        self._optimizer = torch.optim.NAdam(params, foreach=True, capturable=capturable)
        self.step: Callable[[], object] = self._optimizer.step
        if capturable:
            self._graph = _captured(torch, self._optimizer.step)
            self.step = self._graph.replay


def _captured(torch: Any, step: Callable[[], object]) -> Any:
    """Capture a step into a graph, as PyTorch's documentation has it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


class Bus:
    """Copies between pinned memory of the host and a GPU, each way on a stream of its own.

    Args:
        torch: The module.
        place: Where the GPU is.
        nbytes: Of each copy.
    """

    def __init__(self, torch: Any, place: Place, nbytes: int) -> None:
        self._torch, self._is_real = torch, place.is_real
        kind: dict[str, Any] = {"dtype": torch.uint8}
        self._host = [torch.zeros(nbytes, pin_memory=place.is_real, **kind) for _ in range(2)]
        self._there = [torch.zeros(nbytes, device=place.torch_name, **kind) for _ in range(2)]
        self._streams = [torch.cuda.Stream() for _ in range(2)] if place.is_real else []

    def down(self) -> None:
        """Copy from the GPU to the host."""
        self._copy(0, self._host[0], self._there[0])

    def up(self) -> None:
        """Copy from the host to the GPU."""
        self._copy(1, self._there[1], self._host[1])

    def both(self) -> None:
        """Copy both ways at once."""
        self.down()
        self.up()

    def _copy(self, stream: int, target: Any, source: Any) -> None:
        if not self._is_real:
            target.copy_(source)
            return
        with self._torch.cuda.stream(self._streams[stream]):
            target.copy_(source, non_blocking=True)
