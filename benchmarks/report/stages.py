"""The table of what steps of stage 2 take beside those of stage 1."""

from pathlib import Path

from benchmarks.cases.stages import CASE, cpu_of
from benchmarks.contenders.names import (
    ARRAYS,
    ARRAYS_STAGE_2,
    ARRAYS_UPDATED,
    STAGE_2,
    STAGE_2_UPDATED,
    THROUGH_TORCH,
)
from benchmarks.harness.case import Verdict
from benchmarks.harness.record import newest, read

STAGES = "stages"
_CPU = "the same, CPU time of a rank"
_ROWS = (
    ("training a small GPT, a few sequences in a step", THROUGH_TORCH, STAGE_2),
    (_CPU, cpu_of(THROUGH_TORCH), cpu_of(STAGE_2)),
    ("training it with `update_in_backward=True`", THROUGH_TORCH, STAGE_2_UPDATED),
    (_CPU, cpu_of(THROUGH_TORCH), cpu_of(STAGE_2_UPDATED)),
    ("no backward: gradients are ready at once", ARRAYS, ARRAYS_STAGE_2),
    (_CPU, cpu_of(ARRAYS), cpu_of(ARRAYS_STAGE_2)),
    ("the same with `update_in_backward=True`", ARRAYS, ARRAYS_UPDATED),
    (_CPU, cpu_of(ARRAYS), cpu_of(ARRAYS_UPDATED)),
)


def stages_text(folder: Path) -> str:
    """Write the newest times of both stages as Markdown."""
    results = newest(read(CASE, folder))
    if not results:
        return "There are no results of `python -m benchmarks stages` yet."
    result = results[-1]
    lines = ["| A step, ms | stage 1 | stage 2 | ratio |", "| --- | ---: | ---: | ---: |"]
    ratios = {verdict.name: verdict for verdict in CASE.judge(result)}
    for label, first, second in _ROWS:
        if (verdict := ratios.get(f"{second} / {first}")) is not None:
            times = [f"{1e3 * result.value(name):.0f}" for name in (first, second)]
            lines.append(f"| {' | '.join((label, *times, _words_of(verdict)))} |")
    origin, numel = result.origin, result.numel / 1e6
    busy = ""
    if not result.is_quiet:
        busy = (
            f" Other jobs took {100 * (result.others or 0):.0f} % of the machine meanwhile: the "
            "times are too long, and the ratios are rough."
        )
    return "\n".join(lines) + (
        f"\n\nMedians of steps of {numel:.0f} M parameters on {result.ranks} ranks of one node, in "
        "turn. Ratios are medians of those of each turn, with 95 % confidence "
        f"intervals.{busy} {origin.mpi}, {origin.machine['cpu']}, {origin.machine['cores']} cores, "
        f"{origin.date[:10]}, commit {origin.commit}."
    )


def _words_of(verdict: Verdict) -> str:
    if verdict.interval is None:
        return f"{verdict.value:.2f}"
    low, high = verdict.interval
    return f"{verdict.value:.2f} ({low:.2f} to {high:.2f})"
