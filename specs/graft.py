"""Edits: what a person asks for (`EditSpec`), and what it comes to, site by site (`Edit`)."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from specs.fields import Spec, refuse
from specs.layers import Layers
from specs.operators import Operator, Target


class Site(Spec):
    """A place where an operator can be replaced."""

    block: int = Field(ge=0)
    target: Target

    def __str__(self) -> str:
        return f"{self.block:02d}.{self.target}"


class Edit(Spec):
    """One scion in one site."""

    site: Site
    operator: Operator


class EditSpec(Spec):
    """Replace the operators at `target` by `operator`, in the blocks that `layers` chooses."""

    target: Target
    operator: Operator
    layers: Layers

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.target not in self.operator.targets:
            refuse(["operator", "kind"], self.operator.kind, f"an operator for {self.target}")
        return self

    def edits(self, depth: int) -> tuple[Edit, ...]:
        """The edit of each chosen block, in order."""
        return tuple(
            Edit(site=Site(block=block, target=self.target), operator=self.operator)
            for block in self.layers.choose(depth)
        )
