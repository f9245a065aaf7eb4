"""Loss curves: a run on any number of ranks is the run of one process with the whole batch."""

import functools
import math

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from shardopt.policy import ShardPolicy
from shardopt.torch import NAdam

pytestmark = pytest.mark.mpi

NUM_STEPS = 100
NUM_ROWS = 12  # of the global batch: a whole number on 1, 2, 3 and 4 ranks
WIDTH, NUM_HEADS, LENGTH, NUM_TOKENS = 16, 2, 6, 11


class Transformer(nn.Module):
    """One block that reads a row of tokens and says the next."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.tokens = nn.Embedding(NUM_TOKENS, WIDTH)
            self.places = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
            self.block = nn.TransformerEncoderLayer(
                WIDTH, NUM_HEADS, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            self.norm = nn.LayerNorm(WIDTH)
            self.head = nn.Linear(WIDTH, NUM_TOKENS)

    def forward(self, tokens):
        mask = torch.full((LENGTH, LENGTH), -math.inf, dtype=self.places.dtype).triu(1)
        hidden = self.block(self.tokens(tokens) + self.places, src_mask=mask)
        return self.head(self.norm(hidden))


def batch(step):
    """Rows that count up by a stride of their own, some with a mistake."""
    rng = np.random.default_rng(step)
    start, stride = rng.integers(0, NUM_TOKENS, (NUM_ROWS, 1)), rng.integers(1, 4, (NUM_ROWS, 1))
    rows = (start + stride * np.arange(LENGTH + 1)) % NUM_TOKENS
    rows[:, -1] += rng.random(NUM_ROWS) < 0.1
    return torch.from_numpy(rows % NUM_TOKENS)


def curve(dtype, make_opt, rows=slice(None), num_steps=NUM_STEPS, clip=None):
    """Losses before each step of a run under a schedule.

    Args:
        dtype: Of the parameters.
        make_opt: Makes the optimizer from parameters and settings.
        rows: Which rows of each batch to train on.
        num_steps: Number of steps.
        clip: Called with the parameters before each step.
    """
    model = Transformer().to(dtype)
    opt = make_opt(model.parameters(), lr=3e-3, weight_decay=0.01, decoupled_weight_decay=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=3e-3, total_steps=NUM_STEPS + 1)
    losses = []
    for step in range(num_steps):
        opt.zero_grad()
        tokens = batch(step)[rows]
        logits = model(tokens[:, :-1]).flatten(0, 1)
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        loss.backward()
        if clip is not None:
            clip(model.parameters())
        opt.step()
        schedule.step()
        losses.append(loss.item())
    if isinstance(opt, NAdam):
        opt.close()
    return np.array(losses)


def sharded_curve(comm, dtype, num_steps=NUM_STEPS, **settings):
    """The same over ranks, each with its part of the batch: losses of the whole batch."""
    policy = ShardPolicy(timeout_s=20, bucket_nbytes=4096)
    make_opt = functools.partial(NAdam, comm=comm, policy=policy, **settings)
    each = NUM_ROWS // comm.size
    rows = slice(comm.rank * each, (comm.rank + 1) * each)
    return np.mean(comm.allgather(curve(dtype, make_opt, rows, num_steps)), axis=0)


@pytest.fixture(scope="module")
def whole_curve():
    """The curve of one process with torch.optim.NAdam, by dtype."""
    return functools.cache(lambda dtype: curve(dtype, torch.optim.NAdam))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_the_loss_is_that_of_one_process(comm, whole_curve, dtype, rtol):
    expected = whole_curve(dtype)
    np.testing.assert_allclose(sharded_curve(comm, dtype), expected, rtol=rtol)
    assert expected[-10:].mean() < 0.6 * expected[:10].mean()  # it learns


def test_max_grad_norm_clips_as_torch_does(comm):
    clip = functools.partial(nn.utils.clip_grad_norm_, max_norm=0.05)
    losses = sharded_curve(comm, torch.float64, 20, max_grad_norm=0.05)
    expected = curve(torch.float64, torch.optim.NAdam, num_steps=20, clip=clip)
    np.testing.assert_allclose(losses, expected, rtol=1e-10)
    unclipped = curve(torch.float64, torch.optim.NAdam, num_steps=20)
    assert np.abs(losses / unclipped - 1).max() > 1e-5  # Adam hardly minds


# -- sixteen bits ----------------------------------------------------------------------------------


def test_bfloat16_with_a_master_learns_as_float32_does(comm, whole_curve):
    expected = whole_curve(torch.float32)[-20:].mean()
    assert sharded_curve(comm, torch.bfloat16)[-20:].mean() == pytest.approx(expected, rel=0.01)
