"""The transformer in plain NumPy, with its backward pass written by hand.

Every layer has a ``forward``, which keeps what ``backward`` needs, and a ``backward``, which writes
the gradient of the weight and returns that of the input.

[Note: gradients go straight into p.grad]
Each weight is used once per step, so ``backward`` writes the gradient and never adds to an old one:
the matrix product lands in the optimizer's gradient memory without a temporary or a copy. Weights
are read through ``p.data`` at every use, because the optimizer moves them into memory that all
ranks of the node share.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import shardopt.numpy
from shardopt.numpy import Parameter
from train_lm.models import base
from train_lm.models.base import NORM_EPS, Array, Shape, Weights, rotary_angles, softmax_inplace


class Learner(base.Learner):
    """The model in NumPy; see ``base.Learner``."""

    optimizers = shardopt.numpy

    def _build(self, weights: Weights, dtype: str, device: str) -> Any:
        self.model = Transformer(self.shape, {n: w.astype(dtype) for n, w in weights.items()})
        return self.model.parameters()

    def logits(self, inputs: Array) -> Array:
        """Run the model forward."""
        return self.model.logits(inputs)

    def loss(self, inputs: Array, targets: Array) -> float:
        """Run the model forward."""
        return self.model.loss(inputs, targets)

    def loss_and_grads(self, inputs: Array, targets: Array, weight: float = 1.0) -> float:
        """Run forward and backward; the gradients are in ``p.grad``."""
        self.opt.zero_grad()
        return self.model.loss_and_grads(inputs, targets, weight)


class Linear:
    """``y = x @ w`` for x [tokens, fan_in] and w [fan_in, fan_out]."""

    def __init__(self, name: str, weights: Weights) -> None:
        self.weight = Parameter(weights[f"{name}.weight"], f"{name}.weight")

    def forward(self, x: Array) -> Array:
        """Return ``x @ w`` [tokens, fan_out]."""
        self.x = x
        y: Array = x @ self.weight.data
        return y

    def backward(self, dy: Array) -> Array:
        """Write dw and return dx, given ``dy`` [tokens, fan_out]."""
        write_grad(self.weight, self.x, dy)
        dx: Array = dy @ self.weight.data.T
        return dx


class Norm:
    """RMS normalization of the last axis."""

    def forward(self, x: Array) -> Array:
        """Return ``x / rms(x)``."""
        mean_square = np.einsum("nd,nd->n", x, x) / x.shape[-1]
        self.scale = 1 / np.sqrt(mean_square + NORM_EPS)[:, None]
        y: Array = x * self.scale
        self.y = y
        return y

    def backward(self, dy: Array) -> Array:
        """Return ``scale * (dy - y * mean(dy * y))``."""
        mean = np.einsum("nd,nd->n", dy, self.y) / dy.shape[-1]
        dx: Array = self.y * -mean[:, None]
        dx += dy
        dx *= self.scale
        return dx


class Attention:
    """Causal multi-head attention with rotary positions."""

    def __init__(self, name: str, shape: Shape, weights: Weights) -> None:
        self.shape = shape
        self.qkv = Linear(f"{name}.qkv", weights)
        self.out = Linear(f"{name}.out", weights)
        dtype = self.qkv.weight.data.dtype
        self.phases = rotary_phases(shape.context, shape.head_width, dtype)
        # Added to the scores: -inf above the diagonal hides the future.
        self.mask = np.triu(np.full((shape.context, shape.context), -np.inf, dtype), k=1)

    def forward(self, x: Array, batch: int) -> Array:
        """Mix each position of ``x`` [batch * time, width] with the positions before it."""
        qkv = self._split_heads(self.qkv.forward(x), batch)
        time = qkv.shape[1]
        as_complex(qkv[:, :, :2])[...] *= self.phases[:time]
        self.q, self.k, self.v = qkv.transpose(2, 0, 3, 1, 4)

        scores = self.q @ self.k.swapaxes(-1, -2)
        scores += self.mask[:time, :time]
        self.attention = softmax_inplace(scores)

        mixed = np.empty((batch, time, self.shape.heads, self.shape.head_width), x.dtype)
        np.matmul(self.attention, self.v, out=mixed.swapaxes(1, 2))
        return self.out.forward(mixed.reshape(x.shape))

    def backward(self, dy: Array, batch: int) -> Array:
        """Return dx, given ``dy`` [batch * time, width]."""
        shape = self.shape
        dmixed = self.out.backward(dy).reshape(batch, -1, shape.heads, shape.head_width)
        dmixed = dmixed.swapaxes(1, 2)
        dqkv_flat = np.empty((len(dy), 3 * shape.width), dy.dtype)
        dqkv = self._split_heads(dqkv_flat, batch)
        dq, dk, dv = dqkv.transpose(2, 0, 3, 1, 4)

        np.matmul(self.attention.swapaxes(-1, -2), dmixed, out=dv)
        dscores = dmixed @ self.v.swapaxes(-1, -2)
        dscores -= np.einsum("bhqk,bhqk->bhq", dscores, self.attention)[..., None]
        dscores *= self.attention
        np.matmul(dscores, self.k, out=dq)
        np.matmul(dscores.swapaxes(-1, -2), self.q, out=dk)

        as_complex(dqkv[:, :, :2])[...] *= self.phases[: dqkv.shape[1]].conj()
        return self.qkv.backward(dqkv_flat)

    def _split_heads(self, flat: Array, batch: int) -> Array:
        """View [batch * time, 3 * width] as [batch, time, 3, heads, head_width]."""
        return flat.reshape(batch, -1, 3, self.shape.heads, self.shape.head_width)


class Mlp:
    """Two projections around ``relu(x)**2``, cheaper than GELU."""

    def __init__(self, name: str, weights: Weights) -> None:
        self.up = Linear(f"{name}.up", weights)
        self.down = Linear(f"{name}.down", weights)

    def forward(self, x: Array) -> Array:
        """Return ``relu(x @ up)**2 @ down`` [tokens, width]."""
        hidden = self.up.forward(x)
        self.relu = np.maximum(hidden, 0, out=hidden)
        return self.down.forward(np.square(self.relu))

    def backward(self, dy: Array) -> Array:
        """Return dx, given ``dy`` [tokens, width]."""
        dhidden = self.down.backward(dy)
        dhidden *= self.relu
        dhidden *= 2
        return self.up.backward(dhidden)


class Block:
    """``x += attention(norm(x)); x += mlp(norm(x))``."""

    def __init__(self, name: str, shape: Shape, weights: Weights) -> None:
        self.attention_norm, self.mlp_norm = Norm(), Norm()
        self.attention = Attention(f"{name}.attention", shape, weights)
        self.mlp = Mlp(f"{name}.mlp", weights)

    def forward(self, x: Array, batch: int) -> Array:
        """Return the block's output [batch * time, width]; ``x`` is overwritten."""
        x += self.attention.forward(self.attention_norm.forward(x), batch)
        x += self.mlp.forward(self.mlp_norm.forward(x))
        return x

    def backward(self, dx: Array, batch: int) -> Array:
        """Return the input's gradient; ``dx`` is overwritten."""
        dx += self.mlp_norm.backward(self.mlp.backward(dx))
        dx += self.attention_norm.backward(self.attention.backward(dx, batch))
        return dx


class Transformer:
    """The model: bytes [batch, time] in, mean cross-entropy in nats per byte out.

    Args:
        shape: The sizes.
        weights: The first weights; all arithmetic is in their dtype, float64 for gradient checks.
    """

    def __init__(self, shape: Shape, weights: Weights) -> None:
        self.shape = shape
        self.embedding = Parameter(weights["embedding.weight"], "embedding.weight")
        self.blocks = [Block(f"blocks.{i}", shape, weights) for i in range(shape.layers)]
        self.norm = Norm()
        self.head = Linear("head", weights)

    def parameters(self) -> list[Parameter]:
        """Return all weights, in the order of the forward pass."""
        weights = [self.embedding]
        for block in self.blocks:
            attention, mlp = block.attention, block.mlp
            weights += [layer.weight for layer in (attention.qkv, attention.out, mlp.up, mlp.down)]
        return [*weights, self.head.weight]

    def logits(self, inputs: Array) -> Array:
        """Score the byte after each of ``inputs`` [batch, time]; returns [batch * time, 256]."""
        batch = len(inputs)
        x = self.embedding.data[inputs.ravel()]
        for block in self.blocks:
            x = block.forward(x, batch)
        return self.head.forward(self.norm.forward(x))

    def loss(self, inputs: Array, targets: Array) -> float:
        """Return the mean cross-entropy of ``targets`` [batch, time], in nats per byte."""
        return self._cross_entropy(inputs, targets)[0]

    def loss_and_grads(self, inputs: Array, targets: Array, weight: float = 1.0) -> float:
        """Return the loss and write the gradient of every weight, times ``weight``, to ``grad``."""
        loss, dlogits = self._cross_entropy(inputs, targets)
        dlogits[np.arange(dlogits.shape[0]), targets.ravel()] -= 1
        dlogits /= dlogits.shape[0] / weight
        dx = self.norm.backward(self.head.backward(dlogits))
        for block in reversed(self.blocks):
            dx = block.backward(dx, len(inputs))
        one_hot = np.zeros_like(dlogits)
        one_hot[np.arange(len(one_hot)), inputs.ravel()] = 1
        write_grad(self.embedding, one_hot, dx)
        return loss

    def _cross_entropy(self, inputs: Array, targets: Array) -> tuple[float, Array]:
        """Return the loss and the predicted probabilities [batch * time, 256]."""
        probabilities = softmax_inplace(self.logits(inputs))
        of_target = probabilities[np.arange(len(probabilities)), targets.ravel()]
        tiny = np.finfo(probabilities.dtype).tiny
        return float(-np.log(np.maximum(of_target, tiny)).mean()), probabilities


def write_grad(weight: Parameter, x: Array, dy: Array) -> None:
    """Write ``x.T @ dy`` into the weight's gradient. [Note: gradients go straight into p.grad]."""
    assert weight.grad is not None, "opt.zero_grad() binds the gradients before backward"
    np.matmul(x.T, dy, out=weight.grad)


def rotary_phases(context: int, head_width: int, dtype: np.dtype[Any]) -> Array:
    """Return the rotations of queries and keys, complex [context, 2, 1, head_width / 2].

    A pair of numbers is one complex number. The rotation of the queries includes attention's
    factor of 1 / sqrt(head_width).
    """
    rotations = np.exp(1j * rotary_angles(context, head_width))
    both = np.stack([rotations * head_width**-0.5, rotations], axis=1)[:, :, None, :]
    return both.astype(np.result_type(dtype, np.complex64))


def as_complex(pairs: Array) -> Array:
    """View real [..., 2n] as complex [..., n]."""
    return pairs.view(np.result_type(pairs.dtype, np.complex64))
