"""`profile`: what each operator of the rootstock puts out, and where its attention goes, on noised training latents.

For every site the distribution of the operator's output; for every site with softmax attention the mass within each
band, overall and by quarter of the timesteps (arXiv 2506.05340). Heavy tails are why attention is distilled
with L1; locality tells which blocks may do with a local operator. Leaves `profile.json`, which
`stages.artifacts.evidence` reads, the same as a table, `profile.csv`, and pictures.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from graftwork.models.measures.locality import Locality
from graftwork.models.numerics.precision import computing, products
from graftwork.models.operators.attention import Attention
from graftwork.models.rootstocks import RootstockConfig
from graftwork.models.surgery import observe, scion_at
from graftwork.specs.edits import Site
from graftwork.stages.artifacts.evidence import (
    DISTANCES,
    Curve,
    LocalityCurves,
    Outputs,
    Profile,
    QuarterCurves,
    write_profile,
)
from graftwork.stages.artifacts.hybrids import load_model
from graftwork.stages.artifacts.latents import noised, read
from graftwork.stages.catalog.profile import ProfileParams
from graftwork.stages.contract import Context
from graftwork.stages.pictures.pictures import activation_boxes, locality_by_quarter, locality_map

BATCH = 64  # at most
OBSERVED_BYTES = 2**30  # of one batch: what goes into and comes out of all sites
LEVELS = (0.001, 0.01, 0.25, 0.5, 0.75, 0.99, 0.999)
NUM_LARGEST = 5
SIGN = 1 << 15  # of a bfloat16


def run(context: Context) -> None:
    params: ProfileParams = context.params
    model, _ = load_model(context.inputs, "base")
    model = model.to(context.device)
    sites = [Site(block=block, target=target) for block in range(model.config.depth) for target in ("mha", "mlp")]
    attentions = {site: scion for site in sites if isinstance(scion := scion_at(model, site), Attention)}
    objective = model.config.objective.on(context.device)
    tallies = {site: Tally(context.device) for site in sites}
    localities = {site: Locality(model.config.grid, context.device) for site in attentions}

    training = read(context.input("features"), "training").stratified(params.samples)
    samples = noised(training, model.config.objective, 1, params.seed, "profile")
    batch, done = batch_size(model.config, len(sites)), 0
    while done < len(samples):
        part = samples[done : done + batch].to(context.device)
        with computing(params.precision, context.device):
            observations = observe(model, sites, part.z, part.t, part.condition)
        quarters = objective.quarter(part.t)
        with products(params.precision):  # in bf16 the statistics are fp32's
            for site, observation in observations.items():
                tallies[site].add(observation.output)
                if site in attentions:
                    localities[site].add(attentions[site], observation.inputs[0], quarters)
        done += len(part)
        context.report(done, len(samples))
        context.stop_if_asked()

    outputs = {str(site): tally.summary(str(site)) for site, tally in tallies.items()}
    profile = Profile(outputs=outputs, locality=curves({str(site): where for site, where in localities.items()}))
    write_profile(context.out, profile)
    write_table(profile, context.out / "profile.csv")
    activation_boxes(profile.outputs, context.out / "activations")
    if attentions:
        locality_map(profile.locality, context.out / "locality")
        locality_by_quarter(profile.locality, context.out / "locality_by_quarter")


def batch_size(config: RootstockConfig, num_sites: int) -> int:
    """As many samples as OBSERVED_BYTES hold the activations of, in float32."""
    return max(1, min(BATCH, OBSERVED_BYTES // (2 * num_sites * config.place.num_tokens * config.width * 4)))


class Tally:
    """The distribution of values, of which only sums, the largest and a histogram are kept.

    A bin of the histogram is a bfloat16: a value is counted where it rounds to, so quantiles are exact to within 0.4%
    at any magnitude, and the same however values are split into batches.
    """

    def __init__(self, device: torch.device) -> None:
        self.powers = torch.zeros(4, dtype=torch.float64, device=device)
        self.largest = torch.zeros(NUM_LARGEST, device=device)
        self.counts = torch.zeros(2 * SIGN, dtype=torch.int64, device=device)

    def add(self, values: Tensor) -> None:
        values = values.flatten()
        exact = values.double()
        self.powers += torch.stack([exact.pow(power).sum() for power in (1, 2, 3, 4)])
        self.largest = torch.cat([self.largest, values.abs().float()]).topk(NUM_LARGEST).values
        bins = values.bfloat16().view(torch.int16).int() + SIGN
        self.counts += bins.bincount(minlength=len(self.counts))

    def summary(self, name: str) -> Outputs:
        """name: of whose values they are, for the complaint if they are not finite."""
        if not self.largest.isfinite().all():
            raise FloatingPointError(f"{name} puts out values that are not finite")
        count = int(self.counts.sum())
        first, second, third, fourth = (self.powers / count).tolist()
        variance = max(0.0, second - first**2)
        central_fourth = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        varies = variance > 1e-12 * second  # else it is rounding
        return Outputs(
            mean=first,
            std=variance**0.5,
            excess_kurtosis=central_fourth / variance**2 - 3 if varies else 0.0,
            largest=self.largest[0].item(),
            largest_magnitudes=tuple(self.largest.tolist()),
            quantiles=self.quantiles(),
        )

    def quantiles(self) -> dict[str, float]:
        """Level -> the least value that this share of all values does not exceed."""
        values = torch.arange(-SIGN, SIGN, dtype=torch.int16).view(torch.bfloat16).float()
        values, order = values.sort()
        below = self.counts.cpu()[order].cumsum(0).double()
        places = torch.searchsorted(below, torch.tensor(LEVELS, dtype=torch.float64) * below[-1])
        return dict(zip(map(str, LEVELS), values[places].tolist(), strict=True))


def curves(localities: Mapping[str, Locality]) -> LocalityCurves:
    overall = {site: where.overall() for site, where in localities.items()}
    quarters = {site: where.by_quarter() for site, where in localities.items()}
    return LocalityCurves(
        tokens={site: _curve(mass.tokens) for site, mass in overall.items()},
        patches={site: _curve(mass.patches) for site, mass in overall.items()},
        by_quarter=QuarterCurves(
            tokens={site: tuple(each and _curve(each.tokens) for each in four) for site, four in quarters.items()},
            patches={site: tuple(each and _curve(each.patches) for each in four) for site, four in quarters.items()},
        ),
    )


def _curve(mass: Tensor) -> Curve:
    return tuple(round(value, 9) for value in mass.tolist())


def write_table(profile: Profile, path: Path) -> None:
    """A line a site; of the bands, those of 1, 2, 4, .. tokens and patches."""
    longest = {distance: max(map(len, profile.locality.along(distance).values()), default=0) for distance in DISTANCES}
    bands = [(2**power, distance) for distance in DISTANCES for power in range(32) if 2**power < longest[distance]]
    columns = ["site", "mean", "std", "excess_kurtosis", "largest", *(f"quantile_{level}" for level in LEVELS)]
    columns += [f"within_{band}_{distance}" for band, distance in bands]
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for site, output in profile.outputs.items():
            statistics = [output.mean, output.std, output.excess_kurtosis, output.largest, *output.quantiles.values()]
            masses = [(profile.locality.along(distance).get(site), band) for band, distance in bands]
            within = [curve[band] if curve else "" for curve, band in masses]
            table.writerow([site, *statistics, *within])
