"""One's own classes on a checkpoint of others: which row of its label table each class begins with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from graftwork.models.checkpoints.errors import UnfitCheckpoint
from graftwork.models.checkpoints.files import Tensors
from graftwork.models.numerics.streams import generator
from graftwork.models.rootstocks import CONFIGS

FRESH_STD = 0.02  # of a row that is learned anew, as DiT's are at the start


@dataclass(frozen=True)
class Labels:
    """Rows of a job's label table: by class, the number of the checkpoint's row, or None for a fresh one.

    A fresh row is drawn from a stream of the job's seed and the class's name: it stays when classes are added.
    """

    names: tuple[str, ...]
    rows: tuple[int | None, ...]
    seed: int


def label_table(names: Collection[str]) -> str | None:
    """Return which of the tensors is a label table, by what the families say; None if none is."""
    return next((table for config in CONFIGS.values() if (table := config.files.label_table) in names), None)


def num_classes(tensors: Tensors) -> int | None:
    """Return how many classes a checkpoint's label table has beside the null class; None if it has no such table."""
    shape = tensors.shapes.get(label_table(tensors.shapes) or "", ())
    return shape[0] - 1 if len(shape) == 2 and shape[0] > 1 else None


def relabelled(tensors: Tensors, labels: Labels, trained: int | None) -> Tensors:
    """Return the tensors with a label table for the classes of a job; the null class keeps its row, the last.

    trained: how many classes the checkpoint says it was trained on, if it does.
    """
    count, table = num_classes(tensors), label_table(tensors.shapes)
    if count is None or table is None:
        return tensors  # of no family with labels, as is said where it is recognised
    if trained == count + 1:
        raise UnfitCheckpoint(
            f"{tensors.source}: {table} has a row for each of its {trained:,} classes, and none for the null class"
        )
    for name, row in zip(labels.names, labels.rows, strict=True):
        if row is not None and row >= count:
            raise UnfitCheckpoint(
                f"{tensors.source}: has {count:,} classes, so no row {row:,} for the class {name!r}",
                f"weights.classes with rows from 0 to {count - 1:,}",
            )
    shapes = {**tensors.shapes, table: (len(labels.rows) + 1, tensors.shapes[table][1])}

    def get(name: str) -> torch.Tensor:
        value = tensors.get(name)
        return _table(value, labels) if name == table else value

    return Tensors(tensors.source, shapes, get, tensors.odd, tensors.metadata)


def _table(theirs: torch.Tensor, labels: Labels) -> torch.Tensor:
    """Return the rows (classes + 1, D) of a job's label table, from those of the checkpoint."""
    width = theirs.shape[1]
    rows = [
        FRESH_STD * torch.randn(width, generator=generator(labels.seed, "base", "class", name))
        if row is None
        else theirs[row].float()
        for name, row in zip(labels.names, labels.rows, strict=True)
    ]
    return torch.stack([*rows, theirs[-1].float()])
