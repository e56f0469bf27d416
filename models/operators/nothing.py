"""No operator: what stands where one was dropped."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graftwork.models.operators import register
from graftwork.specs.operators import NoOperator, Place


@register(NoOperator)
class Nothing(nn.Module):
    """Zeros, whatever goes in: they depend on nothing and have no gradient."""

    def __init__(self, spec: NoOperator, place: Place) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)
