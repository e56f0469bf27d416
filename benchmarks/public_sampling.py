"""The public sampler's loop: a batch through all steps, in eager mode, with the chain's constants on the host."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from graftwork.models.condition import Condition, Conditioner
from graftwork.models.objectives import Network
from graftwork.models.objectives.gaussian import respaced
from graftwork.models.sampling.gaussian import _ancestral, _ddim
from graftwork.models.sampling.guidance import guided
from graftwork.specs.sampler import Sampler


@torch.no_grad()
def public_sample(
    model: Network,
    condition: Condition,
    noise: Iterator[Tensor],
    *,
    sampler: Sampler,
    conditioner: Conditioner,
    bounded: bool,
    tf32: bool,
) -> Tensor:
    """Return latents (B,C,..) for the condition; noise: as many draws of that shape as the sampler takes."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    chain = respaced(sampler.steps)  # its constants are copied to the device where a step needs them
    step = _ancestral if sampler.kind == "ancestral" else _ddim
    network = guided(model, condition, conditioner, sampler)
    x = next(noise)
    for i in reversed(range(sampler.steps)):
        position = torch.full((len(x),), i, dtype=torch.long, device=x.device)
        output = network(x, chain.timesteps.to(x.device)[position], condition)
        epsilon, raw = output[:, : x.shape[1]], output[:, x.shape[1] :]
        x0 = chain.x0_from_noise(x, position, epsilon)
        x0 = x0.clamp(-1, 1) if bounded else x0
        x = step(chain, x, x0, raw, position, noise.__next__) if i > 0 else x0
    torch.set_float32_matmul_precision("highest")
    return x
