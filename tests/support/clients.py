"""What the tests of other people's trainers share: their imports, batches, and one whole process.

Each test trains a model over all ranks, each with its rows of every batch, and once more as one
process with ``torch.optim.NAdam`` on all rows.
"""

import importlib
import importlib.util
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from shardopt.torch import NAdam
from tests.support.errors import POLICY

torch.set_num_threads(1)

NUM_ROWS = 12  # of a batch over all ranks: a whole number on 1, 2, 3 and 4 ranks
NUM_STEPS = 6
MAX_GRAD_NORM = 0.1  # clips every step of the tests

SETTINGS = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "decoupled_weight_decay": True}
"""Of both optimizers. ``eps`` keeps the rounding of float32 from becoming steps of full size."""

TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
"""Of float32 losses and weights after a few steps, whose sums were taken in another order."""


def require(name):
    """Import a module of another project, whatever it warns of, or skip the test without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lend_operators()
        return pytest.importorskip(name, exc_type=ImportError)


def lend_operators():
    """Declare what torchvision misses where its compiled part cannot be loaded.

    timm needs torchvision, and others import it where it is. pip's wheel is built for torch with
    CUDA, and finds none of its operators beside a torch for CPUs. Nothing here calls them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            LENT.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


LENT = torch.library.Library("torchvision", "FRAGMENT")  # its end would take the operators away


def make_opt(params, comm, **settings):
    """The sharded optimizer under test."""
    return NAdam(params, comm=comm, **{"policy": POLICY, **SETTINGS, **settings})


def make_whole_opt(params, **settings):
    """The optimizer of one process."""
    return torch.optim.NAdam(params, **SETTINGS | settings)


def make_net(seed=0):
    """A small network, the same on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2)
        )


def batch(step):
    """Inputs and targets of all rows of one step."""
    rng = np.random.default_rng([7, step])
    inputs, targets = rng.standard_normal((NUM_ROWS, 6)), rng.standard_normal((NUM_ROWS, 2))
    return torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets, dtype=torch.float32)


def rows_of(comm):
    """The rows of every batch that are this rank's; all of them without ranks."""
    return slice(None) if comm is None else slice(comm.rank, None, comm.size)


def loss_of(model, step, rows=slice(None)):
    """The mean squared error on some rows of a batch."""
    inputs, targets = batch(step)
    return nn.functional.mse_loss(model(inputs[rows]), targets[rows])


def assert_same_weights(model, expected, **tolerance):
    """All parameters of two models must agree."""
    pairs = zip(model.named_parameters(), expected.named_parameters(), strict=True)
    for (name, one), (_, other) in pairs:
        torch.testing.assert_close(
            one.detach(),
            other.detach(),
            **tolerance or TOLERANCE,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_same_losses(comm, losses, expected):
    """Means of the ranks' losses must be those of one process."""
    np.testing.assert_allclose(np.mean(comm.allgather(losses), axis=0), expected, **TOLERANCE)
