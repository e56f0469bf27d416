"""Samplers, and guidance. A module here registers what draws samples for a kind of sampler of `specs.sampler`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from graftwork.models.condition import Condition, Conditioner
from graftwork.models.objectives import Network, Objective
from graftwork.models.sampling.guidance import guided
from graftwork.specs.sampler import Sampler


class Draw(Protocol):
    """What draws samples with one kind of sampler."""

    def __call__(
        self,
        network: Network,
        condition: Condition,
        noise: Callable[[], Tensor],
        *,
        sampler: Any,
        objective: Objective,
        bounded: bool,
    ) -> Tensor:
        """Return latents (B,C,..) for the condition of B samples.

        network: as guided. noise: each call returns the next unit Gaussian draw (B,C,..); in a job a `SampleNoise`.
        sampler: the spec, of a kind that the function is registered for. objective: of the kinds that the spec serves.
        bounded: latents lie in [-1, 1].
        """
        ...


D = TypeVar("D", bound=Draw)
SAMPLERS: dict[str, Draw] = {}


def register(*kinds: str) -> Callable[[D], D]:
    """Decorate a function that draws samples with samplers of these kinds."""

    def keep(draw: D) -> D:
        SAMPLERS.update(dict.fromkeys(kinds, draw))
        return draw

    return keep


@torch.no_grad()
def sample(
    network: Network,
    condition: Condition,
    noise: Callable[[], Tensor],
    *,
    sampler: Sampler,
    conditioner: Conditioner,
    objective: Objective,
    bounded: bool,
) -> Tensor:
    """Return latents (B,C,..) for the condition of B samples, guided as the sampler says.

    noise: each call returns the next unit Gaussian draw of the latents' shape, on their device.
    bounded: latents lie in [-1, 1] (pixels), so that estimates of the clean ones may be clamped.

    Raises ValueError for a sampler that does not serve what the model predicts.
    """
    if objective.kind not in sampler.serves:
        accepted = f"a sampler for models that predict {objective.kind}, as this one does"
        raise ValueError(f"sampler.kind: got {sampler.kind}; accepted: {accepted}")
    network = guided(network, condition, conditioner, sampler)
    draw = SAMPLERS[sampler.kind]
    return draw(network, condition, noise, sampler=sampler, objective=objective, bounded=bounded)


# Importing a module registers its samplers, so that a file put here is found.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
