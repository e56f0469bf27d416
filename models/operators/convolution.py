"""Short causal depthwise convolutions, which the Hyena family, Mamba-2 and the Hyena-X MLP are made of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.operators.kernels import CAUSAL_CONVOLUTION, choose
from specs.operators import Accelerated


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
        y = super().forward(F.pad(x, (taps - 1, 0)))
        return F.silu(y) if self.silu else y


def laid_out(x: Tensor) -> Tensor:
    """(B,C,L) as the kernel takes it: L contiguous, or C contiguous and all strides multiples of 8."""
    channels_last = x.stride(1) == 1 and not any(n % 8 for n in (x.shape[1], x.stride(0), x.stride(2)))
    return x if channels_last else x.contiguous()
