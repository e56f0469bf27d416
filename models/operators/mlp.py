"""Feed-forward operators: the block's own at any expansion ratio, and Hyena-X across channels (arXiv 2506.05340)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.models.operators import Shapes, register
from graftwork.models.operators.convolution import CausalConv1d
from graftwork.specs.operators import Mlp, MlpHyenaX, Place


def _ratio(shapes: Shapes, place: Place) -> dict[str, Any]:
    # width * ratio is within half a unit of the hidden width, and is rounded to it.
    return {"ratio": shapes["fc1.weight"][0] / place.width}


@register(Mlp, _ratio, inherits={"fc1": "fc1", "fc2": "fc2"})
class FeedForward(nn.Module):
    """fc2(gelu(fc1(x))), with the tanh approximation of GELU; DiT's own names."""

    def __init__(self, spec: Mlp, place: Place) -> None:
        super().__init__()
        hidden = spec.hidden(place)
        self.fc1 = nn.Linear(place.width, hidden)
        self.fc2 = nn.Linear(hidden, place.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _ratio_and_kernel(shapes: Shapes, place: Place) -> dict[str, Any]:
    return {"ratio": shapes["out_proj.weight"][1] // place.width, "kernel": shapes["short_filter.weight"][-1]}


@register(MlpHyenaX, _ratio_and_kernel, inherits={"out_proj": "fc2"})
class ChannelHyena(nn.Module):
    """y = out_proj(q * (k * v)), with q, k, v of width rD each from `in_proj` and a causal convolution.

    The convolution's channels are the N tokens and it slides along the 3rD channels: each token has taps of its own,
    and the first outputs of k and v also see the last inputs of q and k.
    """

    def __init__(self, spec: MlpHyenaX, place: Place) -> None:
        super().__init__()
        inner = spec.ratio * place.width
        self.in_proj = nn.Linear(place.width, 3 * inner)
        self.short_filter = CausalConv1d(place.num_tokens, spec.kernel, spec)
        self.out_proj = nn.Linear(inner, place.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.short_filter(self.in_proj(x)).chunk(3, dim=-1)  # (B,N,rD)
        return self.out_proj(q * (k * v))
