"""What tests of several rooms are made with: modules in which nothing is hidden, a pickle that betrays itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def lively(module: nn.Module, seed: int = 0, scale: float = 0.3) -> Any:
    """The module with every parameter random: nothing is hidden behind a zero."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(scale * torch.randn(value.shape, generator=draws))
    return module


def progress(saved: Tensor) -> Tensor:
    """A checkpoint's progress, with the mean over the workers for the sums of their losses."""
    return torch.cat([saved[:2], saved[2:].mean()[None]])


class Payload:
    """Unpickling one touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)
