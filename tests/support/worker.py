"""A job that steps steadily and saves now and then, for tests that take something away from it."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from mpi4py import MPI

from shardopt import ShardPolicy
from shardopt.checkpoint import Checkpointer

SHAPES = {"weight": (300, 500), "bias": (500,), "head": (500, 40)}
SAVE_EVERY = 10
PREPARATION_S = 60


def make_numpy(policy):
    """Give the optimizer, and a function that computes gradients."""
    from shardopt.numpy import NAdam, Parameter

    params = [Parameter(np.ones(shape, np.float32), name) for name, shape in SHAPES.items()]
    opt = NAdam(params, policy=policy)

    def differentiate(step):
        opt.zero_grad()
        for param in params:
            param.grad[...] = np.sin(step + param.data)

    return opt, differentiate


def make_torch(policy):
    """Likewise; gradients set out while backward still runs."""
    import torch

    from shardopt.torch import NAdam

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(300, 500), torch.nn.Linear(500, 40))
    opt = NAdam(model.named_parameters(), policy=policy)

    def differentiate(step):
        opt.zero_grad()
        inputs = torch.full((4, 300), 1.0 / step)
        model(inputs).square().mean().backward()

    return opt, differentiate


def write_down(directory, hook):
    """Let a rank's last words also be in a file: what it prints may not reach mpirun."""

    def write(kind, error, traceback):
        words = directory / f"last-words-{MPI.COMM_WORLD.rank}"
        words.write_text(f"{kind.__name__}: {error}")
        hook(kind, error, traceback)

    return write


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--framework", choices=["numpy", "torch"], default="numpy")
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--timeout-s", type=float, default=30.0)
    options = parser.parse_args()
    here = MPI.COMM_WORLD.rank == 0
    sys.excepthook = write_down(options.directory, sys.excepthook)
    policy = ShardPolicy(timeout_s=options.timeout_s, bucket_nbytes=100_000)
    make = {"numpy": make_numpy, "torch": make_torch}[options.framework]
    # Slow imports and kernels that are compiled take nothing off the time allowed.
    make(replace(policy, timeout_s=PREPARATION_S))[0].close()
    opt, differentiate = make(policy)
    with opt, Checkpointer(options.directory) as checkpointer:
        restored = checkpointer.restore(opt)
        first = restored.step if restored else 0
        if here:
            print(f"from step {first}", flush=True)
        for step in range(first + 1, first + options.steps + 1):
            differentiate(step)
            opt.step()
            if step % SAVE_EVERY == 0:
                checkpointer.save(step, opt)
        checkpointer.wait()
    if here:
        print(f"to step {step}", flush=True)


if __name__ == "__main__":
    main()
