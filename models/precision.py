"""The precision of products of matrices and of convolutions; a model's weights stay fp32.

TF32 is a switch of the whole process, which an operation reads when it begins: a backward pass too, so a training
stays within `products` from its first step to its last. bf16 is autocast's, which a pass enters for itself. On a CPU
there is no TF32: products are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from graftwork.specs.training import Precision


def allow_tf32(matrices: bool, convolutions: bool) -> None:
    """Say whether a GPU may round the factors of fp32 products to TF32. PyTorch itself allows it for convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = matrices
    torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def products(precision: Precision) -> Iterator[None]:
    """Within this context, a GPU computes fp32 products in TF32 if that is the precision, else in full fp32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(precision == "tf32", precision == "tf32")
    try:
        yield
    finally:
        allow_tf32(*before)


@contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Within this context, a forward pass on the device has that precision.

    In bf16 weights are rounded once a context: what trains them has to enter one for each pass.
    """
    with products(precision), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield
