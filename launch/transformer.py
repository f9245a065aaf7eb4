"""A byte-level, decoder-only transformer in plain NumPy, with its backward pass written by hand.

Pre-norm blocks, causal attention with rotary positions, a squared-ReLU MLP and an untied head.
Every layer is a ``forward`` that keeps what its ``backward`` needs, and a ``backward`` that writes
the weight's gradient and returns the input's.

[Note: gradients go straight into p.grad]  Each weight is used once a step, so ``backward`` writes
the gradient and never adds to an old one: the matrix product lands in the optimizer's gradient
memory, without a temporary and without a copy. Weights are read through ``p.data`` at every use,
because the optimizer moves them into memory that all ranks of the node share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from shardopt.numpy import Parameter

Array = NDArray[Any]

NUM_BYTES = 256
MLP_RATIO = 4
NORM_EPS = 1e-5
ROPE_BASE = 1000.0
TEMPERATURE = 0.7
"""Below 1, generated text keeps closer to what the model is sure of."""


@dataclass(frozen=True)
class Shape:
    """The sizes that make a transformer."""

    layers: int
    width: int
    heads: int
    context: int

    @property
    def head_width(self) -> int:
        """Width of one attention head, an even number."""
        return self.width // self.heads


class Linear:
    """``y = x @ w`` for x [tokens, fan_in] and w [fan_in, fan_out], which starts as ``init``."""

    def __init__(self, name: str, init: Array) -> None:
        self.weight = Parameter(init, name=name)

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
    """RMS normalization of the last axis, without a gain: the next weight can absorb one."""

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
    """Causal multi-head attention with rotary positions; the output weight starts at zero."""

    def __init__(self, name: str, shape: Shape, init: Initializer) -> None:
        self.shape = shape
        self.qkv = Linear(f"{name}.qkv.weight", init.normal(shape.width, 3 * shape.width))
        self.out = Linear(f"{name}.out.weight", init.zeros(shape.width, shape.width))
        self.phases = rotary_phases(shape.context, shape.head_width, init.dtype)
        # Added to the scores: -inf above the diagonal hides the future.
        self.mask = np.triu(np.full((shape.context, shape.context), -np.inf, init.dtype), k=1)

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
    """Two projections around ``relu(x)**2`` (So et al., 2021, Primer), cheaper than GELU.

    The output weight starts at zero.
    """

    def __init__(self, name: str, shape: Shape, init: Initializer) -> None:
        hidden = MLP_RATIO * shape.width
        self.up = Linear(f"{name}.up.weight", init.normal(shape.width, hidden))
        self.down = Linear(f"{name}.down.weight", init.zeros(hidden, shape.width))

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
    """``x += attention(norm(x)); x += mlp(norm(x))``, at first the identity."""

    def __init__(self, name: str, shape: Shape, init: Initializer) -> None:
        self.attention_norm, self.mlp_norm = Norm(), Norm()
        self.attention = Attention(f"{name}.attention", shape, init)
        self.mlp = Mlp(f"{name}.mlp", shape, init)

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
    """The model: bytes [batch, time] in, mean cross-entropy in nats a byte out.

    Args:
        shape: Its sizes.
        seed: Where its initial weights come from.
        dtype: Of weights and arithmetic; float64 is for gradient checks.
    """

    def __init__(self, shape: Shape, *, seed: int = 0, dtype: DTypeLike = np.float32) -> None:
        init = Initializer(seed, np.dtype(dtype))
        self.shape = shape
        self.embedding = Parameter(init.normal(NUM_BYTES, shape.width, std=0.1), "embedding.weight")
        self.blocks = [Block(f"blocks.{i}", shape, init) for i in range(shape.layers)]
        self.norm = Norm()
        self.head = Linear("head.weight", init.zeros(shape.width, NUM_BYTES))

    def parameters(self) -> list[Parameter]:
        """All weights, in the order of the forward pass."""
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
        """Return the mean cross-entropy of ``targets`` [batch, time], in nats a byte."""
        return self._cross_entropy(inputs, targets)[0]

    def loss_and_grads(self, inputs: Array, targets: Array) -> float:
        """Return the loss and write the gradient of every weight into its ``grad``."""
        loss, dlogits = self._cross_entropy(inputs, targets)
        dlogits[np.arange(dlogits.shape[0]), targets.ravel()] -= 1
        dlogits /= dlogits.shape[0]
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


@dataclass
class Initializer:
    """Draws initial weights, so that one seed gives one model."""

    seed: int
    dtype: np.dtype[Any]

    def __post_init__(self) -> None:
        self.generator = np.random.default_rng(self.seed)

    def normal(self, fan_in: int, fan_out: int, std: float | None = None) -> Array:
        """Draw [fan_in, fan_out]; by default such that outputs are about as large as inputs."""
        std = fan_in**-0.5 if std is None else std
        return (self.generator.standard_normal((fan_in, fan_out)) * std).astype(self.dtype)

    def zeros(self, fan_in: int, fan_out: int) -> Array:
        """Return zeros [fan_in, fan_out]."""
        return np.zeros((fan_in, fan_out), self.dtype)


def write_grad(weight: Parameter, x: Array, dy: Array) -> None:
    """Write ``x.T @ dy`` into the weight's gradient. [Note: gradients go straight into p.grad]."""
    assert weight.grad is not None, "opt.zero_grad() binds the gradients before backward"
    np.matmul(x.T, dy, out=weight.grad)


def softmax_inplace(scores: Array) -> Array:
    """Overwrite ``scores`` with their softmax over the last axis."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def rotary_phases(context: int, head_width: int, dtype: np.dtype[Any]) -> Array:
    """Return the rotations of queries and keys, complex [context, 2, 1, head_width / 2].

    A pair of numbers is one complex number, turned by an angle that grows with its position: the
    product of a query and a key then depends on their distance alone (Su et al., 2021, RoFormer).
    The queries' rotation carries the 1 / sqrt(head_width) of attention too.
    """
    frequencies = ROPE_BASE ** (-np.arange(0, head_width, 2) / head_width)
    rotations = np.exp(1j * np.outer(np.arange(context), frequencies))
    both = np.stack([rotations * head_width**-0.5, rotations], axis=1)[:, :, None, :]
    return both.astype(np.result_type(dtype, np.complex64))


def as_complex(pairs: Array) -> Array:
    """View real [..., 2n] as complex [..., n]."""
    return pairs.view(np.result_type(pairs.dtype, np.complex64))


def generate(
    model: Transformer, prompt: Array, num_bytes: int, generator: np.random.Generator
) -> Array:
    """Continue ``prompt`` [bytes], drawing each next byte as the model expects it.

    Returns:
        The new bytes, [num_bytes].
    """
    text = np.empty(len(prompt) + num_bytes, np.uint8)
    text[: len(prompt)] = prompt
    for end in range(len(prompt), len(text)):
        window = text[max(0, end - model.shape.context) : end]
        logits = model.logits(window[None])[-1].astype(np.float64)
        text[end] = generator.choice(NUM_BYTES, p=softmax_inplace(logits / TEMPERATURE))
    return text[len(prompt) :]
