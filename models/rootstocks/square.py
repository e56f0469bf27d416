"""Configs of families whose latents are squares, cut into square patches: a DiT's, and those of its relatives."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from graftwork.models.rootstocks import RootstockConfig
from graftwork.models.rootstocks.layers import OUTPUT, PATCHES, POSITIONS
from graftwork.specs.operators import Place

Sizes = Mapping[str, tuple[int, int, int]]  # published ones, by letter: depth, width, heads


class Shape(TypedDict):
    """What the tensors of every such family tell of its config."""

    input_size: int
    in_channels: int
    patch: int
    depth: int
    width: int
    heads: int
    learn_sigma: bool


@dataclass(frozen=True, kw_only=True)
class SquareConfig(RootstockConfig):
    """What such families have in common."""

    input_size: int  # S, latent pixels a side
    in_channels: int  # C
    patch: int
    depth: int
    width: int
    heads: int
    num_classes: int  # 0 of a family without classes
    learn_sigma: bool = True

    def shape_misfit(self) -> str | None:
        """Return which of its sizes do not go together; None if there can be such a model."""
        misfits = (
            (self.width % self.heads, f"{self.heads} attention heads do not divide its width, {self.width}"),
            (self.width % 4, f"width: {self.width}, expected a multiple of 4, for the 2-D position embedding"),
            (
                self.input_size % self.patch,
                f"input_size: {self.input_size}, expected a multiple of patch, {self.patch}",
            ),
        )
        return next((problem for wrong, problem in misfits if wrong), None)

    def letter(self, sizes: Sizes) -> str | None:
        """Return the letter of its published size, if it has one of these."""
        size = (self.depth, self.width, self.heads)
        return next((letter for letter, published in sizes.items() if published == size), None)

    @property
    def side(self) -> int:
        """Tokens a side."""
        return self.input_size // self.patch

    @property
    def num_tokens(self) -> int:
        return self.side**2

    @property
    def place(self) -> Place:
        return Place(self.width, self.heads, self.num_tokens)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one latent: (C,S,S)."""
        return (self.in_channels, self.input_size, self.input_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return (self.side, self.side)


def square(shape: Sequence[int]) -> tuple[int, int]:
    """Return the channels and the side of latents (C,S,S). Raise ValueError if they are not square."""
    channels, *sides = shape
    if len(sides) != 2 or sides[0] != sides[1]:
        raise ValueError(f"latents: got the shape {tuple(shape)}; accepted: (channels, side, side)")
    return channels, sides[0]


def asked_shape(model: Any, shape: Sequence[int]) -> Shape:
    """Return what a spec says of a model for latents (C,S,S). Raise ValueError if they are not square."""
    channels, side = square(shape)
    return Shape(
        input_size=side,
        in_channels=channels,
        patch=model.patch,
        depth=model.depth,
        width=model.width,
        heads=model.heads,
        learn_sigma=model.learn_sigma,
    )


def shape_of(shapes: Mapping[str, Sequence[int]], heads: int | None, sizes: Sizes) -> Shape:
    """Return what tensors' shapes tell. Heads cannot be seen: if they are not given, they are the published size's.

    Raise ValueError if there is no such size, or if the tokens are no square.
    """
    width, channels, patch, _ = shapes[PATCHES]
    blocks = [int(number[1]) for name in shapes if (number := re.match(r"blocks\.(\d+)\.", name))]
    depth, positions = 1 + max(blocks, default=-1), shapes.get(POSITIONS)
    if positions is None:
        raise ValueError(f"{POSITIONS}: missing, which tells the size of its images")
    side = math.isqrt(positions[1]) if len(positions) == 3 else -1
    if side < 0 or side**2 != positions[1]:
        raise ValueError(f"{POSITIONS}: {positions}, expected a square number of tokens")
    if heads is None:
        heads = next((size[2] for size in sizes.values() if size[:2] == (depth, width)), None)
    if heads is None:
        raise ValueError(
            f"{depth} blocks of width {width} are no published size, and a file does not tell its attention "
            "heads: name their number"
        )
    return Shape(
        input_size=side * patch,
        in_channels=channels,
        patch=patch,
        depth=depth,
        width=width,
        heads=heads,
        learn_sigma=shapes[f"{OUTPUT}.weight"][0] == 2 * channels * patch**2,
    )
