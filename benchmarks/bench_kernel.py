"""Time the CPU kernel against STREAM's triad and torch's NAdam on the same number of threads.

python benchmarks/bench_kernel.py
"""

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np

from names import AXPY, FOREACH, KERNEL, KERNEL_NUMEL, TRIAD
from peers import GRAD_SIZE, load_torch
from placing import page_aligned
from record import Ratio, Result, Samples, medians, report, sample
from shardopt.backends.base import UpdatePlan
from shardopt.backends.cpu.kernel import CpuKernel
from shardopt.backends.cpu.memory import padded_zeros
from shardopt.layout.dtypes import DTYPES, compute_dtype, has_master
from shardopt.layout.padding import row_numel
from shardopt.rule.nadam import Hyperparams, StepCount, step_coefficients
from triad import Triad

NUM_TENSORS = 16
FILL_NUMEL = 1 << 20


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured.

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
    """The kernel and its arrays, which lie to each other as in ``shardopt.store.buffers``.

    Attributes:
        nbytes: What one update must move: gradients once; parameters, moments and the master that
            16-bit parameters have, both ways.
    """

    def __init__(self, setting: Setting) -> None:
        numel, dtype, num_sources = setting.numel, setting.dtype, setting.num_sources
        self._kernel = CpuKernel(setting.threads)
        self._kernel.prepare(dtype)
        row = row_numel(numel, dtype)
        rows = page_aligned((1 + num_sources) * row, dtype).reshape(-1, row)
        self._param, self._grads = rows[0, :numel], rows[1:]
        fill_random(self._param, 1.0, 0)
        for source in range(num_sources):
            fill_random(self._grads[source, :numel], GRAD_SIZE, 1 + source)
        names = ["exp_avg", "exp_avg_sq"] + ["master"] * has_master(dtype)
        self._state = {
            name: padded_zeros(numel, compute_dtype(dtype), len(rows) + i, self._param)
            for i, name in enumerate(names)
        }
        if has_master(dtype):
            self._state["master"][:] = self._param
        self._segments = np.array([[0, numel, 0]])
        self._clock, self._hyper = StepCount(), Hyperparams()
        each = np.dtype(dtype).itemsize * (num_sources + 2)
        self.nbytes = numel * each + 2 * sum(array.nbytes for array in self._state.values())

    def run(self) -> None:
        """Take one step."""
        self._clock.advance(self._hyper)
        row = step_coefficients(self._hyper, self._clock, 1 / len(self._grads))
        m, v = self._state["exp_avg"], self._state["exp_avg_sq"]
        plan = UpdatePlan(0, self._param.size, self._segments, np.array([row], m.dtype))
        self._kernel.update(self._grads, self._param, self._state.get("master"), m, v, plan)

    def close(self) -> None:
        """End the threads."""
        self._kernel.close()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=KERNEL_NUMEL, help="parameters (64 Mi)")
    parser.add_argument("--repeats", type=int, default=15, help="samples of each contender (15)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(float32)")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="(1 2)")
    parser.add_argument("--sources", type=int, nargs="*", default=[1], help="gradients summed (1)")
    arguments = parser.parse_args()
    for threads in arguments.threads:
        for num_sources in arguments.sources:
            setting = Setting(arguments.numel, arguments.dtype, num_sources, threads)
            compare(setting, arguments.repeats)


def compare(setting: Setting, repeats: int) -> None:
    """Measure and report one setting."""
    kernel = KernelRun(setting)
    triad = Triad(setting.numel, compute_dtype(setting.dtype), setting.threads)
    contenders = {TRIAD: triad.triad, AXPY: triad.axpy, KERNEL: kernel.run}
    # In 16 bits torch's moments have 16 bits too, and there is no master: another optimizer.
    comparable = setting.num_sources == 1 and not has_master(setting.dtype)
    torch = load_torch(setting.threads) if comparable else None
    if torch is not None:
        contenders[FOREACH] = foreach_optimizer(torch, setting).step
    samples_s, others = sample(contenders, repeats)
    kernel.close()
    triad.close()
    report(evaluate(setting, samples_s, kernel.nbytes, triad.nbytes), others)


def evaluate(setting: Setting, samples_s: Samples, kernel_nbytes: int, triad_nbytes: int) -> Result:
    """Draw the ratios from the samples."""
    times_s = medians(samples_s)
    kernel_rate = kernel_nbytes / times_s[KERNEL] / 1e9
    triad_rate, axpy_rate = (triad_nbytes / times_s[name] / 1e9 for name in (TRIAD, AXPY))
    ratios = [
        Ratio("kernel GB/s / triad GB/s", kernel_rate / triad_rate, 0.9),
        Ratio("kernel GB/s / axpy GB/s", kernel_rate / axpy_rate),
    ]
    if FOREACH in times_s:
        speed = times_s[FOREACH] / times_s[KERNEL]
        ratios.append(Ratio(f"{FOREACH} / {KERNEL}", speed, 5.0))
    figures = {"triad, GB/s": triad_rate, "axpy, GB/s": axpy_rate, "kernel, GB/s": kernel_rate}
    return Result(
        "kernel",
        f"CpuKernel.update, {setting.num_sources} source(s)",
        1,
        setting.threads,
        setting.dtype,
        setting.numel,
        samples_s,
        ratios,
        setting == Setting(KERNEL_NUMEL, "float32", 1, setting.threads),
        figures,
        settings={"sources": setting.num_sources},
    )


def fill_random(array: Any, size: float, seed: int) -> None:
    """Touch every page with numbers that are neither zero nor denormal."""
    rng, full = np.random.default_rng(seed), np.dtype(compute_dtype(array.dtype.name))
    for start in range(0, array.size, FILL_NUMEL):
        run = array[start : start + FILL_NUMEL]
        run[:] = rng.standard_normal(run.size, full) * full.type(size)


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


if __name__ == "__main__":
    main()
