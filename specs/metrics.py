"""Metrics: what each one needs of a job, and which figures it puts into the table.

A metric takes two places: a class here, and a module in stages/evaluation/metrics/ that looks at images. The planner,
the checks before a run, the samples' judges and the table go by the registry.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from graftwork.specs.codec import PixelCodec
from graftwork.specs.fields import refuse
from graftwork.specs.text import JSON_PROMPTS

if TYPE_CHECKING:
    from graftwork.specs.evaluate import EvaluateSpec
    from graftwork.specs.job import JobSpec

GENEVAL_REPOSITORY = "github.com/djghosh13/geneval"
KID_SUBSET_IMAGES = 1000
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # the name under which pytorch-fid publishes the weights


class Networks(Protocol):
    """A section that names networks, which transformers reads."""

    model_types: ClassVar[Mapping[str, tuple[str, ...]]]  # what their config.json may say, by its fields

    def weights(self) -> Mapping[str, str]: ...


class MetricSpec:
    """A metric, as a plan knows it. All of it is of the class: there are no instances."""

    name: ClassVar[str]
    figures: ClassVar[tuple[str, ...]]  # columns of the table; quality is drawn against cost by the first one
    rising: ClassVar[tuple[str, ...]] = ()  # those of which more is better; of the others less is
    # Images that samples are held against: the job's own training images, or what `evaluate.reference` names; none
    # where each sample is judged by itself, and real images are not.
    reference: ClassVar[Literal["training", "given", "none"]] = "training"
    steps: ClassVar[tuple[str, ...]] = ()  # steps of the job whose artifacts it looks with
    keeps: ClassVar[str | None] = None  # features of every image that it needs; metrics of one name share them
    takes_images: ClassVar[bool] = False  # of a given reference, which may have no statistics in their place
    min_images: ClassVar[int] = 2  # of samples and of a reference; 2 have a covariance
    accepted_reference: ClassVar[str] = ""  # of a metric whose reference is given: what it may be

    @classmethod
    def check_section(cls, evaluate: EvaluateSpec) -> None:
        """Raise from the section's validator if it lacks something that the metric needs."""
        if cls.reference == "given" and evaluate.reference is None:
            refuse(["reference"], None, f"with metrics [{cls.name}], {cls.accepted_reference}")
        if evaluate.samples < cls.min_images:
            refuse(["samples"], evaluate.samples, f"with metrics [{cls.name}], {cls.min_images} or more")

    @classmethod
    def check_job(cls, job: JobSpec) -> None:
        """Raise from the job's validator if the metric cannot look at what the job makes."""

    @classmethod
    def networks(cls, evaluate: EvaluateSpec) -> Mapping[str, Networks]:
        """Return the sections below `evaluate` that name networks for the metric, by their fields."""
        return {}

    @classmethod
    def weights(cls, evaluate: EvaluateSpec) -> Mapping[str, Path]:
        """Return the files with networks that the metric looks with, by the field of `evaluate` that names each."""
        sections = cls.networks(evaluate).items()
        return {f"{name}.{field}": Path(path) for name, one in sections for field, path in one.weights().items()}

    @classmethod
    def absent(cls, evaluate: EvaluateSpec) -> list[str]:
        """Return a line for each file that the section does not name, and that is not where it is looked for."""
        return []


class ClassifierMetric(MetricSpec):
    """Frechet distance on the features of a small classifier that the job trains on its own data (not FID), and the
    share of samples that it reads as their label."""

    name = "classifier"
    figures = ("distance", "agreement")
    rising = ("agreement",)
    steps = ("classifier",)

    @classmethod
    def check_job(cls, job: JobSpec) -> None:
        if not isinstance(job.codec, PixelCodec):
            refuse(
                ["evaluate", "metrics"], list(job.evaluate.metrics), "[fid, likeness]; the classifier reads pixels only"
            )
        if job.model.told == "texts":
            accepted = (
                f"[geneval, clip_score, fid, likeness]; the classifier learns classes, a {job.model.kind} is told texts"
            )
            refuse(["evaluate", "metrics"], list(job.evaluate.metrics), accepted)


IMAGES = "a folder with images, all of one size, directly in it, or an .npz with arr_0, uint8 images (n,H,W,3)"


class InceptionMetric(MetricSpec):
    """A metric on features of pytorch-fid's network. Those on its last features share one pass of an image."""

    reference: ClassVar[Literal["training", "given", "none"]] = "given"

    @classmethod
    def weights(cls, evaluate: EvaluateSpec) -> Mapping[str, Path]:
        return {"inception": inception_file(evaluate.inception)}

    @classmethod
    def absent(cls, evaluate: EvaluateSpec) -> list[str]:
        if evaluate.inception is not None or (hub := inception_file(None)).is_file():
            return []
        weights = f"pytorch-fid's Inception weights ({hub.name}), named here or placed at {hub}"
        return [f"evaluate.inception: got nothing; accepted: {weights}"]


class FidMetric(InceptionMetric):
    """The Frechet Inception distance, on the features of pytorch-fid's network."""

    name = "fid"
    figures = ("fid",)
    accepted_reference = f"an .npz with mu and sigma, {IMAGES}"


class SfidMetric(InceptionMetric):
    """The spatial FID (arXiv 2103.03841): the Frechet distance on features of an earlier layer, with their places."""

    name = "sfid"
    figures = ("sfid",)
    accepted_reference = f"an .npz with mu_s and sigma_s, {IMAGES}"


class InceptionScoreMetric(InceptionMetric):
    """The Inception Score (arXiv 1606.03498), over splits of 5,000 samples."""

    name = "is"
    figures = ("is", "is_sd")
    rising = ("is",)
    reference = "none"


class PrecisionRecallMetric(InceptionMetric):
    """Improved precision and recall (arXiv 1904.06991), by the three nearest neighbours."""

    name = "precision_recall"
    figures = ("precision", "precision_low", "precision_high", "recall", "recall_low", "recall_high")
    rising = figures
    keeps = "pool3"
    takes_images = True
    min_images = 4  # one has three neighbours
    accepted_reference = IMAGES


class KidMetric(InceptionMetric):
    """The Kernel Inception distance (arXiv 1801.01401), over 100 subsets of 1,000 images."""

    name = "kid"
    figures = ("kid", "kid_sd")
    keeps = "pool3"
    takes_images = True
    accepted_reference = IMAGES


class FdDinoMetric(MetricSpec):
    """The Frechet distance on a DINO's class tokens; FD-DINOv2 (arXiv 2306.04675) with DINOv2 ViT-L/14."""

    name = "fd_dino"
    figures = ("fd_dino",)
    reference = "given"
    takes_images = True
    accepted_reference = IMAGES

    @classmethod
    def check_section(cls, evaluate: EvaluateSpec) -> None:
        super().check_section(evaluate)
        if evaluate.dino is None:
            refuse(["dino"], None, "with metrics [fd_dino], a DINO, as {kind: dino, path: facebook/dinov2-large}")

    @classmethod
    def networks(cls, evaluate: EvaluateSpec) -> Mapping[str, Networks]:
        return {"dino": evaluate.dino} if evaluate.dino is not None else {}


DETECTOR = "with metrics [geneval], a detector, as {kind: mask2former, path: .., colours: ..}"


class GenevalMetric(MetricSpec):
    """GenEval (arXiv 2310.11513): the share of samples that show what their prompts say, as a detector sees it."""

    name = "geneval"
    figures = ("geneval",)
    rising = figures
    reference = "none"

    @classmethod
    def check_section(cls, evaluate: EvaluateSpec) -> None:
        if evaluate.detector is None:
            refuse(["detector"], None, DETECTOR)
        if evaluate.prompts is None or not evaluate.prompts.endswith(JSON_PROMPTS):
            accepted = (
                f"with metrics [geneval], evaluation_metadata.jsonl, of {GENEVAL_REPOSITORY}, or one in its format"
            )
            refuse(["prompts"], evaluate.prompts, accepted)

    @classmethod
    def check_job(cls, job: JobSpec) -> None:
        _require_texts(job)

    @classmethod
    def networks(cls, evaluate: EvaluateSpec) -> Mapping[str, Networks]:
        return {"detector": evaluate.detector} if evaluate.detector is not None else {}


class ClipScoreMetric(MetricSpec):
    """CLIPScore (arXiv 2104.08718): how near samples are to their texts, as a CLIP sees both."""

    name = "clip_score"
    figures = ("clip_score",)
    rising = figures
    reference = "none"

    @classmethod
    def check_section(cls, evaluate: EvaluateSpec) -> None:
        if evaluate.clip is None:
            refuse(["clip"], None, "with metrics [clip_score], a CLIP, as {kind: clip, path: ..}")

    @classmethod
    def check_job(cls, job: JobSpec) -> None:
        _require_texts(job)

    @classmethod
    def networks(cls, evaluate: EvaluateSpec) -> Mapping[str, Networks]:
        return {"clip": evaluate.clip} if evaluate.clip is not None else {}


class LikenessMetric(MetricSpec):
    """How near samples are to the rootstock's of the same noise and the same class or text."""

    name = "likeness"
    figures = ("likeness:psnr",)
    rising = figures
    reference = "none"

    @classmethod
    def check_job(cls, job: JobSpec) -> None:
        if "rootstock" not in job.rows():
            accepted = "with metrics [likeness], rootstock among them, which the others are held against"
            refuse(["evaluate", "rows"], list(job.rows()), accepted)

    @classmethod
    def networks(cls, evaluate: EvaluateSpec) -> Mapping[str, Networks]:
        named = evaluate.likeness.networks() if evaluate.likeness is not None else {}
        return {f"likeness.{field}": network for field, network in named.items()}


def _require_texts(job: JobSpec) -> None:
    """Raise from the job's validator if its samples are not of texts."""
    if job.model.told == "classes":
        accepted = f"classifier, fid or likeness; a {job.model.kind} is told classes, no prompts"
        refuse(["evaluate", "metrics"], list(job.evaluate.metrics), accepted)


METRICS: dict[str, type[MetricSpec]] = {
    metric.name: metric
    for metric in (
        ClassifierMetric,
        FidMetric,
        SfidMetric,
        InceptionScoreMetric,
        PrecisionRecallMetric,
        KidMetric,
        FdDinoMetric,
        GenevalMetric,
        ClipScoreMetric,
        LikenessMetric,
    )
}
_FIGURES = [figure for metric in METRICS.values() for figure in metric.figures]
assert len({*_FIGURES}) == len(_FIGURES), f"two metrics have a figure of one name: {_FIGURES}"

INCEPTION_METRICS = tuple(name for name, metric in METRICS.items() if issubclass(metric, InceptionMetric))

if TYPE_CHECKING:
    Metric = str
else:
    Metric = Literal[tuple(METRICS)]


def inception_file(path: str | None) -> Path:
    """Return where the Inception weights are: the file given, or where torch's hub keeps them (torch is not needed)."""
    if path is not None:
        return Path(path)
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    torch_home = os.path.expanduser(os.environ.get("TORCH_HOME", os.path.join(cache, "torch")))  # noqa: PTH111, PTH118  # needs no home
    return Path(torch_home) / "hub" / "checkpoints" / INCEPTION_FILE
