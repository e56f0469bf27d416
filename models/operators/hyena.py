"""The Hyena family: gates around short causal convolutions (arXiv 2506.05340)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.models.operators import Shapes, register
from graftwork.models.operators.convolution import CausalConv1d
from graftwork.specs import operators as specs
from graftwork.specs.operators import HyenaSE, HyenaX, HyenaY, Place


def _settings(shapes: Shapes, place: Place) -> dict[str, Any]:
    taps = shapes["short_filter.weight"] if "short_filter.weight" in shapes else shapes["inner_filter.weight"]
    return {"kernel": taps[-1]}


INHERITS = {"in_proj": "qkv", "out_proj": "proj"}


@register(HyenaSE, _settings, INHERITS)
@register(HyenaX, _settings, INHERITS)
@register(HyenaY, _settings, INHERITS)
class Hyena(nn.Module):
    """y = out_proj(q * inner(k * v)), with q, k, v from `in_proj` and, if `short`, a causal convolution.

    hyena_se has both convolutions, hyena_x only the one on q, k, v, hyena_y only the inner one.
    """

    def __init__(self, spec: specs.Hyena, place: Place) -> None:
        super().__init__()
        width = place.width
        self.in_proj = Projections(width, 3 * width)
        self.short_filter = CausalConv1d(3 * width, spec.kernel, spec) if spec.short else None
        self.inner_filter = CausalConv1d(width, spec.kernel, spec) if spec.inner else None
        if self.inner_filter is not None:
            start_as_identity(self.inner_filter)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # Within LoRA it is another layer, which knows no parts.
        if x.device.type == "cpu" and self.short_filter is None and isinstance(self.in_proj, Projections):
            q, k, v = self.in_proj(x, apart=True)
        else:
            q, k, v = along_tokens(self.short_filter, self.in_proj(x)).chunk(3, dim=-1)
        return self.out_proj(q * along_tokens(self.inner_filter, k * v))


class Projections(nn.Linear):
    """A linear layer, (B,N,D) -> (B,N,3D), that gives its three parts as well. Those are three products on a CPU, which
    are faster than one of that width, and whose gradients need not be put together."""

    def forward(self, x: Tensor, apart: bool = False) -> Any:
        if not apart:
            return super().forward(x)
        each = zip(self.weight.chunk(3), self.bias.chunk(3), strict=True)
        return [F.linear(x, weight, bias) for weight, bias in each]


def along_tokens(taps: CausalConv1d | None, x: Tensor) -> Tensor:
    """(B,N,C) -> (B,N,C), if there are taps; channels stay contiguous."""
    return x if taps is None else taps(x.transpose(1, 2)).transpose(1, 2)


@torch.no_grad()
def start_as_identity(taps: nn.Conv1d) -> None:
    taps.weight.zero_()
    taps.weight[:, 0, -1] = 1
    assert taps.bias is not None
    taps.bias.zero_()
