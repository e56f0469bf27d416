"""Plans of the same cost as another: its operators, as many of each, in the first blocks, the last, some evenly or any.

Blocks are all of one shape, so what such a plan costs is the same to the FLOP and parameter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch

from graftwork.models.numerics.streams import generator
from graftwork.specs.edits import Edit
from graftwork.stages.catalog.trial import RANDOM_PLANS, STATIC_PLANS

Pick = Callable[[Sequence[int], int], list[int]]  # of some blocks, so many


def baselines(
    plan: Collection[Edit], candidates: Collection[Edit], seed: int
) -> Iterator[tuple[str, list[Edit] | None]]:
    """Yield names and plans; None for one that the candidates do not allow."""
    static: Mapping[str, Pick] = {"first": _first, "last": _last, "interleaved": _interleaved}
    for name in STATIC_PLANS:
        yield name, laid_out(plan, candidates, static[name])
    for number in range(1, 1 + RANDOM_PLANS):
        yield f"random {number}", laid_out(plan, candidates, _random(seed, number))


def laid_out(plan: Collection[Edit], candidates: Collection[Edit], pick: Pick) -> list[Edit] | None:
    """Return the plan's operators in other blocks; None if the candidates do not have them all there.

    Pairs take their blocks first, and each target's operators come in an even mixture.
    """
    offered = {(edit.site.target, edit.site.block, edit.operator): edit for edit in candidates}
    taken: set[int] = set()  # blocks of pairs
    made: list[Edit] = []
    for target in ("pair", "mha", "mlp"):
        operators = _mixed([edit for edit in plan if edit.site.target == target])
        blocks = sorted({edit.site.block for edit in candidates if edit.site.target == target} - taken)
        if target == "pair":
            blocks = _apart(blocks)
        if len(blocks) < len(operators):
            return None
        for block, operator in zip(sorted(pick(blocks, len(operators))), operators, strict=True):
            edit = offered.get((target, block, operator.operator))
            if edit is None:
                return None
            made.append(edit)
            taken |= {place.block for place in edit.places} if target == "pair" else set()
    return made


def _apart(firsts: Sequence[int]) -> list[int]:
    """Return the first blocks of pairs that have no block in common, beginning with the first pair."""
    chosen: list[int] = []
    for first in firsts:
        if not chosen or first > chosen[-1] + 1:
            chosen.append(first)
    return chosen


def _mixed(edits: Sequence[Edit]) -> list[Edit]:
    """Return one edit for each, those of an operator spread evenly over the whole."""
    counts = Counter(edit.operator for edit in edits)
    examples = {edit.operator: edit for edit in edits}
    places = [
        ((number + 0.5) / count, order, operator)
        for order, (operator, count) in enumerate(counts.items())
        for number in range(count)
    ]
    return [examples[operator] for _, _, operator in sorted(places, key=lambda place: place[:2])]


def _first(blocks: Sequence[int], count: int) -> list[int]:
    return [*blocks[:count]]


def _last(blocks: Sequence[int], count: int) -> list[int]:
    return [*blocks[len(blocks) - count :]]


def _interleaved(blocks: Sequence[int], count: int) -> list[int]:
    size = len(blocks)
    return [block for i, block in enumerate(blocks) if (i + 1) * count // size > i * count // size]


def _random(seed: int, number: int) -> Pick:
    source = generator(seed, "trial", number)

    def pick(blocks: Sequence[int], count: int) -> list[int]:
        order = torch.randperm(len(blocks), generator=source).tolist()
        return [blocks[place] for place in order[:count]]

    return pick
