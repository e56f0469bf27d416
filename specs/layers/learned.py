"""The strategy whose gates learn, under a budget or group by group, which blocks to replace."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from graftwork.specs.fields import Spec, are_integers, is_integer, refuse
from graftwork.specs.layers.strategy import MAX_DEPTH, Share
from graftwork.specs.operators import Operator
from graftwork.specs.training import SearchSpec


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
