"""Time the kernel in all its forms; see ``benchmarks.cases.codes``."""

from collections.abc import Iterator
from functools import partial

from benchmarks.cases.codes import (
    BFLOAT16,
    BFLOAT16_CODED,
    CASE,
    CODED,
    FLOAT32,
    NUMEL,
    OTHER_RULES,
    Options,
)
from benchmarks.contenders.internals import BareKernel, make_arrays, state_form
from benchmarks.contenders.problem import GRAD_SIZE
from benchmarks.harness.placing import fill_random
from benchmarks.harness.result import Result
from benchmarks.harness.timing import require_one_rank, sample

_FULL = state_form()
_CONTENDERS = {
    FLOAT32: ("float32", _FULL, "NAdam"),
    CODED: ("float32", state_form(optim_bits=8), "NAdam"),
    BFLOAT16: ("bfloat16", state_form(has_masters=False), "NAdam"),
    BFLOAT16_CODED: ("bfloat16", state_form(optim_bits=8, has_masters=False), "NAdam"),
    **{rule: ("float32", _FULL, rule) for rule in OTHER_RULES},
}
_NUM_CALLS = 64
"""Updates in a sample at the default size; larger ones take fewer."""


def measure(options: Options) -> Iterator[Result]:
    """Measure all contenders in turn."""
    require_one_rank(CASE.name)
    kernels = {}
    for name, (dtype, form, rule) in _CONTENDERS.items():
        arrays = make_arrays(options.numel, dtype, 1, form)
        fill_random(arrays.param, 1.0, 0)
        fill_random(arrays.grads[0, : options.numel], GRAD_SIZE, 1)
        kernels[name] = BareKernel(arrays, 1, 1, form=form, rule=rule)
    num_calls = max(1, _NUM_CALLS * NUMEL // options.numel)
    runs = {name: partial(kernel.update, num_calls) for name, kernel in kernels.items()}
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
