"""Strategies that choose which blocks an edit replaces. Each one turns a depth into block indices.

Static ones need nothing but the depth, so a plan knows its sites before anything has run.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field, field_validator

from specs.fields import Spec, refuse


class AllLayers(Spec):
    """Every block."""

    kind: Literal["all"] = "all"

    def choose(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def reason(self) -> str:
        return "all blocks"


class ExplicitLayers(Spec):
    """The listed blocks, counted from 0."""

    kind: Literal["explicit"] = "explicit"
    blocks: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)

    @field_validator("blocks")
    @classmethod
    def _distinct(cls, blocks: tuple[int, ...]) -> tuple[int, ...]:
        for position, block in enumerate(blocks):
            if block in blocks[:position]:
                refuse([position], block, "each block once")
        return tuple(sorted(blocks))

    def choose(self, depth: int) -> tuple[int, ...]:
        return self.blocks

    def reason(self) -> str:
        return "listed in the spec"


class InterleavedLayers(Spec):
    """An even share of the blocks: 0.5 takes 1, 3, 5, ..; 0.75 leaves 0, 4, 8, .. alone (the published patterns)."""

    kind: Literal["interleaved"] = "interleaved"
    ratio: float = Field(0.5, gt=0, le=1, description="share of the blocks that is replaced")

    def choose(self, depth: int) -> tuple[int, ...]:
        # A block is taken when the running share passes a whole number; Fractions, since 0.1 * 10 is not 1 in binary.
        share = Fraction(str(self.ratio))
        return tuple(i for i in range(depth) if int((i + 1) * share) > int(i * share))

    def reason(self) -> str:
        return f"interleaved, {self.ratio:.0%}"


Layers = Annotated[AllLayers | ExplicitLayers | InterleavedLayers, Field(discriminator="kind")]
