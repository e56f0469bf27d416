"""Flow matching on the linear path, with the velocity as what is predicted (SiT, arXiv 2401.08740).

t lies in [0, 1] and t = 1 is data: x_t = t x1 + (1 - t) x0, of noise x0 and a clean sample x1, so that the velocity is
x1 - x0. A network is given t as it is, not times 1000. Of a network with two outputs a channel (`learn_sigma`), as the
published ones are, the second half is left out. Shapes: x (B,C,..), t (B,) float32.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from graftwork.models.condition import Condition
from graftwork.models.objectives import QUARTERS, Network, over, register
from graftwork.specs.sampler import Prediction


@register
class LinearFlow:
    """The objective of a flow model: it draws t, noises, and gives the loss."""

    kind: ClassVar[Prediction] = "velocity"

    def on(self, device: torch.device) -> Self:
        """Return the objective: it has no constants that would lie on a device."""
        return self

    def draw_t(self, count: int, source: torch.Generator) -> Tensor:
        """Return t (count,), uniform in [0, 1)."""
        return torch.rand(count, generator=source, device=source.device)

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return the point at t on the line from the noise to the clean samples `x0`."""
        t = over(t, x0)
        return t * x0 + (1 - t) * noise

    def loss(self, network: Network, x0: Tensor, t: Tensor, condition: Condition, noise: Tensor) -> Tensor:
        """Return the squared error of the velocity a sample, (B,), a mean over its elements."""
        predicted = velocity_in(network(self.noised(x0, t, noise), t, condition).float(), x0)
        return (predicted - (x0 - noise)).square().flatten(1).mean(1)

    def mimicry(self, x: Tensor, t: Tensor, output: Tensor, wanted: Tensor) -> Tensor:
        """Return the squared difference of the velocities a sample, (B,), a mean over their elements."""
        return (velocity_in(output, x) - velocity_in(wanted, x)).square().flatten(1).mean(1)

    def x0(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """Return the clean samples that a network's output at (x, t) points to: x + (1 - t) v."""
        return x + (1 - over(t, x)) * velocity_in(output, x)

    def quarter(self, t: Tensor) -> Tensor:
        """Return the quarter (B,) of the noise levels that t is in: 0 has the least noise, 3 the most."""
        return ((1 - t) * QUARTERS).long().clamp(max=QUARTERS - 1)


def velocity_in(output: Tensor, like: Tensor) -> Tensor:
    """Return the part of a network's output that is the velocity, shaped as `like`."""
    return output[:, : like.shape[1]]
