"""What steps found out, as the steps that decide by it read it. No torch: a plan can be explained without."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from graftwork.specs.edits import Edit, Site
from graftwork.specs.solve import CostName, ScoredError

Distance = Literal["tokens", "patches"]
DISTANCES: tuple[Distance, ...] = ("tokens", "patches")
Curve = tuple[float, ...]  # entry k is the attention mass within distance k; the last is 1


class Outputs(BaseModel):
    """The distribution of what an operator puts out."""

    model_config = ConfigDict(frozen=True)
    mean: float
    std: float
    excess_kurtosis: float
    largest: float  # magnitude
    largest_magnitudes: tuple[float, ...]  # falling
    quantiles: Mapping[str, float]  # by level, as in "0.999"; to within 0.4%


class QuarterCurves(BaseModel):
    """Attention mass at t in 0 .. 249, 250 .. 499, and so on, by site; None where no sample had such a timestep."""

    model_config = ConfigDict(frozen=True)
    tokens: Mapping[str, tuple[Curve | None, ...]]
    patches: Mapping[str, tuple[Curve | None, ...]]

    def along(self, distance: Distance) -> Mapping[str, tuple[Curve | None, ...]]:
        return self.tokens if distance == "tokens" else self.patches


class LocalityCurves(BaseModel):
    """Attention mass within each band, of the sites that have softmax attention over all tokens."""

    model_config = ConfigDict(frozen=True)
    tokens: Mapping[str, Curve]  # |i - j| along the sequence, 0 .. N - 1
    patches: Mapping[str, Curve]  # the larger of rows and columns in the image, 0 .. side - 1
    by_quarter: QuarterCurves

    def along(self, distance: Distance) -> Mapping[str, Curve]:
        return self.tokens if distance == "tokens" else self.patches


class Profile(BaseModel):
    """The artifact of `profile`."""

    model_config = ConfigDict(frozen=True)
    outputs: Mapping[str, Outputs]
    locality: LocalityCurves

    def mass_within(self, block: int, band: int, distance: Distance) -> float:
        """The share of the block's attention that goes no further than `band`."""
        curves = self.locality.along(distance)
        site = str(Site(block=block, target="mha"))
        if site not in curves:
            raise ValueError(f"{site} has no softmax attention over all tokens, so its locality is not known")
        return curves[site][min(band, len(curves[site]) - 1)]

    def excess_kurtosis(self, site: Site) -> float:
        """Of the operator's outputs; 0 for a Gaussian."""
        return self.outputs[str(site)].excess_kurtosis


def write_profile(folder: Path, profile: Profile) -> None:
    """`profile.json`: what each site puts out, by site, and `locality` beside them."""
    document = profile.model_dump(mode="json")
    (folder / "profile.json").write_text(json.dumps(document["outputs"] | {"locality": document["locality"]}))


def read_profile(folder: Path) -> Profile:
    document = json.loads((folder / "profile.json").read_text())
    locality = document.pop("locality")
    return Profile.model_validate({"outputs": document, "locality": locality})


class Distilled(BaseModel):
    """How well a scion mimics, on held-out latents; `distill.json`."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")  # of an operator whose output never changes
    loss: str  # that it was trained with
    loss_because: str
    heldout_error: float  # of that loss
    relative_error: float  # squared error over the outputs' variance
    best_epoch: int
    inherited: tuple[str, ...] | None = None  # its tensors that began with the rootstock's; None unless asked for


def write_distilled(folder: Path, distilled: Distilled) -> None:
    (folder / "distill.json").write_text(distilled.model_dump_json(indent=1, exclude_none=True))


def read_distilled(folder: Path) -> Distilled:
    return Distilled.model_validate_json((folder / "distill.json").read_bytes())


ERROR_WORDS: dict[ScoredError, str] = {"output": "error at the model's output", "loss": "change of the diffusion loss"}


class Scored(BaseModel):
    """What scions in the rootstock do to the whole model; `score.json`."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")
    output: float  # squared error at the model's output over the rootstock's output squared, a mean over samples
    output_by_quarter: tuple[float | None, ...]  # by the noise level, the first has the least; None without samples
    output_standard_error: float | None  # of the mean
    loss: float  # change of the diffusion loss
    loss_by_quarter: tuple[float | None, ...]
    loss_standard_error: float | None
    rootstock_loss: float
    samples: int

    def error(self, name: ScoredError) -> float:
        return self.output if name == "output" else self.loss


def write_scored(folder: Path, scored: Scored) -> None:
    (folder / "score.json").write_text(scored.model_dump_json(indent=1))


def read_scored(folder: Path) -> Scored:
    return Scored.model_validate_json((folder / "score.json").read_bytes())


class OperatorCosts(BaseModel):
    """What an operator in a block adds to what the model costs with the block as it was."""

    model_config = ConfigDict(frozen=True)
    target: str
    operator: dict[str, Any]
    latency_ms: float
    peak_memory: float  # bytes


class MeasuredCosts(BaseModel):
    """What a model costs on a device, and what each operator changes of it; `cost.json`."""

    model_config = ConfigDict(frozen=True)
    device: str
    batch: int
    latency_ms: float  # of the rootstock: a pass of a batch
    peak_memory: float  # bytes
    block_latency_ms: float  # of one block as it is: (T(2N) - T(N)) / N
    fixed_latency_ms: float  # of what is in no block: 2 T(N) - T(2N)
    operators: tuple[OperatorCosts, ...]

    def change(self, edit: Edit) -> tuple[float, float]:
        """Return what an edit changes of latency and peak memory; raise KeyError for an operator not measured."""
        operator = edit.operator.model_dump(mode="json")
        for one in self.operators:
            if one.target == edit.site.target and one.operator == operator:
                return one.latency_ms, one.peak_memory
        raise KeyError(str(edit.operator))


def write_costs(folder: Path, costs: MeasuredCosts) -> None:
    (folder / "cost.json").write_text(costs.model_dump_json(indent=1))


def read_costs(folder: Path) -> MeasuredCosts:
    return MeasuredCosts.model_validate_json((folder / "cost.json").read_bytes())


class Tried(BaseModel):
    """A plan as a whole model, beside what was predicted of it."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")
    name: str
    edits: tuple[str, ...]
    scoring: str
    predicted_error: float | None  # the sum of its sites' scores; None of a plan that no solver made
    error: float
    scored: Scored
    predicted: Mapping[CostName, float]
    measured: Mapping[CostName, float] = {}  # of plans that a solver made


class Trial(BaseModel):
    """A solver's plans, the best first, and others of the same cost as the best; `trial.json`."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")
    error: ScoredError
    rootstock: Mapping[CostName, float]
    measured_rootstock: Mapping[CostName, float]
    plans: tuple[Tried, ...]

    @property
    def words(self) -> str:
        return ERROR_WORDS[self.error]

    def columns(self, plan: int) -> dict[str, float]:
        """Return what was predicted of one of the solver's plans, and measured, as columns of the table."""
        chosen = self.plans[plan]
        predicted = {} if chosen.predicted_error is None else {"predicted_error": chosen.predicted_error}
        columns = predicted | {"measured_error": chosen.error}
        for name, value in chosen.measured.items():
            columns |= {f"predicted_{name}": chosen.predicted[name], f"measured_{name}": value}
        return columns


def write_trial(folder: Path, trial: Trial) -> None:
    (folder / "trial.json").write_text(trial.model_dump_json(indent=1))


def read_trial(folder: Path) -> Trial:
    return Trial.model_validate_json((folder / "trial.json").read_bytes())


class SearchedGroup(BaseModel):
    """What the gates of one group came to."""

    model_config = ConfigDict(frozen=True)
    blocks: tuple[int, ...]
    confidence: float  # probability of the mask that was chosen


class SearchedSite(BaseModel):
    """What the gate of one site came to, under a budget."""

    model_config = ConfigDict(frozen=True)
    block: int
    confidence: float  # probability of what was chosen


class Search(BaseModel):
    """The part of `search.json` that the selection goes by: groups, or under a budget sites."""

    model_config = ConfigDict(frozen=True)
    chosen: tuple[int, ...]  # blocks whose operator is replaced
    options: Mapping[int, int] = {}  # by block: which of several operators, where it is not the edit's own
    groups: tuple[SearchedGroup, ...] = ()
    sites: tuple[SearchedSite, ...] = ()

    def replaces(self, block: int, option: int) -> bool:
        """Whether the block's original gives way to that operator."""
        return block in self.chosen and self.options.get(block, 0) == option

    def confidence(self, block: int) -> float:
        """The probability of the choice that the block is part of."""
        of_groups = {block: group.confidence for group in self.groups for block in group.blocks}
        return (of_groups | {site.block: site.confidence for site in self.sites})[block]


def read_search(folder: Path) -> Search:
    return Search.model_validate_json((folder / "search.json").read_bytes())
