"""``shardopt doctor``: examine an MPI job, measure its parts, and judge what that means.

``library``, ``job`` and ``gpus`` collect the facts and ``measure`` the speeds, as the values of
``facts``. ``job_findings``, with those of memory and GPUs, and ``speed_findings`` judge them, and
``render`` writes the report.
"""

import argparse
from pathlib import Path

from shardopt.cli.base import Command, Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("--quick", action="store_true", help="measure for a shorter time")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    calibrate_help = "write the measured speeds to a file for shardopt plan --calibration"
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help=calibrate_help)
    folder_help = "measure the disk of this folder too (default: that of --calibrate, if given)"
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help=folder_help)
    timeout_help = "longest time to wait for another rank, in seconds (default: 30)"
    parser.add_argument(
        "--timeout", type=_positive, default=30.0, metavar="SECONDS", help=timeout_help
    )


def run(options: argparse.Namespace) -> Exit:
    """Examine the job that this process is a rank of. Collective: every rank."""
    from shardopt.cli.doctor.examine import examine  # loads MPI, which no other command needs

    return examine(
        quick=options.quick,
        as_json=options.json,
        timeout_s=options.timeout,
        calibration=options.calibrate,
        folder=options.folder,
    )


def _positive(word: str) -> float:
    value = float(word)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


_positive.__name__ = "number > 0"  # argparse names it when a word does not fit

COMMAND = Command(
    name="doctor",
    summary="examine an MPI job: launcher, ranks, cores, GPUs, memory, links between nodes",
    details=(
        "Start it the way you start the training job. It describes the job, measures memory,\n"
        "barriers and links for a few seconds, and judges each: ok, note or problem."
    ),
    example="mpirun -n 4 shardopt doctor",
    exit_codes=("no problem", "a problem, or a rank that did not respond in time"),
    add_arguments=add_arguments,
    run=run,
)
