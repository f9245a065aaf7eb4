"""Time the kernel; see ``benchmarks.cases.kernel``."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.cases.kernel import AXPY_RATE, CASE, KERNEL, KERNEL_RATE, TRIAD_RATE, Options
from benchmarks.contenders.internals import BareKernel, compute_dtype, has_master, make_arrays
from benchmarks.contenders.names import AXPY, FOREACH, TRIAD
from benchmarks.contenders.problem import GRAD_SIZE
from benchmarks.contenders.torch_env import load_torch
from benchmarks.harness.placing import fill_random
from benchmarks.harness.result import Result
from benchmarks.harness.timing import require_one_rank, sample
from shardopt.measure.memory import Triad

NUM_TENSORS = 16


@dataclass(frozen=True, slots=True)
class Setting:
    """The setting of one run.

    Attributes:
        numel: Parameters.
        dtype: Of parameters and gradients; all else is in ``compute_dtype`` of it.
        num_sources: Gradients that the kernel sums.
        threads: Threads of every contender.
    """

    numel: int
    dtype: str
    num_sources: int
    threads: int


class KernelRun:
    """The kernel on arrays that lie to each other as the optimizer's do.

    Attributes:
        nbytes: Bytes that one update must move: gradients once; parameters, moments and the master
            that 16-bit parameters have, both ways.
    """

    def __init__(self, setting: Setting) -> None:
        numel, num_sources = setting.numel, setting.num_sources
        arrays = make_arrays(numel, setting.dtype, num_sources)
        fill_random(arrays.param, 1.0, 0)
        for source in range(num_sources):
            fill_random(arrays.grads[source, :numel], GRAD_SIZE, 1 + source)
        if "master" in arrays.state:
            arrays.state["master"][:] = arrays.param
        self._kernel = BareKernel(arrays, num_sources, setting.threads)
        self.run = self._kernel.update
        self.close = self._kernel.close
        each = np.dtype(setting.dtype).itemsize * (num_sources + 2)
        self.nbytes = numel * each + 2 * sum(array.nbytes for array in arrays.state.values())


def measure(options: Options) -> Iterator[Result]:
    """Measure one setting after the other."""
    require_one_rank(CASE.name)
    for threads in options.threads:
        for num_sources in options.sources:
            setting = Setting(options.numel, options.dtype, num_sources, threads)
            yield compare(setting, options.rounds)


def compare(setting: Setting, rounds: int) -> Result:
    """Measure one setting."""
    kernel = KernelRun(setting)
    triad = Triad(setting.numel, compute_dtype(setting.dtype), setting.threads)
    contenders = {TRIAD: triad.triad, AXPY: triad.axpy, KERNEL: kernel.run}
    # In 16 bits torch's moments have 16 bits too, and there is no master: another optimizer.
    comparable = setting.num_sources == 1 and not has_master(setting.dtype)
    torch = load_torch(setting.threads) if comparable else None
    if torch is not None:
        contenders[FOREACH] = foreach_optimizer(torch, setting).step
    samples_s, others = sample(contenders, rounds)
    kernel.close()
    triad.close()
    result = Result(
        case=CASE.name,
        title=f"CpuKernel.update, {setting.num_sources} source(s)",
        ranks=1,
        threads=setting.threads,
        dtype=setting.dtype,
        numel=setting.numel,
        samples_s=samples_s,
        settings={"sources": setting.num_sources},
        others=others,
    )
    rates = {
        TRIAD_RATE: triad.nbytes / result.value(TRIAD) / 1e9,
        AXPY_RATE: triad.nbytes / result.value(AXPY) / 1e9,
        KERNEL_RATE: kernel.nbytes / result.value(KERNEL) / 1e9,
    }
    return result.with_figures(rates)


def foreach_optimizer(torch: Any, setting: Setting) -> Any:
    """Make torch's optimizer, with gradients in place."""
    cuts = [setting.numel * i // NUM_TENSORS for i in range(NUM_TENSORS + 1)]
    params = []
    for tensor in range(NUM_TENSORS):
        shape, kind = cuts[tensor + 1] - cuts[tensor], getattr(torch, setting.dtype)
        param = torch.empty(shape, dtype=kind).requires_grad_()
        param.grad = torch.empty(shape, dtype=kind)
        fill_random(param.detach().numpy(), 1.0, tensor)
        fill_random(param.grad.numpy(), GRAD_SIZE, tensor)
        params.append(param)
    return torch.optim.NAdam(params, foreach=True)
