"""Measure the kernel on a GPU; see ``benchmarks.cases.gpu_kernel``."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

from benchmarks.cases.gpu_kernel import CASE, COPY_RATE, KERNEL_RATE, Options
from benchmarks.contenders.gpus import Place, TorchOnGpu, opened, repeated
from benchmarks.contenders.internals import BareKernel, has_master, make_device_arrays
from benchmarks.contenders.names import DEVICE_COPY, FOREACH, GRAPH, KERNEL
from benchmarks.contenders.problem import GRAD_SIZE
from benchmarks.contenders.torch_env import load_torch
from benchmarks.harness.result import Result
from benchmarks.harness.timing import require_one_rank, sample

REPEATS = 10
"""Calls in a sample: the wait for the GPU takes as long as a small part of one."""


def measure(options: Options) -> Iterator[Result]:
    """Measure one dtype after the other."""
    require_one_rank(CASE.name)
    for dtype in options.dtypes:
        with opened(options.device) as place:
            yield compare(options, dtype, place)


def compare(options: Options, dtype: str, place: Place) -> Result:
    """Measure one dtype."""
    update, update_nbytes = kernel_update(options.numel, dtype, place)
    copy, copy_nbytes = device_copy(options.numel, place)
    contenders: dict[str, Callable[[], object]] = {DEVICE_COPY: copy, KERNEL: update}
    # In 16 bits torch's moments have 16 bits too, and there is no master: another optimizer.
    torch = None if has_master(dtype) else load_torch(1)
    if torch is not None:
        cuts = [options.numel * i // options.tensors for i in range(options.tensors + 1)]
        numels = [stop - start for start, stop in pairwise(cuts)]
        contenders[FOREACH] = TorchOnGpu(torch, place, numels).step
        contenders[GRAPH] = TorchOnGpu(torch, place, numels, in_graph=True).step
    runs = {name: repeated(work, REPEATS, place) for name, work in contenders.items()}
    samples_s, others = sample(runs, options.rounds)
    result = Result(
        case=CASE.name,
        title=f"CudaKernel.update (mean of {REPEATS})",
        ranks=1,
        threads=1,
        dtype=dtype,
        numel=options.numel,
        samples_s={name: [value / REPEATS for value in each] for name, each in samples_s.items()},
        settings={"device": options.device, "dtype": dtype},
        others=others,
    )
    rates = {
        COPY_RATE: copy_nbytes / result.value(DEVICE_COPY) / 1e9,
        KERNEL_RATE: update_nbytes / result.value(KERNEL) / 1e9,
    }
    return result.with_figures(rates)


def kernel_update(numel: int, dtype: str, place: Place) -> tuple[Callable[[], None], int]:
    """Return an update of one source, and the bytes that it must move."""
    arrays = make_device_arrays(place.device, numel, dtype, 1)
    place.fill(arrays.param, 1.0, 0)
    place.fill(arrays.grads[0], GRAD_SIZE, 1)
    if "master" in arrays.state:
        place.fill(arrays.state["master"], 1.0, 0)
    kernel = BareKernel(arrays, 1, 1, place.device.kernel)
    nbytes = 3 * np.dtype(dtype).itemsize * numel
    return kernel.update, nbytes + 2 * sum(array.nbytes for array in arrays.state.values())


def device_copy(numel: int, place: Place) -> tuple[Callable[[], None], int]:
    """Return a copy within the memory of the device, and the bytes that it moves."""
    source, target = (place.zeros(numel, "float32") for _ in range(2))
    place.fill(source, 1.0, 2)
    return lambda: place.device.copy(target, source), 2 * source.nbytes
