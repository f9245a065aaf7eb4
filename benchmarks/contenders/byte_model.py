"""A small language model over bytes, in PyTorch: 0.87 million parameters at a width of 128."""

import math
from typing import Any

NUM_BYTES, NUM_LAYERS, NUM_HEADS, MLP_RATIO, MAX_CONTEXT = 256, 4, 4, 4, 64


def make_model(torch: Any, width: int, seed: int) -> Any:
    """Make a pre-norm transformer whose output has the weights of its embedding."""
    nn, functional = torch.nn, torch.nn.functional
    torch.manual_seed(seed)

    class Block(nn.Module):  # type: ignore[misc, name-defined]  # torch may be missing
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
            self.qkv = nn.Linear(width, 3 * width)
            self.out = nn.Linear(width, width)
            self.up = nn.Linear(width, MLP_RATIO * width)
            self.down = nn.Linear(MLP_RATIO * width, width)

        def forward(self, x: Any) -> Any:
            batch, length, _ = x.shape
            heads = self.qkv(self.norms[0](x)).view(batch, length, 3, NUM_HEADS, -1)
            q, k, v = heads.permute(2, 0, 3, 1, 4)
            seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
            return x + self.down(functional.gelu(self.up(self.norms[1](x))))

    class Transformer(nn.Module):  # type: ignore[misc, name-defined]  # likewise
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(NUM_BYTES, width)
            self.places = nn.Parameter(torch.randn(MAX_CONTEXT, width) * 0.02)
            self.blocks = nn.Sequential(*(Block() for _ in range(NUM_LAYERS)))
            self.norm = nn.LayerNorm(width)
            nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(width))

        def forward(self, tokens: Any) -> Any:
            x = self.blocks(self.embedding(tokens) + self.places[: tokens.shape[1]])
            return self.norm(x) @ self.embedding.weight.T

    return Transformer()


def next_byte_loss(torch: Any, model: Any, sequences: Any) -> Any:
    """Return the mean loss, in float32, of the next byte of each in some sequences."""
    tokens = torch.from_numpy(sequences)
    logits = model(tokens[:, :-1]).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
