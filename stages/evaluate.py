"""`evaluate`: samples of each row (a step of its own, in `rows.py`), then the table over all rows.

The table's rows: `heldout`, real images that nothing was trained on (the floor), and the models that `rows.py`
sampled. Leaves `results.json`, a labelled grid of held-out images and the plot of quality against cost.
"""

from __future__ import annotations

import json
import statistics
import time
from functools import partial
from typing import cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from cluster.runtime import fan_out
from models.classifier import Classifier
from models.costs import forward_flops, forward_inputs, forward_memory, forward_seconds, num_parameters
from models.frechet import distance, gaussian
from models.precision import computing
from specs.steps import EvaluateParams, Row, SampleParams
from stages import Context
from stages.codec import Coder, load_codec
from stages.hybrid import row_model
from stages.inception import inception_features, load_inception, reference_statistics
from stages.latents import read, read_meta
from stages.pictures import quality_against_cost, sample_grid
from stages.rows import draw, sample_row

TIMED_SAMPLES, TIMED_RUNS = 16, 3
COSTS = ("params", "flops", "ms_per_sample", "latency_ms", "peak_memory")
Table = dict[str, dict[str, float]]


def run(context: Context) -> None:
    if isinstance(context.params, SampleParams):
        sample_row(context)
    else:
        _tabulate(context)


def _tabulate(context: Context) -> None:
    params: EvaluateParams = context.params
    # One task, so that a GPU can be asked for and the rows are timed one after another.
    ((results, heldout),) = fan_out(_measure, context, [params], context.resources)
    (context.out / "results.json").write_text(json.dumps(results, indent=1))
    meta = read_meta(context.input("features"))
    labels = [meta.classes[label] for label in read(context.input("features"), "heldout").labels[: len(heldout)]]
    sample_grid(heldout, labels, "heldout", context.out / "heldout")
    quality_against_cost(
        results, "distance" if "distance" in results["heldout"] else "fid", context.out / "quality-cost"
    )


def _measure(context: Context, params: EvaluateParams, device: torch.device) -> tuple[Table, NDArray[np.uint8]]:
    """The table, and the held-out images in it."""
    recipe = params.recipe
    features = context.input("features")
    codec = load_codec(params.codec, device)
    images = {"heldout": codec.decode(read(features, "heldout").first(recipe.samples).tensor())}
    labels = {"heldout": read(features, "heldout").labels[: recipe.samples].numpy()}
    for row in _rows(context):
        folder = context.input(f"rows/{row}")
        images[row], labels[row] = np.load(folder / "samples.npy"), np.load(folder / "labels.npy")
    table: Table = {row: {} for row in images}
    if "classifier" in recipe.metrics:
        _judge(context, codec, table, images, labels)
    if "fid" in recipe.metrics:
        assert recipe.reference is not None
        network = load_inception(recipe.inception, device)
        reference = reference_statistics(recipe.reference, network, device)
        for name, columns in table.items():
            features_of_row = inception_features(images[name], network, device)
            columns["fid"] = distance(gaussian(features_of_row), reference)
    _cost(context, table, device)
    return table, images["heldout"]


def _judge(
    context: Context,
    codec: Coder,
    table: Table,
    images: dict[str, NDArray[np.uint8]],
    labels: dict[str, NDArray[np.int64]],
) -> None:
    """`distance`: Frechet, on the classifier's features, to the training images. `agreement`: read as their label."""
    folder = context.input("features")
    meta, training = read_meta(folder), codec.decode(read(folder, "training").tensor())
    judge = Classifier(meta.channels, meta.side, len(meta.classes))
    judge.load_state_dict(load_file(context.input("classifier") / "classifier.safetensors"))
    judge.eval()
    reference = gaussian(_features(judge, training))
    for row, columns in table.items():
        features = _features(judge, images[row])
        columns["distance"] = distance(gaussian(features), reference)
        with torch.no_grad():
            read_as = judge.head(torch.from_numpy(features)).argmax(1).numpy()
        columns["agreement"] = float((read_as == labels[row]).mean())


def _features(judge: Classifier, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    with torch.no_grad():
        parts = [judge.features((part.float() - 128) / 127.5) for part in torch.from_numpy(images).split(256)]
    return torch.cat(parts).numpy()


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
    meta = read_meta(context.input("features"))
    with computing(params.recipe.precision, device):
        # Rounds over all rows, so that a machine that slows down slows them all; the first round warms up.
        for round_ in range(TIMED_RUNS + 1):
            for row, model in models.items():
                elapsed = _timed(
                    partial(draw, model, meta, range(TIMED_SAMPLES), params.recipe.sampler, params.seed, device)
                )
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
