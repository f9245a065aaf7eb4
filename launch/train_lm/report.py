"""The report of a run, as the training loop sees it; only rank 0 loads what is used to draw it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train_lm.checkpoints import Origin
    from train_lm.corpus import Baselines, Corpus
    from train_lm.options import Options


@dataclass(frozen=True)
class Setting:
    """The machine and the model of a run; ``framework`` is empty for plain NumPy."""

    mpi_library: str
    num_ranks: int
    num_nodes: int
    framework: str
    params_numel: int
    rank_nbytes: int
    node_nbytes: int
    replicated_rank_nbytes: int
    replicated_node_nbytes: int


@dataclass(frozen=True)
class Step:
    """The numbers of one optimizer step; the loss is in bits per byte, averaged over ranks."""

    step: int
    train_bits: float
    lr: float
    grad_norm: float | None
    tokens_per_s: float
    model_ms: float
    optimizer_ms: float


def make_report(rank: int, options: Options) -> Report:
    """Return the report of a rank.

    Args:
        rank: Its number.
        options: The command line's.

    Raises:
        ValueError: The packages that draw it are not installed, or the folder for the results
            cannot be written.
    """
    if rank > 0:
        return Report()
    try:
        from train_lm.main_report import MainReport
    except ImportError as error:
        raise ValueError(
            f"matplotlib and rich must be installed; got: {error}. "
            "Install them: pip install '.[plot]'."
        ) from None
    return MainReport(options)


class Report:
    """A report that does nothing, for every rank but 0: the training loop need not know."""

    def start(self, setting: Setting, corpus: Corpus, baselines: Baselines, origin: Origin) -> None:
        """Report what is about to be trained."""

    def step(self, step: Step) -> None:
        """Report a step."""

    def evaluation(self, step: int, held_out_bits: float) -> None:
        """Report the loss on the held-out text."""

    def finish(self, prompt: bytes, continuation: bytes) -> None:
        """Report the result and a sample of the model's text."""

    def interrupted(self) -> None:
        """Report that the run was stopped before its end."""
