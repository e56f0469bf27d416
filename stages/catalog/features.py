"""The first stage: images become latents; of samples that the rootstock is to draw, which there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork.specs.codec import Codec, VaeCodec
from graftwork.specs.data import Data, SyntheticData
from graftwork.specs.fields import Spec
from graftwork.specs.vae import vae_folder
from graftwork.stages.catalog.inputs import prompts_format
from graftwork.stages.stage import External, Stage, StepDraft

if TYPE_CHECKING:
    from graftwork.specs.job import JobSpec


class FeaturesParams(Spec):
    """Images to latents."""

    data: Data
    codec: Codec


def steps(job: JobSpec) -> Iterator[StepDraft]:
    external: tuple[External, ...] = ()
    if isinstance(job.codec, VaeCodec):
        external = (External("codec", str(vae_folder(Path(job.codec.path))), "codec.path"),)
    if isinstance(job.data, SyntheticData):  # which samples there are; `synthesis` draws them
        external += (External("prompts", job.data.prompts, "data.prompts"),)
        params = FeaturesParams(data=job.data.listing(), codec=job.codec)
        yield StepDraft("features", params, {}, prompts_format(job.data.prompts), external)
        return
    params = FeaturesParams(data=job.data, codec=job.codec)
    yield StepDraft("features", params, {}, external=external, data=job.data, spreads=True)


STAGE = Stage(
    version=2,
    steps=steps,
    module="graftwork.stages.features.features",
    orchestrates=True,
    foundation=True,
    memory="codec.batch",
)
