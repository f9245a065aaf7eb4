"""The report of a run, made by rank 0: screen, log and plot."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from train_lm import screen
from train_lm.plot_loss import plot_loss
from train_lm.report import Report
from train_lm.run_log import RunLog

if TYPE_CHECKING:
    from train_lm.checkpoints import Origin
    from train_lm.corpus import Baselines, Corpus
    from train_lm.options import Options
    from train_lm.report import Setting, Step

KEPT_FRACTION = 0.95
"""The weight of the old value in the moving averages on the screen."""
REFRESHES_PER_SECOND = 4


class MainReport(Report):
    """Rank 0's report: first ``start``, then steps and evaluations, then one of the two ends.

    Args:
        options: The command line's.

    Raises:
        ValueError: The folder for the results cannot be written.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._log = RunLog(options.out)
        self._console = Console(highlight=False)
        self._progress = screen.make_progress(options.steps)
        self._live = Live(
            console=self._console, refresh_per_second=REFRESHES_PER_SECOND, transient=True
        )

    def start(self, setting: Setting, corpus: Corpus, baselines: Baselines, origin: Origin) -> None:
        """Log the setting, print the header and show the progress bar."""
        self._baselines = baselines
        self._origin = origin
        self._averages: Step | None = None
        self._held_out_bits = screen.UNIFORM_BITS
        self._log_start(setting, corpus)
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
        # The first step stays out of the averages: JAX compiles the model in it.
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
        """Print the result, a sample, and how to continue."""
        self._end(
            "finished",
            held_out_bits=self._held_out_bits,
            sample=screen.printable(prompt + continuation),
        )
        self._console.print(screen.draw_result(self._held_out_bits, self._baselines))
        self._console.print(screen.draw_sample(prompt, continuation))
        self._console.print(screen.draw_ending(self._options))

    def interrupted(self) -> None:
        """Draw the curves so far, and print where they are.

        The end is logged last: without it in the log, quickstart.sh draws the curves itself.
        """
        plot_loss(self._options.out)
        self._end("interrupted")
        step = self._averages.step if self._averages else self._origin.step
        self._console.print(screen.draw_interruption(self._options, step))

    def _log_start(self, setting: Setting, corpus: Corpus) -> None:
        parts = (
            screen.describe_model(setting, self._options),
            screen.describe_framework(setting, self._options),
            screen.describe_ranks(setting),
        )
        self._log.begin(self._origin.run, self._origin.step)
        self._log.write(
            "start",
            run=self._origin.run,
            step=self._origin.step,
            caption=" · ".join(part for part in parts if part),
            text=corpus.name,
            unigram_bits=self._baselines.unigram,
            bigram_bits=self._baselines.bigram,
            options={name: str(value) for name, value in asdict(self._options).items()},
            **asdict(setting),
        )

    def _end(self, how: str, **fields: object) -> None:
        self._live.stop()
        self._log.write("end", how=how, **fields)
        self._log.close()


def average(old: Step | None, new: Step) -> Step:
    """Return ``new`` with moving averages in the place of the numbers that jump between steps."""
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
