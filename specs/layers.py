"""Strategies that choose which blocks an edit replaces.

A static one needs the depth alone, so that a plan knows its sites before anything has run. The others go by evidence:
they name the blocks that they may choose from (`candidates`), and the `select` step asks them to `rank` or read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from graftwork.specs.fields import Spec, are_integers, is_integer, refuse
from graftwork.specs.operators import Operator
from graftwork.specs.training import SearchSpec

MAX_DEPTH = 256  # blocks of a model

Evidence = Literal["none", "locality", "errors", "search"]


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

    def asked(self) -> str:
        return f"{self.count} blocks" if self.count is not None else f"{self.ratio or 0.5:.0%}"


class InterleavedLayers(Share):
    """An even share of the blocks: 0.5 takes 1, 3, 5, ..; 0.75 leaves 0, 4, 8, .. alone (the published patterns)."""

    kind: Literal["interleaved"] = "interleaved"

    def candidates(self, depth: int) -> tuple[int, ...]:
        # A block is taken when the running share passes a whole number.
        share = self.share(depth)
        return tuple(i for i in range(depth) if int((i + 1) * share) > int(i * share))

    def reason(self) -> str:
        return f"interleaved, {self.asked()}"


class FirstLayers(Share):
    """The blocks nearest to the input."""

    kind: Literal["first"] = "first"

    def candidates(self, depth: int) -> tuple[int, ...]:
        return tuple(range(self.number(depth)))

    def reason(self) -> str:
        return f"first {self.asked()}"


class LastLayers(Share):
    """The blocks nearest to the output."""

    kind: Literal["last"] = "last"

    def candidates(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth - self.number(depth), depth))

    def reason(self) -> str:
        return f"last {self.asked()}"


class MiddleLayers(Share):
    """The blocks in the middle; where it cannot be exact, nearer to the input."""

    kind: Literal["middle"] = "middle"

    def candidates(self, depth: int) -> tuple[int, ...]:
        start = (depth - self.number(depth)) // 2
        return tuple(range(start, start + self.number(depth)))

    def reason(self) -> str:
        return f"middle {self.asked()}"


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


class LearnedLayers(Share):
    """Gates that learn which originals to keep, group by group (arXiv 2409.17481).

    With a `ratio` or a `count` each group replaces its even share of that, instead of keeping `keep`.
    With a `budget` there are no groups: each site chooses among the original, the edit's operator and `operators`, so
    that the whole model comes to that share of the rootstock's FLOPs.
    """

    evidence = "search"
    kind: Literal["learned"] = "learned"
    groups: int | tuple[tuple[int, ...], ...] = Field(4, description="consecutive blocks a group, or the groups")
    keep: int | tuple[int, ...] = Field(2, description="originals that stay in a group, or in each of them")
    pinned: tuple[int, ...] | None = Field(
        None, max_length=MAX_DEPTH, description="originals that must stay; by default each group's first"
    )
    operators: tuple[Operator, ...] = Field(
        (), max_length=64, description="with a budget: what a site may choose beside the edit's own"
    )
    budget: float | None = Field(
        None,
        gt=0,
        lt=1000,
        description="FLOPs of the whole model over the rootstock's, met within 2%; instead of groups",
    )
    search: SearchSpec = SearchSpec()
    finetune_from: Literal["scions", "search"] = Field(
        "scions", description="scions: the rootstock and distilled scions; search: what the search trained, LoRA merged"
    )

    @field_validator("groups", mode="before")
    @classmethod
    def _size_or_groups(cls, groups: Any) -> Any:
        if not is_integer(groups) and not (isinstance(groups, list | tuple) and all(map(are_integers, groups))):
            refuse([], groups, "how many blocks a group has, or a list of groups, as in [[0, 1], [2, 3]]")
        if not is_integer(groups) and sum(map(len, groups)) > MAX_DEPTH:
            refuse([], groups, f"groups of at most {MAX_DEPTH} blocks in all")
        return groups

    @field_validator("keep", mode="before")
    @classmethod
    def _number_or_numbers(cls, keep: Any) -> Any:
        if not is_integer(keep) and not are_integers(keep):
            refuse([], keep, "how many originals stay in each group, or a list with a number for each, as in [1, 2]")
        if not is_integer(keep) and len(keep) > MAX_DEPTH:
            refuse([], keep, f"numbers for at most {MAX_DEPTH} groups")
        return keep

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.budget is None and self.operators:
            refuse(["operators"], [one.kind for one in self.operators], "a budget beside it, or none")
        for field in ("groups", "keep"):
            if self.budget is not None and field in self.model_fields_set:
                refuse([field], getattr(self, field), "groups or a budget, not both")
        for field in ("ratio", "count"):
            if getattr(self, field) is not None and (self.budget is not None or "keep" in self.model_fields_set):
                other = "keep" if self.budget is None else "a budget"
                refuse([field], getattr(self, field), f"a {field} or {other}, not both")
        if isinstance(self.groups, int):
            if self.groups < 1:
                refuse(["groups"], self.groups, "at least 1 block a group, or a list of groups")
            return self
        for position, group in enumerate(self.groups):
            if not group or list(group) != list(range(group[0], group[0] + len(group))):
                refuse(["groups", position], list(group), "consecutive blocks")
        return self

    @property
    def pins(self) -> tuple[int, ...]:
        """With a budget: blocks that stay."""
        return self.pinned or ()

    def grouped(self, depth: int) -> tuple[Group, ...]:
        """The groups of a model; `misfit` says whether they are in order."""
        blocks = (
            tuple(tuple(range(start, min(start + self.groups, depth))) for start in range(0, depth, self.groups))
            if isinstance(self.groups, int)
            else self.groups
        )
        return tuple(
            Group(blocks=group, keep=keep, pinned=self._pinned(group, keep))
            for group, keep in zip(blocks, self._keeps(blocks, depth), strict=False)
        )

    def _keeps(self, blocks: tuple[tuple[int, ...], ...], depth: int) -> tuple[int, ...]:
        if self.ratio is None and self.count is None:
            return self.keep if isinstance(self.keep, tuple) else (self.keep,) * len(blocks)
        share, ends = self.share(depth), [0, *accumulate(map(len, blocks))]
        return tuple(end - start - (int(end * share) - int(start * share)) for start, end in pairwise(ends))

    def _pinned(self, group: tuple[int, ...], keep: int) -> tuple[int, ...]:
        if self.pinned is None:
            return group[: min(1, keep)]
        return tuple(block for block in group if block in self.pinned)

    def number(self, depth: int) -> int:
        if self.budget is not None:
            return len(self.candidates(depth))
        return sum(len(group.blocks) - group.keep for group in self.grouped(depth))

    def misfit(self, depth: int) -> tuple[str, object, str] | None:
        return next(self._misfits(depth), None)

    def _misfits(self, depth: int) -> Iterator[tuple[str, object, str]]:
        if (self.ratio or self.count) and (shared := super().misfit(depth)):
            yield shared
            return
        if self.budget is None:
            yield from self._group_misfits(depth)
        for block in self.pinned or ():
            if not 0 <= block < depth:
                yield "pinned", block, f"a block of this model, 0 .. {depth - 1}"
        if not self.number(depth):
            yield "keep", self.keep, "a number that leaves something to replace"

    def _group_misfits(self, depth: int) -> Iterator[tuple[str, object, str]]:
        count = -(-depth // self.groups) if isinstance(self.groups, int) else len(self.groups)
        if isinstance(self.keep, tuple) and len(self.keep) != count:
            yield "keep", list(self.keep), f"one number, or one for each of {count} groups"
        covered = sorted(block for group in self.grouped(depth) for block in group.blocks)
        if covered != list(range(depth)):
            yield "groups", self.groups, f"groups that cover each of the blocks 0 .. {depth - 1} once"
        for group in self.grouped(depth):
            if not 0 <= group.keep <= len(group.blocks):
                yield "keep", group.keep, f"0 .. {len(group.blocks)}, the blocks of the group {list(group.blocks)}"
            if len(group.pinned) > group.keep:
                yield "pinned", list(group.pinned), f"at most {group.keep} of {list(group.blocks)}, as many as stay"

    def candidates(self, depth: int) -> tuple[int, ...]:
        """Blocks that some mask replaces: all but the pinned, in groups that do not keep all."""
        if self.budget is not None:
            return tuple(block for block in range(depth) if block not in self.pins)
        return tuple(
            block
            for group in self.grouped(depth)
            if group.keep < len(group.blocks)
            for block in group.blocks
            if block not in group.pinned
        )

    def reason(self) -> str:
        return "learned by gates"


class Group(Spec):
    """Consecutive blocks of which `keep` originals stay, the pinned ones among them."""

    blocks: tuple[int, ...]
    keep: int
    pinned: tuple[int, ...]


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
    | LearnedLayers,
    Field(discriminator="kind"),
]
