"""Train the model piece by piece; see ``benchmarks.cases.loss``."""

import importlib
import json
import math
import statistics
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases.loss import (
    BFLOAT16,
    BFLOAT16_CODED,
    CASE,
    CODED,
    CONTENDERS,
    FLOAT32,
    NEAREST,
    Options,
    farthest,
    lowest,
)
from benchmarks.contenders.byte_model import make_model, next_byte_loss
from benchmarks.contenders.torch_env import load_torch
from benchmarks.harness.result import Result
from benchmarks.harness.timing import require_one_rank
from shardopt import ShardPolicy

CONTEXT, BATCH = 64, 8
LR = 2e-3
"""At the start; it falls linearly to 0: at a constant one seeds differ by more than contenders."""
HELD_OUT_ONE_IN, NUM_HELD_OUT = 10, 2048
_POLICIES: Mapping[str, dict[str, Any]] = {
    FLOAT32: {},
    CODED: {"optim_bits": 8},
    BFLOAT16: {"master_weights": False},
    BFLOAT16_CODED: {"optim_bits": 8, "master_weights": False},
    NEAREST: {},
}
_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Of Student's t for 95 %, two-sided, by the number of seeds."""


def measure(options: Options) -> Iterator[Result]:
    """Do the pieces that are missing, and sum up once all are there.

    Raises:
        RuntimeError: PyTorch is missing.
    """
    require_one_rank(CASE.name)
    torch = load_torch(1)
    if torch is None:
        raise RuntimeError(f"{CASE.name} must have torch; got none. Install it, as README.md says.")
    path, text = Path(options.pieces), _read_text()
    wanted = [(seed, name) for name in CONTENDERS for seed in options.seeds]
    done = _read_pieces(path, options)
    for seed, name in [each for each in wanted if each not in done][: options.at_most]:
        done[seed, name] = loss = train(torch, text, options, seed, name)
        line = {"steps": options.steps, "width": options.width, "seed": seed, "contender": name}
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "held_out": loss}) + "\n")
        print(f"seed {seed}, {name}: {loss:.4f}", flush=True)
    if all(each in done for each in wanted):
        numel = sum(p.numel() for p in make_model(torch, options.width, 0).parameters())
        yield Result(
            case=CASE.name,
            title=f"held-out loss after {options.steps} steps, seeds {options.seeds}",
            ranks=1,
            threads=1,
            dtype="float32",
            numel=numel,
            figures=summarise(done, options.seeds),
            settings={"steps": options.steps, "seeds": list(options.seeds)},
        )


def summarise(losses: Mapping[tuple[int, str], float], seeds: Sequence[int]) -> dict[str, float]:
    """Return mean losses, and intervals of the differences to float32, paired by seed."""
    figures = {}
    for name in CONTENDERS:
        own = [losses[seed, name] for seed in seeds]
        figures[f"{name}: mean"] = statistics.fmean(own)
        if name == FLOAT32:
            continue
        differences = [loss - losses[seed, FLOAT32] for loss, seed in zip(own, seeds, strict=True)]
        mean, half = statistics.fmean(differences), math.inf
        if len(seeds) in _QUANTILES:
            half = _QUANTILES[len(seeds)] * statistics.stdev(differences) / math.sqrt(len(seeds))
        figures[f"{name} - {FLOAT32}: mean"] = mean
        figures[lowest(name)] = mean - half
        figures[farthest(name)] = abs(mean) + half
    return {key: value for key, value in figures.items() if math.isfinite(value)}


def train(torch: Any, text: tuple[Any, Any], options: Options, seed: int, name: str) -> float:
    """Train one contender, and return its loss on held-out text."""
    model = make_model(torch, options.width, seed)
    if name not in (FLOAT32, CODED):
        model.to(torch.bfloat16)
    generator = np.random.default_rng(seed)
    face: Any = importlib.import_module("shardopt.torch")  # torch may be missing
    with face.NAdam(model, lr=LR, policy=ShardPolicy(seed=seed, **_POLICIES[name])) as opt:
        for step in range(options.steps):
            opt.param_groups[0]["lr"] = LR * (1 - step / options.steps)
            opt.zero_grad()
            _loss(torch, model, _draw(text[0], generator, BATCH)).backward()
            opt.step()
            if name == NEAREST:
                for param, entry in opt.state.items():
                    entry["master"].copy_(param.detach())
    held_out = _draw(text[1], np.random.default_rng(1234), NUM_HELD_OUT)
    with torch.no_grad():
        parts = np.array_split(held_out, 64)
        losses = [float(_loss(torch, model, part)) for part in parts]
    return statistics.fmean(losses)


def _loss(torch: Any, model: Any, sequences: Any) -> Any:
    """Return the loss of some sequences, computed in float32 with weights as they are kept."""
    weights = {name: param.float() for name, param in model.named_parameters()}
    return next_byte_loss(torch, partial(torch.func.functional_call, model, weights), sequences)


def _draw(text: Any, generator: np.random.Generator, count: int) -> Any:
    starts = generator.integers(0, len(text) - CONTEXT - 1, count)
    return np.stack([text[start : start + CONTEXT + 1] for start in starts]).astype(np.int64)


def _read_text() -> tuple[Any, Any]:
    """Return the modules of Python's library as bytes: those to learn from, and the others."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    held_out = b"".join(files[::HELD_OUT_ONE_IN])
    del files[::HELD_OUT_ONE_IN]
    return np.frombuffer(b"".join(files), np.uint8), np.frombuffer(held_out, np.uint8)


def _read_pieces(path: Path, options: Options) -> dict[tuple[int, str], float]:
    found = {}
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if (line["steps"], line["width"]) == (options.steps, options.width):
                found[line["seed"], line["contender"]] = line["held_out"]
    return found
