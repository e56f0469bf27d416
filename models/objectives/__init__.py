"""What a model learns to predict, and the loss. An objective draws timesteps, adds noise and reads a network's output.

A module here registers its objective by the name that specs give it, `specs.sampler.Prediction`; each family's config
has one as `objective`. Shapes: B samples, x (B,C,..) latents of any shape, t (B,) timesteps.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor

from graftwork.models.condition import Condition
from graftwork.specs.sampler import Prediction

Network = Callable[[Tensor, Tensor, Condition], Tensor]  # of x, t and the condition; its output is (B,C_out,..)
QUARTERS = 4  # of the noise levels


class Objective(Protocol):
    """What training, distillation, profiles and sampling ask of what a model predicts."""

    kind: ClassVar[Prediction]

    def on(self, device: torch.device) -> Self:
        """Return the objective with its constants on a device, so that no step has to move them."""
        ...

    def draw_t(self, count: int, source: torch.Generator) -> Tensor:
        """Return timesteps (count,) to train at, on the generator's device, as a network is told them."""
        ...

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return clean latents with unit Gaussian noise added up to the level of t."""
        ...

    def loss(self, network: Network, x0: Tensor, t: Tensor, condition: Condition, noise: Tensor) -> Tensor:
        """Return the loss of each sample, (B,) float32."""
        ...

    def mimicry(self, x: Tensor, t: Tensor, output: Tensor, wanted: Tensor) -> Tensor:
        """Return how far each output (B,C_out,..) at (x, t) is from that of another network, (B,): its loss, with what
        the other put out in the place of what is to be predicted."""
        ...

    def x0(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """Return the clean latents that a network's output at (x, t) points to."""
        ...

    def quarter(self, t: Tensor) -> Tensor:
        """Return the quarter (B,) of the noise levels, 0 .. QUARTERS - 1: 0 has the least noise."""
        ...


T = TypeVar("T", bound=Objective)
OBJECTIVES: dict[str, Callable[[], Objective]] = {}


def register(objective: type[T]) -> type[T]:
    """Decorate an objective: `objective_of` makes it by its kind, without arguments."""
    OBJECTIVES[objective.kind] = objective
    return objective


def objective_of(kind: Prediction) -> Objective:
    """Return a model's objective, by what it predicts. Raises ValueError if there is none."""
    if kind not in OBJECTIVES:
        raise ValueError(f"objective: got {kind!r}; accepted: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[kind]()


def over(values: Tensor, like: Tensor) -> Tensor:
    """Return values (B,) as (B,1,..), with as many dimensions as `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


# Importing a module registers its objective, so that a file put here is found.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
