"""What tests of several rooms are made with: modules in which nothing is hidden, a pickle that betrays itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graftwork.models.rootstocks import Rootstock
from graftwork.models.rootstocks.dit import Block, DiTConfig
from graftwork.stages.artifacts.evidence import Scored

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
Batch = tuple[Tensor, Tensor, Tensor]  # noised latents, timesteps and labels

TINY = DiTConfig(input_size=8, in_channels=3, patch=2, depth=4, width=16, heads=2, num_classes=5)


def lively(module: M, seed: int = 0, scale: float = 0.3) -> M:
    """The module with every parameter random: nothing is hidden behind a zero."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(scale * torch.randn(value.shape, generator=draws))
    return module


def block_of(model: Rootstock, index: int) -> Block:
    """A DiT's block of that number, which is in no pair."""
    block = model.blocks[index]
    assert isinstance(block, Block)
    return block


def noting(note: Callable[P, object], function: Callable[P, T]) -> Callable[P, T]:
    """The function, before each call of which `note` is told its arguments."""

    def noted(*args: P.args, **kwargs: P.kwargs) -> T:
        note(*args, **kwargs)
        return function(*args, **kwargs)

    return noted


def a_score(output: float, loss: float) -> Scored:
    """What some scions did to the whole model's output, and to its loss."""
    return Scored(
        output=output,
        output_by_quarter=(output,) * 4,
        output_standard_error=None,
        loss=loss,
        loss_by_quarter=(loss,) * 4,
        loss_standard_error=None,
        rootstock_loss=1.0,
        samples=1,
    )


def progress(saved: Tensor) -> Tensor:
    """A checkpoint's progress, with the mean over the workers for the sums of their losses."""
    return torch.cat([saved[:2], saved[2:].mean()[None]])


class Payload:
    """Unpickling one touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class PixelFeatures:
    """What stands for Inception, at no cost: its last features are some pixels."""

    def pool3(self, images: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(images.reshape(len(images), -1)[:, :5].copy()).double() / 255

    def logits(self, images: NDArray[np.uint8]) -> Tensor:
        return self.pool3(images)[:, :3] * 9
