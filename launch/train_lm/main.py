"""A training job on every rank, from the command line to the exit code."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from mpi4py import MPI

from shardopt import ShardPolicy
from shardopt.measure.cores import bound_to, count_cores
from train_lm.checkpoints import Checkpoints, Origin, find_origin, require_same_run
from train_lm.corpus import load_corpus
from train_lm.models import import_learner
from train_lm.models.base import Shape, initial_weights
from train_lm.options import HEAD_WIDTH, OPTIMIZERS, parse_options
from train_lm.report import make_report
from train_lm.training import Training

if TYPE_CHECKING:
    from train_lm.corpus import Corpus
    from train_lm.models.base import Learner
    from train_lm.options import Options
    from train_lm.report import Report

BETAS = (0.9, 0.99)
MAX_GRAD_NORM = 1.0


def main() -> int:
    """Load the text, build the model, train it and show what it learnt.

    Collective: every rank.

    Returns:
        The exit code.
    """
    options = parse_options()
    # Before the first step there is nothing to save: Ctrl-C ends a rank at once, and silently.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    comm = MPI.COMM_WORLD
    corpus, report, learner_class, device = prepare(comm, options)
    learner_class.limit_threads(cores_per_rank(comm))
    learner = make_learner(comm, options, learner_class, device)

    with learner.opt:
        with Checkpoints(options, learner.opt, comm) as checkpoints:
            origin = restore(comm, checkpoints)
            learner.adopt_loaded()
            training = Training(options, corpus, learner, comm, report, origin)
            training.announce()
            checkpoints.watch(origin, corpus)
            training.run(checkpoints)
        if checkpoints.exit_code:
            report.interrupted()
        elif comm.rank == 0:
            report.finish(*training.write_sample())
    return checkpoints.exit_code


def prepare(comm: MPI.Intracomm, options: Options) -> tuple[Corpus, Report, type[Learner], str]:
    """Read the text, import the framework, find this rank's device and open the log.

    A single rank may fail, for example on a node without the file. All ranks then end together,
    with one message, instead of waiting for the one that failed.

    Collective: every rank.
    """
    problem, local_rank = None, find_local_rank(comm)
    try:
        learner_class = import_learner(options.framework)
        device = learner_class.find_device(options.device, local_rank)
        corpus = load_corpus(options.text, options.context)
        if options.checkpoint and comm.rank == 0:
            origin, saved = find_origin(options.checkpoint)
            if origin is not None:
                require_same_run(options, corpus, comm.size, origin, saved)
        report = make_report(comm.rank, options)
    except ValueError as error:
        problem = str(error)
    exit_on_any(comm, problem)
    return corpus, report, learner_class, device


def find_local_rank(comm: MPI.Intracomm) -> int:
    """Return the number of this rank on its node, which the launchers tell; MPI knows it, too.

    Collective: every rank.
    """
    node_comm = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    local_rank = node_comm.rank
    node_comm.Free()
    return int(os.environ.get("SHARDOPT_LOCAL_RANK", local_rank))


def cores_per_rank(comm: MPI.Intracomm) -> int:
    """Return this rank's share of the cores it may run on.

    Without a limit every rank would start a thread on every core, and the threads would spend their
    time waiting for each other.

    Collective: every rank.
    """
    node_comm = comm.Split_type(MPI.COMM_TYPE_SHARED)
    cores = bound_to()
    num_sharing = node_comm.allgather(cores).count(cores)
    node_comm.Free()
    return max(1, count_cores() // num_sharing)


def make_learner(
    comm: MPI.Intracomm, options: Options, learner_class: type[Learner], device: str
) -> Learner:
    """Build the model with its first weights, and the optimizer that shards it.

    Collective: every rank.
    """
    shape = Shape(options.layers, options.width, options.width // HEAD_WIDTH, options.context)
    return learner_class(
        shape,
        initial_weights(shape, options.seed),
        options.dtype,
        device,
        OPTIMIZERS[options.optimizer],
        betas=BETAS,
        max_grad_norm=MAX_GRAD_NORM,
        comm=comm,
        policy=ShardPolicy(timeout_s=options.timeout),
    )


def restore(comm: MPI.Intracomm, checkpoints: Checkpoints) -> Origin:
    """Resume from a checkpoint, or begin a new run; see ``prepare`` for what may go wrong.

    Collective: every rank.
    """
    problem = None
    try:
        origin = checkpoints.restore()
    except ValueError as error:
        problem = str(error)
    exit_on_any(comm, problem)
    return origin


def exit_on_any(comm: MPI.Intracomm, problem: str | None) -> None:
    """End all ranks if one of them has a problem; rank 0 prints the first.

    Collective: every rank.
    """
    problems = [problem for problem in comm.allgather(problem) if problem]
    if problems:
        if comm.rank == 0:
            print(f"train_lm.py: {problems[0]}", file=sys.stderr)
        sys.exit(2)
