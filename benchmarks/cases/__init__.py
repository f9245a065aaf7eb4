"""The cases: packages that declare their ``Case`` and measure it in the module ``measure``."""

from benchmarks.cases import (
    checkpoint,
    codes,
    faces,
    gpu_kernel,
    gpu_memory,
    gpu_offload,
    gpu_overhead,
    kernel,
    loss,
    memory,
    nodes,
    offload,
    overhead,
    predict,
    scaling,
    stages,
    step,
    training,
    writes,
)
from benchmarks.harness.case import Case

_ON_CPUS = (
    kernel,
    codes,
    overhead,
    step,
    training,
    stages,
    faces,
    writes,
    offload,
    memory,
    checkpoint,
    scaling,
    nodes,
    predict,
    loss,
)
_ON_GPUS = (gpu_kernel, gpu_overhead, gpu_memory, gpu_offload)

CASES: dict[str, Case] = {package.CASE.name: package.CASE for package in (*_ON_CPUS, *_ON_GPUS)}
