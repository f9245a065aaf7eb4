"""The training loop, which does not know in which framework the model is written.

Each rank takes its share of a step's sequences and computes its own gradients; ``opt.step()``
averages them over the ranks and updates the parameters, of which all ranks of a node share one
copy.

[Note: the same run on any number of ranks]
The sequences of a step follow from the seed and the step's number alone. A run that resumes from a
checkpoint keeps their number, however many ranks now share them: where some ranks have more
sequences than others, their gradients are weighted accordingly, and the average is the one over all
sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from mpi4py import MPI

from train_lm.corpus import count_baselines
from train_lm.models.base import count_weights, generate
from train_lm.report import Setting, Step

if TYPE_CHECKING:
    from train_lm.checkpoints import Checkpoints, Origin
    from train_lm.corpus import Bytes, Corpus
    from train_lm.models.base import Learner
    from train_lm.options import Options
    from train_lm.report import Report

WARMUP_STEPS = 50
LAST_LR_FRACTION = 0.05
NUM_EVALUATIONS = 10
HELD_OUT_SEQUENCES = 512
PROMPT_NBYTES, SAMPLE_NBYTES = 128, 500


@dataclass(frozen=True)
class Training:
    """A run in progress: the model, the text it learns from, and where the results go."""

    options: Options
    corpus: Corpus
    learner: Learner
    comm: MPI.Intracomm
    report: Report
    origin: Origin

    def announce(self) -> None:
        """Report what is about to be trained, on which machine. Collective: every rank."""
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

    def run(self, checkpoints: Checkpoints) -> None:
        """Take all remaining steps, or fewer if the run is interrupted. Collective: every rank."""
        interval = math.ceil(self.options.steps / NUM_EVALUATIONS)
        for step in range(self.origin.step + 1, self.options.steps + 1):
            self.take_step(step)
            interrupted = checkpoints.exit_code > 0
            if not interrupted and (step % interval == 0 or step == self.options.steps):
                self.report.evaluation(step, self.evaluate())
            checkpoints.save_if_due(step)
            if interrupted:
                return

    def take_step(self, step: int) -> None:
        """Draw a batch, compute gradients, update the parameters. Collective: every rank."""
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

        # This sum also waits for the slowest rank; otherwise the optimizer's time would include it.
        (nats,) = learner.opt.sum_over_ranks([weight * own_nats])
        synced_s = perf_counter()
        learner.step()
        end_s = perf_counter()
        self.report.step(
            Step(
                step=step,
                train_bits=float(nats) / comm.size / math.log(2),
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

    def evaluate(self) -> float:
        """Return the held-out bits per byte; each rank evaluates a part. Collective: every rank."""
        comm, batch = self.comm, self.options.batch
        inputs, targets = (whole[comm.rank :: comm.size] for whole in self.held_out())
        own_nats = 0.0
        for start in range(0, len(inputs), batch):
            part = slice(start, start + batch)
            own_nats += self.learner.loss(inputs[part], targets[part]) * inputs[part].size
        nats, num_bytes = self.learner.opt.sum_over_ranks([own_nats, inputs.size])
        return float(nats) / float(num_bytes) / math.log(2)

    def write_sample(self) -> tuple[bytes, bytes]:
        """Return the first lines of the held-out text and how the model continues them."""
        prompt = self.corpus.held_out[:PROMPT_NBYTES]
        line_ends = np.flatnonzero(prompt == ord("\n"))
        prompt = prompt[: line_ends[-1] + 1] if line_ends.size else prompt
        generator = np.random.default_rng(self.options.seed)
        return prompt.tobytes(), generate(self.learner, prompt, SAMPLE_NBYTES, generator).tobytes()


def scheduled_lr(step: int, options: Options) -> float:
    """Return the learning rate of a step, counted from 1: linear warmup, then half a cosine."""
    warmup = min(1.0, step / min(WARMUP_STEPS, math.ceil(options.steps / 5)))
    cosine = 0.5 * (1 + math.cos(math.pi * step / options.steps))
    return options.lr * warmup * (LAST_LR_FRACTION + (1 - LAST_LR_FRACTION) * cosine)
