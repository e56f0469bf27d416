"""Short causal depthwise convolutions, which the Hyena family, Mamba-2 and the Hyena-X MLP are made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.models.numerics.parts import in_parts
from graftwork.models.operators.kernels import CAUSAL_CONVOLUTION, choose
from graftwork.specs.operators import Accelerated


class CausalConv1d(nn.Conv1d):
    """(B,C,L) -> (B,C,L), one filter a channel: out[l] sees l - K + 1 .. l; then SiLU if asked.

    The weight is (C,1,K) and its last tap sees the present. The kernel is called in here and not by the operator, so
    that an engine that gathers a module's parameters when it is called has them.
    """

    def __init__(self, channels: int, kernel: int, spec: Accelerated, *, silu: bool = False) -> None:
        super().__init__(channels, channels, kernel, groups=channels)
        self.spec = spec
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        taps = self.kernel_size[0]
        fused = choose(CAUSAL_CONVOLUTION, self.spec, x, taps)
        if fused is not None:
            return fused(laid_out(x), self.weight[:, 0], self.bias, activation="silu" if self.silu else None)
        if x.device.type == "cpu":
            y = CausalOnCpu.apply(x, self.weight, self.bias)
        else:
            y = super().forward(F.pad(x, (taps - 1, 0)))
        return F.silu(y) if self.silu else y


def laid_out(x: Tensor) -> Tensor:
    """(B,C,L) as the kernel takes it: L contiguous, or C contiguous and all strides multiples of 8."""
    channels_last = x.stride(1) == 1 and not any(n % 8 for n in (x.shape[1], x.stride(0), x.stride(2)))
    return x if channels_last else x.contiguous()


class CausalOnCpu(torch.autograd.Function):
    """The same convolution where C may be contiguous as well as L, and comes out as it went in.

    PyTorch's own gradient of the taps takes many times as long on a CPU as the convolution (benchmarks/operators.py).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _slid(x, weight, bias, x.shape[2], 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        length, taps = x.shape[2], weight.shape[2]
        of_x = _slid(gradient, weight.to(gradient.dtype).flip(2), None, length, taps - 1)
        back = [min(taps - 1 - tap, length) for tap in range(taps)]  # how far before the present a tap looks
        exact = torch.promote_types(weight.dtype, torch.float32)
        of_weight, of_bias = weight.new_zeros(weight.shape, dtype=exact), weight.new_zeros(len(weight), dtype=exact)
        for seen, part in in_parts(x.to(gradient.dtype), gradient):
            of_taps = [(seen[..., : length - far] * part[..., far:]).sum((0, 2)) for far in back]
            of_weight += torch.stack(of_taps, dim=1)[:, None]
            of_bias += part.sum((0, 2))
        return of_x.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype)


def _slid(x: Tensor, weight: Tensor, bias: Tensor | None, length: int, start: int) -> Tensor:
    """`length` outputs from the `start`-th, of all those that see any of x (B,C,L). In two dimensions, where PyTorch
    knows a layout in which C is contiguous."""
    taps = weight.shape[2]
    y = F.conv2d(x[:, :, None], weight[:, :, None], bias, padding=(0, taps - 1), groups=x.shape[1])
    return y[:, :, 0, start : start + length]
