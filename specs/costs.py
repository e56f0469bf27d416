"""What a model costs, by formula, before anything exists: parameters, and FLOPs of one forward pass of one sample.

FLOPs are those of matrix products and convolutions, a multiply-add counting as two. A rootstock's formulas are its
family's. A test holds them to what torch counts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Protocol

from graftwork.specs.edits import Edit, Site
from graftwork.specs.operators import Mha, Mlp, OperatorSpec, Place, linear_parameters

FREQUENCIES = 256  # sinusoids that describe a timestep
ORIGINALS: dict[str, OperatorSpec] = {"mha": Mha(), "mlp": Mlp(ratio=4)}


@dataclass(frozen=True)
class Cost:
    """Parameters, and FLOPs of a forward pass of one sample."""

    params: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.flops + other.flops)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.params - other.params, self.flops - other.flops)


NOTHING = Cost(0, 0)


def operator_cost(operator: OperatorSpec, place: Place) -> Cost:
    return Cost(operator.num_parameters(place), operator.flops(place))


class Shape(Protocol):
    """What a rootstock's cost depends on beside its place: a spec has it, and so has the config of a model."""

    @property
    def formulas(self) -> Formulas: ...
    @property
    def depth(self) -> int: ...
    @property
    def patch(self) -> int: ...
    @property
    def learn_sigma(self) -> bool: ...


class Formulas(ABC):
    """What the parts of a family's models cost. The family's spec has its formulas, and so has its config."""

    @abstractmethod
    def embedding(self, model: Shape, place: Place, channels: int, num_classes: int) -> Cost:
        """Return the cost of what stands before the first block."""

    @abstractmethod
    def block(self, model: Shape, place: Place) -> Cost:
        """Return the cost of one block, with the operators that it has of its own."""

    @abstractmethod
    def final(self, model: Shape, place: Place, channels: int) -> Cost:
        """Return the cost of what stands behind the last block."""


class DitFormulas(Formulas):
    """Of a DiT (arXiv 2212.09748), and of whatever has its network."""

    def embedding(self, model: Shape, place: Place, channels: int, num_classes: int) -> Cost:
        """Return the cost of embedding patches, timestep and label."""
        width, patch = place.width, model.patch**2
        return Cost(
            linear_parameters(channels * patch, width)
            + linear_parameters(FREQUENCIES, width)
            + linear_parameters(width, width)
            + (num_classes + 1) * width,
            2 * place.num_tokens * channels * patch * width + 2 * (FREQUENCIES + width) * width,
        )

    def block(self, model: Shape, place: Place) -> Cost:
        """Return the cost of both operators and the modulation."""
        width = place.width
        modulation = Cost(linear_parameters(width, 6 * width), 12 * width**2)
        return sum((operator_cost(operator, place) for operator in ORIGINALS.values()), modulation)

    def final(self, model: Shape, place: Place, channels: int) -> Cost:
        """Return the cost of the last modulation and projection."""
        width, out = place.width, model.patch**2 * channels * (2 if model.learn_sigma else 1)
        return Cost(
            linear_parameters(width, out) + linear_parameters(width, 2 * width),
            2 * place.num_tokens * width * out + 4 * width**2,
        )


DIT = DitFormulas()


class PixartFormulas(Formulas):
    """Of a PixArt-Sigma (arXiv 2403.04692): one modulation for all blocks, and a cross-attention in each."""

    def embedding(self, model: Shape, place: Place, channels: int, num_classes: int) -> Cost:
        """Return the cost of embedding patches, timestep and text, and of the shared modulation."""
        width, patch = place.width, model.patch**2
        tokens, channels_in = _text_of(model)
        return Cost(
            linear_parameters(channels * patch, width)
            + linear_parameters(FREQUENCIES, width)
            + linear_parameters(width, width)
            + linear_parameters(width, 6 * width)
            + linear_parameters(channels_in, width)
            + linear_parameters(width, width),
            2 * place.num_tokens * channels * patch * width
            + 2 * (FREQUENCIES + width + 6 * width) * width
            + 2 * tokens * (channels_in + width) * width,
        )

    def block(self, model: Shape, place: Place) -> Cost:
        """Return the cost of both operators, the cross-attention and the table of modulations."""
        width, tokens, (text, _) = place.width, place.num_tokens, _text_of(model)
        cross = Cost(
            2 * linear_parameters(width, width) + linear_parameters(width, 2 * width) + 6 * width,
            4 * tokens * width**2 + 4 * text * width**2 + 4 * tokens * text * width,
        )
        return sum((operator_cost(operator, place) for operator in ORIGINALS.values()), cross)

    def final(self, model: Shape, place: Place, channels: int) -> Cost:
        """Return the cost of the last projection, and its table."""
        width, out = place.width, model.patch**2 * channels * (2 if model.learn_sigma else 1)
        return Cost(linear_parameters(width, out) + 2 * width, 2 * place.num_tokens * width * out)


def _text_of(model: Shape) -> tuple[int, int]:
    """Return the tokens of a text, and the channels of each; those of the released models where it does not say."""
    return getattr(model, "text_tokens", 300), getattr(model, "caption_channels", 4096)


def rootstock_cost(model: Shape, place: Place, channels: int, num_classes: int) -> Cost:
    """Return the cost of a model for latents of `channels` channels, with its own operators in every block."""
    outside = embedding_cost(model, place, channels, num_classes) + model.formulas.final(model, place, channels)
    return sum((block_cost(place, model) for _ in range(model.depth)), outside)


def embedding_cost(model: Shape, place: Place, channels: int, num_classes: int) -> Cost:
    """Return the cost of what stands before the first block."""
    return model.formulas.embedding(model, place, channels, num_classes)


def block_cost(place: Place, model: Shape) -> Cost:
    """Return the cost of one of the model's blocks, with its own operators."""
    return model.formulas.block(model, place)


@dataclass(frozen=True)
class GraftCost:
    """What a graft costs beside its rootstock."""

    rootstock: Cost
    graft: Cost
    replaced: Cost  # the operators that the edits take out
    scions: Cost  # what they put in; of a parallel block the merging projection, which replaces nothing


def graft_cost(rootstock: Cost, edits: Iterable[Edit], place: Place, carried: Iterable[Edit] = ()) -> GraftCost:
    """The cost of `rootstock` with `edits`; `carried` are the edits that its weights come with."""
    standing: dict[Site, Cost] = {}
    for edit in carried:
        cost = scion_cost(edit, place)
        rootstock += cost - _original(edit, place)
        standing[edit.site] = cost
    replaced = scions = NOTHING
    for edit in edits:
        replaced += standing.get(edit.site, _original(edit, place))
        scions += scion_cost(edit, place)
    return GraftCost(rootstock, rootstock + scions - replaced, replaced, scions)


BUDGET_TOLERANCE = 0.02  # by which a model's FLOPs may miss a budget, either way


PARTS = 2**20  # that the range of the totals is told apart in, where they are not multiples of some cost


def reachable(
    rootstock: Cost, original: Cost, options: Sequence[Cost], sites: int, wanted: float
) -> tuple[int, int, int]:
    """Return FLOPs of models in which each of some like sites has its original or an option: least, most, and nearest
    to `wanted`.

    Sums of subsets, as bits of a number: options that cost 2 and 3 units more, at two sites, come to 0, 2, 3, 4, 5 and
    6 units, which is 0b1111101. One more site shifts the number by each option's units, and all of these are joined.
    """
    changes = [0, *(option.flops - original.flops for option in options)]
    low, high = min(changes), max(changes)
    least, most = rootstock.flops + sites * low, rootstock.flops + sites * high
    unit = max(math.gcd(*(change - low for change in changes)), (most - least) // PARTS, 1)
    steps = {round((change - low) / unit) for change in changes}
    sums = 1  # bit i: whether the sites can come to i units above the least
    for _ in range(sites):
        sums = reduce(or_, (sums << step for step in steps))
    place = min(max(round((wanted - least) / unit), 0), sums.bit_length() - 1)
    totals = (least + bit * unit for bit in nearest_set_bits(sums, place))
    return least, most, min(totals, key=lambda total: abs(total - wanted))


def nearest_set_bits(bits: int, place: int) -> tuple[int, int]:
    """Return the last set bit at or below a place, and the first at or above it.

    Of 0b1001001, whose bits 0, 3 and 6 are set, (3, 6) for place 4 and (3, 3) for place 3. Bit 0 and some bit at or
    above the place must be set.
    """
    below = (bits & ((2 << place) - 1)).bit_length() - 1
    rest = bits >> place
    return below, place + (rest & -rest).bit_length() - 1


def scion_cost(edit: Edit, place: Place) -> Cost:
    """What the scion costs; of a parallel block, the merging projection, since its branches were there before."""
    if isinstance(edit.operator, OperatorSpec):
        return operator_cost(edit.operator, place)
    return Cost(linear_parameters(2 * place.width, place.width), 4 * place.num_tokens * place.width**2)


def learns(edit: Edit, place: Place) -> bool:
    """Return whether a scion is trained in stage 1: whether it has parameters, and they do not come from elsewhere."""
    return edit.scions is None and scion_cost(edit, place).params > 0


def _original(edit: Edit, place: Place) -> Cost:
    return operator_cost(ORIGINALS[edit.site.target], place) if edit.site.target in ORIGINALS else NOTHING
