"""Strategies that need no measurement: named blocks, or blocks by their place in the model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from graftwork.specs.fields import refuse
from graftwork.specs.layers.strategy import MAX_DEPTH, Share, Strategy


class AllLayers(Strategy):
    """Every block."""

    kind: Literal["all"] = "all"

    def candidates(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def reason(self) -> str:
        return "all blocks"


class ExplicitLayers(Strategy):
    """The listed blocks, counted from 0."""

    kind: Literal["explicit"] = "explicit"
    blocks: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, max_length=MAX_DEPTH)

    @field_validator("blocks")
    @classmethod
    def _distinct(cls, blocks: tuple[int, ...]) -> tuple[int, ...]:
        for position, block in enumerate(blocks):
            if block in blocks[:position]:
                refuse([position], block, "each block once")
        return tuple(sorted(blocks))

    def candidates(self, depth: int) -> tuple[int, ...]:
        return self.blocks

    def reason(self) -> str:
        return "listed in the spec"


class InterleavedLayers(Share):
    """An even share of the blocks: 0.5 takes 1, 3, 5, ..; 0.75 leaves 0, 4, 8, .. alone (the published patterns)."""

    kind: Literal["interleaved"] = "interleaved"

    def candidates(self, depth: int) -> tuple[int, ...]:
        # A block is taken when the running share passes a whole number.
        share = self.share(depth)
        return tuple(i for i in range(depth) if int((i + 1) * share) > int(i * share))

    def reason(self) -> str:
        return f"interleaved, {self.describe_share()}"


class FirstLayers(Share):
    """The blocks nearest to the input."""

    kind: Literal["first"] = "first"

    def candidates(self, depth: int) -> tuple[int, ...]:
        return tuple(range(self.number(depth)))

    def reason(self) -> str:
        return f"first {self.describe_share()}"


class LastLayers(Share):
    """The blocks nearest to the output."""

    kind: Literal["last"] = "last"

    def candidates(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth - self.number(depth), depth))

    def reason(self) -> str:
        return f"last {self.describe_share()}"


class MiddleLayers(Share):
    """The blocks in the middle; where it cannot be exact, nearer to the input."""

    kind: Literal["middle"] = "middle"

    def candidates(self, depth: int) -> tuple[int, ...]:
        start = (depth - self.number(depth)) // 2
        return tuple(range(start, start + self.number(depth)))

    def reason(self) -> str:
        return f"middle {self.describe_share()}"
