"""`evaluate`: samples of each row (a step of its own, in `rows.py`), then the table over all rows.

The table's rows: `heldout`, real images that nothing was trained on (the floor), and the models that `rows.py` sampled.
Each row, and what it is held against, comes as the statistics that its step left. Leaves `results.json` and the plot of
quality against cost.
"""

from __future__ import annotations

import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import cast, get_args

import torch

from graftwork.cluster.fan_out import fan_out
from graftwork.models.costs import forward_flops, forward_inputs, forward_memory, forward_seconds, num_parameters
from graftwork.models.frechet import distance
from graftwork.models.precision import computing
from graftwork.specs.evaluate import Metric
from graftwork.specs.steps import EvaluateParams, Row, SampleParams
from graftwork.stages import Context
from graftwork.stages.hybrid import row_model
from graftwork.stages.latents import read_meta
from graftwork.stages.pictures import quality_against_cost
from graftwork.stages.rows import draw, labels_of, sample_row
from graftwork.stages.scores import read_scores, read_statistics_of

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
    (results,) = fan_out(_measure, context, [context.params], context.resources)
    (context.out / "results.json").write_text(json.dumps(results, indent=1))
    quality_against_cost(
        results, "distance" if "distance" in results["heldout"] else "fid", context.out / "quality-cost"
    )


def _measure(context: Context, params: EvaluateParams, device: torch.device) -> Table:
    table: Table = {row: _quality(context, row, params.recipe.metrics) for row in ("heldout", *_rows(context))}
    _cost(context, table, device)
    return table


def _quality(context: Context, row: str, metrics: tuple[Metric, ...]) -> dict[str, float]:
    """`distance`: Frechet, on the classifier's features, to the training images. `agreement`: the share that the
    classifier reads as their label. `fid`: Frechet, on Inception's features, to the reference."""
    folder, columns = context.input(f"rows/{row}"), {}
    if "classifier" in metrics:
        columns["distance"] = _distance(context, folder, "classifier")
        columns["agreement"] = read_scores(folder).agreement
    if "fid" in metrics:
        columns["fid"] = _distance(context, folder, "fid")
    return columns


def _distance(context: Context, folder: Path, metric: Metric) -> float:
    reference = read_statistics_of(context.input(f"reference/{metric}"), metric)
    return distance(read_statistics_of(folder, metric), reference)


def _cost(context: Context, table: Table, device: torch.device) -> None:
    """What each model costs; real images cost nothing.

    params; flops: of a forward pass of one sample; latency_ms and peak_memory (bytes): of a forward pass of a batch;
    ms_per_sample: of a whole sampling.
    """
    params: EvaluateParams = context.params
    table["heldout"] |= dict.fromkeys(COSTS, 0)
    models = {row: row_model(context, row, params.seed).to(device) for row in _rows(context)}
    seconds: dict[Row, list[float]] = {row: [] for row in models}
    latency: dict[Row, list[float]] = {row: [] for row in models}
    meta, timed = read_meta(context.input("features")), range(TIMED_SAMPLES)
    labels = labels_of(timed, TIMED_SAMPLES, len(meta.classes))
    with computing(params.recipe.precision, device):
        # Rounds over all rows, so that a machine that slows down slows them all; the first round warms up.
        for round_ in range(TIMED_RUNS + 1):
            for row, model in models.items():
                elapsed = _timed(partial(draw, model, meta, timed, labels, params.recipe.sampler, params.seed, device))
                one_pass = forward_seconds(model, forward_inputs(model, params.recipe.batch, device))
                if round_ > 0:
                    seconds[row].append(elapsed)
                    latency[row].append(one_pass)
            context.report(round_ + 1, TIMED_RUNS + 1)
        memory = {
            row: forward_memory(model, forward_inputs(model, params.recipe.batch, device))
            for row, model in models.items()
        }
    for row, model in models.items():
        costs = (
            num_parameters(model),
            forward_flops(model),
            1000 * statistics.median(seconds[row]) / TIMED_SAMPLES,
            1000 * statistics.median(latency[row]),
            memory[row],
        )
        table[row] |= dict(zip(COSTS, costs, strict=True))


def _timed(work: partial[torch.Tensor]) -> float:
    """Seconds until the samples are on the host."""
    start = time.perf_counter()
    work().cpu()
    return time.perf_counter() - start


def _rows(context: Context) -> list[Row]:
    """The sampled rows of this job, in the table's order."""
    return [cast(Row, row) for row in get_args(Row) if f"rows/{row}" in context.inputs]
