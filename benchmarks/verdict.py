"""What a run of ``bench_checkpoint.py`` amounts to."""

from collections.abc import Mapping

from names import (
    BARE_READ,
    BESIDE,
    COMPUTE,
    CPU,
    DCP,
    DCP_KEPT,
    DIRECT_WRITE,
    DURABLE,
    GROWTH,
    LOAD,
    LOAD_OVER,
    MEMCPY,
    SHARDOPT,
    STALL,
    STEP,
    SYNCHRONOUS,
    TORCH_SAVE,
    WRITTEN,
)
from record import Ratio, Samples, medians


def checkpoint_ratios(samples_s: Samples, figures: Mapping[str, float], nbytes: int) -> list[Ratio]:
    """Draw the ratios.

    Args:
        samples_s: Of all contenders.
        figures: Likewise, megabytes.
        nbytes: Of a rank's checkpoint.
    """
    times_s = medians(samples_s)
    ours, ratios = SHARDOPT, []

    def divide(over: str, under: str, target: float | None = None, *, least: bool = False) -> None:
        if over in times_s and under in times_s:
            ratios.append(Ratio(f"{over} / {under}", times_s[over] / times_s[under], target, least))

    def compare(what: str, name: str, target: float | None = None) -> None:
        if what.format(name) in times_s and what.format(ours) in times_s:
            value = times_s[what.format(ours)] / times_s[what.format(name)]
            ratios.append(Ratio(what.format(f"{ours} / {name}"), value, target, at_least=False))

    divide(STALL.format(ours), MEMCPY, 1.3)
    divide(DIRECT_WRITE, WRITTEN.format(ours), 0.8, least=True)
    divide(DIRECT_WRITE, DURABLE.format(ours), least=True)
    divide(DIRECT_WRITE, DURABLE.format(SYNCHRONOUS), least=True)
    for name, stall, cpu in ((DCP, 0.4, 0.3), (DCP_KEPT, None, None), (TORCH_SAVE, None, None)):
        compare(STALL, name, stall)
        compare(CPU, name, cpu)
        compare(DURABLE, name)
        compare(LOAD, name)
    divide(LOAD.format(ours), BARE_READ)
    divide(LOAD_OVER.format(ours), BARE_READ)
    for what in (STEP, COMPUTE):
        divide(BESIDE.format(ours, what), what, 1.15 if what == STEP else None)
        divide(BESIDE.format(ours, what), BESIDE.format(DIRECT_WRITE, what))
        for name in (DIRECT_WRITE, DCP, DCP_KEPT):
            divide(BESIDE.format(name, what), what)
    for what, target in (("load", 256.0), ("save", 1.05 * nbytes / 1e6)):
        name = GROWTH.format(ours, what)
        ratios.append(Ratio(name, figures[name], target, at_least=False))
    return ratios
