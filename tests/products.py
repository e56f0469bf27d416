"""What tests of the precision watch: every product of matrices and convolution, with what a GPU would compute it in."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
MATRICES = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._scaled_dot_product_flash_attention_for_cpu}
CONVOLUTIONS = {aten.convolution, aten.convolution_backward}


class Products(TorchDispatchMode):
    """Counts the products that run within it, those of backward passes too, by precision: fp32, tf32 or a dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices: Counter[str] = Counter()
        self.convolutions: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in MATRICES:
            self.matrices[precision_of(args, torch.backends.cuda.matmul.allow_tf32)] += 1
        if packet in CONVOLUTIONS:
            self.convolutions[precision_of(args, torch.backends.cudnn.allow_tf32)] += 1
        return func(*args, **(kwargs or {}))


def precision_of(args: Any, tf32: bool) -> str:
    dtype = next(value.dtype for value in args if isinstance(value, Tensor))
    return {torch.float32: "tf32" if tf32 else "fp32", torch.bfloat16: "bf16"}.get(dtype, str(dtype))
