"""The steps that a job comes to: what each is told, and what it needs. The planner makes keys of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from graftwork.pipeline.planning.contents import Contents
from graftwork.pipeline.planning.fingerprints import External, data_fingerprint
from graftwork.specs import params
from graftwork.specs.codec import VaeCodec
from graftwork.specs.data import DigitsData
from graftwork.specs.edits import Edit
from graftwork.specs.evaluate import EvaluateSpec, Row
from graftwork.specs.fields import Spec
from graftwork.specs.job import JobSpec
from graftwork.specs.layers.evidence import LocalityLayers
from graftwork.specs.metrics import METRICS, Metric
from graftwork.specs.rootstock import CheckpointWeights
from graftwork.specs.training import Precision
from graftwork.specs.vae import vae_folder
from graftwork.stages.features.hashes import ImageHashes
from graftwork.stages.features.sources import num_classes, split_sizes

PROFILE_SAMPLES = 256
FEATURES, ROOTSTOCK = {"features": "features"}, {"features": "features", "base": "base"}
RULES = ("last_turn", "few_samples", "stream")  # among what lies outside: how a step does what it did otherwise before

Needs = dict[str, str]  # role -> step


@dataclass(frozen=True)
class UnkeyedStep:
    """A step that has no key yet."""

    name: str
    stage: str
    params: Spec
    needs: Needs
    outside: Mapping[str, str] = field(default_factory=dict)  # what else its result depends on, by role
    external: tuple[External, ...] = ()  # whose fingerprints join that
    images: ImageHashes | None = None  # that it reads


def unkeyed_steps(job: JobSpec, contents: Contents) -> Iterator[UnkeyedStep]:
    """Yield every step of the job, each after those that it needs. contents: of the files that it brings along."""
    yield from _rootstock(job, contents)
    yield from _distillation(job)
    yield from _searches(job)
    yield _selection(job)
    yield from _finetuning(job)
    yield from _evaluation(job)


def _rootstock(job: JobSpec, contents: Contents) -> Iterator[UnkeyedStep]:
    outside, images = data_fingerprint(job.data, contents)
    external: tuple[External, ...] = ()
    if isinstance(job.codec, VaeCodec):
        external = (External("codec", str(vae_folder(Path(job.codec.path))), "codec.path"),)
    features = params.FeaturesParams(data=job.data, codec=job.codec)
    yield UnkeyedStep("features", "features", features, {}, outside, external, images)

    external = ()
    if isinstance(job.weights, CheckpointWeights):
        external = (External("checkpoint", job.weights.path, "weights.path"),)
    base = params.BaseParams(seed=job.seed, model=job.model, weights=job.weights)
    yield UnkeyedStep("base", "base", base, FEATURES, external=external)
    if any("classifier" in METRICS[metric].steps for metric in job.evaluate.metrics):
        yield UnkeyedStep("classifier", "classifier", params.ClassifierParams(seed=job.seed), FEATURES)
    profile = params.ProfileParams(seed=job.seed, samples=PROFILE_SAMPLES, precision=job.profile.precision)
    yield UnkeyedStep("profile", "profile", profile, ROOTSTOCK, _few(job, PROFILE_SAMPLES))


def _distillation(job: JobSpec) -> Iterator[UnkeyedStep]:
    edits = job.edits()
    few = _few(job, job.distill.samples, job.distill.heldout or job.distill.samples)
    for edit in edits:
        within = _within(edit, edits)
        needs = ROOTSTOCK | _scions(within)
        if job.distill.loss == "auto":
            needs |= {"profile": "profile"}
        told = params.DistillParams(seed=job.seed, edit=edit, within=within, recipe=job.distill)
        external = (External("scions", edit.scions, "graft.scions"),) if edit.scions else ()
        outside = {**few, **_stream(job.distill.precision)}
        yield UnkeyedStep(f"distill/{edit.name}", "distill", told, needs, outside, external)


def _within(edit: Edit, edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """The edits of the blocks that a parallel block takes in."""
    if edit.site.target != "pair":
        return ()
    blocks = (edit.site.block, edit.site.block + 1)
    return tuple(other for other in edits if other.site.target != "pair" and other.site.block in blocks)


def _scions(edits: Iterable[Edit]) -> Needs:
    return {f"scions/{edit.name}": f"distill/{edit.name}" for edit in edits}


def _searches(job: JobSpec) -> Iterator[UnkeyedStep]:
    depth = job.model.depth
    for number, layers in job.learned().items():
        candidates = job.graft[number].edits(depth)
        groups = layers.grouped(depth) if layers.budget is None else ()
        told = params.SearchParams(
            seed=job.seed, candidates=candidates, groups=groups, budget=layers.budget, recipe=layers.search
        )
        few = _few(job, _share(job, layers.search.fraction))
        yield UnkeyedStep(f"search/{number}", "search", told, ROOTSTOCK | _scions(candidates), few)


def _selection(job: JobSpec) -> UnkeyedStep:
    depth = job.model.depth
    rules = tuple(params.Rule(edits=spec.edits(depth), layers=getattr(spec, "layers", None)) for spec in job.graft)
    needs = _scions(job.edits()) | {f"search/{number}": f"search/{number}" for number in job.learned()}
    if any(isinstance(rule.layers, LocalityLayers) for rule in rules):
        needs |= {"profile": "profile"}
    return UnkeyedStep("select", "select", params.SelectParams(depth=depth, rules=rules), needs)


def _hybrid(job: JobSpec) -> Needs:
    """The graft after stage 1."""
    return ROOTSTOCK | {"select": "select"} | _scions(job.edits())


def _finetuning(job: JobSpec) -> Iterator[UnkeyedStep]:
    distilled = params.FinetuneParams(seed=job.seed, scions="distilled", recipe=job.finetune)
    needs = _hybrid(job)
    for number, layers in job.learned().items():
        if layers.finetune_from == "search":
            needs |= {"searched": f"search/{number}"}
    few = _few(job, _share(job, job.finetune.fraction))
    yield UnkeyedStep("finetune", "finetune", distilled, needs, few)
    if job.finetune.control:
        random = distilled.model_copy(update={"scions": "random"})
        yield UnkeyedStep("finetune/random_init", "finetune", random, ROOTSTOCK | {"select": "select"}, few)


def _evaluation(job: JobSpec) -> Iterator[UnkeyedStep]:
    asked = job.evaluate
    metrics = tuple(sorted(set(asked.metrics)))
    judges: Needs = {step: step for metric in metrics for step in METRICS[metric].steps}
    weights = tuple(external for metric in metrics for external in _weights(asked, metric))
    yield from _references(job, metrics, judges, weights)

    models: dict[Row, Needs] = {
        "rootstock": ROOTSTOCK,
        "stage1": _hybrid(job),
        "stage2": FEATURES | {"finetuned/stage2": "finetune"},
        "random_init": FEATURES | {"finetuned/random_init": "finetune/random_init"},
    }
    rows = {row: needs for row, needs in models.items() if row in job.rows()}
    outside = {**_last_turn(job), **_stream(asked.precision)}
    for row, needs in rows.items():
        told = params.SampleParams(
            seed=job.seed,
            row=row,
            codec=job.codec,
            samples=asked.samples,
            batch=asked.batch,
            metrics=metrics,
            sampler=asked.sampler,
            precision=asked.precision,
            keep_samples=asked.keep_samples,
            inception=asked.inception,
            compile=asked.compile,
        )
        yield UnkeyedStep(f"evaluate/{row}", "evaluate", told, needs | judges, outside, weights)

    needs = {role: step for of_row in rows.values() for role, step in of_row.items()}
    needs |= {"rows/heldout": "reference/heldout"} | {f"rows/{row}": f"evaluate/{row}" for row in rows}
    needs |= {f"reference/{metric}": f"reference/{metric}" for metric in metrics}
    yield UnkeyedStep("evaluate", "evaluate", params.EvaluateParams(seed=job.seed, recipe=asked), needs)


def _last_turn(job: JobSpec) -> dict[str, str]:
    """Say, in the keys of those that have one, how the classes of a turn that is not full are chosen."""
    classes = num_classes(job.data)
    return {"last_turn": "spread"} if classes and job.evaluate.samples % classes else {}


def _stream(precision: Precision) -> dict[str, str]:
    """Say, in the keys of those that autocast makes bf16, what the stream of the blocks is."""
    return {"stream": "fp32"} if precision == "bf16" else {}


def _few(job: JobSpec, *counts: float) -> dict[str, str]:
    """Say, in the keys of those that it concerns, how fewer samples than classes are chosen."""
    classes = num_classes(job.data)
    return {"few_samples": "spread"} if classes and min(counts) < classes else {}


def _share(job: JobSpec, fraction: float) -> float:
    """Return how many training images a share of them is; infinity if they are elsewhere."""
    here = isinstance(job.data, DigitsData) or Path(job.data.path).is_dir()
    return max(1, round(split_sizes(job.data)[0] * fraction)) if here else math.inf


def _weights(evaluate: EvaluateSpec, metric: Metric) -> tuple[External, ...]:
    """Return the files with networks that a metric looks with."""
    files = METRICS[metric].weights(evaluate)
    return tuple(External(field, str(path), f"evaluate.{field}") for field, path in files.items())


def _references(
    job: JobSpec, metrics: tuple[Metric, ...], judges: Needs, weights: tuple[External, ...]
) -> Iterator[UnkeyedStep]:
    """What the rows are held against, and the row of real images: whatever is grafted, they stay."""
    asked = job.evaluate
    for metric in metrics:
        if METRICS[metric].reference == "training":
            training = params.TrainingStatisticsParams(codec=job.codec, metric=metric)
            needs = {step: step for step in METRICS[metric].steps}
            yield UnkeyedStep(f"reference/{metric}", "reference", training, FEATURES | needs)
            continue
        assert asked.reference is not None
        external: tuple[External, ...] = (External("reference", asked.reference, "evaluate.reference"),)
        background = None
        if Path(asked.reference).is_dir():  # statistics are taken as they are
            external += _weights(asked, metric)
            background = job.data.background
        given = params.GivenStatisticsParams(
            reference=asked.reference, background=background, inception=asked.inception, metric=metric
        )
        yield UnkeyedStep(f"reference/{metric}", "reference", given, {}, external=external)
    heldout = params.HeldoutParams(codec=job.codec, samples=asked.samples, metrics=metrics, inception=asked.inception)
    yield UnkeyedStep("reference/heldout", "reference", heldout, FEATURES | judges, _last_turn(job), weights)
