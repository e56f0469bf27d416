"""Classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from graftwork.models.condition import Condition, Conditioner
from graftwork.models.objectives import Network
from graftwork.specs.sampler import Sampler


def guided(network: Network, condition: Condition, conditioner: Conditioner, sampler: Sampler) -> Network:
    """Return a network with classifier-free guidance for samples of this condition, to be called with it (fp32).

    What is predicted becomes null + guidance * (conditional - null) (arXiv 2207.12598), from one batch of both halves.
    The published sampler guides the first three latent channels only; the variance is the conditional one's.
    """
    if sampler.guidance == 1.0:
        return network
    null = conditioner.null(condition)

    def run(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        both = network(torch.cat([x, x]), torch.cat([t, t]), condition.join(null)).float()
        conditional, without = both.chunk(2)
        channels = x.shape[1] if sampler.guided_channels == "all" else min(3, x.shape[1])
        predicted = torch.lerp(without[:, :channels], conditional[:, :channels], sampler.guidance)
        return torch.cat([predicted, conditional[:, channels:]], dim=1)

    return run
