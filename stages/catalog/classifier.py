"""The judge of the classifier metric."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from graftwork.specs.fields import Spec
from graftwork.specs.metrics import METRICS
from graftwork.stages.catalog.inputs import images
from graftwork.stages.stage import Stage, StepDraft

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec


class ClassifierParams(Spec):
    """The judge of the classifier metric."""

    seed: int


def steps(job: JobSpec) -> Iterator[StepDraft]:
    if any("classifier" in METRICS[metric].steps for metric in job.evaluate.metrics):
        yield StepDraft("classifier", ClassifierParams(seed=job.seed), images(job))


STAGE = Stage(version=1, steps=steps, module="graftwork.stages.evaluation.classifier")
