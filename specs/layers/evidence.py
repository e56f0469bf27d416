"""Strategies that rank blocks by what was measured: locality of attention, or distillation error."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from graftwork.specs.layers.strategy import Share


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
