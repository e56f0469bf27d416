"""What a model costs: parameters, and floating-point operations by torch's counter."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.dit import DiT


def num_parameters(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


def forward_flops(model: DiT) -> int:
    """FLOPs of one forward pass of one sample; a multiply-add counts as two. Counted on meta tensors: nothing runs."""
    config = model.config
    model = copy.deepcopy(model).to("meta")
    x = torch.zeros(1, config.in_channels, config.input_size, config.input_size, device="meta")
    index = torch.zeros(1, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, index, index)
    return counter.get_total_flops()
