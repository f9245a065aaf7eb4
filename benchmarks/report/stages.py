"""The table of what steps of stage 2 take beside those of stage 1."""

from pathlib import Path

from benchmarks.cases.stages import CASE, cpu_of
from benchmarks.contenders.names import ARRAYS, ARRAYS_STAGE_2, STAGE_2, THROUGH_TORCH
from benchmarks.harness.record import newest, read

STAGES = "stages"
_ROWS = {
    "training a small GPT, a few sequences in a step": (THROUGH_TORCH, STAGE_2),
    "the same, CPU time of a rank": (cpu_of(THROUGH_TORCH), cpu_of(STAGE_2)),
    "no backward: gradients are ready at once": (ARRAYS, ARRAYS_STAGE_2),
    "the same, CPU time of a rank ": (cpu_of(ARRAYS), cpu_of(ARRAYS_STAGE_2)),
}


def stages_text(folder: Path) -> str:
    """Write the newest times of both stages as Markdown."""
    results = newest(read(CASE, folder))
    if not results:
        return "There are no results of `python -m benchmarks stages` yet."
    result = results[-1]
    lines = ["| A step, ms | stage 1 | stage 2 | ratio |", "| --- | ---: | ---: | ---: |"]
    for label, names in _ROWS.items():
        if all(map(result.has, names)):
            first, second = map(result.value, names)
            cells = [label.strip(), f"{1e3 * first:.0f}", f"{1e3 * second:.0f}"]
            lines.append(f"| {' | '.join(cells)} | {second / first:.2f} |")
    origin, numel = result.origin, result.numel / 1e6
    busy = ""
    if not result.is_quiet:
        busy = (
            f" Other jobs took {100 * (result.others or 0):.0f} % of the machine meanwhile: the "
            "times are too long, and the ratios are rough."
        )
    return "\n".join(lines) + (
        f"\n\nMedians of steps of {numel:.0f} M parameters on {result.ranks} ranks of one node, in "
        f"turn.{busy} {origin.mpi}, {origin.machine['cpu']}, {origin.machine['cores']} cores, "
        f"{origin.date[:10]}, commit {origin.commit}."
    )
