"""What a run tells: the screen, the log and the plot, by rank 0; the other ranks keep silent."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

import screen
from plot_loss import plot_loss
from run_log import RunLog

if TYPE_CHECKING:
    from checkpoints import Origin
    from corpus import Baselines, Corpus
    from options import Options
    from screen import Setting, Step

KEPT_FRACTION = 0.95
"""How much of its old value a number on the screen keeps from one step to the next."""
REFRESHES_A_SECOND = 4


class Report:
    """Tells nothing: the report of every rank but 0, so that the training loop knows no ranks."""

    def start(self, setting: Setting, corpus: Corpus, baselines: Baselines, origin: Origin) -> None:
        """Tell what is going to happen."""

    def step(self, step: Step) -> None:
        """Tell of one step."""

    def evaluation(self, step: int, held_out_bits: float) -> None:
        """Tell what the model makes of the held-out text."""

    def finish(self, prompt: bytes, continuation: bytes) -> None:
        """Tell the result, with some text by the model."""

    def interrupted(self) -> None:
        """Tell that the run was stopped before its end."""


class MainReport(Report):
    """Rank 0's report; ``start`` comes first, then steps and evaluations, then one of the ends."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._log = RunLog(options.out)
        self._console = Console(highlight=False)
        self._progress = screen.make_progress(options.steps)
        self._live = Live(
            console=self._console, refresh_per_second=REFRESHES_A_SECOND, transient=True
        )

    def start(self, setting: Setting, corpus: Corpus, baselines: Baselines, origin: Origin) -> None:
        """Print the header, log the setting and show the progress bar."""
        self._baselines = baselines
        self._origin = origin
        self._averages: Step | None = None
        self._held_out_bits = screen.UNIFORM_BITS
        parts = (
            screen.describe_model(setting, self._options),
            screen.describe_framework(setting, self._options),
            screen.describe_ranks(setting),
        )
        self._log.begin(origin.run, origin.step)
        self._log.write(
            "start",
            run=origin.run,
            step=origin.step,
            caption=" · ".join(part for part in parts if part),
            text=corpus.name,
            unigram_bits=baselines.unigram,
            bigram_bits=baselines.bigram,
            options={name: str(value) for name, value in asdict(self._options).items()},
            **asdict(setting),
        )
        self._console.print(screen.draw_header(setting, corpus, self._options))
        if origin.step:
            self._console.print(screen.draw_origin(origin))
        self._progress.update(self._progress.task_ids[0], completed=origin.step)
        self._console.print(Text(screen.COLUMNS, style="dim"))
        if self._console.is_terminal:
            self._live.start()

    def step(self, step: Step) -> None:
        """Log the step and move the bar."""
        self._log.write("step", **asdict(step))
        # The first step is no measure of the others: JAX compiles the model in it.
        measured = step.step > self._origin.step + 2
        self._averages = average(self._averages if measured else None, step)
        self._progress.update(self._progress.task_ids[0], completed=step.step)
        self._live.update(Group(Text(), self._progress, screen.draw_numbers(self._averages)))

    def evaluation(self, step: int, held_out_bits: float) -> None:
        """Log and print the held-out loss, and draw the curves so far."""
        assert self._averages is not None, "an evaluation follows a step"
        self._held_out_bits = held_out_bits
        self._log.write("eval", step=step, held_out_bits=held_out_bits)
        self._console.print(screen.draw_row(self._averages, held_out_bits))
        plot_loss(self._options.out)

    def finish(self, prompt: bytes, continuation: bytes) -> None:
        """Print the result and a sample, and say how to go on."""
        self._end(
            "finished",
            held_out_bits=self._held_out_bits,
            sample=screen.printable(prompt + continuation),
        )
        self._console.print(screen.draw_result(self._held_out_bits, self._baselines))
        self._console.print(screen.draw_sample(prompt, continuation))
        self._console.print(screen.draw_ending(self._options))

    def interrupted(self) -> None:
        """Draw the curves as far as they go, and say where they are.

        The end is logged last: a log without one tells quickstart.sh that curves may be missing.
        """
        plot_loss(self._options.out)
        self._end("interrupted")
        step = self._averages.step if self._averages else self._origin.step
        self._console.print(screen.draw_interruption(self._options, step))

    def _end(self, how: str, **fields: object) -> None:
        self._live.stop()
        self._log.write("end", how=how, **fields)
        self._log.close()


def average(old: Step | None, new: Step) -> Step:
    """Let the numbers of ``new`` that jump from step to step move slowly instead."""
    if old is None:
        return new

    def between(old_value: float, new_value: float) -> float:
        return KEPT_FRACTION * old_value + (1 - KEPT_FRACTION) * new_value

    return replace(
        new,
        train_bits=between(old.train_bits, new.train_bits),
        tokens_per_s=between(old.tokens_per_s, new.tokens_per_s),
        model_ms=between(old.model_ms, new.model_ms),
        optimizer_ms=between(old.optimizer_ms, new.optimizer_ms),
    )
