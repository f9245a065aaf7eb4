"""The appearance of a run in the terminal: plain values in, objects for rich out."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from train_lm import plot_loss, run_log
from train_lm.options import OPTIMIZERS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from train_lm.checkpoints import Origin
    from train_lm.corpus import Baselines, Corpus
    from train_lm.options import Options
    from train_lm.report import Setting, Step

MB = 1e6
BAR_WIDTH = 40
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
UNIFORM_BITS = 8.0
"""The loss of a model that knows nothing: eight bits per byte."""


def describe_model(setting: Setting, options: Options) -> str:
    """Describe the model's size."""
    return (
        f"{plural(options.layers, 'layer')} × {options.width} wide, "
        f"{setting.params_numel:,} parameters"
    )


def describe_framework(setting: Setting, options: Options) -> str:
    """Name framework and dtype; empty for plain NumPy, which needs no mention."""
    return setting.framework and f"{setting.framework}, {options.dtype}"


def describe_ranks(setting: Setting) -> str:
    """Name the MPI library and count the ranks."""
    return (
        f"{setting.mpi_library}, {plural(setting.num_ranks, 'rank')} "
        f"on {plural(setting.num_nodes, 'node')}"
    )


def draw_header(setting: Setting, corpus: Corpus, options: Options) -> RenderableType:
    """Draw a summary of the setting, before training starts."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_row("MPI", describe_ranks(setting))
    facts.add_row("model", describe_model(setting, options))
    if framework := describe_framework(setting, options):
        facts.add_row("", framework)
    facts.add_row("text", corpus.name)
    train_mb, held_out_mb = len(corpus.train) / MB, len(corpus.held_out) / MB
    facts.add_row("", f"{train_mb:.2f} MB to learn from, {held_out_mb:.2f} MB held out")
    optimizer = OPTIMIZERS[options.optimizer]
    title = Text(f"A language model, trained with sharded {optimizer}", style="bold")
    return Padding(
        Group(title, Text(), facts, Text(), draw_memory(setting, optimizer)), (1, 2), expand=False
    )


def draw_origin(origin: Origin) -> Text:
    """Describe the checkpoint from which the run resumes."""
    saved_by = plural(origin.num_ranks, "rank")
    return Text(f"  Resumed after step {origin.step:,} from {origin.path}, saved by {saved_by}.\n")


def draw_memory(setting: Setting, optimizer: str) -> Table:
    """Compare the memory of a sharded and a replicated optimizer in a table."""
    table = Table.grid(padding=(0, 3))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    head = Text("memory of parameters, gradients, moments", style="dim")
    table.add_row(head, Text("a rank", style="dim"), Text("a node", style="dim"))
    for name, rank_nbytes, node_nbytes in (
        ("shardopt", setting.rank_nbytes, setting.node_nbytes),
        (f"replicated {optimizer}", setting.replicated_rank_nbytes, setting.replicated_node_nbytes),
    ):
        table.add_row(name, f"{rank_nbytes / MB:.1f} MB", f"{node_nbytes / MB:.1f} MB")
    return table


COLUMNS = "     step    training    held out     tokens/s      model    optimizer"


def draw_row(step: Step, held_out_bits: float) -> Text:
    """Format one line under ``COLUMNS``."""
    return Text.assemble(
        f"{step.step:>9,}{step.train_bits:>12.3f}",
        (f"{held_out_bits:>12.3f}", "bold"),
        f"{step.tokens_per_s:>13,.0f}{step.model_ms:>8.0f} ms{step.optimizer_ms:>10.1f} ms",
    )


def make_progress(num_steps: int) -> Progress:
    """Make a progress bar for the whole run, with the remaining time."""
    progress = Progress(
        TextColumn("  "),
        BarColumn(bar_width=BAR_WIDTH),
        MofNCompleteColumn(),
        TextColumn("steps,"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )
    progress.add_task("", total=num_steps)
    return progress


def draw_numbers(step: Step) -> Text:
    """Format the current numbers, which stand under the bar."""
    return Text(
        f"   {step.train_bits:.2f} bits/byte · {step.tokens_per_s:,.0f} tokens/s"
        f" · model {step.model_ms:.0f} ms · optimizer {step.optimizer_ms:.1f} ms",
        style="dim",
    )


def draw_result(held_out_bits: float, baselines: Baselines) -> RenderableType:
    """Compare the model's bits per byte with those of counting, as bars."""
    table = Table.grid(padding=(0, 2))
    for name, bits, style in (
        ("unigram counts", baselines.unigram, "dim"),
        ("bigram counts", baselines.bigram, "dim"),
        ("this model", held_out_bits, "bold"),
    ):
        bar = ProgressBar(total=UNIFORM_BITS, completed=bits, width=BAR_WIDTH)
        table.add_row(Text(name, style=style), Text(f"{bits:.3f}", style=style), bar)
    difference = baselines.bigram - held_out_bits
    side = "below" if difference >= 0 else "above"
    verdict = Text.assemble(
        ("Held-out bits per byte", "bold"), f": {abs(difference):.2f} {side} the bigram model"
    )
    return Padding(Group(verdict, Text(), table), (1, 2), expand=False)


def draw_sample(prompt: bytes, continuation: bytes) -> RenderableType:
    """Frame a held-out prompt and the model's continuation."""
    text = Text.assemble((printable(prompt), "dim"), printable(continuation))
    return Padding(Panel(text, title="text by the model", title_align="left"), (0, 2), expand=False)


def printable(content: bytes) -> str:
    """Decode bytes for the terminal, without the control characters that it would obey."""
    return CONTROL_CHARACTERS.sub("�", content.decode("utf-8", errors="replace"))


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural where needed."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def draw_ending(options: Options) -> RenderableType:
    """List where the results are and how to continue."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    facts.add_row("curves", str(options.out / plot_loss.FILE_NAME))
    facts.add_row("log", str(options.out / run_log.FILE_NAME))
    if options.checkpoint:
        facts.add_row("checkpoints", str(options.checkpoint))
        more = f"--steps {2 * options.steps} --out {options.out}"
        facts.add_row("continue", f"run the same command with {more} to train this model further")
    else:
        more = f"--steps {4 * options.steps} --width {2 * options.width}"
        facts.add_row("continue", f"add {more}, or --text PATH for your own text")
    return Padding(facts, (1, 2), expand=False)


def draw_interruption(options: Options, step: int) -> RenderableType:
    """Describe what is left of a run that was stopped, and how to resume it."""
    text = f"Ended early. The log and the curves so far are in {options.out}."
    if options.checkpoint:
        text += (
            f"\nStep {step:,} is saved in {options.checkpoint}: the same command resumes from "
            f"there; with --out {options.out} it also extends the log and the curves."
        )
    return Padding(text, (1, 2), expand=False)
