"""The command line of ``train_lm.py``; standard library only, so that ``--help`` works anywhere.

Run as a script, it checks its arguments and prints the framework to install and the folder for the
results: ``quickstart.sh`` thus finds a mistake before it installs anything.
"""

from __future__ import annotations

import argparse
import platform
import typing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

HEAD_WIDTH = 32
"""Width of one attention head: the model's width is a whole number of heads."""
FRAMEWORKS = ("numpy", "torch", "jax", "lucid")
DTYPES = ("float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
OPTIMIZERS = {"nadam": "NAdam", "adamw": "AdamW", "adam": "Adam", "radam": "RAdam"}


@dataclass(frozen=True)
class Options:
    """The user's choices; the fields are named after the options."""

    steps: int
    layers: int
    width: int
    context: int
    batch: int
    optimizer: str
    lr: float
    seed: int
    framework: str
    dtype: str
    device: str
    text: Path | None
    out: Path
    checkpoint: Path | None
    save_every: int | None
    timeout: float


def parse_options(arguments: list[str] | None = None) -> Options:
    """Read the command line, or end the program with a message about the first mistake.

    Args:
        arguments: The words after the program's name; ``sys.argv`` when None.
    """
    parser = make_parser()
    options = Options(**vars(parser.parse_args(arguments)))
    for problem in find_problems(options):
        parser.error(problem)
    return options


def make_parser() -> argparse.ArgumentParser:
    """Describe the options; the defaults take about two minutes on two cores."""
    parser = argparse.ArgumentParser(
        prog="train_lm.py",
        description="Train a byte-level transformer, sharded over all ranks of an mpirun.",
        epilog="quickstart.sh starts it; by hand: mpirun -n 2 python launch/train_lm.py",
        allow_abbrev=False,  # quickstart.sh looks for --out
    )
    add_model_options(parser)
    add_run_options(parser)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that shape the model and its training."""
    add = parser.add_argument
    add("--steps", type=int, default=800, help="optimizer steps (%(default)s)")
    add("--layers", type=int, default=4, help="transformer blocks (%(default)s)")
    width_help = f"width of the model, a multiple of {HEAD_WIDTH} (%(default)s)"
    add("--width", type=int, default=128, help=width_help)
    add("--context", type=int, default=128, help="bytes the model sees at once (%(default)s)")
    add("--batch", type=int, default=8, help="sequences per rank and step (%(default)s)")
    optimizer_help = "optimizer (%(default)s)"
    add("--optimizer", choices=OPTIMIZERS, default="nadam", help=optimizer_help)
    add("--lr", type=float, default=2e-3, help="peak learning rate (%(default)s)")
    add("--seed", type=int, default=0, help="seed of all random numbers (%(default)s)")
    framework_help = "framework the model is written in (%(default)s)"
    add("--framework", choices=FRAMEWORKS, default="numpy", help=framework_help)
    dtype_help = "dtype of torch's weights; bfloat16 is slow on CPUs without it (%(default)s)"
    add("--dtype", choices=DTYPES, default="float32", help=dtype_help)
    device_help = "where torch's model is; auto is a GPU if there is one (%(default)s)"
    add("--device", choices=DEVICES, default="auto", help=device_help)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for input, output and other ranks."""
    add = parser.add_argument
    text_help = "file or folder to learn from (the source code of Python's standard library)"
    add("--text", type=Path, metavar="PATH", help=text_help)
    out_help = "folder for log and curves (runs/DATE_TIME)"
    add("--out", type=Path, metavar="DIR", default=default_folder(), help=out_help)
    checkpoint_help = (
        "folder for checkpoints; if it holds some, the run resumes from the newest, on any number "
        "of ranks, with its original sequences per step; --steps and --lr may change, the model, "
        "the seed and the text may not (no checkpoints)"
    )
    add("--checkpoint", type=Path, metavar="DIR", help=checkpoint_help)
    every_help = "steps between two checkpoints (a tenth of --steps)"
    add("--save-every", type=int, metavar="STEPS", help=every_help)
    timeout_help = "longest wait for another rank before the job ends and names it (%(default)g)"
    add("--timeout", type=float, metavar="SECONDS", default=300.0, help=timeout_help)


def default_folder() -> Path:
    """Return a new folder named after the time, so that no run overwrites another."""
    return Path("runs") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"


def find_problems(options: Options) -> list[str]:
    """Return one message for each mistake in ``options``."""
    problems = [
        f"--{name} must be at least {least}; got {value}. Choose a larger number."
        for name, value, least in (
            ("steps", options.steps, 1),
            ("layers", options.layers, 1),
            ("width", options.width, HEAD_WIDTH),
            ("context", options.context, 2),
            ("batch", options.batch, 1),
            ("seed", options.seed, 0),
            ("save-every", options.save_every, 1),
        )
        if value is not None and value < least
    ]
    if not options.timeout > 0:
        problems.append(f"--timeout must be > 0; got {options.timeout:g}. Leave it out for 300.")
    if options.width % HEAD_WIDTH:
        nearest = max(1, round(options.width / HEAD_WIDTH)) * HEAD_WIDTH
        problems.append(
            f"--width must be a multiple of {HEAD_WIDTH}; got {options.width}. Try {nearest}."
        )
    if not 0 < options.lr < 1:
        problems.append(f"--lr must be between 0 and 1; got {options.lr}. Try 0.004.")
    return problems + find_conflicts(options)


def find_conflicts(options: Options) -> list[str]:
    """Return one message for each pair of settings that cannot go together."""
    problems = []
    if options.save_every is not None and options.checkpoint is None:
        problems.append(
            f"--save-every must come with --checkpoint; got {options.save_every} alone. "
            "Add --checkpoint DIR."
        )
    if options.dtype != "float32" and options.framework != "torch":
        problems.append(
            f"--dtype must be float32 with --framework {options.framework}; got {options.dtype}. "
            "Add --framework torch, or leave --dtype out."
        )
    if options.device == "cuda" and options.framework != "torch":
        problems.append(
            f"--device must be cpu or auto with --framework {options.framework}; got cuda. "
            "Add --framework torch, or leave --device out."
        )
    if options.framework == "lucid" and not hasattr(typing, "override"):
        problems.append(
            "--framework lucid must run on Python 3.12 or later; got "
            f"{platform.python_version()}. Point quickstart.sh to one: PYTHON=/path/to/python3.12."
        )
    return problems


if __name__ == "__main__":
    options = parse_options()
    print(options.framework, options.out)
