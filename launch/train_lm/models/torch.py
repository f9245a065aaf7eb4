"""The transformer in PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shardopt.torch
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


class Learner(base.Learner):
    """The model in PyTorch; see ``base.Learner``."""

    optimizers = shardopt.torch
    framework = f"PyTorch {torch.__version__.split('+')[0]}"  # without +cpu

    def _build(self, weights: Weights, dtype: str, device: str) -> Any:
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.framework += f" on {torch.cuda.get_device_name(self.device)}"
        self.model = Transformer(self.shape, self.device)
        self.model.load_state_dict({n: torch.from_numpy(w) for n, w in out_by_in(weights).items()})
        self.model.to(self.device, getattr(torch, dtype))
        return self.model.named_parameters()

    @staticmethod
    def limit_threads(count: int) -> None:
        """Limit PyTorch's own threads as well."""
        base.Learner.limit_threads(count)
        torch.set_num_threads(count)

    @staticmethod
    def find_device(choice: str, local_rank: int) -> str:
        """Take the GPUs that this rank sees in turn; see ``base.Learner.find_device``."""
        count = 0 if choice == "cpu" else torch.cuda.device_count()
        if count:
            number = local_rank % count
            torch.cuda.set_device(number)  # or torch would keep a context on the first GPU, too
            return f"cuda:{number}"
        if choice == "cuda":
            build = torch.version.cuda or "none: a build for CPUs"
            raise ValueError(
                f"--device cuda must find a GPU; got none (CUDA of torch {torch.__version__}: "
                f"{build}). Check nvidia-smi and CUDA_VISIBLE_DEVICES, or leave --device out."
            )
        return "cpu"

    def step(self) -> None:
        """Update, and wait for a GPU: the time that a step takes is measured."""
        super().step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def logits(self, inputs: Array) -> Array:
        """Run the model forward."""
        logits: Array = self.model(self._as_tensor(inputs)).flatten(0, 1).cpu().numpy()
        return logits

    @torch.no_grad()
    def loss(self, inputs: Array, targets: Array) -> float:
        """Run the model forward."""
        return self._loss(inputs, targets).item()

    def loss_and_grads(self, inputs: Array, targets: Array, weight: float = 1.0) -> float:
        """Run forward and backward; the gradients are in ``p.grad``."""
        self.opt.zero_grad()
        loss = self._loss(inputs, targets)
        (weight * loss).backward()
        return loss.item()

    def _loss(self, inputs: Array, targets: Array) -> Tensor:
        logits = self.model(self._as_tensor(inputs))
        return F.cross_entropy(logits.flatten(0, 1), self._as_tensor(targets).flatten())

    def _as_tensor(self, tokens: Array) -> Tensor:
        """Convert bytes to int64, as indexing requires, on the model's device."""
        return torch.from_numpy(tokens.astype(np.int64)).to(self.device)


class Transformer(nn.Module):
    """Tokens [batch, time] in, float32 logits [batch, time, 256] out."""

    def __init__(self, shape: Shape, device: torch.device | None = None) -> None:
        super().__init__()
        angles = torch.from_numpy(rotary_angles(shape.context, shape.head_width)).float()
        # Not a buffer: ``model.to(torch.bfloat16)`` would round the angles of distant positions.
        angles = angles.to(device)
        self.rotations = torch.polar(torch.ones_like(angles), angles)
        self.embedding = nn.Embedding(NUM_BYTES, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.head = nn.Linear(shape.width, NUM_BYTES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Score the byte after each of ``tokens``."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rotations[: tokens.shape[1]])
        return self.head(norm(x)).float()


class Block(nn.Module):
    """Attention and an MLP, each added to its input."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:
        """Transform ``x`` [batch, time, width]."""
        x = x + self.attention(norm(x), rotations)
        return x + self.mlp(norm(x))


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:
        """Mix each position of ``x`` [batch, time, width] with the positions before it."""
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each [batch, heads, time, head_width]
        q, k = rotate(q, rotations), rotate(k, rotations)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two projections around ``relu(x)**2``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, MLP_RATIO * shape.width, bias=False)
        self.down = nn.Linear(MLP_RATIO * shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position by itself."""
        return self.down(F.relu(self.up(x)).square())


def norm(x: Tensor) -> Tensor:
    """Divide by the root mean square of the last axis."""
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate each pair of ``x`` [batch, heads, time, head_width], as a complex number."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).type_as(x)
