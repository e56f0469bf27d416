"""A solver's plans as whole models: error and cost, beside what was predicted and beside plans of the same cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from graftwork.specs.edits import Edit
from graftwork.specs.fields import Spec
from graftwork.specs.solve import Limits, ScoredError, ScoreSpec
from graftwork.specs.training import Precision
from graftwork.stages.catalog.flops import RootstockFlops
from graftwork.stages.catalog.inputs import few_samples, hybrid, stream
from graftwork.stages.stage import Stage, StepDraft, Work

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec

RANDOM_PLANS = 3
STATIC_PLANS = ("first", "last", "interleaved")


class TrialParams(Spec):
    """The plans of a solver, and what they are tried on."""

    seed: int
    candidates: tuple[Edit, ...]  # that plans are made of
    error: ScoredError
    limits: Limits  # that the plans are to keep
    recipe: ScoreSpec
    batch: int  # of the passes that are timed
    precision: Precision  # of them


def steps(job: JobSpec) -> Iterator[StepDraft]:
    if job.solve is None:
        return
    params = TrialParams(
        seed=job.seed,
        candidates=job.candidates(),
        error=job.solve.error,
        limits=job.solve.limits,
        recipe=job.score,
        batch=job.evaluate.batch,
        precision=job.evaluate.precision,
    )
    plans = 1 + job.solve.plans + len(STATIC_PLANS) + RANDOM_PLANS
    yield StepDraft(
        "trial",
        params,
        hybrid(job) | {"select": "select", "cost": "cost"},
        few_samples(job, job.score.samples) | stream(job.score.precision),
        work=Work(float(plans * RootstockFlops.of(job).whole() * job.score.samples * job.score.draws)),
        precision=job.score.precision,
    )


STAGE = Stage(version=1, steps=steps, module="graftwork.stages.selection.trial", memory="score.batch")
