"""The parts that the models of all frameworks share: sizes, first weights and the interface.

The model is a byte-level, decoder-only transformer: pre-norm blocks, causal attention with rotary
positions, a squared-ReLU MLP (So et al., 2021, Primer) and an untied head. Norms have no gain,
because the weight after them can absorb it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from types import ModuleType

Array = NDArray[Any]
Weights = dict[str, Array]

NUM_BYTES = 256
MLP_RATIO = 4
NORM_EPS = 1e-5
ROPE_BASE = 1000.0
TEMPERATURE = 0.7
"""Below 1, generated text favours the bytes that the model is sure of."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer."""

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

    Inputs are bytes in NumPy arrays [batch, time]; losses are means, in nats per byte.

    Collective: construction and ``step``.

    Args:
        shape: The model's sizes.
        weights: Its first weights, from ``initial_weights``.
        dtype: The dtype of weights and gradients.
        device: Where they are, from ``find_device``.
        optimizer: The name of the optimizer's class.
        **settings: Arguments for the optimizer.

    Attributes:
        shape: As given.
        opt: The framework's optimizer.
        optimizers: The module with the framework's optimizers.
        framework: The framework's name and version; empty for plain NumPy.
    """

    optimizers: ModuleType
    framework = ""
    opt: Any

    def __init__(
        self,
        shape: Shape,
        weights: Weights,
        dtype: str = "float32",
        device: str = "cpu",
        optimizer: str = "NAdam",
        **settings: Any,
    ) -> None:
        self.shape = shape
        params = self._build(weights, dtype, device)
        self.opt = getattr(self.optimizers, optimizer)(params, **settings)

    @abstractmethod
    def _build(self, weights: Weights, dtype: str, device: str) -> Any:
        """Make the model, and return what of it the optimizer is to train."""

    @staticmethod
    def find_device(choice: str, local_rank: int) -> str:
        """Return the device of this rank's model; raises ``ValueError`` if there is none such.

        Args:
            choice: ``auto``, ``cpu`` or ``cuda``.
            local_rank: The rank's number on its node: GPUs are taken in turn.
        """
        return "cpu"

    @staticmethod
    def limit_threads(count: int) -> None:
        """Limit each operation of this process to ``count`` cores; call it before the first one."""
        threadpool_limits(count)

    @abstractmethod
    def logits(self, inputs: Array) -> Array:
        """Score the byte after each of ``inputs``; returns [batch * time, 256]."""

    @abstractmethod
    def loss(self, inputs: Array, targets: Array) -> float:
        """Return the cross-entropy of ``targets``."""

    @abstractmethod
    def loss_and_grads(self, inputs: Array, targets: Array, weight: float = 1.0) -> float:
        """Return the loss, and keep this rank's gradients for ``step``.

        Args:
            inputs: Bytes.
            targets: The byte after each of them.
            weight: A factor of the gradients, but not of the loss: above 1 on a rank that has more
                sequences than others.
        """

    def adopt_loaded(self) -> None:  # noqa: B027  # not abstract
        """Use the weights of a checkpoint that was loaded into ``opt``.

        There is nothing to do where the model and the optimizer share their memory.
        """

    def step(self) -> None:
        """Average the gradients over ranks and update the weights. Collective: every rank."""
        self.opt.step()


def weight_shapes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return the shape of each weight, [fan_in, fan_out], in the order of the forward pass."""
    width, hidden = shape.width, MLP_RATIO * shape.width
    shapes = {"embedding.weight": (NUM_BYTES, width)}
    for i in range(shape.layers):
        shapes[f"blocks.{i}.attention.qkv.weight"] = (width, 3 * width)
        shapes[f"blocks.{i}.attention.out.weight"] = (width, width)
        shapes[f"blocks.{i}.mlp.up.weight"] = (width, hidden)
        shapes[f"blocks.{i}.mlp.down.weight"] = (hidden, width)
    return shapes | {"head.weight": (width, NUM_BYTES)}


def count_weights(shape: Shape) -> int:
    """Return the number of parameters."""
    return sum(fan_in * fan_out for fan_in, fan_out in weight_shapes(shape).values())


def initial_weights(shape: Shape, seed: int, dtype: DTypeLike = np.float32) -> Weights:
    """Draw the first weights, which depend on the seed but not on the framework.

    The outputs of a layer are about as large as its inputs, except that each block starts as the
    identity and the head predicts all bytes equally.
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
    """Transpose all weights but the embedding to ``nn.Linear``'s layout, [fan_out, fan_in]."""
    return {
        name: weight.copy() if name == "embedding.weight" else weight.T.copy()
        for name, weight in weights.items()
    }


def rotary_angles(context: int, head_width: int) -> Array:
    """Return the angles by which attention rotates queries and keys, [context, head_width / 2].

    Each pair of neighbouring numbers is rotated by an angle proportional to its position: the
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
    """Continue ``prompt`` [bytes], drawing each byte from the model's distribution.

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
