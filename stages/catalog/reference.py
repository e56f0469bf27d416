"""What the rows of the table are held against, and the row of real images: whatever is grafted, they stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from graftwork.specs.codec import Codec
from graftwork.specs.fields import KeyedIfSet, LocalPath, Spec, Unkeyed
from graftwork.specs.likeness import DinoSpec
from graftwork.specs.metrics import METRICS, Metric
from graftwork.stages.catalog.inputs import images, last_turn
from graftwork.stages.data.npz import holds_images
from graftwork.stages.stage import External, Needs, Stage, StepDraft

if TYPE_CHECKING:
    from graftwork.specs.evaluate import EvaluateSpec
    from graftwork.specs.job import JobSpec


class TrainingStatisticsParams(Spec):
    """What a metric sees in the training images."""

    codec: Codec
    metric: Annotated[Metric, KeyedIfSet("classifier")] = "classifier"


class GivenStatisticsParams(Spec):
    """What a metric sees in the images of `evaluate.reference`, or the statistics that it is."""

    reference: Annotated[LocalPath, Unkeyed()]  # the content of both files is in the key
    background: str | None = None  # of images, in a folder: what shows through transparent pixels
    inception: Annotated[LocalPath | None, Unkeyed()] = None
    dino: Annotated[DinoSpec | None, KeyedIfSet()] = None
    metric: Annotated[Metric, KeyedIfSet("fid")] = "fid"


class GivenFeaturesParams(Spec):
    """The features of each image of `evaluate.reference`, for metrics that need them all."""

    features: str  # the name by which metrics keep them
    reference: Annotated[LocalPath, Unkeyed()]  # the content of both files is in the key
    background: str | None = None
    inception: Annotated[LocalPath | None, Unkeyed()] = None


class HeldoutParams(Spec):
    """The table's first row: real images that nothing was trained on."""

    codec: Codec
    samples: int
    metrics: tuple[Metric, ...]
    dino: Annotated[DinoSpec | None, KeyedIfSet()] = None
    inception: Annotated[LocalPath | None, Unkeyed()] = None


def steps(job: JobSpec) -> Iterator[StepDraft]:
    metrics = held_against(chosen_metrics(job))
    steps = {name: metric for metric, name in reference_steps(metrics).items()}  # metrics that keep the same share one
    for name, metric in steps.items():
        yield _training(job, metric) if METRICS[metric].reference == "training" else _given(job, metric, name)
    spec = job.evaluate
    dino = spec.dino if "fd_dino" in metrics else None
    params = HeldoutParams(codec=job.codec, samples=spec.samples, metrics=metrics, dino=dino, inception=spec.inception)
    needs = images(job) | judges(metrics)
    yield StepDraft("reference/heldout", params, needs, last_turn(job), networks(job.evaluate, metrics))


def _training(job: JobSpec, metric: Metric) -> StepDraft:
    params = TrainingStatisticsParams(codec=job.codec, metric=metric)
    return StepDraft(f"reference/{metric}", params, images(job) | judges([metric]))


def _given(job: JobSpec, metric: Metric, name: str) -> StepDraft:
    reference = job.evaluate.reference
    assert reference is not None
    external: tuple[External, ...] = (External("reference", reference, "evaluate.reference"),)
    if METRICS[metric].takes_images or holds_images(reference):  # statistics are taken as they are
        external += networks(job.evaluate, [metric])
    background = job.data.background if Path(reference).is_dir() else None
    params = given_params(metric, reference, background, job.evaluate.inception, job.evaluate.dino)
    return StepDraft(name, params, {}, external=external)


def given_params(
    metric: Metric, reference: str, background: str | None, inception: str | None, dino: DinoSpec | None = None
) -> GivenStatisticsParams | GivenFeaturesParams:
    """Return the parameters of the step that reads a given reference for a metric."""
    if (features := METRICS[metric].keeps) is not None:
        return GivenFeaturesParams(features=features, reference=reference, background=background, inception=inception)
    own = {"dino": dino} if metric == "fd_dino" else {"inception": inception}
    return GivenStatisticsParams(reference=reference, background=background, metric=metric, **own)


def chosen_metrics(job: JobSpec) -> tuple[Metric, ...]:
    """Return the job's metrics, each once, in an order that is the same however they were listed."""
    return tuple(sorted(set(job.evaluate.metrics)))


def held_against(metrics: Sequence[Metric]) -> tuple[Metric, ...]:
    """Return the metrics that look at real images too, and hold samples against them."""
    return tuple(metric for metric in metrics if METRICS[metric].reference != "none")


def reference_steps(metrics: Sequence[Metric]) -> dict[Metric, str]:
    """Return the step that leaves what samples are held against, for each metric that has such a thing."""
    return {metric: f"reference/{METRICS[metric].keeps or metric}" for metric in held_against(metrics)}


def judges(metrics: Sequence[Metric]) -> Needs:
    """Return the steps whose artifacts the metrics look with."""
    return {step: step for metric in metrics for step in METRICS[metric].steps}


def networks(evaluate: EvaluateSpec, metrics: Sequence[Metric]) -> tuple[External, ...]:
    """Return the files with networks that the metrics look with."""
    files = {field: path for metric in metrics for field, path in METRICS[metric].weights(evaluate).items()}
    return tuple(External(field, str(path), f"evaluate.{field}") for field, path in files.items())


STAGE = Stage(version=1, steps=steps, module="graftwork.stages.evaluation.reference")
