"""Train a byte-level transformer with sharded NAdam: mpirun runs this script on every rank.

Every rank takes its share of a step's sequences and computes its own gradients; ``opt.step()``
averages them over the ranks and updates the parameters, of which all ranks of a node share one
copy. The model is written in NumPy, PyTorch, JAX or lucid; the loop does not know which.

[Note: the same run on any number of ranks]
Which sequences a step learns from follows from the seed and the step's number alone. A run that
goes on from a checkpoint keeps their number, however many ranks share them now: where some have
more than others, their gradients weigh more, and the average is the one over all sequences.
"""

from __future__ import annotations

import math
import signal
import sys
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from mpi4py import MPI

from checkpoints import Checkpoints, Origin, look_for_origin, require_same_run
from corpus import Bytes, Corpus, count_baselines, load_corpus
from models import find_learner
from models.base import Learner, Shape, count_weights, generate, initial_weights
from options import HEAD_WIDTH, Options, parse_options
from report import MainReport, Report
from screen import Setting, Step
from shardopt import ShardPolicy
from shardopt.measure.cores import bound_to, count_cores

BETAS = (0.9, 0.99)
MAX_GRAD_NORM = 1.0
WARMUP_STEPS = 50
LAST_LR_FRACTION = 0.05
EVALUATIONS = 10
HELD_OUT_SEQUENCES = 512
PROMPT_NBYTES, SAMPLE_NBYTES = 128, 500


def main() -> int:
    """Load text, make the model, train it, show what it learnt; returns the exit code."""
    options = parse_options()
    # Until the first step there is nothing to save: Ctrl-C ends a rank at once, and silently.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    comm = MPI.COMM_WORLD
    corpus, report, make_learner = prepare(comm, options)
    make_learner.limit_threads(share_cores(comm))
    shape = Shape(options.layers, options.width, options.width // HEAD_WIDTH, options.context)
    learner = make_learner(
        shape,
        initial_weights(shape, options.seed),
        options.dtype,
        betas=BETAS,
        max_grad_norm=MAX_GRAD_NORM,
        comm=comm,
        policy=ShardPolicy(timeout_s=options.timeout),
    )

    with learner.opt:
        with Checkpoints(options, learner.opt, comm) as checkpoints:
            origin = restore(comm, checkpoints)
            learner.take_loaded()
            run = Run(options, corpus, learner, comm, report, origin)
            run.announce()
            checkpoints.watch(origin, corpus)
            run.train(checkpoints)
        if checkpoints.exit_code:
            report.interrupted()
        elif comm.rank == 0:
            report.finish(*run.write_sample())
    return checkpoints.exit_code


def share_cores(comm: MPI.Intracomm) -> int:
    """Count this rank's part of the cores it may run on. Collective.

    Each rank would else start a thread on every core, and they would spend their time waiting for
    one another.
    """
    node_comm = comm.Split_type(MPI.COMM_TYPE_SHARED)
    cores = bound_to()
    sharing = node_comm.allgather(cores).count(cores)
    node_comm.Free()
    return max(1, count_cores() // sharing)


def prepare(comm: MPI.Intracomm, options: Options) -> tuple[Corpus, Report, type[Learner]]:
    """Read the text, import the framework and open the log, or end all ranks with one sentence.

    One rank alone may fail, on a node that lacks the file; the others would wait for it forever.
    Collective.
    """
    problem = None
    try:
        make_learner = find_learner(options.framework)
        corpus = load_corpus(options.text, options.context)
        if options.checkpoint and comm.rank == 0:
            origin, saved = look_for_origin(options.checkpoint)
            if origin is not None:
                require_same_run(options, corpus, comm.size, origin, saved)
        report = MainReport(options) if comm.rank == 0 else Report()
    except ValueError as error:
        problem = str(error)
    end_if_any(comm, problem)
    return corpus, report, make_learner


def restore(comm: MPI.Intracomm, checkpoints: Checkpoints) -> Origin:
    """Go on from a checkpoint, or begin, or end all ranks with one sentence. Collective."""
    problem = None
    try:
        origin = checkpoints.restore()
    except ValueError as error:
        problem = str(error)
    end_if_any(comm, problem)
    return origin


def end_if_any(comm: MPI.Intracomm, problem: str | None) -> None:
    """End all ranks if one has a problem, and say the first. Collective."""
    problems = [problem for problem in comm.allgather(problem) if problem]
    if problems:
        if comm.rank == 0:
            print(f"train_lm.py: {problems[0]}", file=sys.stderr)
        sys.exit(2)


@dataclass(frozen=True)
class Run:
    """A model, what it learns from, and what trains it."""

    options: Options
    corpus: Corpus
    learner: Learner
    comm: MPI.Intracomm
    report: Report
    origin: Origin

    def announce(self) -> None:
        """Report what is going to happen. Collective."""
        comm, memory = self.comm, self.learner.opt.memory_report()
        vendor, version = MPI.get_vendor()
        setting = Setting(
            mpi_library=f"{vendor} {'.'.join(map(str, version))}",
            num_ranks=comm.size,
            num_nodes=len(set(comm.allgather(MPI.Get_processor_name()))),
            framework=self.learner.framework,
            params_numel=count_weights(self.learner.shape),
            rank_nbytes=memory.rank_nbytes,
            node_nbytes=memory.node_nbytes,
            replicated_rank_nbytes=memory.replicated_rank_nbytes,
            replicated_node_nbytes=memory.replicated_node_nbytes,
        )
        baselines = count_baselines(self.corpus.train, *self.held_out())
        self.report.start(setting, self.corpus, baselines, self.origin)

    def train(self, checkpoints: Checkpoints) -> None:
        """Take all steps that are left, or fewer when a rank is interrupted. Collective."""
        interval = math.ceil(self.options.steps / EVALUATIONS)
        for step in range(self.origin.step + 1, self.options.steps + 1):
            self.take_step(step)
            interrupted = checkpoints.exit_code > 0
            if not interrupted and (step % interval == 0 or step == self.options.steps):
                self.report.evaluation(step, self.evaluate(step))
            checkpoints.save_if_due(step)
            if interrupted:
                return

    def take_step(self, step: int) -> None:
        """Draw, differentiate, update. Collective."""
        learner, comm, options, batch = self.learner, self.comm, self.options, self.origin.batch
        lr = scheduled_lr(step, options)
        for group in learner.opt.param_groups:
            group["lr"] = lr

        start_s = perf_counter()
        # See [Note: the same run on any number of ranks].
        generator = np.random.default_rng([options.seed, step])
        share = slice(comm.rank, None, comm.size)
        inputs, targets = self.corpus.draw_batch(generator, batch, options.context, share)
        weight = len(inputs) * comm.size / batch
        own_nats = learner.loss_and_grads(inputs, targets, weight)
        model_s = perf_counter() - start_s

        # Also waits for the slowest rank, which would else be counted as time of the optimizer.
        (nats,) = self.sum_over_ranks(step, "loss", weight * own_nats)
        synced_s = perf_counter()
        learner.step()
        end_s = perf_counter()
        self.report.step(
            Step(
                step=step,
                train_bits=nats / comm.size / math.log(2),
                lr=lr,
                grad_norm=learner.opt.last_step.grad_norm,
                tokens_per_s=batch * options.context / (end_s - start_s),
                model_ms=1e3 * model_s,
                optimizer_ms=1e3 * (end_s - synced_s),
            )
        )

    def held_out(self) -> tuple[Bytes, Bytes]:
        """Return the held-out inputs and targets, the same at every call."""
        return self.corpus.held_out_windows(HELD_OUT_SEQUENCES, self.options.context)

    def evaluate(self, step: int) -> float:
        """Return the held-out bits per byte; each rank predicts its part. Collective."""
        comm, batch = self.comm, self.options.batch
        inputs, targets = (whole[comm.rank :: comm.size] for whole in self.held_out())
        nats = 0.0
        for start in range(0, len(inputs), batch):
            part = slice(start, start + batch)
            nats += self.learner.loss(inputs[part], targets[part]) * inputs[part].size
        nats, num_bytes = self.sum_over_ranks(step, "evaluation", nats, inputs.size)
        return nats / num_bytes / math.log(2)

    def sum_over_ranks(self, step: int, phase: str, *values: float) -> list[float]:
        """Add each value over all ranks, with the optimizer's deadline. Collective."""
        collectives = self.learner.opt.core.collectives
        sums = collectives.allreduce(np.array(values, np.float64), MPI.SUM, step, phase)
        return [float(value) for value in sums]

    def write_sample(self) -> tuple[bytes, bytes]:
        """Let the model continue the first lines of the held-out text."""
        prompt = self.corpus.held_out[:PROMPT_NBYTES]
        line_ends = np.flatnonzero(prompt == ord("\n"))
        prompt = prompt[: line_ends[-1] + 1] if line_ends.size else prompt
        generator = np.random.default_rng(self.options.seed)
        return prompt.tobytes(), generate(self.learner, prompt, SAMPLE_NBYTES, generator).tobytes()


def scheduled_lr(step: int, options: Options) -> float:
    """Rise linearly over the first steps, then fall along half a cosine; steps count from 1."""
    warmup = min(1.0, step / min(WARMUP_STEPS, math.ceil(options.steps / 5)))
    cosine = 0.5 * (1 + math.cos(math.pi * step / options.steps))
    return options.lr * warmup * (LAST_LR_FRACTION + (1 - LAST_LR_FRACTION) * cosine)


if __name__ == "__main__":
    sys.exit(main())
