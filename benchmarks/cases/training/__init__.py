"""Whole training of a small GPT in PyTorch, against DDP and FSDP2, each with torch's NAdam."""

from dataclasses import dataclass

from benchmarks.contenders.names import DDP, FSDP2, THROUGH_TORCH
from benchmarks.harness.case import Case, Claim, Quick, Ratio, Target, quotient
from benchmarks.harness.options import option

LAYERS, WIDTH, CONTEXT, BATCH = 6, 640, 128, 1
NUMEL = 29_818_880
"""Parameters of a model of these sizes."""

TRAINERS = (THROUGH_TORCH, DDP, FSDP2)
STEPS = "steps"
"""The setting of the steps in a round."""
DIFFERENCE = "largest difference of losses, relative"


def tokens_per_s(trainer: str) -> str:
    """Return the key of the tokens that a contender learns from in a second, on all ranks."""
    return f"{trainer}, tokens/s"


def held_out_bits(trainer: str) -> str:
    """Return the key of the curve of a contender's held-out loss, in bits per byte."""
    return f"{trainer}: held-out bits per byte"


def _faster(peer: str, target: Target | None = None) -> Ratio:
    name = f"tokens/s: {THROUGH_TORCH} / {peer}"
    return quotient(peer, THROUGH_TORCH, target, name=name, better="more")


@dataclass(frozen=True)
class Options:
    """The options of this case."""

    layers: int = option(LAYERS, "transformer blocks")
    width: int = option(WIDTH, "of the model, a multiple of 32")
    context: int = option(CONTEXT, "bytes the model sees at once")
    batch: int = option(BATCH, "sequences of a rank in a step")
    steps: int = option(4, "in a round of each contender")
    rounds: int = option(8, "samples of each contender, after one that warms up")
    learning_rate: float = option(5e-4, "of all contenders, constant")
    skip: tuple[str, ...] = option((), "peers left out", choices=TRAINERS[1:])


CASE = Case(
    name="training",
    package=__name__,
    measures="tokens/s and held-out loss of a small GPT, against DDP and FSDP2 with torch's NAdam",
    start="mpirun -n 2 python -m benchmarks training",
    options=Options,
    claim=Claim(NUMEL, min_ranks=2, settings={"context": CONTEXT, "batch": BATCH}),
    ratios=(_faster(DDP, Target(at_least=1.4)), _faster(FSDP2)),
    quick=Quick(
        ("--layers", "2", "--width", "64", "--steps", "2", "--rounds", "5"),
        ranks=2,
        modules=("torch", "threadpoolctl"),
    ),
)
