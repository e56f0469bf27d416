"""The rootstock: pretrained here, or read from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from graftwork.specs.fields import Spec
from graftwork.specs.rootstock import CheckpointWeights, Model, PretrainWeights, Weights
from graftwork.stages.catalog.flops import RootstockFlops, training
from graftwork.stages.catalog.inputs import LABELS, features, texts
from graftwork.stages.stage import External, Stage, StepDraft

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec


class BaseParams(Spec):
    """The rootstock."""

    seed: int
    model: Model
    weights: Weights


def steps(job: JobSpec) -> Iterator[StepDraft]:
    weights = job.weights
    params = BaseParams(seed=job.seed, model=job.model, weights=weights)
    if isinstance(weights, PretrainWeights):
        work = training(weights, RootstockFlops.of(job).whole())
        yield StepDraft("base", params, features(job), work=work, workers=weights.workers, precision=weights.precision)
        return
    assert isinstance(weights, CheckpointWeights)
    # Not the latents: they may be the rootstock's own.
    needs, checkpoint = LABELS | texts(job), External("checkpoint", weights.path, "weights.path")
    yield StepDraft("base", params, needs, external=(checkpoint,))


STAGE = Stage(
    version=4,
    steps=steps,
    module="graftwork.stages.training.base",
    orchestrates=True,
    trains=True,
    makes_model=True,
    foundation=True,
    memory="weights.micro_batch, or set weights.checkpointing",
)
