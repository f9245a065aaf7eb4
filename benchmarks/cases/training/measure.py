"""Train a small GPT by each contender; see ``benchmarks.cases.training``."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mpi4py import MPI

from benchmarks.cases.training import CASE, DIFFERENCE, STEPS, Options, held_out_bits, tokens_per_s
from benchmarks.contenders.internals import share_of_cores
from benchmarks.contenders.names import THROUGH_TORCH
from benchmarks.contenders.problem import DTYPE
from benchmarks.contenders.torch_env import gloo, load_torch
from benchmarks.contenders.trainers import TRAINERS, Gpt, Trainer, load_train_lm
from benchmarks.harness.result import Result, Samples
from benchmarks.harness.timing import Neighbours, slowest_s

HELD_OUT_SEQUENCES = 4  # of each rank
AT_FIRST, LATER = 1e-5, 2e-2
"""Largest differences of two losses, relative, in the first round and after it: sums in another
order differ by some 1e-7, and training lets that grow, to 2e-4 within 32 steps."""


def measure(options: Options) -> Iterator[Result]:
    """Train by all contenders in turn, round by round.

    Raises:
        RuntimeError: PyTorch is missing, or a contender learns something else.
    """
    comm = MPI.COMM_WORLD
    threads = share_of_cores(comm)
    if load_torch(threads) is None:
        raise RuntimeError(f"{CASE.name} must have torch; got none. Install it, as README.md says.")
    gpt = Gpt(comm, options.layers, options.width, options.context, options.learning_rate)
    text = Text(comm, options.batch, options.context)
    with gloo(comm, wanted=True):
        names = [name for name in TRAINERS if name not in options.skip]
        run = Run(text, {name: TRAINERS[name](gpt) for name in names}, options.steps)
        run.take_round(is_timed=False)
        neighbours = Neighbours(comm)
        for _ in range(options.rounds):
            run.take_round()
        others = neighbours.share()
        figures = {DIFFERENCE: run.difference}
        run.close()
    if comm.rank == 0:
        result = Result(
            case=CASE.name,
            title=f"training steps of {options.layers} layers of width {options.width}, "
            f"{text.num_tokens} tokens each, time of the slowest rank",
            ranks=comm.size,
            threads=threads,
            dtype=DTYPE,
            numel=gpt.numel,
            samples_s=run.samples_s,
            figures=figures,
            curves=run.curves,
            settings={
                "context": options.context,
                "batch": options.batch,
                "learning_rate": options.learning_rate,
                STEPS: options.steps,
            },
            others=others,
        )
        rates = {tokens_per_s(name): text.num_tokens / result.value(name) for name in names}
        yield result.with_figures(rates)


class Text:
    """The text that all contenders learn from, in the same order.

    Args:
        comm: The ranks.
        batch: Sequences of a rank in a step.
        context: Bytes of a sequence.

    Attributes:
        comm: As given.
        num_tokens: Tokens in a step, on all ranks together.
    """

    def __init__(self, comm: MPI.Intracomm, batch: int, context: int) -> None:
        self.comm, self.num_tokens = comm, comm.size * batch * context
        self._context, self._batch = context, comm.size * batch
        self._share = slice(comm.rank, None, comm.size)
        self._corpus = load_train_lm("corpus").load_corpus(None, context)

    def batch(self, step: int) -> tuple[Any, Any]:
        """Return this rank's inputs and targets of a step, each [batch, context]."""
        generator = np.random.default_rng([0, step])
        inputs, targets = self._corpus.draw_batch(
            generator, self._batch, self._context, self._share
        )
        return inputs, targets

    def held_out(self) -> tuple[Any, Any]:
        """Return this rank's share of the held-out sequences, the same at every call."""
        count = HELD_OUT_SEQUENCES * self.comm.size
        inputs, targets = self._corpus.held_out_windows(count, self._context)
        return inputs[self._share], targets[self._share]

    def mean(self, own: Any) -> Any:
        """Average what each rank has, a number or an array. Collective: every rank."""
        return self.comm.allreduce(np.asarray(own, np.float64)) / self.comm.size


@dataclass
class Run:
    """The contenders, and what they have come to. Collective: every method.

    Attributes:
        text: What they learn from.
        trainers: The contenders, by name.
        steps: In a round.
        samples_s: Seconds of a step, its mean in each round that is timed, by contender.
        curves: Held-out loss after each round, also after the one that warms up.
        difference: The largest one of two contenders' losses, relative.
    """

    text: Text
    trainers: dict[str, Trainer]
    steps: int
    samples_s: Samples = field(default_factory=dict)
    curves: Samples = field(default_factory=dict)
    difference: float = 0.0
    _num_steps: int = 0

    def take_round(self, *, is_timed: bool = True) -> None:
        """Train by each contender, and check that all have learned the same.

        Raises:
            RuntimeError: They have not.
        """
        batches = [self.text.batch(self._num_steps + step) for step in range(self.steps)]
        self._num_steps += self.steps
        held_out, curves = self.text.held_out(), {}
        for name, trainer in self.trainers.items():
            losses: list[float] = []
            spent_s = slowest_s(training(trainer, batches, losses), self.text.comm)
            if is_timed:
                self.samples_s.setdefault(name, []).append(spent_s / self.steps)
            curves[name] = self.text.mean([*losses, trainer.loss(*held_out)])
            bits = float(curves[name][-1]) / math.log(2)
            self.curves.setdefault(held_out_bits(name), []).append(bits)
        largest = AT_FIRST if self._num_steps == self.steps else LATER
        self.difference = max(self.difference, difference_of(curves, largest))

    def close(self) -> None:
        """Free the memory."""
        for trainer in self.trainers.values():
            trainer.close()
        self.trainers.clear()


def difference_of(curves: Mapping[str, Any], allowed: float) -> float:
    """Return how far losses are apart, if all contenders learn alike.

    Args:
        curves: Losses of the steps of a round, and held-out loss at its end, by contender.
        allowed: The largest difference that rounding explains.

    Returns:
        The largest difference from those of this project, relative.

    Raises:
        RuntimeError: It is larger than allowed, so that times would not be comparable.
    """
    expected, largest = curves[THROUGH_TORCH], 0.0
    for name, losses in curves.items():
        difference = float(np.max(np.abs(losses / expected - 1)))
        if not difference <= allowed:
            raise RuntimeError(
                f"{name} must learn as {THROUGH_TORCH} does; got losses that differ by "
                f"{difference:.2g} of them, more than {allowed:g}. Fix the contender."
            )
        largest = max(largest, difference)
    return largest


def training(
    trainer: Trainer, batches: list[tuple[Any, Any]], losses: list[float]
) -> Callable[[], None]:
    """Return a function that trains for a round, and appends the losses."""

    def train() -> None:
        losses.extend(trainer.step(*batch) for batch in batches)

    return train
