"""Two blocks side by side as one, and what is left in the second one's place."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ParallelBlock(nn.Module):
    """Two blocks that read the same input: y = x + merge([a(x) - x, b(x) - x]) (arXiv 2506.05340)."""

    def __init__(self, first: nn.Module, second: nn.Module, width: int) -> None:
        """The merge starts as the sum of what the two blocks add."""
        super().__init__()
        self.first, self.second = first, second
        self.merge = nn.Linear(2 * width, width)
        with torch.no_grad():
            self.merge.weight.copy_(torch.eye(width).repeat(1, 2))
            self.merge.bias.zero_()

    def forward(self, x: Tensor, *conditioning: Tensor) -> Tensor:
        """Return the stream (B,N,D) behind both blocks. conditioning: what the family's blocks get beside it."""
        return x + self.update(x, *conditioning)

    def update(self, x: Tensor, *conditioning: Tensor) -> Tensor:
        """Return what the block adds to its input (B,N,D)."""
        return self.merge(torch.cat([self.first(x, *conditioning) - x, self.second(x, *conditioning) - x], dim=-1))


class Absorbed(nn.Module):
    """The identity, left at index i + 1 when a parallel block absorbs block i + 1: later blocks keep their index."""

    def forward(self, x: Tensor, *conditioning: Tensor) -> Tensor:
        return x
