"""Samplers of models that predict the noise: respaced ancestral (the published one), and DDIM for few steps.

DDIM is arXiv 2010.02502, eq. 12, with eta 0. The code is our own. Shapes: x (B,C,..).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graftwork.models.condition import Condition
from graftwork.models.objectives import Network, Objective
from graftwork.models.objectives.gaussian import Diffusion, at, respaced
from graftwork.models.sampling import register
from graftwork.specs.sampler import AncestralSampler, DdimSampler


@register("ancestral", "ddim")
def draw(
    network: Network,
    condition: Condition,
    noise: Callable[[], Tensor],
    *,
    sampler: AncestralSampler | DdimSampler,
    objective: Objective,
    bounded: bool,
) -> Tensor:
    """Return latents (B,C,..), from noise along a respaced chain; see `sampling.Draw`.

    bounded: the estimate of x0 is clamped to [-1, 1] at each step.
    """
    x = noise()
    chain = respaced(sampler.steps).on(x.device)
    step = _ancestral if sampler.kind == "ancestral" else _ddim
    for i in reversed(range(sampler.steps)):
        position = torch.full((len(x),), i, dtype=torch.long, device=x.device)
        output = network(x, chain.timesteps[position], condition).float()
        x0, raw = chain.x0(x, position, output), output[:, x.shape[1] :]
        if bounded:
            x0 = x0.clamp(-1, 1)
        x = step(chain, x, x0, raw, position, noise) if i > 0 else x0
    return x


def _ancestral(
    chain: Diffusion, x: Tensor, x0: Tensor, raw: Tensor, position: Tensor, noise: Callable[[], Tensor]
) -> Tensor:
    """Draw x[i-1] ~ p(x[i-1] | x[i]), with the learned variance where there is one."""
    log_var = chain.log_variance(raw, position) if raw.shape[1] else at(chain.max_log_var, position, x)
    return chain.posterior_mean(x0, x, position) + torch.exp(0.5 * log_var) * noise()


def _ddim(
    chain: Diffusion, x: Tensor, x0: Tensor, raw: Tensor, position: Tensor, noise: Callable[[], Tensor]
) -> Tensor:
    """Move along the deterministic path; the noise that belongs to the (clamped) x0 is kept."""
    kept = (x - at(chain.sqrt_kept, position, x) * x0) / at(chain.sqrt_noise, position, x)
    return chain.noised(x0, position - 1, kept)
