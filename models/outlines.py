"""A model as large as another, without its weights: for finding out how much memory passes take."""

from __future__ import annotations

import copy

import torch
from torch import nn


def outline(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a model with zeros on `device` for its weights; the model's own are not copied on the way.

    Compiled blocks are plain again in it.
    """
    zeros: dict[int, object] = {
        id(value): nn.Parameter(torch.zeros_like(value, device=device), value.requires_grad)
        for value in model.parameters()
    }
    return copy.deepcopy(model, zeros)
