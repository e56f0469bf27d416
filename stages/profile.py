"""`profile`: what each operator of the rootstock puts out, on noised training latents. Leaves `profile.json`.

For every site: mean, standard deviation, excess kurtosis and largest magnitude of the operator's output. Heavy tails
(a large kurtosis) are why attention is distilled with L1.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from models import checkpoints
from models.surgery import observe
from specs.graft import Site
from specs.steps import ProfileParams
from stages import Context
from stages.latents import noised, read

BATCH = 64


def run(context: Context) -> None:
    params: ProfileParams = context.params
    model, _ = checkpoints.load(context.input("base"))
    model = model.to(context.device)
    sites = [Site(block=block, target=target) for block in range(model.config.depth) for target in ("mha", "mlp")]
    latents = read(context.input("features"), "training").first(params.samples)
    shown = noised(latents, 1, params.seed, "profile")
    moments = {site: Moments() for site in sites}
    for start in range(0, len(shown.z), BATCH):
        part = slice(start, start + BATCH)
        for site, seen in observe(
            model, sites, *(each[part].to(context.device) for each in (shown.z, shown.t, shown.labels))
        ).items():
            moments[site].add(seen.output)
        context.report(min(start + BATCH, len(shown.z)), len(shown.z))
    table = {str(site): moments[site].summary() for site in sites}
    (context.out / "profile.json").write_text(json.dumps(table, indent=1))


class Moments:
    """Raw moments up to the fourth, and the largest magnitude, accumulated in float64."""

    def __init__(self) -> None:
        self.count, self.largest = 0, 0.0
        self.powers = torch.zeros(4, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        values = values.cpu().double().flatten()
        self.count += values.numel()
        self.largest = max(self.largest, values.abs().max().item())
        self.powers += torch.stack([values.pow(power).sum() for power in (1, 2, 3, 4)])

    def summary(self) -> dict[str, float]:
        first, second, third, fourth = (self.powers / self.count).tolist()
        variance = second - first**2
        central_fourth = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        return {
            "mean": first,
            "std": variance**0.5,
            "excess_kurtosis": central_fourth / variance**2 - 3 if variance > 0 else 0.0,
            "largest": self.largest,
        }
