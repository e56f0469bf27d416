"""`evaluate`: samples of each row (a step of its own, in `samples.py`), then the table over all rows.

The table's rows: `heldout`, real images that nothing was trained on (the floor), and the models sampled by
`samples.py`. Each row, and what it is held against, comes as the statistics that its step left. Leaves
`results.json` and the plot of quality against cost.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from typing import cast, get_args

import torch

from graftwork.cluster.fan_out import fan_out
from graftwork.models.condition import Condition
from graftwork.models.measures.costs import (
    forward_flops,
    forward_inputs,
    forward_memory,
    forward_seconds,
    num_parameters,
)
from graftwork.models.numerics.precision import computing
from graftwork.models.objectives import Network
from graftwork.models.rootstocks import Rootstock
from graftwork.specs.evaluate import EvaluateSpec, Row
from graftwork.specs.metrics import Metric
from graftwork.stages.artifacts.evidence import read_trial
from graftwork.stages.artifacts.hybrids import row_model
from graftwork.stages.artifacts.latents import read_meta
from graftwork.stages.artifacts.plan import read_decided
from graftwork.stages.catalog.evaluate import EvaluateParams, SampleParams
from graftwork.stages.contract import Context
from graftwork.stages.evaluation.judges import figures_of_row
from graftwork.stages.evaluation.samples import draw, labels_of, network_of, sample_row
from graftwork.stages.evaluation.subjects import subjects
from graftwork.stages.pictures.pictures import quality_against_cost

TIMED_SAMPLES, TIMED_RUNS = 16, 3
COSTS = ("params", "flops", "ms_per_sample", "latency_ms", "peak_memory")
Table = dict[str, dict[str, float]]


def run(context: Context) -> None:
    if isinstance(context.params, SampleParams):
        sample_row(context)
    else:
        _tabulate(context)


def _tabulate(context: Context) -> None:
    # One task, so that a GPU can be asked for and the rows are timed one after another.
    (costs,) = fan_out(_costs, context, [context.params], context.resources)
    # No GPU is held while a CPU takes the roots of covariances.
    on_cpu = context.resources.model_copy(update={"gpu": 0.0})
    qualities = list(fan_out(_quality, context, list(costs), on_cpu))
    results = {row: _finite(context, row, quality) | costs[row] for row, quality in zip(costs, qualities, strict=True)}
    if "trial" in context.inputs:
        plan = read_decided(context.input("select"))
        results["stage1"] |= _finite(context, "stage1", read_trial(context.input("trial")).columns(plan))
    (context.out / "results.json").write_text(json.dumps(results, indent=1))
    *_, last = qualities  # of a sampled row
    quality_against_cost(results, next(iter(last), "params"), context.out / "quality-cost")


def _finite(context: Context, row: str, figures: dict[str, float]) -> dict[str, float]:
    """Return the figures that are numbers, and say which are not: JSON, MLflow and comparisons know no others."""
    for name, value in figures.items():
        if not math.isfinite(value):
            context.note(f"{row}: {name} is {value}, and left out of the table")
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _quality(context: Context, row: str, _: torch.device) -> dict[str, float]:
    return figures_of_row(context, row, _metrics(context))


def _metrics(context: Context) -> list[Metric]:
    params: EvaluateParams = context.params
    return sorted(set(params.recipe.metrics))


@dataclass(frozen=True)
class Timed:
    """A row's model, what it is sampled with, and the seconds of each sampling and of each forward pass."""

    model: Rootstock
    network: Network
    samplings: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)


def _costs(context: Context, params: EvaluateParams, device: torch.device) -> Table:
    """Return what each model costs, computed as its samples were; real images cost nothing.

    params; flops: of a forward pass of one sample; latency_ms and peak_memory (bytes): of a forward pass of a batch;
    ms_per_sample: of a whole sampling.
    """
    recipe, rows = params.recipe, {row: _timed_row(context, row, device) for row in _rows(context)}
    meta, timed = read_meta(context.input("features")), range(TIMED_SAMPLES)
    told = subjects(context)
    condition = Condition(labels=told.first + labels_of(timed, TIMED_SAMPLES, len(told.names)))
    # Rounds over all rows, so that a machine that slows down slows them all; the first round warms up.
    for round_ in range(TIMED_RUNS + 1):
        for row in rows.values():
            drawn = (row.model, meta, timed, condition, recipe.sampler, params.seed, device)
            sampling = partial(draw, row.network, *drawn)
            with computing(recipe.precision, device):
                row.samplings.append(_seconds(sampling))
                # By now bf16 has rounded the weights, which a sampling does once.
                row.passes.append(forward_seconds(row.network, forward_inputs(row.model, recipe.batch, device)))
        context.report(round_ + 1, TIMED_RUNS + 1)
    table: Table = {"heldout": dict.fromkeys(COSTS, 0)}
    for name, row in rows.items():
        table[name] = dict(zip(COSTS, _cost(row, recipe, device), strict=True))
    return table


def _timed_row(context: Context, row: Row, device: torch.device) -> Timed:
    params: EvaluateParams = context.params
    model = row_model(context, row, params.seed).to(device)
    return Timed(model, network_of(model, params.recipe.compile))


def _cost(row: Timed, recipe: EvaluateSpec, device: torch.device) -> tuple[float, ...]:
    """In the order of COSTS."""
    with computing(recipe.precision, device):  # entered anew: bf16's rounded weights are part of the memory
        memory = forward_memory(row.model, forward_inputs(row.model, recipe.batch, device), row.network)
    return (
        num_parameters(row.model),
        forward_flops(row.model),
        1000 * statistics.median(row.samplings[1:]) / TIMED_SAMPLES,
        1000 * statistics.median(row.passes[1:]),
        memory,
    )


def _seconds(work: partial[torch.Tensor]) -> float:
    """Seconds until the samples are on the host."""
    start = time.perf_counter()
    work().cpu()
    return time.perf_counter() - start


def _rows(context: Context) -> list[Row]:
    """The sampled rows of this job, in the table's order."""
    return [cast(Row, row) for row in get_args(Row) if f"rows/{row}" in context.inputs]
