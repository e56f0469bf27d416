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

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + self.update(x, c)

    def update(self, x: Tensor, c: Tensor) -> Tensor:
        """What the block adds to its input."""
        return self.merge(torch.cat([self.first(x, c) - x, self.second(x, c) - x], dim=-1))


class Absorbed(nn.Module):
    """Stands where a block was that a parallel block before it took in, so that blocks keep their numbers."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x
