"""The contract of a layer strategy, and what strategies with a share of the blocks have in common."""

from __future__ import annotations

from fractions import Fraction
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from graftwork.specs.fields import Spec, refuse

MAX_DEPTH = 256  # blocks of a model

Evidence = Literal["none", "locality", "errors", "scores", "search"]


class Strategy(Spec):
    """What all strategies share."""

    evidence: ClassVar[Evidence] = "none"

    def candidates(self, depth: int) -> tuple[int, ...]:
        """The blocks that may be chosen; of a static strategy, those that are."""
        raise NotImplementedError

    def number(self, depth: int) -> int:
        """How many of them are chosen."""
        return len(self.candidates(depth))

    def misfit(self, depth: int) -> tuple[str, object, str] | None:
        """Where the strategy does not fit a model: the field at fault, its value, and what is accepted."""
        return None

    def reason(self) -> str:
        """In a word or two, why a block was chosen."""
        raise NotImplementedError


class Share(Strategy):
    """Strategies that choose a number of blocks, given as a ratio of them or as a count."""

    ratio: float | None = Field(None, gt=0, le=1, description="share of the blocks that is replaced; 0.5 by default")
    count: int | None = Field(None, ge=1, description="how many blocks are replaced, instead of a ratio")

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.ratio is not None and self.count is not None:
            refuse(["count"], self.count, "a count or a ratio, not both")
        return self

    def share(self, depth: int) -> Fraction:
        """Of the blocks; exact, since 0.1 * 10 is not 1 in binary."""
        return Fraction(self.count, depth) if self.count is not None else Fraction(str(self.ratio or 0.5))

    def number(self, depth: int) -> int:
        return int(depth * self.share(depth))

    def misfit(self, depth: int) -> tuple[str, object, str] | None:
        if self.count is not None and self.count > depth:
            return "count", self.count, f"at most {depth}, the blocks of this model"
        if not self.number(depth):
            return "ratio", self.ratio, f"a ratio that chooses some of {depth} blocks"
        return None

    def describe_share(self) -> str:
        return f"{self.count} blocks" if self.count is not None else f"{self.ratio or 0.5:.0%}"
