"""The transformer in lucid, with workarounds for some defects of its version 2.9.

- A sum is written ``f(x) + x`` and not ``x + f(x)``. With the latter, backward visits ``x`` twice,
  and the gradients are wrong, or backward fails.
- The gradient of indexing, and so of ``nn.Embedding``, counts a byte once, however often it occurs.
- ``mean(axis)`` and ``is_causal`` compute in float64, whatever the inputs are.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import lucid
import lucid.nn as nn
import lucid.nn.functional as F
import numpy as np
from lucid import Tensor

import shardopt.lucid
from train_lm.models import base
from train_lm.models.base import (
    MLP_RATIO,
    NORM_EPS,
    NUM_BYTES,
    Array,
    Shape,
    Weights,
    out_by_in,
    rotary_angles,
)

SMALLEST_PROBABILITY = 1e-30
"""Keeps the logarithm finite; lucid's own 1e-7 would change the loss."""


class Learner(base.Learner):
    """The model in lucid; see ``base.Learner``."""

    optimizers = shardopt.lucid
    framework = f"lucid {version('lucid-dl')}"

    def _build(self, weights: Weights, dtype: str, device: str) -> Any:
        with np.errstate(all="ignore"):  # nn.Linear converts uninitialised memory
            self.model = Transformer(self.shape)
        self.model.load_state_dict({n: w.astype(dtype) for n, w in out_by_in(weights).items()})
        return self.model.state_dict(keep_vars=True).items()

    def logits(self, inputs: Array) -> Array:
        """Run the model forward."""
        with lucid.no_grad():
            logits: Array = self.model(inputs).data
        return logits

    def loss(self, inputs: Array, targets: Array) -> float:
        """Run the model forward."""
        with lucid.no_grad():
            return self._loss(inputs, targets).item()

    def loss_and_grads(self, inputs: Array, targets: Array, weight: float = 1.0) -> float:
        """Run forward and backward; the gradients are in ``p.grad``."""
        self.opt.zero_grad()
        loss = self._loss(inputs, targets)
        (weight * loss).backward()
        return loss.item()

    def _loss(self, inputs: Array, targets: Array) -> Tensor:
        targets = Tensor(targets.ravel().astype(np.int64))
        return F.cross_entropy(self.model(inputs), targets, eps=SMALLEST_PROBABILITY)


class Transformer(nn.Module):
    """Bytes [batch, time] in, logits [batch * time, 256] out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_BYTES, shape.width)
        self.blocks = nn.ModuleList([Block(shape) for _ in range(shape.layers)])
        self.head = nn.Linear(shape.width, NUM_BYTES, bias=False)

    def forward(self, tokens: Array) -> Tensor:
        """Score the byte after each of ``tokens``."""
        one_hot = np.eye(NUM_BYTES, dtype=self.embedding.weight.data.dtype)[tokens.ravel()]
        x = Tensor(one_hot) @ self.embedding.weight
        for block in self.blocks:
            x = block(x, len(tokens))
        return self.head(norm(x))


class Block(nn.Module):
    """Attention and an MLP, each added to its input."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, batch: int) -> Tensor:
        """Transform ``x`` [batch * time, width]."""
        x = self.attention(norm(x), batch) + x
        return self.mlp(norm(x)) + x


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, batch: int) -> Tensor:
        """Mix each position of ``x`` [batch * time, width] with the positions before it."""
        shape = self.shape
        split = self.qkv(x).reshape(batch, -1, 3, shape.heads, shape.head_width)
        q, k, v = split.transpose((2, 0, 3, 1, 4)).unbind()  # each [batch, heads, time, head_width]
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, causal_mask(q))
        return self.out(mixed.swapaxes(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    """Two projections around ``relu(x)**2``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, MLP_RATIO * shape.width, bias=False)
        self.down = nn.Linear(MLP_RATIO * shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position by itself."""
        return self.down(lucid.square(F.relu(self.up(x))))


def norm(x: Tensor) -> Tensor:
    """Divide by the root mean square of the last axis."""
    mean_square = lucid.square(x).sum(axis=-1, keepdims=True) / x.shape[-1]
    return lucid.reciprocal(lucid.sqrt(mean_square + NORM_EPS)) * x


def rotate(x: Tensor) -> Tensor:
    """Rotate each pair of ``x`` [batch, heads, time, head_width] by its position's angle."""
    time, head_width = x.shape[-2:]
    angles = rotary_angles(time, head_width).repeat(2, axis=-1)
    cos, sin = (Tensor(f(angles).astype(x.data.dtype)) for f in (np.cos, np.sin))
    # (a, b) becomes (-b, a): a rotation by a quarter turn
    turn = np.kron(np.eye(head_width // 2), [[0, 1], [-1, 0]]).astype(x.data.dtype)
    return x * cos + (x @ Tensor(turn)) * sin


def causal_mask(x: Tensor) -> Tensor:
    """Return the mask to add to the scores, [time, time]: -inf in the future, else zero."""
    time = x.shape[-2]
    return Tensor(np.triu(np.full((time, time), -np.inf, x.data.dtype), k=1))
