"""Tensors of another layout under a family's own names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from graftwork.models.checkpoints.files import Made, Tensors


def translated(
    tensors: Tensors, names: Mapping[str, Sequence[str]], left_out: Collection[str], made: Mapping[str, Made]
) -> Tensors:
    """Return tensors under other names, and those that are computed beside them.

    names: new name -> the tensors here that it is made of, row upon row. A tensor that none of the names has, or whose
    parts are not all there or differ in shape, keeps its own name, to be found unfit; but for what is `left_out`.
    """
    shapes = tensors.shapes
    whole = {
        new: several
        for new, several in names.items()
        if (first := shapes.get(several[0])) and all(shapes.get(old) == first for old in several)
    }
    known = {old for several in whole.values() for old in several}.union(left_out)
    return tensors.joined({**whole, **{name: [name] for name in shapes if name not in known}}, made)


def split(state: Mapping[str, Tensor], names: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """Return the tensors that a family's are made of: the other way round, as copies."""
    return {
        name: rows.clone()
        for ours, made_of in names.items()
        for name, rows in zip(made_of, state[ours].chunk(len(made_of)), strict=True)
    }
