"""The transformer in JAX: pure functions of a tree of weights."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import shardopt.jax
from train_lm.models import base
from train_lm.models.base import NORM_EPS, Array, Shape, Weights, rotary_angles

Params = dict[str, Any]


class Learner(base.Learner):
    """The model in JAX; see ``base.Learner``."""

    optimizers = shardopt.jax
    framework = f"JAX {jax.__version__}"

    def _build(self, weights: Weights, dtype: str, device: str) -> Any:
        jax.config.update("jax_platforms", "cpu")  # as the optimizer runs on the CPU
        self.params = jax.tree.map(partial(jnp.asarray, dtype=dtype), as_tree(weights))
        return self.params

    @staticmethod
    def limit_threads(count: int) -> None:
        """Limit JAX's own threads as well; it reads NPROC when it starts them."""
        base.Learner.limit_threads(count)
        os.environ["NPROC"] = str(count)

    def logits(self, inputs: Array) -> Array:
        """Run the model forward.

        Texts are padded to the whole context, which does not change the result under causal
        attention; otherwise JAX would compile the model anew for every length.
        """
        batch, time = inputs.shape
        whole = np.zeros((batch, max(time, self.shape.context)), inputs.dtype)
        whole[:, :time] = inputs
        logits = np.asarray(forward(self.params, whole, self.shape))
        return logits[:, :time].reshape(batch * time, -1)

    def loss(self, inputs: Array, targets: Array) -> float:
        """Run the model forward."""
        return float(cross_entropy(self.params, inputs, targets, self.shape))

    def loss_and_grads(self, inputs: Array, targets: Array, weight: float = 1.0) -> float:
        """Run forward and backward; the gradients are kept in ``grads``."""
        result = loss_and_grads(self.params, inputs, targets, weight, self.shape)
        (_, loss), self.grads = jax.block_until_ready(result)
        return float(loss)

    def step(self) -> None:
        """Replace the weights by updated ones, as arrays are immutable. Collective: every rank."""
        self.params = self.opt.step(self.grads)

    def adopt_loaded(self) -> None:
        """Replace the weights by the loaded ones, as arrays are immutable."""
        self.params = self.opt.params


@partial(jax.jit, static_argnames="shape")
def forward(params: Params, tokens: jax.Array, shape: Shape) -> jax.Array:
    """Score the byte after each of ``tokens`` [batch, time]; returns [batch, time, 256]."""
    angles = rotary_angles(tokens.shape[1], shape.head_width)
    x = params["embedding"][tokens]
    for block in params["blocks"]:
        x = x + attention(block, norm(x), angles, shape)
        x = x + jnp.square(jax.nn.relu(norm(x) @ block["up"])) @ block["down"]
    return norm(x) @ params["head"]


def attention(block: Params, x: jax.Array, angles: Array, shape: Shape) -> jax.Array:
    """Mix each position of ``x`` [batch, time, width] with the positions before it."""
    qkv = (x @ block["qkv"]).reshape(*x.shape[:2], 3, shape.heads, shape.head_width)
    q, k, v = (qkv[:, :, i] for i in range(3))
    mixed = jax.nn.dot_product_attention(rotate(q, angles), rotate(k, angles), v, is_causal=True)
    return mixed.reshape(x.shape) @ block["out"]


def rotate(x: jax.Array, angles: Array) -> jax.Array:
    """Rotate each pair of ``x`` [batch, time, heads, head_width] by its position's angle."""
    cos, sin = (jnp.asarray(f(angles)[:, None], x.dtype) for f in (np.cos, np.sin))
    a, b = x[..., 0::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)


def norm(x: jax.Array) -> jax.Array:
    """Divide by the root mean square of the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + NORM_EPS)


@partial(jax.jit, static_argnames="shape")
def cross_entropy(params: Params, inputs: jax.Array, targets: jax.Array, shape: Shape) -> jax.Array:
    """Return the mean cross-entropy of ``targets`` [batch, time]."""
    scores = jax.nn.log_softmax(forward(params, inputs, shape).astype(jnp.float32))
    return -jnp.take_along_axis(scores, targets[..., None], axis=-1).mean()


@partial(jax.jit, static_argnames="shape")
@partial(jax.value_and_grad, has_aux=True)
def loss_and_grads(
    params: Params, inputs: jax.Array, targets: jax.Array, weight: float, shape: Shape
) -> tuple[jax.Array, jax.Array]:
    """Return the weighted loss, to be differentiated, and the loss itself."""
    loss = cross_entropy(params, inputs, targets, shape)
    return weight * loss, loss


def as_tree(weights: Weights) -> Params:
    """Arrange the weights in a tree, by block and then by layer."""
    blocks: dict[str, Params] = {}
    tree: Params = {"blocks": blocks}
    for name, weight in weights.items():
        *path, layer, _ = name.split(".")  # blocks.0.mlp.up.weight
        (blocks.setdefault(path[1], {}) if path else tree)[layer] = weight
    return tree | {"blocks": list(blocks.values())}
