"""The precision of products of matrices and of convolutions; a model's weights stay fp32.

TF32 is a switch of the whole process, which an operation reads when it begins: a backward pass too, so a training
stays within `products` from its first step to its last. bf16 is autocast's, which a pass enters for itself. On a CPU
there is no TF32: products are fp32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from graftwork.specs.training import Precision

TRITON_PRECISION = "TRITON_F32_DEFAULT"  # read when a kernel is compiled: a process keeps to one precision


def allow_tf32(matrices: bool, convolutions: bool) -> None:
    """Say whether a GPU may round the factors of fp32 products to TF32.

    PyTorch by itself allows it for convolutions, and Triton for all kernels that say nothing of it, as mamba-ssm's.
    """
    torch.backends.cuda.matmul.allow_tf32 = matrices
    torch.backends.cudnn.allow_tf32 = convolutions
    os.environ[TRITON_PRECISION] = "tf32" if matrices else "ieee"


@contextmanager
def products(precision: Precision) -> Iterator[None]:
    """Within this context, a GPU computes fp32 products in TF32 if that is the precision, else in full fp32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    of_triton = os.environ.get(TRITON_PRECISION)
    allow_tf32(precision == "tf32", precision == "tf32")
    try:
        yield
    finally:
        allow_tf32(*before)
        if of_triton is None:
            del os.environ[TRITON_PRECISION]
        else:
            os.environ[TRITON_PRECISION] = of_triton


@contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Within this context, a forward pass on the device has that precision.

    In bf16 weights are rounded once a context: what trains them has to enter one for each pass.
    """
    with products(precision), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield
