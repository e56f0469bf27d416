"""What several families are made of: embeddings of patches, positions and timesteps, norm and modulation.

Shapes: B batch, C latent channels, S latent pixels a side, N tokens, D width, P patch side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from graftwork.models.rootstocks import RootstockConfig
from graftwork.specs.costs import FREQUENCIES

MAX_PERIOD = 10_000.0
# Names of tensors, and of the layer that puts out the prediction.
PATCHES, POSITIONS, OUTPUT = "x_embedder.proj.weight", "pos_embed", "final_layer.linear"


class PatchEmbedding(nn.Module):
    """(B,C,S,S) -> (B,N,D), rows first."""

    def __init__(self, config: RootstockConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.width, config.patch, stride=config.patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedding(nn.Module):
    """(B,) timesteps in 0 .. 999 -> (B,D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t[:, None].float() * torch.exp(-math.log(MAX_PERIOD) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(B,N,D) with (B,D) shift and scale."""
    return x * (1 + scale[:, None]) + shift[:, None]


def layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def unpatchified(x: Tensor, side: int, patch: int, channels: int) -> Tensor:
    """(B,N,P*P*C), rows of `side` tokens, channels last within a patch -> (B,C,side*P,side*P)."""
    x = x.reshape(-1, side, side, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * patch, side * patch)


def waves_of_positions(side: int, width: int, stretch: float = 1.0) -> Tensor:
    """Return the fixed 2-D sin-cos embedding (1,side*side,width): half of it for the column, half for the row.

    stretch: what positions are divided by.
    """
    quarter = width // 4
    frequencies = MAX_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = (torch.arange(side, dtype=torch.float64) / stretch)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()[None]
