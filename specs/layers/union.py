"""Strategies that choose which blocks an edit replaces.

A static one needs the depth alone, so that a plan knows its sites before anything has run. The others go by evidence:
they name the blocks that they may choose from (`candidates`), and the `select` step asks them to `rank` or read it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from graftwork.specs.layers.evidence import LeastLocalLayers, LowestErrorLayers, LowestScoreLayers, MostLocalLayers
from graftwork.specs.layers.learned import LearnedLayers
from graftwork.specs.layers.solved import SolvedLayers
from graftwork.specs.layers.static import (
    AllLayers,
    ExplicitLayers,
    FirstLayers,
    InterleavedLayers,
    LastLayers,
    MiddleLayers,
)

LearnedLayers.model_rebuild()

Layers = Annotated[
    AllLayers
    | ExplicitLayers
    | InterleavedLayers
    | FirstLayers
    | LastLayers
    | MiddleLayers
    | MostLocalLayers
    | LeastLocalLayers
    | LowestErrorLayers
    | LowestScoreLayers
    | SolvedLayers
    | LearnedLayers,
    Field(discriminator="kind"),
]
