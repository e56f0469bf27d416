"""`reference`: what samples are held against, computed once, whatever is grafted; and the table's row of real images.

`reference/<metric>` looks at the training images, or at those of `evaluate.reference`, or takes the statistics that
it is: each leaves mu and sigma of the features in `<metric>.npz`. `reference/pool3` leaves the features of each of its
images in `pool3.npy`, for the metrics that need them. `reference/heldout` looks at real images that nothing was trained
on, and leaves what a sampled row does (see `samples.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from graftwork.specs.codec import Codec
from graftwork.specs.data import COLOURS
from graftwork.stages.artifacts.arrays import GrowingArray
from graftwork.stages.artifacts.latents import Latents, read, read_meta
from graftwork.stages.catalog.reference import (
    GivenFeaturesParams,
    GivenStatisticsParams,
    HeldoutParams,
    TrainingStatisticsParams,
)
from graftwork.stages.contract import Context
from graftwork.stages.evaluation.inception import Inception, images_of
from graftwork.stages.evaluation.judges import Judges, Scores, Verdict, rows_file, statistics_file
from graftwork.stages.evaluation.metrics import JUDGES
from graftwork.stages.features.codec import load_codec

BATCH = 256


def run(context: Context) -> None:
    params: TrainingStatisticsParams | GivenStatisticsParams | GivenFeaturesParams | HeldoutParams = context.params
    if isinstance(params, GivenStatisticsParams):
        _read_reference(context, params)
    elif isinstance(params, GivenFeaturesParams):
        _keep_features(context, params)
    elif isinstance(params, TrainingStatisticsParams):
        _judge_training_images(context, params)
    else:
        _judge_heldout_images(context, params)


def _read_reference(context: Context, params: GivenStatisticsParams) -> None:
    def report(done: int, total: int) -> None:
        context.report(done, total)
        context.stop_if_asked()

    background = params.background or COLOURS["white"]
    judge = JUDGES[params.metric]
    statistics = judge.read_reference(context, Path(params.reference), background, params.inception, report)
    statistics.write(statistics_file(context.out, params.metric))


def _keep_features(context: Context, params: GivenFeaturesParams) -> None:
    inception = Inception.shared(params.inception, context.device)
    images = images_of(params.reference, params.background or COLOURS["white"])
    features, done = GrowingArray(rows_file(context.out, params.features), len(images)), 0
    for batch in images.batches(BATCH):
        features.append(inception.pool3(batch).float().cpu().numpy())
        done += len(batch)
        context.report(done, len(images))
        context.stop_if_asked()


def _judge_training_images(context: Context, params: TrainingStatisticsParams) -> None:
    judges = Judges(context, (params.metric,), None, context.device)
    training = read(context.input("features"), "training")
    moments = _judged(context, judges, params.codec, training).moments
    for metric, sums in moments.items():
        sums.gaussian().write(statistics_file(context.out, metric))


def _judge_heldout_images(context: Context, params: HeldoutParams) -> None:
    from graftwork.stages.pictures.pictures import CELLS, sample_grid

    judges = Judges(context, params.metrics, params.inception, context.device)
    heldout = read(context.input("features"), "heldout").spread(params.samples)
    _judged(context, judges, params.codec, heldout).write(context.out)
    classes = read_meta(context.input("features")).classes
    images, labels = next(_decoded(context, params.codec, heldout.stratified(CELLS)))
    sample_grid(images, [classes[label] for label in labels], "heldout", context.out / "grid")


def _judged(context: Context, judges: Judges, codec: Codec, latents: Latents) -> Scores:
    scores, files = Scores(), FeatureFiles(context.out, len(latents.x))
    for images, labels in _decoded(context, codec, latents):
        verdict = judges.look(images, labels)
        scores.add(verdict)
        files.add(verdict)
        context.report(scores.count, len(latents.x))
        context.stop_if_asked()
    return scores


class FeatureFiles:
    """The files of the features that metrics keep of so many images."""

    def __init__(self, folder: Path, num_images: int) -> None:
        self.folder, self.num_images = folder, num_images
        self._files: dict[str, GrowingArray] = {}

    def add(self, verdict: Verdict) -> None:
        """Write what is kept of the images that come next."""
        for name, rows in verdict.feature_rows().items():
            if name not in self._files:
                self._files[name] = GrowingArray(rows_file(self.folder, name), self.num_images)
            self._files[name].append(rows)


def _decoded(context: Context, codec: Codec, latents: Latents) -> Iterator[tuple[NDArray[np.uint8], Tensor]]:
    """The images of the latents and their labels, some at a time."""
    coder = load_codec(codec, context.device, min(context.resources.gpu, 1.0))
    for x, labels in zip(latents.x.split(BATCH), latents.labels.split(BATCH), strict=True):
        yield coder.decode(x), labels
