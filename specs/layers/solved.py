"""The strategy by which a solver chooses among all options of all sites together, under the job's limits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from graftwork.specs.fields import refuse
from graftwork.specs.layers.strategy import MAX_DEPTH, Strategy


class SolvedLayers(Strategy):
    """The blocks for which a solver finds this operator the best, under the limits of the job's `solve`.

    Edits that are solved may want the same sites: each site holds its original or one of their operators.
    """

    evidence = "scores"
    kind: Literal["solved"] = "solved"
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, max_length=MAX_DEPTH, description="that may be chosen; by default all"
    )

    @field_validator("blocks")
    @classmethod
    def _distinct(cls, blocks: tuple[int, ...] | None) -> tuple[int, ...] | None:
        for position, block in enumerate(blocks or ()):
            if block in (blocks or ())[:position]:
                refuse([position], block, "each block once")
        return None if blocks is None else tuple(sorted(blocks))

    def candidates(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth)) if self.blocks is None else self.blocks

    def misfit(self, depth: int) -> tuple[str, object, str] | None:
        beyond = [block for block in self.blocks or () if block >= depth]
        return ("blocks", beyond[0], f"blocks of this model, 0 .. {depth - 1}") if beyond else None

    def reason(self) -> str:
        return "solved for the least error within the limits"
