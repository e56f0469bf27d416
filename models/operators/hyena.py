"""The Hyena family: gates around short causal convolutions (REFERENCE section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.operators import register
from specs.operators import HyenaSE, HyenaX, HyenaY


class Hyena(nn.Module):
    """y = out_proj(q * inner(k * v)), with q, k, v from `in_proj` and, if `short`, a causal convolution.

    hyena_se has both convolutions, hyena_x only the one on q, k, v, hyena_y only the inner one.
    """

    def __init__(self, width: int, kernel: int, *, short: bool, inner: bool) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 3 * width)
        self.short_filter = causal_filter(3 * width, kernel) if short else None
        self.inner_filter = causal_filter(width, kernel) if inner else None
        if self.inner_filter is not None:
            start_as_identity(self.inner_filter)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.in_proj(x).transpose(1, 2)  # (B,3D,N)
        if self.short_filter is not None:
            qkv = convolve(qkv, self.short_filter)
        q, k, v = qkv.chunk(3, dim=1)
        v = k * v
        if self.inner_filter is not None:
            v = convolve(v, self.inner_filter)
        return self.out_proj((q * v).transpose(1, 2))


def causal_filter(channels: int, kernel: int) -> nn.Conv1d:
    """Depthwise; the weight is (channels, 1, kernel) and its last tap sees the present token."""
    return nn.Conv1d(channels, channels, kernel, groups=channels)


def convolve(x: Tensor, taps: nn.Conv1d) -> Tensor:
    """(B,channels,N): out[n] sees n - K + 1 .. n."""
    return taps(F.pad(x, (taps.kernel_size[0] - 1, 0)))


@torch.no_grad()
def start_as_identity(taps: nn.Conv1d) -> None:
    taps.weight.zero_()
    taps.weight[:, 0, -1] = 1
    assert taps.bias is not None
    taps.bias.zero_()


@register(HyenaSE)
def _se(spec: HyenaSE, width: int, heads: int, num_tokens: int) -> nn.Module:
    return Hyena(width, spec.kernel, short=True, inner=True)


@register(HyenaX)
def _x(spec: HyenaX, width: int, heads: int, num_tokens: int) -> nn.Module:
    return Hyena(width, spec.kernel, short=True, inner=False)


@register(HyenaY)
def _y(spec: HyenaY, width: int, heads: int, num_tokens: int) -> nn.Module:
    return Hyena(width, spec.kernel, short=False, inner=True)
