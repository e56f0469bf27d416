"""Mamba-2 (arXiv 2405.21060) with the tensor names of mamba_ssm's `Mamba2`, as published grafts have them.

Shapes: B batch, N tokens, I inner width, H heads of P = I / H channels, S dimensions of the state; N is taken in K
chunks of L tokens. One group: all heads share b and c, which a token reads the state with and writes it with.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.models.operators import Shapes, register
from graftwork.models.operators.convolution import CausalConv1d
from graftwork.models.operators.kernels import STATE_SPACE_SCAN, choose
from graftwork.specs.operators import Mamba2, Place

KERNEL_CHUNK = 256  # tokens that the fused scan takes at a time; mamba_ssm's default
STEP = 0.001, 0.1  # range of the initial time steps, log-uniform
SLOWEST_STEP = 1e-4
DECAY = 1.0, 16.0  # range of the initial decay rates, uniform


def _settings(shapes: Shapes, place: Place) -> dict[str, Any]:
    (inner,), (heads,), (convolved, _, d_conv) = (shapes[name] for name in ("norm.weight", "A_log", "conv1d.weight"))
    return {
        "d_state": (convolved - inner) // 2,
        "d_conv": d_conv,
        "expand": inner // place.width,
        "headdim": inner // heads,
    }


@register(Mamba2, _settings, inherits={"out_proj": "proj"})
class StateSpace(nn.Module):
    """y = out_proj(norm(scan(x, dt, b, c) + D x, z)), where z, x, b, c, dt come of `in_proj`, in that order of rows,
    and x, b, c go through a causal convolution and SiLU."""

    def __init__(self, spec: Mamba2, place: Place) -> None:
        super().__init__()
        self.spec = spec
        inner, heads = spec.inner(place), spec.num_heads(place)
        convolved = inner + 2 * spec.d_state
        self.split = inner, convolved, heads
        self.in_proj = nn.Linear(place.width, inner + convolved + heads, bias=False)
        self.conv1d = CausalConv1d(convolved, spec.d_conv, spec, silu=True)
        step = (torch.rand(heads) * math.log(STEP[1] / STEP[0]) + math.log(STEP[0])).exp().clamp(min=SLOWEST_STEP)
        self.dt_bias = nn.Parameter(step + (-(-step).expm1()).log())  # the inverse of softplus
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*DECAY).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedNorm(inner)
        self.out_proj = nn.Linear(inner, place.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        (inner, _, heads), d_state = self.split, self.spec.d_state
        z, convolved, dt = self.in_proj(x).split(self.split, dim=-1)
        convolved = self.conv1d(convolved.transpose(1, 2)).transpose(1, 2)
        x, b, c = convolved.split([inner, d_state, d_state], dim=-1)
        x = x.unflatten(-1, (heads, -1))  # (B,N,H,P)
        wide = at_least_fp32(x)
        rate = -self.A_log.to(wide).exp()
        fused = choose(STATE_SPACE_SCAN, self.spec, x)
        if fused is not None:
            b, c = b[:, :, None], c[:, :, None]  # their one group
            y = fused(x, dt, rate, b, c, KERNEL_CHUNK, D=self.D, dt_bias=self.dt_bias, dt_softplus=True)
        else:
            dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
            y = (scan(x, dt, rate, b, c, self.spec.chunk) + self.D.to(wide)[:, None] * x).to(x.dtype)
        return self.out_proj(self.norm(y.flatten(2), z))


class GatedNorm(nn.Module):
    """RMSNorm over the channels of y * silu(z)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        wide = at_least_fp32(y)
        gated = y.to(wide) * F.silu(z.to(wide))
        return F.rms_norm(gated, self.weight.shape, self.weight.to(wide), eps=1e-5).to(y.dtype)


def scan(x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, chunk: int) -> Tensor:
    """Run the state space  state[n] = exp(rate dt[n]) state[n-1] + dt[n] b[n] x[n]^T,  y[n] = c[n]^T state[n].

    Quadratic within a chunk and linear over the chunks (section 6 of the paper). Decays and states are at least fp32,
    products have x's precision.

    x (B,N,H,P), dt (B,N,H) > 0 and rate (H,) < 0 at least fp32, b and c (B,N,S) -> (B,N,H,P), at least fp32.
    """
    num_tokens = x.shape[1]
    chunk = min(chunk, num_tokens)
    tail = -num_tokens % chunk
    # A token of padding has dt 0: it lets nothing decay and adds nothing.
    x, dt, b, c = (F.pad(v, (0, 0) * (v.dim() - 2) + (0, tail)).unflatten(1, (-1, chunk)) for v in (x, dt, b, c))
    dtype, wide = x.dtype, dt.dtype
    x = (x * dt[..., None]).to(dtype)  # (B,K,L,H,P)
    log_decay = (dt * rate).cumsum(2)  # (B,K,L,H), since before the chunk
    through = log_decay[:, :, -1:]  # (B,K,1,H), of the whole chunk

    # What tokens of the same chunk wrote: (c b^T * decay between the two, no later than the reader) x.
    at = log_decay.transpose(2, 3)  # (B,K,H,L)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    decay = (at[..., :, None] - at[..., None, :]).masked_fill(later, float("-inf")).exp()
    scores = (c @ b.transpose(2, 3))[:, :, None] * decay  # (B,K,H,L,L)
    y = (scores.to(dtype) @ x.transpose(2, 3)).transpose(2, 3).to(wide)  # (B,K,L,H,P)

    # What each chunk adds to the state by its end, and from that the state before each chunk: (B,K,S,H,P).
    kept = (x * (through - log_decay).exp()[..., None]).to(dtype)
    added = (b.transpose(2, 3) @ kept.flatten(3)).to(wide).unflatten(-1, x.shape[3:])
    state, before = torch.zeros_like(added[:, 0]), []
    for new, lasting in zip(added.unbind(1), through.exp()[..., None].unbind(1), strict=True):
        before.append(state)
        state = lasting * state + new
    read = (c @ torch.stack(before, dim=1).flatten(3).to(dtype)).to(wide).unflatten(-1, x.shape[3:])
    y = y + read * log_decay.exp()[..., None]
    return y.flatten(1, 2)[:, :num_tokens]


def at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
