"""The rootstock draws the samples that everything is trained on, where the data are synthetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from graftwork.specs.codec import Codec
from graftwork.specs.data import SyntheticData
from graftwork.specs.fields import Spec, Unkeyed
from graftwork.specs.sampler import Sampler
from graftwork.specs.training import Precision
from graftwork.stages.catalog.flops import RootstockFlops, sampling
from graftwork.stages.catalog.inputs import LABELS, stream, texts
from graftwork.stages.stage import Stage, StepDraft

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec


class SynthesisParams(Spec):
    """Samples of the rootstock."""

    seed: int
    sampler: Sampler
    batch: int
    precision: Precision
    codec: Annotated[Codec, Unkeyed()]  # for the picture alone


def steps(job: JobSpec) -> Iterator[StepDraft]:
    data = job.data
    if not isinstance(data, SyntheticData):
        return
    sampler = job.samplers()["data"]
    params = SynthesisParams(
        seed=data.seed, sampler=sampler, batch=data.batch, precision=data.precision, codec=job.codec
    )
    yield StepDraft(
        "synthesis",
        params,
        LABELS | texts(job) | {"base": "base"},
        stream(data.precision),
        work=sampling(sampler, RootstockFlops.of(job).whole(), data.samples),
        precision=data.precision,
        spreads=True,
    )


STAGE = Stage(
    version=1,
    steps=steps,
    module="graftwork.stages.synthesis.synthesis",
    orchestrates=True,
    foundation=True,
    memory="data.batch",
)
