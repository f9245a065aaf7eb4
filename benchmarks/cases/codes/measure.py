"""Time the kernel with all forms of the state; see ``benchmarks.cases.codes``."""

from collections.abc import Callable, Iterator

from benchmarks.cases.codes import (
    BFLOAT16,
    BFLOAT16_CODED,
    CASE,
    CODED,
    FLOAT32,
    NUMEL,
    Options,
)
from benchmarks.contenders.internals import BareKernel, make_arrays, state_form
from benchmarks.contenders.problem import GRAD_SIZE
from benchmarks.harness.placing import fill_random
from benchmarks.harness.result import Result
from benchmarks.harness.timing import require_one_rank, sample

_FORMS = {
    FLOAT32: ("float32", state_form()),
    CODED: ("float32", state_form(optim_bits=8)),
    BFLOAT16: ("bfloat16", state_form(has_masters=False)),
    BFLOAT16_CODED: ("bfloat16", state_form(optim_bits=8, has_masters=False)),
}
_NUM_CALLS = 64
"""Updates in a sample at the default size; larger ones take fewer."""


def measure(options: Options) -> Iterator[Result]:
    """Measure all forms in turn."""
    require_one_rank(CASE.name)
    kernels = {}
    for name, (dtype, form) in _FORMS.items():
        arrays = make_arrays(options.numel, dtype, 1, form)
        fill_random(arrays.param, 1.0, 0)
        fill_random(arrays.grads[0, : options.numel], GRAD_SIZE, 1)
        kernels[name] = BareKernel(arrays, 1, 1, form=form)
    num_calls = max(1, _NUM_CALLS * NUMEL // options.numel)
    runs = {name: _repeated(kernel.update, num_calls) for name, kernel in kernels.items()}
    samples_s, others = sample(runs, options.rounds)
    for kernel in kernels.values():
        kernel.close()
    yield Result(
        case=CASE.name,
        title=f"CpuKernel.update, {num_calls} times",
        ranks=1,
        threads=1,
        dtype="float32",
        numel=options.numel,
        samples_s=samples_s,
        others=others,
    )


def _repeated(run: Callable[[], None], count: int) -> Callable[[], None]:
    def run_all() -> None:
        for _ in range(count):
            run()

    return run_all
