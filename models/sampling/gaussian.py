"""Samplers: respaced ancestral (the published one), and DDIM for few steps (arXiv 2010.02502, eq. 12, eta 0). Our own.

A guided network runs the conditional and the unconditional half in one batch. Shapes: x (B,C,S,S), y (B,).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graftwork.models.objectives.gaussian import Diffusion, Network, at, respaced
from graftwork.models.sampling.guidance import guided
from graftwork.specs.sampler import Sampler


@torch.no_grad()
def sample(
    network: Network,
    y: Tensor,
    draw: Callable[[], Tensor],
    *,
    sampler: Sampler,
    null_class: int,
    bounded: bool,
) -> Tensor:
    """Latents (B,C,S,S) for the labels y; `draw` yields unit Gaussian noise of that shape.

    bounded: latents lie in [-1, 1] (pixels), so the estimate of x0 is clamped at each step.
    """
    chain = respaced(sampler.steps).on(y.device)
    step = _ancestral if sampler.kind == "ancestral" else _ddim
    network = guided(network, y, null_class, sampler)
    x = draw()
    for i in reversed(range(sampler.steps)):
        position = torch.full_like(y, i)
        output = network(x, chain.timesteps[position], y).float()
        noise, raw = output[:, : x.shape[1]], output[:, x.shape[1] :]
        x0 = chain.x0_from_noise(x, position, noise)
        if bounded:
            x0 = x0.clamp(-1, 1)
        x = step(chain, x, x0, raw, position, draw) if i > 0 else x0
    return x


def _ancestral(
    chain: Diffusion, x: Tensor, x0: Tensor, raw: Tensor, position: Tensor, draw: Callable[[], Tensor]
) -> Tensor:
    """Draw x[i-1] ~ p(x[i-1] | x[i]), with the learned variance where there is one."""
    log_var = chain.log_variance(raw, position) if raw.shape[1] else at(chain.max_log_var, position, x)
    return chain.posterior_mean(x0, x, position) + torch.exp(0.5 * log_var) * draw()


def _ddim(chain: Diffusion, x: Tensor, x0: Tensor, raw: Tensor, position: Tensor, draw: Callable[[], Tensor]) -> Tensor:
    """Move along the deterministic path; the noise that belongs to the (clamped) x0 is kept."""
    noise = (x - at(chain.sqrt_kept, position, x) * x0) / at(chain.sqrt_noise, position, x)
    return chain.add_noise(x0, position - 1, noise)
