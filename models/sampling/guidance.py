"""Classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from graftwork.models.objectives.gaussian import Network
from graftwork.specs.sampler import Sampler


def guided(network: Network, y: Tensor, null_class: int, sampler: Sampler) -> Network:
    """Classifier-free guidance (arXiv 2207.12598): noise = null + guidance * (conditional - null), in fp32.

    The published sampler guides the first three latent channels only; the variance is the conditional one's.
    """
    if sampler.guidance == 1.0:
        return network
    null = torch.full_like(y, null_class)

    def run(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).float()
        with_label, without = both.chunk(2)
        channels = x.shape[1] if sampler.guided_channels == "all" else min(3, x.shape[1])
        noise = torch.lerp(without[:, :channels], with_label[:, :channels], sampler.guidance)
        return torch.cat([noise, with_label[:, channels:]], dim=1)

    return run
