"""Edits: what a person asks for (`OperatorEdits`, `ParallelEdits`), and what it comes to, site by site (`Edit`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from graftwork.specs.fields import Spec, Unkeyed, WeightsPath, are_integers, refuse
from graftwork.specs.layers.learned import LearnedLayers
from graftwork.specs.layers.solved import SolvedLayers
from graftwork.specs.layers.union import Layers
from graftwork.specs.operators import Operator, Target


class Site(Spec):
    """A place that an edit changes: an operator of a block, or a block and the one after it."""

    block: int = Field(ge=0)
    target: Target | Literal["pair"]

    def __str__(self) -> str:
        return f"{self.block:02d}.{self.target}"


class Parallel(Spec):
    """Two consecutive blocks that read the same input; a learned projection merges what they add to it."""

    kind: Literal["parallel"] = "parallel"


class Edit(Spec):
    """One scion in one site."""

    site: Site
    operator: Annotated[Operator | Parallel, Field(discriminator="kind")]
    option: Annotated[int, Unkeyed()] = 0  # where several operators may stand in a site: which of them
    scions: Annotated[str | None, Unkeyed()] = None  # as in OperatorEdits; the file's content is in the key

    @property
    def places(self) -> frozenset[Site]:
        """The sites within blocks that it fills; a pair fills all of its two blocks."""
        if self.site.target != "pair":
            return frozenset({self.site})
        blocks = (self.site.block, self.site.block + 1)
        return frozenset(Site(block=block, target=target) for block in blocks for target in get_args(Target))

    @property
    def name(self) -> str:
        """Of the site, and of the option where there are several."""
        return f"{self.site}.{self.option}" if self.option else str(self.site)

    def sort_key(self) -> tuple[bool, int, str]:
        """Pairs come last: they take in blocks that carry other scions."""
        return self.site.target == "pair", self.site.block, self.site.target


def overlapping(before: Iterable[Edit], after: Iterable[Edit]) -> str | None:
    """Which pair of `after` takes a block that a pair of `before` has; None where none does."""
    taken = {edit.site.block + offset for edit in before if edit.site.target == "pair" for offset in (0, 1)}
    for edit in after:
        if edit.site.target == "pair" and taken & {edit.site.block, edit.site.block + 1}:
            return str(edit.site)
    return None


def numbered(rules: Iterable[Sequence[Edit]]) -> tuple[tuple[Edit, ...], ...]:
    """Return the edits of each rule, those that may stand in one site as its options 0, 1, .."""
    counts = Counter[Site]()

    def option(edit: Edit) -> Edit:
        counts[edit.site] += 1
        return edit.model_copy(update={"option": counts[edit.site] - 1})

    return tuple(tuple(map(option, rule)) for rule in rules)


class OperatorEdits(Spec):
    """Replace the operators at `target` by `operator`, in the blocks that `layers` chooses."""

    kind: Literal["replace"] = "replace"
    target: Target
    operator: Operator
    layers: Layers
    scions: Annotated[WeightsPath | None, Unkeyed()] = Field(
        None,
        description="a graft to take the scions from, instead of distilling them: a file, a folder or a hub id",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.target not in self.operator.targets:
            refuse(["operator", "kind"], self.operator.kind, f"an operator for {self.target}")
        if self.scions is not None and len(self.operators()) > 1:
            refuse(["scions"], self.scions, "nothing, where a site chooses among several operators")
        for position, operator in enumerate(self.operators()[1:]):
            if self.target not in operator.targets:
                refuse(["layers", "operators", position, "kind"], operator.kind, f"an operator for {self.target}")
        return self

    def edits(self, depth: int) -> tuple[Edit, ...]:
        """The edit of each block that may be chosen, in order."""
        return tuple(
            Edit(site=Site(block=block, target=self.target), operator=operator, option=option, scions=self.scions)
            for block in self.layers.candidates(depth)
            for option, operator in enumerate(self.operators())
        )

    def operators(self) -> tuple[Operator, ...]:
        """What may stand in a site, beside the original."""
        return (self.operator, *(self.layers.operators if isinstance(self.layers, LearnedLayers) else ()))

    def number(self, depth: int) -> int:
        """How many sites are edited; with a budget, at most."""
        return self.layers.number(depth)


class ParallelEdits(Spec):
    """Depth to width (arXiv 2506.05340): the two blocks of a pair become one parallel block."""

    kind: Literal["parallel"] = "parallel"
    pairs: Literal["all", "any"] | tuple[tuple[int, int], ...] = Field(
        "all",
        description="all: [0, 1], [2, 3], ..; or a list of pairs of consecutive blocks. Where they are solved for, "
        "also any: [0, 1], [1, 2], ..; and a listed block may be in two pairs, of which one at most is made",
    )
    layers: SolvedLayers | None = Field(None, description="{kind: solved}: which pairs are made; by default all are")

    @field_validator("pairs", mode="before")
    @classmethod
    def _all_or_pairs(cls, pairs: Any) -> Any:
        listed = isinstance(pairs, list | tuple) and all(are_integers(pair) and len(pair) == 2 for pair in pairs)
        if pairs not in ("all", "any") and not listed:
            refuse([], pairs, "all, or a list of pairs, as in [[0, 1], [4, 5]]")
        return pairs

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.layers is not None and self.layers.blocks is not None:
            refuse(["layers", "blocks"], list(self.layers.blocks), "nothing: pairs says what may be chosen")
        if self.pairs == "any" and self.layers is None:
            refuse(["pairs"], "any", "all or a list, since all of them are made; any with layers: {kind: solved}")
        if isinstance(self.pairs, str):
            return self
        blocks: set[int] = set()
        for position, pair in enumerate(self.pairs):
            if pair[0] < 0 or pair[1] != pair[0] + 1:
                refuse(["pairs", position], list(pair), "two consecutive blocks, as in [4, 5]")
            if pair in self.pairs[:position] or (blocks & set(pair) and self.layers is None):
                refuse(["pairs", position], list(pair), "each block in one pair only")
            blocks |= set(pair)
        if not self.pairs:
            refuse(["pairs"], [], "all, or at least one pair")
        return self

    def edits(self, depth: int) -> tuple[Edit, ...]:
        if isinstance(self.pairs, str):
            firsts: Iterable[int] = range(0, depth - 1, 2 if self.pairs == "all" else 1)
        else:
            firsts = sorted(first for first, _ in self.pairs)
        return tuple(Edit(site=Site(block=first, target="pair"), operator=Parallel()) for first in firsts)

    def number(self, depth: int) -> int:
        return len(self.edits(depth))


def _kind(value: Any) -> str:
    """`kind` may be left out of the common case."""
    kind = value.get("kind", "replace") if isinstance(value, dict) else getattr(value, "kind", "replace")
    return str(kind)


EditSpec = Annotated[
    Annotated[OperatorEdits, Tag("replace")] | Annotated[ParallelEdits, Tag("parallel")], Discriminator(_kind)
]
