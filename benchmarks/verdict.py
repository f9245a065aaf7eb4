"""What runs of ``bench_checkpoint.py`` and ``bench_nodes.py`` amount to."""

from collections.abc import Mapping

from names import (
    BACKWARD,
    BARE_READ,
    BESIDE,
    COMPUTE,
    CPU,
    DCP,
    DCP_KEPT,
    DIRECT_WRITE,
    DURABLE,
    GROWTH,
    HIDDEN,
    IN_TURN,
    LOAD,
    LOAD_OVER,
    MEMCPY,
    NARROW,
    NARROW_WIRE,
    OVERLAPPED,
    REDUCE_SCATTER,
    SENT_ALONE_MB,
    SENT_MB,
    SHARDOPT,
    STALL,
    STEP,
    STEP_BEHIND,
    SYNCHRONOUS,
    TORCH_SAVE,
    UPDATE_ALONE,
    WIRE,
    WRITTEN,
    ZERO_REDUNDANCY,
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


def nodes_ratios(
    samples_s: Samples, figures: Mapping[str, float], least_nbytes: float, most_over_limit: float
) -> list[Ratio]:
    """Draw the ratios.

    Args:
        samples_s: Of all contenders.
        figures: Megabytes that were counted.
        least_nbytes: What a node must send in a step.
        most_over_limit: The target for a step over its limit.
    """
    times_s, ratios = medians(samples_s), []
    ours = times_s.get(SHARDOPT)
    if ours is not None:
        limit = max((times_s[WIRE], WIRE), (times_s[UPDATE_ALONE], UPDATE_ALONE))
        for name, over, target, least in (
            (f"{SHARDOPT} / {limit[1]}", ours / limit[0], most_over_limit, False),
            (f"{NARROW_WIRE} / {SHARDOPT}", times_s[NARROW_WIRE] / ours, 0.8, False),
            (f"{NARROW} / {SHARDOPT}", times_s[NARROW] / ours, 0.58, False),
            (f"{REDUCE_SCATTER} / {SHARDOPT}", times_s[REDUCE_SCATTER] / ours, 1.0, True),
            (
                f"{ZERO_REDUNDANCY} / {SHARDOPT}",
                times_s.get(ZERO_REDUNDANCY, 0.0) / ours,
                1.5,
                True,
            ),
        ):
            if over:
                ratios.append(Ratio(name, over, target, least))
    if SENT_MB in figures:
        sent = figures[SENT_MB]
        ratios.append(Ratio("sent by a node / the least", sent * 1e6 / least_nbytes, 1.05, False))
        if SENT_ALONE_MB in figures:
            ratio = sent / figures[SENT_ALONE_MB]
            ratios.append(Ratio("sent by a node / by one of 1 rank", ratio, 1.01, False))
    if OVERLAPPED in times_s:
        exchange_s = times_s[STEP_BEHIND] / 2  # gradients are one half of what travels
        hidden = (times_s[IN_TURN] - times_s[OVERLAPPED]) / exchange_s
        ratios.append(Ratio(HIDDEN, hidden, 0.7))
        ratios.append(Ratio(f"{BACKWARD} / exchange of gradients", times_s[BACKWARD] / exchange_s))
    return ratios
