"""Statistics of what the rootstock's operators put out: for the choice of a loss, and of layers by locality."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from graftwork.specs.fields import Spec
from graftwork.specs.training import ADDED_PRECISION, Precision
from graftwork.stages.catalog.flops import RootstockFlops
from graftwork.stages.catalog.inputs import few_samples, rootstock
from graftwork.stages.stage import Stage, StepDraft, Work

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec

SAMPLES = 256


class ProfileParams(Spec):
    """Statistics of what the operators put out."""

    seed: int
    samples: int
    precision: Annotated[Precision, ADDED_PRECISION] = "fp32"


def steps(job: JobSpec) -> Iterator[StepDraft]:
    precision = job.profile.precision
    params = ProfileParams(seed=job.seed, samples=SAMPLES, precision=precision)
    work = Work(float(RootstockFlops.of(job).whole() * SAMPLES))
    yield StepDraft("profile", params, rootstock(job), few_samples(job, SAMPLES), work=work, precision=precision)


STAGE = Stage(version=2, steps=steps, module="graftwork.stages.selection.profile")
