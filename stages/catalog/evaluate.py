"""Samples of each row of the table, and the table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from graftwork.specs.clip import ClipSpec
from graftwork.specs.codec import Codec
from graftwork.specs.detector import Detector
from graftwork.specs.evaluate import EvaluateSpec, Row
from graftwork.specs.fields import KeyedIfSet, LocalPath, Spec, Unkeyed
from graftwork.specs.likeness import DinoSpec, LikenessSpec
from graftwork.specs.metrics import Metric
from graftwork.specs.sampler import Sampler
from graftwork.specs.training import Precision
from graftwork.stages.catalog.flops import RootstockFlops, graft_flops, sampling
from graftwork.stages.catalog.inputs import features, hybrid, last_turn, rootstock, stream
from graftwork.stages.catalog.reference import chosen_metrics, judges, networks, reference_steps
from graftwork.stages.stage import Needs, Stage, StepDraft

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec


class SampleParams(Spec):
    """Samples of one row of the table."""

    seed: int
    row: Row
    codec: Codec  # its weights are in the key of the features
    samples: int
    batch: int
    metrics: tuple[Metric, ...]
    detector: Annotated[Detector | None, KeyedIfSet()] = None
    clip: Annotated[ClipSpec | None, KeyedIfSet()] = None
    dino: Annotated[DinoSpec | None, KeyedIfSet()] = None
    likeness: Annotated[LikenessSpec | None, KeyedIfSet()] = None
    sampler: Sampler
    precision: Precision = "fp32"
    keep_samples: bool = False
    inception: Annotated[LocalPath | None, Unkeyed()] = None
    compile: Annotated[bool, Unkeyed()] = False


class EvaluateParams(Spec):
    """The table over all rows."""

    seed: int
    recipe: EvaluateSpec


def steps(job: JobSpec) -> Iterator[StepDraft]:
    metrics = chosen_metrics(job)
    rows = _models(job)
    for row, needs in rows.items():
        yield _samples(job, row, needs | judges(metrics))
    needs = {role: step for of_row in rows.values() for role, step in of_row.items()}
    needs |= {"rows/heldout": "reference/heldout"} | {f"rows/{row}": f"evaluate/{row}" for row in rows}
    needs |= {f"reference/{metric}": step for metric, step in reference_steps(metrics).items()}
    if job.solve is not None and "stage1" in rows:
        needs |= {"trial": "trial"}
    yield StepDraft("evaluate", EvaluateParams(seed=job.seed, recipe=job.evaluate), needs)


def _models(job: JobSpec) -> dict[Row, Needs]:
    """Return the rows of the job's table, and what each needs to build its model."""
    models: dict[Row, Needs] = {
        "rootstock": rootstock(job),
        **{row: features(job) | {f"finetuned/{row}": f"finetune/{row}"} for row in job.finalists()},
        "stage1": hybrid(job),
        "stage2": features(job) | {"finetuned/stage2": "finetune"},
        "random_init": features(job) | {"finetuned/random_init": "finetune/random_init"},
    }
    return {row: needs for row, needs in models.items() if row in job.rows()}


def _samples(job: JobSpec, row: Row, needs: Needs) -> StepDraft:
    spec, metrics = job.evaluate, chosen_metrics(job)
    params = SampleParams(
        seed=job.seed,
        row=row,
        codec=job.codec,
        samples=spec.samples,
        batch=spec.batch,
        metrics=metrics,
        detector=spec.detector,
        clip=spec.clip,
        dino=spec.dino,
        likeness=(spec.likeness or LikenessSpec()) if "likeness" in metrics else None,
        sampler=spec.sampler,
        precision=spec.precision,
        keep_samples=spec.keep_samples,
        inception=spec.inception,
        compile=spec.compile,
    )
    flops = RootstockFlops.of(job).whole() if row == "rootstock" else graft_flops(job)
    return StepDraft(
        f"evaluate/{row}",
        params,
        needs,
        last_turn(job) | stream(spec.precision),
        networks(spec, metrics),
        work=sampling(spec.sampler, flops, spec.samples),
        precision=spec.precision,
        spreads=True,
    )


STAGE = Stage(
    version=3,
    steps=steps,
    module="graftwork.stages.evaluation.evaluate",
    orchestrates=True,
    memory="evaluate.batch",
)
