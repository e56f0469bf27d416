"""Gaussian diffusion with a learned variance: noising and the training loss (arXiv 2102.09672, as DiT uses it).

1000 steps, linear beta from 1e-4 to 0.02; the network predicts the noise and, with `learn_sigma`, where the variance
lies between its two bounds. Shapes: x (B,C,..), t (B,) integers in 0 .. T-1.
"""

from __future__ import annotations

import copy
import math
from typing import ClassVar

import torch
from torch import Tensor

from graftwork.models.condition import Condition
from graftwork.models.objectives import QUARTERS, Network, over, register
from graftwork.specs.sampler import Prediction

STEPS = 1000


@register
class Diffusion:
    """The constants of a chain of noising steps: the full one, or one respaced to a subset of its timesteps.

    `timesteps[i]` is what the network is told at step i of this chain.
    """

    kind: ClassVar[Prediction] = "epsilon"

    def __init__(self, timesteps: Tensor | None = None) -> None:
        self.timesteps = torch.arange(STEPS) if timesteps is None else timesteps
        alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64), 0)[self.timesteps]
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        beta = 1 - alpha_bar / before
        posterior_var = beta * (1 - before) / (1 - alpha_bar)
        self.alpha_bar = alpha_bar
        self.sqrt_kept = alpha_bar.sqrt()
        self.sqrt_noise = (1 - alpha_bar).sqrt()
        # q(x[t-1] | x[t], x0) has mean  x0_weight * x0 + xt_weight * x[t]  (DDPM, eq. 7).
        self.x0_weight = beta * before.sqrt() / (1 - alpha_bar)
        self.xt_weight = (1 - before) * (1 - beta).sqrt() / (1 - alpha_bar)
        # The first step's posterior variance is 0; its logarithm takes the second's.
        floor = posterior_var[1:2] if len(posterior_var) > 1 else beta[:1]
        self.min_log_var = torch.cat([floor, posterior_var[1:]]).log()
        self.max_log_var = beta.log()

    def on(self, device: torch.device) -> Diffusion:
        """The same chain with its constants on a device, as they are used there, so that no step has to move them."""
        chain = copy.copy(self)
        for name, values in vars(self).items():
            setattr(chain, name, values.to(device, torch.float32 if values.is_floating_point() else values.dtype))
        return chain

    def draw_t(self, count: int, source: torch.Generator) -> Tensor:
        """Return steps (count,) of the chain, uniform."""
        return torch.randint(len(self.timesteps), (count,), generator=source)

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """z_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise."""
        return at(self.sqrt_kept, t, x0) * x0 + at(self.sqrt_noise, t, x0) * noise

    def x0(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """Return the clean latents that the noise in a network's output points to."""
        return self.x0_from_noise(x, t, output[:, : x.shape[1]])

    def quarter(self, t: Tensor) -> Tensor:
        """Return the quarter (B,) of the chain that t is in; the first has the least noise."""
        return t * QUARTERS // len(self.timesteps)

    def x0_from_noise(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return (x - at(self.sqrt_noise, t, x) * noise) / at(self.sqrt_kept, t, x)

    def posterior_mean(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return at(self.x0_weight, t, x) * x0 + at(self.xt_weight, t, x) * x

    def log_variance(self, raw: Tensor, t: Tensor) -> Tensor:
        """The network's variance output, -1 .. 1, placed between the bounds (arXiv 2102.09672, eq. 15)."""
        share = (raw + 1) / 2
        return share * at(self.max_log_var, t, raw) + (1 - share) * at(self.min_log_var, t, raw)

    def loss(self, network: Network, x0: Tensor, t: Tensor, condition: Condition, noise: Tensor) -> Tensor:
        """The hybrid loss a sample, (B,): noise MSE, plus the variational bound in bits a dimension."""
        x = self.noised(x0, t, noise)
        predicted, raw = noise_and_variance(network(x, t, condition).float(), x)
        error = (predicted - noise).square().flatten(1).mean(1)
        if raw is None:
            return error
        # The bound sees a detached mean, so that it trains the variance alone.
        return error + self._bound(x0, x, t, predicted.detach(), raw)

    def mimicry(self, x: Tensor, t: Tensor, output: Tensor, wanted: Tensor) -> Tensor:
        """The MSE of the noise a sample, (B,), plus the KL to the other's posterior, in bits a dimension.

        As in the bound of `loss`, the KL sees a detached mean and trains the variance alone.
        """
        (noise, raw), (other_noise, other_raw) = noise_and_variance(output, x), noise_and_variance(wanted, x)
        error = (noise - other_noise).square().flatten(1).mean(1)
        if raw is None or other_raw is None:
            return error
        mean, other_mean = (
            self.posterior_mean(self.x0_from_noise(x, t, one), x, t) for one in (noise.detach(), other_noise)
        )
        kl = gaussian_kl(other_mean, self.log_variance(other_raw, t), mean, self.log_variance(raw, t))
        return error + kl.flatten(1).mean(1) / math.log(2.0)

    def _bound(self, x0: Tensor, x: Tensor, t: Tensor, predicted: Tensor, raw: Tensor) -> Tensor:
        """One term of the variational bound, (B,), bits a dimension: a KL for t > 0, a likelihood for t = 0."""
        mean = self.posterior_mean(self.x0_from_noise(x, t, predicted), x, t)
        log_var = self.log_variance(raw, t)
        kl = gaussian_kl(self.posterior_mean(x0, x, t), at(self.min_log_var, t, x), mean, log_var)
        bound = torch.where(over(t, x) == 0, -discretised_log_likelihood(x0, mean, log_var), kl)
        return bound.flatten(1).mean(1) / math.log(2.0)


def noise_and_variance(output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the noise in a network's output, shaped as x, and what says where the variance lies, if that is there."""
    if output.shape[1] != 2 * x.shape[1]:
        return output, None
    noise, raw = output.chunk(2, dim=1)
    return noise, raw


def respaced(count: int) -> Diffusion:
    """The chain over `count` evenly spaced timesteps, both ends included."""
    positions = torch.linspace(0, STEPS - 1, count, dtype=torch.float64)
    return Diffusion(positions.round().long())


def at(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Return values[t] as (B,1,..), in float32 and on the device of `like`."""
    return over(values.to(device=like.device, dtype=torch.float32)[t], like)


def gaussian_kl(mean: Tensor, log_var: Tensor, other_mean: Tensor, other_log_var: Tensor) -> Tensor:
    """KL(first || second) of diagonal Gaussians, in nats, elementwise."""
    difference = (mean - other_mean).square() * torch.exp(-other_log_var)
    return 0.5 * (other_log_var - log_var - 1 + torch.exp(log_var - other_log_var) + difference)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Return the log-probability, in nats, of images with 256 levels in [-1, 1] under a Gaussian (see `normal_cdf`)."""
    centred, precision = x - mean, torch.exp(-0.5 * log_var)
    above = normal_cdf(precision * (centred + 1 / 255))
    below = normal_cdf(precision * (centred - 1 / 255))
    inside = torch.where(x > 0.999, 1 - below, above - below)
    return torch.where(x < -0.999, above, inside).clamp(min=1e-12).log()


def normal_cdf(x: Tensor) -> Tensor:
    """Return the normal CDF by the tanh formula of the published training code, within 3e-4 of the exact one."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
