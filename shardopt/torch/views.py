"""Tensors over parts of shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardopt.torch.tensors import as_complex, as_tensor, layout_of

if TYPE_CHECKING:
    from shardopt._typing import FloatArray


class View:
    """A part of shared memory, and the layout of a tensor over it.

    Each call of ``tensor`` makes a new tensor, and the layout is kept as plain values, because
    torch may replace the memory of an existing tensor in place (``model.to()`` that of gradients,
    ``share_memory()`` even that of the storage).

    Attributes:
        array: The memory.
        latest: The tensor made last.
    """

    __slots__ = ("_complex", "_layout", "array", "latest")

    def __init__(self, array: FloatArray, is_complex: bool) -> None:
        self.array = array
        self._complex = is_complex
        self._layout = layout_of(self.tensor())

    @torch.inference_mode(False)  # so that backward can write to it later
    def tensor(self) -> Tensor:
        """Return a new tensor over the memory."""
        tensor = as_tensor(self.array)
        self.latest = as_complex(tensor) if self._complex else tensor
        return self.latest

    def takes(self, grad: Tensor) -> bool:
        """Copy a gradient into ``latest``, if it fits and is not there already."""
        layout = layout_of(grad)
        if layout[0] == self._layout[0] or layout[1:3] != self._layout[1:3]:
            return False
        if self.latest.requires_grad or not self.is_shown_by(self.latest):
            self.tensor()
        self.latest.copy_(grad)
        return True

    def is_shown_by(self, tensor: Tensor | None) -> bool:
        """Whether a tensor lies over the memory, in the same layout."""
        return (
            tensor is not None
            and tensor.layout is torch.strided  # other layouts have no address
            and layout_of(tensor) == self._layout
        )
