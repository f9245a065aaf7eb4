"""What the models of all frameworks share: sizes, the same first weights, and what may be asked.

The model is a byte-level, decoder-only transformer: pre-norm blocks, causal attention with rotary
positions, a squared-ReLU MLP (So et al., 2021, Primer) and an untied head. Norms have no gain,
because the weight that follows can absorb one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from threadpoolctl import threadpool_limits

Array = NDArray[Any]
Weights = dict[str, Array]

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


class Learner(ABC):
    """A model and the optimizer that trains it, as the training loop sees them.

    Bytes go in as NumPy arrays [batch, time]; losses are means, in nats a byte.

    Args:
        shape: The model's sizes.
        weights: Its first weights, as from ``initial_weights``.
        dtype: Of weights and gradients.
        **settings: Arguments for the framework's NAdam.

    Attributes:
        shape: As given.
        opt: The framework's NAdam: construction is collective.
        framework: Its name and version, for the header; empty for plain NumPy.
    """

    shape: Shape
    opt: Any
    framework = ""

    @abstractmethod
    def __init__(
        self, shape: Shape, weights: Weights, dtype: str = "float32", **settings: Any
    ) -> None: ...

    @staticmethod
    def limit_threads(count: int) -> None:
        """Let each operation of this process run on ``count`` cores; before the first of them."""
        threadpool_limits(count)

    @abstractmethod
    def logits(self, inputs: Array) -> Array:
        """Score the byte after each of ``inputs``; returns [batch * time, 256]."""

    @abstractmethod
    def loss(self, inputs: Array, targets: Array) -> float:
        """Return the cross-entropy of ``targets``."""

    @abstractmethod
    def loss_and_grads(self, inputs: Array, targets: Array, weight: float = 1.0) -> float:
        """Return the loss and leave this rank's gradients where ``step`` finds them.

        Args:
            inputs: Bytes.
            targets: The byte after each of them.
            weight: What gradients are multiplied by, but not the loss: more than 1 on a rank that
                has more sequences than others.
        """

    def take_loaded(self) -> None:  # noqa: B027  # not abstract
        """Take over the weights of a checkpoint that was loaded into ``opt``.

        Nothing needs to be done where the model and the optimizer share their memory.
        """

    def step(self) -> None:
        """Average the gradients over ranks and update the weights. Collective."""
        self.opt.step()


def weight_shapes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Name every weight, [fan_in, fan_out], in the order of the forward pass."""
    width, hidden = shape.width, MLP_RATIO * shape.width
    shapes = {"embedding.weight": (NUM_BYTES, width)}
    for i in range(shape.layers):
        shapes[f"blocks.{i}.attention.qkv.weight"] = (width, 3 * width)
        shapes[f"blocks.{i}.attention.out.weight"] = (width, width)
        shapes[f"blocks.{i}.mlp.up.weight"] = (width, hidden)
        shapes[f"blocks.{i}.mlp.down.weight"] = (hidden, width)
    return shapes | {"head.weight": (width, NUM_BYTES)}


def count_weights(shape: Shape) -> int:
    """Count the model's parameters."""
    return sum(fan_in * fan_out for fan_in, fan_out in weight_shapes(shape).values())


def initial_weights(shape: Shape, seed: int, dtype: DTypeLike = np.float32) -> Weights:
    """Draw the first weights: the same from one seed, whatever the framework.

    Outputs of a layer are about as large as its inputs, except that a block is at first the
    identity, and all bytes are equally likely.
    """
    generator, weights = np.random.default_rng(seed), {}
    for name, (fan_in, fan_out) in weight_shapes(shape).items():
        weight = np.zeros((fan_in, fan_out), dtype)
        if not name.endswith(("out.weight", "down.weight", "head.weight")):
            std = 0.1 if name == "embedding.weight" else fan_in**-0.5
            weight[...] = std * generator.standard_normal((fan_in, fan_out))
        weights[name] = weight
    return weights


def out_by_in(weights: Weights) -> Weights:
    """Lay out the weights as ``nn.Linear`` wants them, [fan_out, fan_in]; the embedding stays."""
    return {
        name: weight.copy() if name == "embedding.weight" else weight.T.copy()
        for name, weight in weights.items()
    }


def rotary_angles(context: int, head_width: int) -> Array:
    """Return the angles by which attention turns queries and keys, [context, head_width / 2].

    Each pair of neighbouring numbers is turned by an angle that grows with its position: the
    product of a query and a key then depends on their distance alone (Su et al., 2021, RoFormer).
    """
    frequencies = ROPE_BASE ** (-np.arange(0, head_width, 2) / head_width)
    return np.outer(np.arange(context), frequencies)


def softmax_inplace(scores: Array) -> Array:
    """Overwrite ``scores`` with their softmax over the last axis."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores


def generate(
    learner: Learner, prompt: Array, num_bytes: int, generator: np.random.Generator
) -> Array:
    """Continue ``prompt`` [bytes], drawing each next byte as the model expects it.

    Returns:
        The new bytes, [num_bytes].
    """
    text = np.empty(len(prompt) + num_bytes, np.uint8)
    text[: len(prompt)] = prompt
    for end in range(len(prompt), len(text)):
        window = text[max(0, end - learner.shape.context) : end]
        logits = learner.logits(window[None])[-1].astype(np.float64)
        text[end] = generator.choice(NUM_BYTES, p=softmax_inplace(logits / TEMPERATURE))
    return text[len(prompt) :]
