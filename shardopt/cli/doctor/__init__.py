"""``shardopt doctor``: what this job is, how fast its parts are, and what that means for training.

``library`` and ``job`` find out what there is, ``measure`` how fast it is; both give the values of
``facts``. ``job_findings`` and ``speed_findings`` judge them, and ``render`` writes them down.
"""

import argparse

from shardopt.cli.base import Command, Exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("--quick", action="store_true", help="measure for a shorter time")
    parser.add_argument("--json", action="store_true", help="print an object")
    timeout_help = "longest wait for another rank, in seconds (default: 30)"
    parser.add_argument(
        "--timeout", type=_positive, default=30.0, metavar="SECONDS", help=timeout_help
    )


def run(options: argparse.Namespace) -> Exit:
    """Examine the job that this process is a rank of. Collective."""
    from shardopt.cli.doctor.examine import examine  # loads MPI, which no other command needs

    return examine(quick=options.quick, as_json=options.json, timeout_s=options.timeout)


def _positive(word: str) -> float:
    value = float(word)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


_positive.__name__ = "number > 0"  # argparse names it when a word does not fit

COMMAND = Command(
    name="doctor",
    summary="examine an MPI job: launcher, ranks, cores, memory, links between nodes",
    details=(
        "Start it as the training job is started. It says what the job is, measures memory,\n"
        "barriers and links for a few seconds, and judges each: ok, note or problem."
    ),
    example="mpirun -n 4 shardopt doctor",
    exit_codes=("no problem", "a problem, or a rank did not come in time"),
    add_arguments=add_arguments,
    run=run,
)
