"""The precision of a model's passes; its weights stay fp32."""

from __future__ import annotations

import torch

from graftwork.specs.training import Precision


def computing(precision: Precision, device: torch.device) -> torch.autocast:
    """Within this context, matrix products and convolutions are computed in bf16, if that is the precision.

    Weights are rounded once a context: what trains them has to enter one for each pass.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
