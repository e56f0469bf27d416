"""Strategies that rank blocks by what was measured: locality of attention, distillation error, or the whole model's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from graftwork.specs.layers.strategy import Share
from graftwork.specs.solve import ScoredError


class LocalityLayers(Share):
    """Blocks by their attention's mass within a band, averaged over samples, timesteps, heads and queries."""

    evidence = "locality"
    band: int = Field(32, ge=0, description="tokens, or patches, on each side")
    distance: Literal["tokens", "patches"] = Field("tokens", description="along the sequence, or in the image's plane")

    def candidates(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))


class MostLocalLayers(LocalityLayers):
    """The blocks with the largest mass within the band."""

    kind: Literal["most_local"] = "most_local"

    def reason(self) -> str:
        return f"most mass within {self.band} {self.distance}"


class LeastLocalLayers(LocalityLayers):
    """The blocks with the smallest mass within the band."""

    kind: Literal["least_local"] = "least_local"

    def reason(self) -> str:
        return f"least mass within {self.band} {self.distance}"


class LowestErrorLayers(Share):
    """The blocks whose scions mimic best: the lowest held-out squared error over the outputs' variance."""

    evidence = "errors"
    kind: Literal["lowest_error"] = "lowest_error"

    def candidates(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def reason(self) -> str:
        return "lowest relative error"


class LowestScoreLayers(Share):
    """The blocks whose scions, each alone in the rootstock, change what the whole model puts out the least."""

    evidence = "scores"
    kind: Literal["lowest_score"] = "lowest_score"
    error: ScoredError = Field(
        "output", description="the relative error at the model's output, or the change of the diffusion loss"
    )

    def candidates(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def reason(self) -> str:
        return "lowest error at the model's output" if self.error == "output" else "least change of the loss"
