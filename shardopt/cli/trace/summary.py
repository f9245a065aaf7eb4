"""``shardopt trace summary``."""

import argparse
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shardopt.cli import text
from shardopt.cli.base import Command, Exit
from shardopt.cli.trace.reading import Run, add_run_argument, choose_run
from shardopt.cli.trace.summarize import STEP, Place, Summary, summarize

_SMALL = 0.01  # of a step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a trace")
    add_run_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print where time goes."""
    chosen, number, num_runs = choose_run(options.folder, options.number)
    summary = summarize(chosen)
    if options.json:
        text.print_json(to_json(chosen, summary))
    else:
        print("\n\n".join(_report(chosen, summary, f"{number} of {num_runs}")))
    return Exit.FINE


def to_json(run: Run, summary: Summary) -> dict[str, Any]:
    """Return a summary as plain values; times are in seconds."""
    waited_for = summary.waited_for_ns()
    return {
        "started": _started(run),
        "ranks": [
            {
                "rank": rank,
                "host": next(f.process["host"] for f in run.files if f.rank == rank),
                "num_steps": each.num_steps,
                "num_last": each.num_last,
                "waited_for_s": waited_for[rank] / 1e9,
                "saves": {
                    name: {"number": time.number, "total_s": time.total_ns / 1e9}
                    for name, time in each.saves.items()
                },
            }
            for rank, each in summary.ranks.items()
        ],
        "num_steps": summary.num_steps,
        "num_meetings": summary.num_meetings,
        "num_undecided": summary.num_undecided,
        "clock_error_s": None if summary.error_ns is None else summary.error_ns / 1e9,
        "spans": [
            {
                "where": place.where,
                "name": place.name,
                "per_step_s": summary.mean_ns(place) / 1e9,
                "by_rank_s": {
                    str(rank): value / 1e9 for rank, value in summary.per_step_ns(place).items()
                },
            }
            for place in summary.places()
        ],
    }


def _report(run: Run, summary: Summary, number: str) -> Iterator[str]:
    yield text.fields(
        [
            ("started", f"{_started(run)}, run {number}"),
            ("ranks", text.ranges(run.ranks)),
            ("steps", f"{summary.num_steps} counted, without the first of each optimizer"),
            ("clocks", _clocks(summary.error_ns)),
        ]
    )
    if summary.num_steps:
        heads = ("where", "span", ">number", ">time", ">share", ">most on", ">time", ">longest")
        rows = [_row(summary, place) for place in summary.places()]
        yield text.titled_table("Where the time of a step goes, mean of all ranks", heads, rows)
    if len(run.ranks) > 1 and summary.num_steps:
        yield text.titled_table("Who makes others wait", *_waits(summary))
        yield _verdict(summary)
    if saves := _saves(summary):
        columns = ("saves", ">number", ">mean", ">most on", ">longest")
        yield text.titled_table("Saves, mean of all ranks", columns, saves)


def _clocks(error_ns: int | None) -> str:
    if error_ns is None:
        return "not compared on every rank: by the wall clocks of the hosts"
    return f"compared, within {text.seconds(error_ns / 1e9)}" if error_ns else "one, the machine's"


def _row(summary: Summary, place: Place) -> tuple[str, ...]:
    times, mean_ns = summary.per_step_ns(place), summary.mean_ns(place)
    most = max(times, key=times.__getitem__)
    step_ns = summary.mean_ns(Place(STEP, STEP))
    found = [each.times[place] for each in summary.ranks.values() if place in each.times]
    counted = sum(each.num_steps for each in summary.ranks.values())
    return (
        "" if place.where == STEP else place.where,
        place.name,
        f"{sum(time.number for time in found) / counted:.3g}",
        text.seconds(mean_ns / 1e9),
        f"{mean_ns / step_ns:.0%}" if step_ns else "-",
        f"rank {most}",
        text.seconds(times[most] / 1e9),
        text.seconds(max(time.longest_ns for time in found) / 1e9),
    )


def _waits(summary: Summary) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    waited_for = summary.waited_for_ns()
    rows: list[tuple[str, ...]] = []
    for rank, each in summary.ranks.items():
        own = summary.per_step_ns(Place("in a step", "wait")).get(rank, 0.0)
        last = f"{each.num_last} of {summary.num_meetings}"
        waits = text.seconds(waited_for[rank] / 1e9), text.seconds(own / 1e9)
        rows.append((f"rank {rank}", last, *waits))
    return ("", ">comes last", ">others wait, per step", ">waits itself"), rows


def _verdict(summary: Summary) -> str:
    waited_for, step_ns = summary.waited_for_ns(), summary.mean_ns(Place(STEP, STEP))
    worst = max(waited_for, key=waited_for.__getitem__)
    if waited_for[worst] < _SMALL * step_ns:
        return f"No rank makes others wait for {_SMALL:.0%} of a step or more."
    lost, whole = text.seconds(waited_for[worst] / 1e9), text.seconds(step_ns / 1e9)
    return f"Rank {worst} makes others wait most: {lost} of a step of {whole}."


def _saves(summary: Summary) -> list[tuple[str, ...]]:
    names = dict.fromkeys(name for each in summary.ranks.values() for name in each.saves)
    rows: list[tuple[str, ...]] = []
    for name in names:
        found = {rank: r.saves[name] for rank, r in summary.ranks.items() if name in r.saves}
        number = sum(time.number for time in found.values())
        mean_s = sum(time.total_ns for time in found.values()) / number / 1e9
        most = max(found, key=lambda rank: found[rank].total_ns / found[rank].number)
        longest_s = max(time.longest_ns for time in found.values()) / 1e9
        rows.append(
            (name, str(number), text.seconds(mean_s), f"rank {most}", text.seconds(longest_s))
        )
    return rows


def _started(run: Run) -> str:
    return f"{datetime.fromtimestamp(run.start_ns / 1e9, UTC):%Y-%m-%d %H:%M:%S}Z"


COMMAND = Command(
    name="summary",
    summary="print where the time of steps goes, and which rank makes others wait",
    details=(
        "The spans are explained in docs/tracing.md. The first step of each\n"
        "optimizer, which compiles, is left out if there are more."
    ),
    example="shardopt trace summary traces",
    exit_codes=("printed", "never"),
    add_arguments=add_arguments,
    run=run,
)
