"""A `features` step in a test's own process."""

from __future__ import annotations

from pathlib import Path

import torch

from graftwork.pipeline.planning.contents import Contents
from graftwork.pipeline.store.artifacts import Store
from graftwork.specs.codec import Codec, PixelCodec
from graftwork.specs.data import CaptionsData, ImageFolderData
from graftwork.specs.resources import StepResources
from graftwork.stages.catalog.features import FeaturesParams
from graftwork.stages.contract import Context
from graftwork.stages.data.hashes import ImageHashes
from graftwork.stages.features import features


def encode(
    data: ImageFolderData | CaptionsData,
    out: Path,
    *,
    codec: Codec | None = None,
    cpu: float = 1,
    images: ImageHashes | None = None,
) -> Path:
    """Do the step for these data; return `out`, the folder that it leaves, which must not be there before.

    images: what the plan knows of them; by default what they hold now.
    """
    out.mkdir()
    features.run(
        Context(
            step="features",
            params=FeaturesParams(data=data, codec=codec or PixelCodec()),
            inputs={},
            out=out,
            partial=Store(f"{out}-store").partial("features"),
            report=lambda done, total, metrics=None: None,
            resources=StepResources(cpu=cpu),
            device=torch.device("cpu"),
            images=images or Contents().images(data),
        )
    )
    return out
