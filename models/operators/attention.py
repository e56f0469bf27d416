"""Softmax attention: over all tokens (`mha`), and within a band (`swa`). H heads of E = D / H channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.operators import register
from specs.operators import Mha, Swa


class Attention(nn.Module):
    """Attention over all tokens; DiT's own names, `qkv` and `proj`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SlidingWindowAttention(nn.Module):
    """Each token attends to the `window` tokens on each side of it and to itself; flash-attn's names.

    Cost grows with N * window: keys and values are gathered into bands of 2 * window + 1, never into N x N.
    """

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.Wqkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.Wqkv(x), self.heads)  # (B,H,N,E)
        num_tokens, width = q.shape[2], self.window
        # (B,H,N,E,2w+1); positions beyond either end are padding, masked below.
        k, v = (F.pad(a, (0, 0, width, width)).unfold(2, 2 * width + 1, 1) for a in (k, v))
        scores = (q[:, :, :, None] @ k)[:, :, :, 0] * q.shape[-1] ** -0.5
        position = torch.arange(num_tokens, device=x.device)[:, None] + torch.arange(-width, width + 1, device=x.device)
        scores = scores.masked_fill((position < 0) | (position >= num_tokens), float("-inf"))
        y = (v @ scores.softmax(-1)[..., None])[..., 0]
        return self.out_proj(y.transpose(1, 2).flatten(2))


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B,N,3D), rows ordered q, k, v -> three of (B,H,N,E)."""
    batch, num_tokens, _ = qkv.shape
    q, k, v = qkv.view(batch, num_tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v


@register(Mha)
def _mha(spec: Mha, width: int, heads: int, num_tokens: int) -> nn.Module:
    return Attention(width, heads)


@register(Swa)
def _swa(spec: Swa, width: int, heads: int, num_tokens: int) -> nn.Module:
    return SlidingWindowAttention(width, heads, spec.window)
