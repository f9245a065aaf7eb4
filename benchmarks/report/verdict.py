"""Verdicts in the terminal, on a run that has just ended and on the newest of all results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks.harness.case import Case, Verdict
from benchmarks.harness.record import newest, read
from benchmarks.harness.result import Result

_WIDTH = 58


def table(case: Case, result: Result) -> str:
    """Write the table of a run: its samples, figures and ratios, and whether targets are met."""
    plural, origin = "s" if result.ranks > 1 else "", result.origin
    processor = origin.machine.get("gpu", origin.machine["cpu"])
    lines = [
        "",
        result.title or case.measures,
        f"{result.numel:,} {result.dtype} parameters, {result.ranks} rank{plural} "
        f"x {result.threads} thread(s), {origin.mpi}, {processor}",
    ]
    for name, values in result.samples_s.items():
        each = median(values) / result.numel * 1e9
        spread = f"{_duration(min(values))} to {_duration(max(values))}"
        middle = _duration(median(values))
        lines.append(f"  {name:<{_WIDTH}} {middle:>10}  {each:9.3f} ns/parameter  ({spread})")
    lines += [f"  {name:<{_WIDTH}} {_number(value)}" for name, value in result.figures.items()]
    lines += [
        f"  {name:<{_WIDTH}} {_number(values[0])} to {values[-1]:.3f}"
        for name, values in result.curves.items()
    ]
    lines += map(_line, case.judge(result))
    if result.others is not None:
        advice = "" if result.is_quiet else ": repeat it on a quiet machine"
        lines.append(f"  other jobs took {result.others:.0%} of the cores meanwhile{advice}")
    return "\n".join(lines)


def beside_targets(case: Case, result: Result) -> str:
    """Write the ratios of a result beside the targets of other settings, without a verdict."""
    return "\n".join(_line(each, "of the full size") for each in case.judge(result, anyway=True))


def summary(cases: Mapping[str, Case], folder: Path) -> str:
    """Write the targets of all cases beside their newest results.

    Args:
        cases: The cases, by name.
        folder: The folder with their results.
    """
    parts, judged, unmeasured = [], [], []
    for case in cases.values():
        results = newest_claimed(case, folder)
        for result in results:
            verdicts = [verdict for verdict in case.judge(result) if verdict.target is not None]
            if verdicts:
                parts.append("\n".join([_heading(result), *map(_line, verdicts)]))
            judged += verdicts
        unmeasured += [f"  {case.name}: {words}" for words in unmeasured_targets(case, results)]
    if unmeasured:
        parts.append("\n".join(["Never measured with the settings claimed:", *unmeasured]))
    num_met = sum(verdict.met is True for verdict in judged)
    parts.append(
        f"{num_met} met, {len(judged) - num_met} MISSED, {len(unmeasured)} never measured."
    )
    return "\n\n".join(parts)


def unmeasured_targets(case: Case, results: Sequence[Result]) -> list[str]:
    """Return, in words, the targets of a case to which none of its results has anything to say."""
    return [
        f"{ratio.name.replace('{ranks}', 'ranks')}, {ratio.target}"
        for ratio in case.ratios
        if ratio.target is not None and all(ratio.of(result) is None for result in results)
    ]


def newest_claimed(case: Case, folder: Path) -> list[Result]:
    """Return the newest results of a case that its targets are for, one for each setting."""
    by_setting: dict[str, list[Result]] = {}
    for result in read(case, folder):
        if case.claim.covers(result):
            settings = sorted(result.settings.items())
            kept = [(key, value) for key, value in settings if key not in case.claim.settings]
            by_setting.setdefault(str((result.threads, kept)), []).append(result)
    return [result for setting in sorted(by_setting) for result in newest(by_setting[setting])]


def _heading(result: Result) -> str:
    ranks = f"{result.ranks} rank{'s' if result.ranks > 1 else ''}"
    settings = "".join(f", {key} {value}" for key, value in sorted(result.settings.items()))
    origin = result.origin
    return (
        f"{result.case}: {ranks} x {result.threads} thread(s){settings}, {origin.mpi}, "
        f"commit {origin.commit}, {origin.date[:10]}"
    )


def _line(verdict: Verdict, remark: str = "") -> str:
    words = ""
    if verdict.bound is not None:
        sign = ">=" if verdict.more_is_better else "<="
        judgement = remark or ("met" if verdict.met else "MISSED")
        words = f"target {sign} {verdict.bound:<5.6g} {judgement}"
    if verdict.interval is not None:
        low, high = verdict.interval
        words += f" ({low:.3f} to {high:.3f})"
    return f"  {verdict.name:<{_WIDTH}} {_number(verdict.value)}  {words}".rstrip()


def _number(value: float) -> str:
    return f"{value:10.3f}" if abs(value) >= 5e-4 or value == 0 else f"{value:10.1e}"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"
