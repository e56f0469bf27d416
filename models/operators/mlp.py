"""The block's feed-forward operator at any expansion ratio; DiT's own names, `fc1` and `fc2`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.operators import register
from specs.operators import Mlp


class FeedForward(nn.Module):
    """fc2(gelu(fc1(x))), with the tanh approximation of GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


@register(Mlp)
def _mlp(spec: Mlp, width: int, heads: int, num_tokens: int) -> nn.Module:
    return FeedForward(width, max(1, round(width * spec.ratio)))
